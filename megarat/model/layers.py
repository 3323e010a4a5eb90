"""The plain parts of a block: RMSNorm and the feed-forward network.

Shapes: B batch, T length, C model width, F channels inside the feed-forward network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megarat.ops import rms_norm
from megarat.parallel.tensor import ALONE, ColumnLinear, RowLinear, TensorParallel


def computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, of which the backward keeps the inputs alone and computes the rest once more.

    It does so only as far as it needs to: what follows the last tensor that a gradient asks for is left out. Of an elementwise function
    before a matrix product, the product is therefore not repeated.
    """
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, computed in fp32; the result has the dtype of the weight (the dtype of the matrices that follow)."""

    def __init__(self, width: int, eps: float, ranks: TensorParallel = ALONE) -> None:
        super().__init__()
        self.eps = eps
        self.ranks = ranks
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Normalise the last axis of ``x_BTC`` (any float dtype)."""
        return rms_norm(x_BTC, self.ranks.replicated(self.weight), self.eps, out_dtype=self.weight.dtype)


class FeedForward(nn.Module):
    """x -> down(gelu(up(norm(x)))) with the exact (erf) GELU; the residual is added by the caller."""

    def __init__(self, width: int, multiple: int, eps: float, ranks: TensorParallel = ALONE) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps, ranks)
        self.up = ColumnLinear(width, multiple * width, ranks)
        self.down = RowLinear(multiple * width, width, ranks)
        self.recompute = False  # norm and GELU once more in the backward, instead of keeping their outputs

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) in the residual dtype -> (B, T, C) in the dtype of the matrices."""
        if self.recompute and torch.is_grad_enabled():
            return computed_again(self._lower, computed_again(self._raise, x_BTC))
        return self._lower(self._raise(x_BTC))

    def _raise(self, x_BTC: Tensor) -> Tensor:
        return self.up(self.norm(x_BTC))

    def _lower(self, x_BTF: Tensor) -> Tensor:
        return self.down(functional.gelu(x_BTF))
