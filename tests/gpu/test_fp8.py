"""FP8 matrix units against the roundings written down in plain torch."""

from __future__ import annotations

import pytest
import torch

from megarat.ops.fp8_linear import GRADIENT_DTYPE, WEIGHT_DTYPE, fp8_linear, fp8_missing, quantise_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fp8_missing(torch.device("cuda")) is not None, reason="needs a GPU with FP8 matrix units"
    ),
]


@pytest.mark.parametrize("dtype", [WEIGHT_DTYPE, GRADIENT_DTYPE])
@pytest.mark.parametrize("shape", [(48, 160), (1000, 272), (4096, 2048)])
def test_the_kernel_rounds_as_torch_does(dtype, shape):
    """The scale is a quotient of fp32 numbers: a last bit of it may move a value across a rounding boundary, at most once in 2^20."""
    from megarat.ops.kernels.fp8 import quantise

    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    rows, columns, scale = quantise(x, dtype, largest, 1e-30, True, True)
    wanted, wanted_columns, wanted_scale = quantise_ref(x, dtype, True, True)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    for ours, theirs in ((rows, wanted), (columns, wanted_columns)):
        differ = ours.view(torch.uint8) != theirs.view(torch.uint8)
        assert differ.float().mean() <= 1e-4


@pytest.mark.parametrize("shape", [(64, 96, 80), (1024, 512, 2048)])
def test_products_equal_the_reference(shape):
    """Equal FP8 factors. Fast accumulation keeps 14 bits of sums (2^-13 a step against the largest partial sum); bf16 results 2^-9."""
    n, c, f = shape
    x = torch.randn(n, c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(f, c, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    dy = torch.randn(n, f, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("triton", "reference"):
        y = fp8_linear(x, weight, backend=backend)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 4e-3


def test_what_is_not_finite_is_seen():
    weight = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    for bad in (float("inf"), float("nan")):
        x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        x[5, 7] = bad
        assert not fp8_linear(x, weight).isfinite().all()
