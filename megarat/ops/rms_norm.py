"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, the mean taken in fp32 over the last dimension.

Shapes: ... any leading dimensions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarat.ops.dispatch import choose_backend


def rms_norm_ref(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """The formula in fp32 (float64 for float64 input); the result keeps that compute dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight_C = x.to(compute), weight_C.to(compute)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight_C


def rms_norm(
    x: Tensor, weight_C: Tensor, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """Normalises the last dimension of x (..., C). Statistics in fp32; the result in `out_dtype`, x's dtype by default."""
    if weight_C.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight of shape {tuple(weight_C.shape)} for {x.shape[-1]} channels")
    choose_backend("rms_norm", backend, x, "no kernel is built for it")
    out_dtype = out_dtype or x.dtype
    if x.dtype == weight_C.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight_C, eps).to(out_dtype)
    return rms_norm_ref(x, weight_C, eps).to(out_dtype)
