"""Backwards that are not differentiable themselves.

torch's own `once_differentiable` raises only where the gradient that comes in depends on something. Where it does not (that of a sum, say), a
second derivative would silently lack the terms of this operation, and so it would where only the way to an input is followed. Here it raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("an operation of megarat.ops was differentiated twice; it has no second derivative")


def once_differentiable(backward: Backward) -> Backward:
    """A backward whose results raise `RuntimeError` where they are differentiated again (`create_graph=True`)."""

    @functools.wraps(backward)
    def first_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        depends_on = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _NoSecondDerivative.apply(x.detach().requires_grad_(), *depends_on) for x in results)

    return first_derivative
