"""Cases of the elementwise kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import accumulate_, apply_rotary, gelu_and_gradient, output_gate, rotary_tables
from megarat.ops.fp8_linear import quantise_ref
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, assert_close, poisoned_memory  # noqa: F401


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_gradient_match_float64(dtype):
    x, dy = (3 * torch.randn(2, 7, 5, 333, device=DEVICE)).to(dtype)
    wide = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(wide)
    (expected_d,) = torch.autograd.grad(expected, wide, dy.double())
    assert_close(gelu_and_gradient(x, dy, backend="triton"), (expected, expected_d), dtype, outputs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", ["shared", "rows", "tokens"])
def test_rotation_of_a_strided_view_and_its_gradient_match_float64(tables, dtype):
    projection = torch.randn(2, 7, 3, 5, 32, device=DEVICE).to(dtype)
    x = projection[:, :, 1] if tables != "tokens" else projection[:, 3, 1]
    positions = {"shared": torch.arange(7), "rows": torch.arange(14).view(2, 7) * 99, "tokens": torch.tensor([3, 1000])}[tables]
    cos, sin = rotary_tables(positions.to(DEVICE), 32)
    dout = torch.randn(x.shape, device=DEVICE).to(dtype)

    def run(compute, backend):
        leaf = x.to(compute) if compute != dtype else x.detach()
        leaf = leaf.requires_grad_()
        out = apply_rotary(leaf, cos, sin, backend=backend)
        return out, *torch.autograd.grad(out, leaf, dout.to(compute))

    assert_close(run(dtype, "triton"), run(torch.float64, "reference"), dtype, outputs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gate_of_a_strided_view_and_its_gradients_match_float64(dtype):
    x = torch.randn(2, 5, 3, 48, device=DEVICE).to(dtype)
    gate = torch.randn(2, 5, 4, 3, 48, device=DEVICE).to(dtype)[:, :, 2]
    dout = torch.randn(x.shape, device=DEVICE).to(dtype)

    def run(compute, backend):
        inputs = [t.detach().to(compute).requires_grad_() for t in (x, gate)]
        out = output_gate(*inputs, backend=backend)
        return out, *torch.autograd.grad(out, inputs, dout.to(compute))

    assert_close(run(dtype, "triton"), run(torch.float64, "reference"), dtype, outputs=1)


@pytest.mark.parametrize("elements", [1, 4096, 10001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_is_added_exactly(elements, dtype):
    total, x = torch.randn(elements, device=DEVICE), torch.randn(elements, device=DEVICE).to(dtype)
    wanted = total + x.float()
    assert torch.equal(accumulate_(total, x, backend="triton"), wanted)


@pytest.mark.skipif(not INTERPRETED, reason="compared with roundings as they come in tests/gpu/test_fp8.py")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_matrix_is_written_in_fp8_both_ways(dtype):
    """Triton's interpreter loses the carry where a mantissa rounds up to a power of two: it is given numbers that FP8 holds (largest one
    included), which leaves layout, masks and scales."""
    from megarat.ops.kernels.fp8 import quantise

    def numbers(m, n):
        x = (torch.randn(m, n) * 8).to(dtype).float()
        x[0, 0] = torch.finfo(dtype).max
        return x

    ragged = torch.cat((numbers(130, 32), numbers(130, 32)), 1)[:, 32:]
    for x in (numbers(48, 160), ragged, torch.zeros(16, 16), torch.full((16, 16), float("nan"))):
        largest = torch.linalg.vector_norm(x, float("inf"))
        for rows, columns in ((True, True), (True, False), (False, True))[: 1 if x.numel() > 256 else 3]:
            found, wanted = quantise(x, dtype, largest, 1e-30, rows, columns), quantise_ref(x, dtype, rows, columns)
            assert torch.equal(found[2].isnan(), wanted[2].isnan())
            if wanted[2].isnan():
                continue
            torch.testing.assert_close(found[2], wanted[2], rtol=1e-6, atol=0)
            for ours, theirs in zip(found[:2], wanted[:2], strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), (dtype, x.shape)
