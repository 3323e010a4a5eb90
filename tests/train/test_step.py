"""The pair against two updates written by hand."""

from __future__ import annotations

import math

import pytest
import tiny_run
import torch

from megarat.engine import Engine
from megarat.model import names
from megarat.train.step import sparse_patterns, train_pair

LR = 1e-2


def test_a_pair_is_a_sparse_update_then_a_dense_one_on_the_same_tokens(mesh):
    settings = tiny_run.config()
    batches = tiny_run.micro_batches(2)
    model = tiny_run.model(settings)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = []
    for patterns in (settings.sparse_patterns, settings.patterns):
        adamw.zero_grad()
        loss = sum(model(ids, patterns, labels) for ids, labels in batches) / 2
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip)
        adamw.step()
        expected.append((loss.item(), norm.item()))

    engine = Engine(tiny_run.model(settings), settings, mesh)
    result = train_pair(engine, batches, settings.sparse_patterns, settings.patterns, LR)
    assert result.finite
    for update, (loss, norm) in zip((result.sparse, result.dense), expected, strict=True):
        assert update.loss == pytest.approx(loss, rel=1e-6)
        assert update.grad_norm == pytest.approx(norm, rel=2e-6)
    state, steps = engine.named_state()
    assert steps == 2
    for name, parameter in model.named_parameters():
        for logical, weight in names.split(name, parameter.detach()).items():
            torch.testing.assert_close(state["master"][logical], weight, rtol=1e-5, atol=3e-7)


def test_the_two_passes_differ(mesh):
    """Otherwise the test above could not tell sparse from dense."""
    settings = tiny_run.config()
    ids, labels = tiny_run.micro_batches(1)[0]
    model = tiny_run.model(settings)
    sparse, dense = (model(ids, patterns, labels).item() for patterns in (settings.sparse_patterns, settings.patterns))
    assert abs(sparse - dense) > 1e-4


def test_without_a_sparse_pattern_there_is_one_update(mesh):
    settings = tiny_run.config(attention={"train_dilation": 1})
    assert settings.sparse_patterns is None
    engine = Engine(tiny_run.model(settings), settings, mesh)
    result = train_pair(engine, tiny_run.micro_batches(2), settings.sparse_patterns, settings.patterns, LR)
    assert result.sparse is None and result.finite
    assert engine.named_state()[1] == 1


def test_a_bad_sparse_update_ends_the_pair_and_leaves_the_weights(mesh, monkeypatch):
    settings = tiny_run.config()
    engine = Engine(tiny_run.model(settings), settings, mesh)
    before, _ = engine.named_state()
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)
    result = train_pair(engine, tiny_run.micro_batches(2), settings.sparse_patterns, settings.patterns, LR)
    assert not result.finite and result.dense is None
    after, steps = engine.named_state()
    assert steps == 0
    assert all(torch.equal(before["master"][name], after["master"][name]) for name in before["master"])


def test_summed_passes_make_one_update_by_the_sum_of_both_losses(mesh):
    settings = tiny_run.config(train={"recipe": "summed"})
    batches = tiny_run.micro_batches(2)
    model = tiny_run.model(settings)
    losses = [sum(model(ids, p, labels) for ids, labels in batches) / 2 for p in (settings.sparse_patterns, settings.patterns)]
    sum(losses).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip).item()

    engine = Engine(tiny_run.model(settings), settings, mesh)
    result = train_pair(engine, batches, settings.sparse_patterns, settings.patterns, LR, summed=True)
    assert result.made and engine.named_state()[1] == 1
    for update, loss in zip((result.sparse, result.dense), losses, strict=True):
        assert update.loss == pytest.approx(loss.item(), rel=1e-6)
        assert update.grad_norm == pytest.approx(norm, rel=2e-6)


@pytest.mark.parametrize("refused", ["sparse", "dense"])
def test_a_summed_update_is_refused_when_one_of_its_passes_is(mesh, refused):
    settings = tiny_run.config(train={"recipe": "summed"})
    engine = Engine(tiny_run.model(settings), settings, mesh)
    result = train_pair(
        engine,
        tiny_run.micro_batches(2),
        settings.sparse_patterns,
        settings.patterns,
        LR,
        lambda which, *_: which != refused,
        summed=True,
    )
    assert result.finite and not result.made and engine.named_state()[1] == 0


def test_the_sparse_pass_comes_every_so_many_pairs():
    settings = tiny_run.config(train={"sparse_every": 3})
    assert [sparse_patterns(settings, pair) is not None for pair in range(7)] == [True, False, False, True, False, False, True]
