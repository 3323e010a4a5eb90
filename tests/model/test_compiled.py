"""The compiled parts of a block against the model without them."""

from __future__ import annotations

import functools

import pytest
import tiny_run
import torch

from megarat.errors import UserError
from megarat.model import compiled


def gradients(compile_blocks: bool) -> tuple[list[float], list[torch.Tensor]]:
    settings = tiny_run.config()
    model = tiny_run.model(settings)
    for block in model.blocks:
        block.compiled = compile_blocks
    ids, labels = tiny_run.micro_batches(1)[0]
    losses = []
    for patterns in (settings.sparse_patterns, settings.patterns):
        loss = model(ids, patterns, labels)
        loss.backward()
        losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters()]


def assert_equal_to_rounding(found, wanted) -> None:
    """fp32, another order of sums over at most 64 terms in 2 layers: some 10 roundings of 2^-24 relative to a tensor's norm."""
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert (ours - theirs).norm() <= 5e-6 * theirs.norm()


def test_the_functions_compute_what_the_modules_do(monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda function: function)
    assert_equal_to_rounding(gradients(True), gradients(False))


def test_one_compiled_function_serves_all_layers_and_passes(monkeypatch):
    """Traced and differentiated as for the real compiler, whose code takes minutes on a busy CPU; tests/gpu runs that one."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    compiled.compiled.cache_clear()
    try:
        assert_equal_to_rounding(gradients(True), gradients(False))
    finally:
        compiled.compiled.cache_clear()
    assert (
        counters["stats"]["unique_graphs"] == 3
    )  # enter of the first layer (no branch yet), of the others, and the feed-forward network


@pytest.mark.parametrize(
    "change",
    [{"parallel": {"zero": 3}}, {"parallel": {"recompute": "selective"}}, {"train": {"fp8": True}, "model": {"hidden": 32}}],
)
def test_what_cannot_be_compiled_is_refused(change):
    train = {"compile": True, **change.pop("train", {})}
    with pytest.raises(UserError, match=r"train\.compile with (parallel\.zero|parallel\.recompute|train\.fp8)"):
        tiny_run.config(train=train, **change)
