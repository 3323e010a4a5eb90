"""A linear layer whose three matrix products run in FP8: y = x W^T, dx = dy W, dW = dy^T x.

    x ~ s_x x8,  W ~ s_W W8   in e4m3 (4 exponent bits, 3 of mantissa),   dy ~ s_dy dy8   in e5m2 (wider range, 2 bits of mantissa)
    y = s_x s_W (x8 W8^T), summed in fp32, and likewise both gradients

Each tensor has one scale, s = max |x| / largest FP8 number, taken from the tensor itself in every call. So there is no state beside the
weights: a resumed run computes what the interrupted one would have, and no history of maxima can overflow. A value that is not finite
makes the scale, and with it the result, not finite.

Hopper multiplies FP8 only where both operands lie along the summed dimension, so a tensor that enters two products is written twice, as
it is and transposed, in one pass. For the backward, x is kept as one FP8 copy: half of what a bf16 layer keeps.

Shapes: N rows (tokens), C inputs, F outputs of the layer; M, N rows and columns of any matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.dispatch import choose_backend

WEIGHT_DTYPE, GRADIENT_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16  # all dimensions of an FP8 product are multiples of this
_SMALLEST = 1e-30  # largest magnitude assumed of a tensor of zeros


class Quantised(NamedTuple):
    """A matrix in FP8: as it is, transposed, or both, and the fp32 scalar to multiply with."""

    rows_MN: Tensor | None
    columns_NM: Tensor | None
    scale: Tensor


def quantise_ref(x_MN: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> Quantised:
    """The definition, by torch operations."""
    limit = torch.finfo(dtype).max
    largest = torch.linalg.vector_norm(x_MN, float("inf"), dtype=torch.float32).clamp_min(_SMALLEST)
    x8_MN = (x_MN.float() * (limit / largest)).clamp(-limit, limit).to(dtype)
    return Quantised(x8_MN if rows else None, x8_MN.T.contiguous() if columns else None, largest / limit)


def product_ref(a_MK: Tensor, b_NK: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * a b^T with fp32 sums of the exact products."""
    return (a_MK.float() @ b_NK.float().T * scale).to(dtype)


def _quantise(x_MN: Tensor, dtype: torch.dtype, kernels: bool, rows: bool = True, columns: bool = True) -> Quantised:
    if not kernels:
        return quantise_ref(x_MN, dtype, rows, columns)
    from megarat.ops.kernels.fp8 import quantise

    largest = torch.linalg.vector_norm(x_MN, float("inf"), dtype=torch.float32)
    return Quantised(*quantise(x_MN, dtype, largest, _SMALLEST, rows, columns))


def _product(
    a_MK: Tensor | None, a_scale: Tensor, b_NK: Tensor | None, b_scale: Tensor, dtype: torch.dtype, kernels: bool, fast: bool
) -> Tensor:
    """a b^T. ``fast`` sums in the matrix units' own registers, of fewer bits than fp32, which forwards bear and gradients do not."""
    assert a_MK is not None and b_NK is not None
    if not kernels:
        return product_ref(a_MK, b_NK, a_scale * b_scale, dtype)
    return torch._scaled_mm(a_MK, b_NK.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_FC: Tensor, kernels: bool) -> Tensor:
        x = _quantise(x_NC, WEIGHT_DTYPE, kernels, columns=weight_FC.requires_grad)
        weight = _quantise(weight_FC, WEIGHT_DTYPE, kernels, columns=False)
        ctx.kernels = kernels
        ctx.save_for_backward(x.columns_NM, x.scale, weight_FC)
        return _product(x.rows_MN, x.scale, weight.rows_MN, weight.scale, x_NC.dtype, kernels, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients, each in the dtype of what it belongs to."""
        x_CN, x_scale, weight_FC = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        dy = _quantise(dy_NF, GRADIENT_DTYPE, ctx.kernels, rows=of_x, columns=of_weight)
        dx_NC = dweight_FC = None
        if of_x:
            weight = _quantise(weight_FC, WEIGHT_DTYPE, ctx.kernels, rows=False)
            dx_NC = _product(dy.rows_MN, dy.scale, weight.columns_NM, weight.scale, dy_NF.dtype, ctx.kernels, fast=False)
        if of_weight:
            dweight_FC = _product(dy.columns_NM, dy.scale, x_CN, x_scale, weight_FC.dtype, ctx.kernels, fast=False)
        return dx_NC, dweight_FC, None


def fp8_linear(x: Tensor, weight_FC: Tensor, *, backend: str | None = None) -> Tensor:
    """x @ weight.T by FP8 products, forward and backward; x is (..., C), the result (..., F) in x's dtype.

    x, weight: bf16, fp16 or fp32; C, F and the number of rows are multiples of 16 (``ValueError`` otherwise).
    backend: "triton" (FP8 matrix units), "reference" (the same roundings in fp32 arithmetic, slow) or None to choose (see ops.dispatch).
    """
    rows = x.numel() // x.shape[-1]
    if any(size % ALIGNMENT for size in (rows, *weight_FC.shape)):
        raise ValueError(
            f"fp8_linear: {rows} rows and a weight {tuple(weight_FC.shape)}; FP8 products need multiples of {ALIGNMENT}"
        )
    kernels = choose_backend("fp8_linear", backend, x, fp8_missing(x.device)) == "triton"
    y_NF: Tensor = _Fp8Linear.apply(x.reshape(rows, x.shape[-1]), weight_FC, kernels)
    return y_NF.view(*x.shape[:-1], weight_FC.shape[0])


def fp8_missing(device: torch.device) -> str | None:
    """Why this device has no FP8 matrix products, or None when it has."""
    if device.type != "cuda":
        return "FP8 matrix products need a GPU"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has no FP8 matrix units (compute capability 8.9 or newer)"
    return None
