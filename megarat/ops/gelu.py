"""The second half of a feed-forward network: a linear map of gelu(x) that keeps x alone for its backward.

    y = gelu(x) W^T,   gelu(x) = x Phi(x) with the exact (erf) normal distribution function Phi

Autograd would keep x for the gelu and gelu(x) for the weight's gradient, the two largest activations of a block. Here the backward makes
gelu(x) and the gradient of x in one pass over x and the gradient of gelu(x), which costs one more write than the gradient alone.

Shapes: ... any leading dimensions (N rows in all), F channels inside, C channels outside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.dispatch import choose_backend, refuse_gradients


def gelu_and_gradient_ref(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(x), dy gelu'(x)) by torch operations, computed in fp32 (float64 for float64 input), each in x's dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, dy = x.to(compute), dy.to(compute)
    phi = 0.5 * (1.0 + torch.erf(wide * math.sqrt(0.5)))
    density = torch.exp(-0.5 * wide.square()) * (2.0 * math.pi) ** -0.5
    return (wide * phi).to(x.dtype), (dy * (phi + wide * density)).to(x.dtype)


def gelu_and_gradient(x: Tensor, dy: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(gelu(x), dy gelu'(x)) of one shape and dtype, in one pass; an input that requires a gradient is refused.

    backend: "triton", "reference" or None to choose (see ops.dispatch).
    """
    if x.shape != dy.shape:
        raise ValueError(f"gelu_and_gradient: x is {tuple(x.shape)} but its gradient is {tuple(dy.shape)}")
    refuse_gradients("gelu_and_gradient", x, dy)
    unsupported = "the input is float64" if x.dtype == torch.float64 else None
    if choose_backend("gelu_and_gradient", backend, x, unsupported) == "reference":
        return gelu_and_gradient_ref(x, dy)
    from megarat.ops.kernels.gelu import launch

    return launch(x.contiguous(), dy.contiguous())


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CF: Tensor, backend: str | None) -> Tensor:
        """Two torch operations; only the inputs are kept."""
        ctx.save_for_backward(x, weight_CF)
        ctx.backend = backend
        return functional.linear(functional.gelu(x), weight_CF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Three matrix products' worth of autograd, with gelu(x) made again beside its gradient."""
        x, weight_CF = ctx.saved_tensors
        active, dx = gelu_and_gradient(x, dy @ weight_CF, backend=ctx.backend)
        dweight_CF = dy.flatten(0, -2).T @ active.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dweight_CF, None


def gelu_linear(x: Tensor, weight_CF: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(x) W^T: (..., F) and (C, F) of one float dtype -> (..., C), by a function whose backward keeps x and the weight only.

    backend: of the elementwise pass of the backward: "triton", "reference" or None to choose (see ops.dispatch).
    """
    if x.dtype != weight_CF.dtype:
        raise ValueError(f"gelu_linear: x is {x.dtype} but the weight is {weight_CF.dtype}")
    return _GeluLinear.apply(x, weight_CF, backend)
