"""The plain parts of a block: RMSNorm and the feed-forward network.

Shapes: B batch, T length, C model width, F channels inside the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from megarat.ops import add_rms_norm, gelu_linear, rms_norm
from megarat.parallel.tensor import ALONE, ColumnLinear, RowLinear, TensorParallel


@contextmanager
def made_again(x: Tensor, make: Callable[[], Tensor], active: bool) -> Iterator[None]:
    """Whatever keeps ``x`` for its backward here keeps nothing: the backward calls ``make`` for the same values, bit for bit.

    For tensors that cost a read and a write to make, such as norms, of what is kept anyway. ``active=False`` changes nothing.
    """
    if not (active and torch.is_grad_enabled()):
        yield
        return
    address, elements = x.data_ptr(), x.numel()

    def leave_out(kept: Tensor) -> Tensor | torch.Size:
        is_x = kept.data_ptr() == address and kept.numel() == elements and kept.is_contiguous()
        return kept.shape if is_x else kept

    def bring_back(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(leave_out, bring_back):
        yield


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, computed in fp32; the result has the dtype of the weight (the dtype of the matrices that follow)."""

    def __init__(self, width: int, eps: float, ranks: TensorParallel = ALONE) -> None:
        super().__init__()
        self.eps = eps
        self.ranks = ranks
        self.weight = nn.Parameter(torch.ones(width))

    @overload
    def forward(self, x_BTC: Tensor) -> Tensor: ...

    @overload
    def forward(self, x_BTC: Tensor, branch_BTC: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x_BTC: Tensor, branch_BTC: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise the last axis of ``x_BTC`` (any float dtype); with a branch, that of ``x + branch``, returned as well (in x's dtype)."""
        weight = self.ranks.replicated(self.weight)
        if branch_BTC is None:
            return rms_norm(x_BTC, weight, self.eps, out_dtype=self.weight.dtype)
        return add_rms_norm(x_BTC, branch_BTC, weight, self.eps, out_dtype=self.weight.dtype)


class FeedForward(nn.Module):
    """x -> down(gelu(up(norm(x)))) with the exact (erf) GELU; the residual is added by the caller."""

    def __init__(self, width: int, multiple: int, eps: float, ranks: TensorParallel = ALONE) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps, ranks)
        self.up = ColumnLinear(width, multiple * width, ranks)
        self.down = RowLinear(multiple * width, width, ranks)
        self.recompute = False  # norm and GELU once more in the backward, instead of keeping their outputs
        self.fused_gelu = False  # GELU once more in the backward, in one pass with its gradient

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) in the residual dtype -> (B, T, C) in the dtype of the matrices."""
        return self.after_norm(self.norm(x_BTC), x_BTC)

    def after_norm(self, normal_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """The same, given also the norm of ``x_BTC``."""
        with made_again(normal_BTC, lambda: self.norm(x_BTC), self.recompute):
            raised_BTF = self.up(normal_BTC)
        if self.fused_gelu:
            return self.down(raised_BTF, gelu_linear)
        active_BTF = functional.gelu(raised_BTF)
        with made_again(active_BTF, lambda: functional.gelu(raised_BTF), self.recompute):
            return self.down(active_BTF)
