"""Cases of the norm's kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import add_rms_norm, rms_norm
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, assert_close, poisoned_memory  # noqa: F401


@pytest.mark.parametrize("used", ["both", "normal", "sum"])
@pytest.mark.parametrize("dtype", [*DTYPES, (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (2, 5, 96), (1, 23, 640)] if INTERPRETED else [(1, 1, 16), (2, 5, 96), (3, 101, 640)], ids=str
)
def test_norm_behind_a_residual_sum_and_all_its_gradients_match_float64(shape, dtype, used):
    """In one dtype, or with an fp32 residual and the rest in fp16; with gradients reaching both outputs or only one."""
    residual_dtype, dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    residual = torch.randn(shape, device=DEVICE).to(dtype).to(residual_dtype)
    branch, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(2 * shape[-1], device=DEVICE).to(dtype)[::2]
    if residual_dtype == torch.bfloat16:  # so that their sum is exact in bf16 and the oracle sees the sum that was normalised
        residual = (residual + branch) - branch
    d_normal, d_sum = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape, device=DEVICE).to(residual_dtype)

    def run(wide, norm):
        inputs = [(x.double() if wide else x.detach()).requires_grad_() for x in (residual, branch, weight)]
        pairs = list(zip(norm(*inputs), (d_normal, d_sum), strict=True))
        pairs = pairs if used == "both" else [pairs[used == "sum"]]
        outputs, gradients = zip(*((y, d.to(y.dtype)) for y, d in pairs), strict=True)
        inputs = inputs if used != "sum" else inputs[:2]
        return (*outputs, *torch.autograd.grad(outputs, inputs, gradients))

    def oracle(a, b, w):
        total = a + b
        return total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w, total

    found = run(False, lambda a, b, w: add_rms_norm(a, b, w, backend="triton"))
    assert_close(found, run(True, oracle), dtype, outputs=2 if used == "both" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_its_gradients_match_float64(dtype, monkeypatch):
    """Three programs with some seven rows each."""
    monkeypatch.setattr("megarat.ops.kernels.rms_norm.BACKWARD", (3, 512, 1))
    x, dy = torch.randn(2, 20, 80, device=DEVICE).to(dtype)
    weight = torch.randn(80, device=DEVICE).to(dtype)

    def run(wide, norm):
        inputs = [(t.double() if wide else t.detach()).requires_grad_() for t in (x, weight)]
        y = norm(*inputs)
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    found = run(False, lambda x, w: rms_norm(x, w, backend="triton"))
    assert_close(found, run(True, lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w), dtype, outputs=1)
