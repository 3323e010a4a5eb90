"""Triton kernel of the rotary embedding: one pass over x, all heads of a token in one program, the table row read once for them all."""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.parts import GradientPlace


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, T, H, x_b, x_t, x_h, out_t, table_b, R: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    h_H1, r_1R = tl.arange(0, HEADS)[:, None], tl.arange(0, R)[None, :]
    cos_1R = tl.load(cos_ptr + b * table_b + t * R + r_1R)
    sin_1R = tl.load(sin_ptr + b * table_b + t * R + r_1R)
    if INVERSE:
        sin_1R = -sin_1R
    x_at = x_ptr + b * x_b + t * x_t + h_H1 * x_h + r_1R
    first_HR = tl.load(x_at, mask=h_H1 < H, other=0.0).to(tl.float32)
    second_HR = tl.load(x_at + R, mask=h_H1 < H, other=0.0).to(tl.float32)
    out_at = out_ptr + token.to(tl.int64) * out_t + h_H1 * (2 * R) + r_1R
    tl.store(out_at, (first_HR * cos_1R - second_HR * sin_1R).to(out_ptr.dtype.element_ty), mask=h_H1 < H)
    tl.store(out_at + R, (second_HR * cos_1R + first_HR * sin_1R).to(out_ptr.dtype.element_ty), mask=h_H1 < H)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, inverse: bool, place: GradientPlace | None = None) -> Tensor:
    """Launches the rotation, or its inverse, into ``place`` if given; cos and sin are contiguous fp32, (T, R) or (B, T, R)."""
    batch, length, heads, channels = x_BTHK.shape
    out_BTHK = torch.empty(x_BTHK.shape, dtype=x_BTHK.dtype, device=x_BTHK.device) if place is None else place.empty()
    _rotary_kernel[(batch * length,)](
        x_BTHK, cos, sin, out_BTHK, length, heads, *x_BTHK.stride()[:3],
        heads * channels if place is None else place.row_stride, cos.stride(0) if cos.dim() == 3 else 0,
        R=channels // 2, HEADS=triton.next_power_of_2(heads), INVERSE=inverse, num_warps=4,
    )  # fmt: skip
    return out_BTHK


class Rotary(torch.autograd.Function):
    """Autograd around the launch: the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates; keeps the tables alone."""
        ctx.save_for_backward(cos, sin)
        ctx.place = GradientPlace.of(x_BTHK)
        return rotate(x_BTHK, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        """Rotates the gradient by the opposite angles."""
        cos, sin = ctx.saved_tensors
        dout_BTHK = dout_BTHK if dout_BTHK.stride(-1) == 1 else dout_BTHK.contiguous()
        return rotate(dout_BTHK, cos, sin, True, ctx.place.claimed()), None, None
