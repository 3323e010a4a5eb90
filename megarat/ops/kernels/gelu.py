"""Triton kernel of the exact GELU and its gradient, both from one reading of x."""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4


@triton.jit
def _gelu_and_gradient_kernel(x_ptr, dy_ptr, y_ptr, dx_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(y_ptr + at, (x * phi).to(y_ptr.dtype.element_ty), mask=at < count)
    tl.store(dx_ptr + at, (dy * (phi + x * density)).to(dx_ptr.dtype.element_ty), mask=at < count)


def launch(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(x), dy gelu'(x)); both inputs are contiguous."""
    y, dx = torch.empty_like(x), torch.empty_like(x)
    _gelu_and_gradient_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, dy, y, dx, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y, dx
