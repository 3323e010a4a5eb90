"""Triton kernel of total += x over tensors of different dtypes."""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _accumulate_kernel(total_ptr, x_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)


def launch(total: Tensor, x: Tensor) -> None:
    """Adds x to total."""
    _accumulate_kernel[(triton.cdiv(total.numel(), BLOCK),)](total, x, total.numel(), BLOCK=BLOCK, num_warps=8)
