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

from megarat.ops.autograd import once_differentiable

# programs (two for each of an H200's 132 multiprocessors), channels a warp, rows in flight; chosen by timing on an H200
BACKWARD = (264, 512, 3)


@triton.jit
def _rms_norm_forward_kernel(
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
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, rstd_ptr, dy_ptr, dsum_ptr, dx_ptr, dbranch_ptr, dweight_ptr, rows, C,
    HAS_DSUM: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w dy - x_hat mean(w dy x_hat)), plus the gradient that reaches the sum directly; dweight: (programs, C) fp32.

    SPLIT: the branch has another dtype than the residual, hence a gradient of its own dtype.
    """
    c = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        at = row * C + c
        rstd = tl.load(rstd_ptr + row)
        x_hat = tl.load(x_ptr + at, mask=c < C, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=c < C, other=0.0).to(tl.float32)
        dweight += dy * x_hat
        dx = rstd * (weight * dy - x_hat * (tl.sum(weight * dy * x_hat, axis=0) / C))
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at, mask=c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
        if SPLIT:
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=c < C)
    tl.store(dweight_ptr + tl.program_id(0) * C + c, dweight, mask=c < C)


def _launch_options(channels: int, channels_a_warp: int = 512) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // channels_a_warp))}


def norm_backward(
    total: Tensor, weight_C: Tensor, rstd: Tensor, dy: Tensor, dtotal: Tensor | None, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launches the backward: gradients of the residual, of the branch (None without one), and of the weight."""
    rows, channels = rstd.numel(), total.shape[-1]
    most_programs, channels_a_warp, stages = BACKWARD
    programs = min(most_programs, rows)
    dx = torch.empty_like(total)
    split = branch_dtype is not None and branch_dtype != total.dtype
    dbranch = torch.empty_like(total, dtype=branch_dtype) if split else dx
    dweight = torch.empty(programs, channels, dtype=torch.float32, device=total.device)
    _rms_norm_backward_kernel[(programs,)](
        total, weight_C, rstd, dy.contiguous(), dy if dtotal is None else dtotal.contiguous(), dx, dbranch, dweight, rows, channels,
        HAS_DSUM=dtotal is not None, SPLIT=split, STAGES=stages, **_launch_options(channels, channels_a_warp),
    )  # fmt: skip
    return dx, None if branch_dtype is None else dbranch, dweight.sum(0).to(weight_C.dtype)


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
        _rms_norm_forward_kernel[(rows,)](
            x, x if branch is None else branch, weight_C, y, total, rstd, channels, eps, ADD=branch is not None,
            **_launch_options(channels),
        )  # fmt: skip
        ctx.save_for_backward(total, weight_C, rstd)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launches the backward; an output that nothing used has no gradient."""
        if dy is None:
            assert dtotal is not None  # or there would be nothing to do
            return dtotal, None if ctx.branch_dtype is None else dtotal.to(ctx.branch_dtype), None, None, None
        total, weight_C, rstd = ctx.saved_tensors
        gradients = norm_backward(total, weight_C, rstd, dy, dtotal, ctx.branch_dtype)
        return *gradients, None, None
