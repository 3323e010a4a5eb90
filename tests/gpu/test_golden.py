"""The whole model through the Triton kernels: against the published code's numbers, and prefill + decode against the full forward."""

from __future__ import annotations

import re

import pytest
import torch

from megarat.infer.cache import SparseCache
from megarat.infer.forward import decode_step, prefill
from megarat.model.pattern import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PATTERNS = ["dense", "D=4", "D=64", "D=16,W=32,I=4", "D=-1,W=32,I=4", "D=8,W=3,I=17", [["D=2", "D=8,W=3,I=1"], ["dense", "D=16"]]]


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return float((ours - reference).norm() / reference.norm())


def spec_of(name: str) -> str | list[str]:
    dilations, window, initial = re.fullmatch(r"logits_D(-?\d+(?:-\d+)*)_W(\d+)_I(\d+)", name).groups()
    layers = [dilations] if dilations.startswith("-") else dilations.split("-")
    specs = [f"D={dilation},W={window},I={initial}" for dilation in layers]
    return specs[0] if len(specs) == 1 else specs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_the_published_ones(published, golden, dtype):
    ids = torch.from_numpy(golden["ids"][:1]).long().cuda()
    model = published.to("cuda", dtype)
    errors = {}
    for name in (name for name in golden if name.startswith("logits_")):
        with torch.no_grad():
            logits = model(ids, resolve(spec_of(name), model.config.layers, model.config.heads))
        errors[name] = relative_error(logits, torch.from_numpy(golden[name]))
    assert max(errors.values()) <= 1.5e-2, errors


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_prefill_and_decode_equal_the_full_forward(published, golden, pattern):
    """fp32 through the kernels; matrices run in full fp32, sums in another order than in the float64 forward on the CPU."""
    patterns = resolve(pattern, published.config.layers, published.config.heads)
    ids = torch.from_numpy(golden["ids"]).long()
    lengths = torch.tensor([40, 61])
    with torch.no_grad():
        full = published.double()(ids, patterns)
        model = published.float().cuda()
        cache = SparseCache(model.config, patterns, 2, 100, torch.float32, "cuda")
        logits = prefill(model, ids[:, :61].cuda(), lengths.cuda(), cache)
        for step in range(30):
            rows = torch.arange(2)
            assert relative_error(logits, full[rows, lengths - 1 + step]) < 1e-4
            logits = decode_step(model, ids[rows, lengths + step].cuda(), cache)
