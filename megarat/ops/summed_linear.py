"""A linear layer whose weight gradient is added to an fp32 sum by the matrix product that makes it.

    y = x W^T,   dx = dy W,   total += dy^T x

Otherwise a product writes the gradient in bf16, and another pass reads it and the fp32 sum and writes the sum: 10 bytes a parameter and
micro-batch more, and one rounding. Here autograd sees no gradient of the weight at all; whoever owns the sum is told by ``note``.

Shapes: N rows (tokens), C inputs, F outputs of the layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megarat.ops.autograd import once_differentiable

APEX_MODULE = "fused_weight_gradient_mlp_cuda"


def add_outer_(total_FC: Tensor, dy_NF: Tensor, x_NC: Tensor) -> None:
    """total += dy^T x, summed in total's dtype (fp32 or wider) whatever the operands' dtype; in one product on GPUs."""
    if dy_NF.dtype == total_FC.dtype:
        torch.addmm(total_FC, dy_NF.T, x_NC, out=total_FC)
    elif dy_NF.is_cuda:
        torch.addmm(total_FC, dy_NF.T, x_NC, out_dtype=total_FC.dtype, out=total_FC)
    else:
        total_FC.addmm_(dy_NF.T.to(total_FC.dtype), x_NC.to(total_FC.dtype))


def apex_add_outer_(total_FC: Tensor, dy_NF: Tensor, x_NC: Tensor) -> None:
    """The same by the kernel of NVIDIA's apex; all contiguous, total fp32."""
    importlib.import_module(APEX_MODULE).wgrad_gemm_accum_fp32(x_NC.contiguous(), dy_NF.contiguous(), total_FC)


def apex_missing() -> str | None:
    """Why ``apex_add_outer_`` cannot run, or None."""
    try:
        importlib.import_module(APEX_MODULE)
    except ImportError as error:
        return f"NVIDIA's apex with its extension {APEX_MODULE} is not installed ({error})"
    return None


AddOuter = Callable[[Tensor, Tensor, Tensor], None]


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, weight_FC: Tensor, total_FC: Tensor, note: Callable[[], None], add_outer: AddOuter
    ) -> Tensor:
        ctx.save_for_backward(x_NC, weight_FC)
        ctx.total_FC, ctx.note, ctx.add_outer = total_FC, note, add_outer
        return functional.linear(x_NC, weight_FC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_FC = ctx.saved_tensors
        dx_NC = dy_NF @ weight_FC if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            ctx.add_outer(ctx.total_FC, dy_NF, x_NC)
            ctx.note()
        return dx_NC, None, None, None, None


def summed_linear(
    x: Tensor, weight_FC: Tensor, *, total_FC: Tensor, note: Callable[[], None], add_outer: AddOuter = add_outer_
) -> Tensor:
    """x @ weight.T with x (..., C); the backward adds the weight's gradient to ``total_FC`` (fp32) and calls ``note``."""
    if total_FC.shape != weight_FC.shape:
        raise ValueError(f"summed_linear: the sum is {tuple(total_FC.shape)}, the weight {tuple(weight_FC.shape)}")
    y_NF: Tensor = _SummedLinear.apply(x.reshape(-1, x.shape[-1]), weight_FC, total_FC, note, add_outer)
    return y_NF.view(*x.shape[:-1], weight_FC.shape[0])
