from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megarat.config import Config, ModelConfig
from megarat.model import mixer
from megarat.model.flops import (
    forward_flops_per_token,
    pair_flops_per_token,
    parameter_count,
    peak_flops,
    training_flops_per_token,
    visible_pairs,
)
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Pattern, resolve
from megarat.ops import visible

PUBLISHED_1B = ModelConfig(layers=24, hidden=2048, heads=16)
PUBLISHED_3B = ModelConfig(layers=28, hidden=2560, heads=20)
PUBLISHED_7B = ModelConfig(layers=32, hidden=4096, heads=32)


@pytest.mark.parametrize(
    ("shape", "with_recurrence", "attention_only"),
    [
        (PUBLISHED_1B, 1_474_922_496, 1_374_259_200),
        (PUBLISHED_3B, 2_651_077_120, 2_467_576_320),
        (PUBLISHED_7B, 7_647_531_008, 7_110_660_096),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(shape, with_recurrence, attention_only):
    assert parameter_count(shape) == with_recurrence
    assert parameter_count(ModelConfig(**{**vars(shape), "recurrence": False})) == attention_only


@pytest.mark.parametrize("recurrence", [True, False])
def test_the_parameter_count_is_that_of_a_real_model(recurrence):
    shape = ModelConfig(layers=3, hidden=24, heads=2, vocab=37, ffn_multiple=3, recurrence=recurrence)
    assert parameter_count(shape) == sum(parameter.numel() for parameter in RATPlusLM(shape).parameters())


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(4), Pattern(16, 5, 3), Pattern(8, 0, 11), Pattern(-1, 7, 2), Pattern(3, 99, 99)]
)
def test_visible_pairs_count_the_mask(pattern):
    for length in (1, 7, 33, 64):
        positions = torch.arange(length)
        assert visible_pairs(pattern, length) == int(visible(positions, positions, pattern).sum())


def attend_visible_keys_only(q_BTHK, k_BTHK, v_BTHK, pattern, *, output_gate_BTHK, document_ids_BT=None):
    """Attention query by query with matrix products over exactly the visible keys, so that a counter sees no hidden pair."""
    length, heads = q_BTHK.shape[1:3]
    per_head = [pattern] * heads if isinstance(pattern, Pattern) else pattern
    out_BTHK = torch.empty_like(q_BTHK)
    positions = torch.arange(length)
    for head, one in enumerate(per_head):
        seen_TT = visible(positions, positions, one)
        for i in range(length):
            keys, values = k_BTHK[:, seen_TT[i], head], v_BTHK[:, seen_TT[i], head]
            scores = torch.bmm(q_BTHK[:, i : i + 1, head], keys.transpose(1, 2)) * q_BTHK.shape[-1] ** -0.5
            out_BTHK[:, i, head] = torch.bmm(scores.softmax(dim=-1), values)[:, 0]
    return out_BTHK * torch.sigmoid(output_gate_BTHK)


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize("spec", ["dense", "D=4", "D=5,W=3,I=2", "D=-1,W=4", [["D=2", "D=-1"], ["dense", "D=8,I=1"]]], ids=str)
def test_forward_flops_are_those_counted_while_a_model_runs(monkeypatch, spec, recurrence):
    shape = ModelConfig(layers=2, hidden=16, heads=2, vocab=37, ffn_multiple=3, recurrence=recurrence)
    model, length, batch = RATPlusLM(shape).initialise(0), 19, 2
    ids, patterns = torch.arange(batch * length).view(batch, length) % shape.vocab, resolve(spec, 2, 2)
    with torch.no_grad():
        expected = model(ids, patterns)
        monkeypatch.setattr(mixer, "dilated_attention", attend_visible_keys_only)
        with FlopCounterMode(display=False) as counter:
            logits = model(ids, patterns)
    torch.testing.assert_close(logits, expected)  # what was counted is the model
    assert counter.get_total_flops() == pytest.approx(
        forward_flops_per_token(shape, patterns, length) * batch * length, rel=1e-12
    )


def test_a_backward_costs_two_forwards(monkeypatch):
    monkeypatch.setattr(mixer, "dilated_attention", attend_visible_keys_only)
    shape = ModelConfig(layers=2, hidden=16, heads=2, vocab=37)
    model, patterns = RATPlusLM(shape).initialise(0), resolve("D=4", 2, 2)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(12)[None], patterns).sum().backward()
    assert counter.get_total_flops() == pytest.approx(training_flops_per_token(shape, patterns, 12) * 12, rel=1e-12)


def test_the_published_15b_recipe_costs_101_and_89_gflop_a_token():
    dense = training_flops_per_token(PUBLISHED_1B, resolve("dense", 24, 16), 4096)
    sparse = training_flops_per_token(PUBLISHED_1B, resolve("D=64", 24, 16), 4096)
    assert dense / 1e9 == pytest.approx(10.057, abs=5e-4)
    assert sparse / 1e9 == pytest.approx(8.868, abs=5e-4)


def test_a_pair_costs_both_passes_and_without_active_recurrence_learning_one():
    config = Config(model=PUBLISHED_1B)
    both = pair_flops_per_token(config)
    config.attention.train_dilation = 1
    assert both / 1e9 == pytest.approx(10.057 + 8.868, abs=1e-3)
    assert pair_flops_per_token(config) / 1e9 == pytest.approx(10.057, abs=5e-4)


def test_a_cpu_has_no_peak():
    assert peak_flops("cpu") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("Some GPU", None),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda") == peak
