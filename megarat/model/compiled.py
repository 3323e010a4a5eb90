"""The parts of a block between recurrence and attention as functions for torch.compile: residual sums, norms, products and GELU.

The kernels stay outside: nothing breaks a graph, and since weights are arguments, one compiled function serves all layers and both passes
of a pair (none of the two functions sees the pattern). Which intermediates the backward keeps and which it computes again is the
compiler's choice.

Shapes: B batch, T length, C model width, F channels inside the feed-forward network, G rows of the fused projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megarat.ops.rms_norm import rms_norm_ref


def enter(x_BTC: Tensor, branch_BTC: Tensor | None, norm_C: Tensor, in_proj_GC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + branch, in_proj(norm(x + branch))): the start of a mixer."""
    total_BTC = x_BTC if branch_BTC is None else x_BTC + branch_BTC
    return total_BTC, functional.linear(rms_norm_ref(total_BTC, norm_C, eps).to(norm_C.dtype), in_proj_GC)


def feed_forward(
    x_BTC: Tensor, branch_BTC: Tensor, norm_C: Tensor, up_FC: Tensor, down_CF: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + branch, down(gelu(up(norm(x + branch)))))."""
    total_BTC = x_BTC + branch_BTC
    raised_BTF = functional.linear(rms_norm_ref(total_BTC, norm_C, eps).to(norm_C.dtype), up_FC)
    return total_BTC, functional.linear(functional.gelu(raised_BTF), down_CF)


@functools.cache
def compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """``function`` through torch.compile, on first use in a process; a shape that was not met before is compiled anew."""
    return torch.compile(function, dynamic=False, fullgraph=True)
