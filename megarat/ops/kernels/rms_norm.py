"""Triton kernels of the RMS norm, optionally behind a residual addition, forward and backward.

A program owns whole rows of C channels. The backward's programs each walk a share of the rows and sum their part of the weight's
gradient in registers; the parts are added in one fixed order, so there are no atomics and results are reproducible.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKWARD_PROGRAMS = 264  # two for each of an H200's 132 multiprocessors


@triton.jit
def _forward_kernel(
    x_ptr, branch_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(branch_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + c, rounded, mask=c < C)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / C + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + c, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=c < C)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dsum_ptr, dx_ptr, dweight_ptr, rows, C, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx = rstd (w dy - x_hat mean(w dy x_hat)), plus the gradient that reaches the sum directly; dweight: (programs, C) fp32."""
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        at = row * C + c
        rstd = tl.load(rstd_ptr + row)
        x_hat = tl.load(x_ptr + at, mask=c < C, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=c < C, other=0.0).to(tl.float32)
        dweight += dy * x_hat
        dx = rstd * (weight * dy - x_hat * (tl.sum(weight * dy * x_hat, axis=0) / C))
        if ADD:
            dx += tl.load(dsum_ptr + at, mask=c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
    tl.store(dweight_ptr + tl.program_id(0) * C + c, dweight, mask=c < C)


def _launch_options(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class RMSNorm(torch.autograd.Function):
    """Autograd around the launches; x and branch are contiguous (..., C). Outputs (y, x + branch or x itself)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight_C: Tensor, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Launches the forward and keeps the normalised sum's input and the rows' scales."""
        rows, channels = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
        total = x if branch is None else torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        _forward_kernel[(rows,)](
            x, x if branch is None else branch, weight_C, y, total, rstd, channels, eps, ADD=branch is not None,
            **_launch_options(channels),
        )  # fmt: skip
        ctx.save_for_backward(total, weight_C, rstd)
        ctx.branch_dtype = None if branch is None else branch.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """Launches the backward."""
        total, weight_C, rstd = ctx.saved_tensors
        rows, channels = rstd.numel(), total.shape[-1]
        dx, programs = torch.empty_like(total), min(BACKWARD_PROGRAMS, rstd.numel())
        dweight = torch.empty(programs, channels, dtype=torch.float32, device=total.device)
        _backward_kernel[(programs,)](
            total, weight_C, rstd, dy.contiguous(), dtotal.contiguous(), dx, dweight, rows, channels, ADD=ctx.branch_dtype is not None,
            **_launch_options(channels),
        )  # fmt: skip
        dbranch = None if ctx.branch_dtype is None else dx.to(ctx.branch_dtype)
        return dx, dbranch, dweight.sum(0).to(weight_C.dtype), None, None
