"""The plain parts of a block: RMSNorm, the bias-free linear map and the feed-forward network.

Shapes: B batch, T length, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megarat.ops import rms_norm


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, computed in fp32; the result has the dtype of the weight (the dtype of the matrices that follow)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Normalise the last axis of ``x_BTC`` (any float dtype)."""
        return rms_norm(x_BTC, self.weight, self.eps, out_dtype=self.weight.dtype)


class Linear(nn.Module):
    """x @ weight.T without a bias; the weight is (out, in)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis from ``fan_in`` to ``fan_out``."""
        return functional.linear(x, self.weight)


class FeedForward(nn.Module):
    """x -> down(gelu(up(norm(x)))) with the exact (erf) GELU; the residual is added by the caller."""

    def __init__(self, width: int, multiple: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.up = Linear(width, multiple * width)
        self.down = Linear(multiple * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) in the residual dtype -> (B, T, C) in the dtype of the matrices."""
        return self.down(functional.gelu(self.up(self.norm(x_BTC))))
