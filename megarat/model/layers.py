"""The plain parts of a block: RMSNorm and the feed-forward network.

Shapes: B batch, T length, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megarat.ops import rms_norm
from megarat.parallel.tensor import ALONE, ColumnLinear, RowLinear, TensorParallel


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

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) in the residual dtype -> (B, T, C) in the dtype of the matrices."""
        return self.down(functional.gelu(self.up(self.norm(x_BTC))))
