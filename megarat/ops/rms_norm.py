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
    """Normalises the last dimension of x (..., C). Statistics in fp32; the result in `out_dtype`, x's dtype by default.

    backend: "triton", "reference" or None to choose (see ops.dispatch).
    """
    out_dtype = out_dtype or x.dtype
    if _choose(x, weight_C, backend) == "triton":
        from megarat.ops.kernels.rms_norm import RMSNorm

        return RMSNorm.apply(x.contiguous(), None, weight_C.contiguous(), eps, out_dtype)[0]
    if x.dtype == weight_C.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight_C, eps).to(out_dtype)
    return rms_norm_ref(x, weight_C, eps).to(out_dtype)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight_C: Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + branch), residual + branch) in one pass; the sum keeps the residual's dtype.

    residual, branch: of one shape (..., C), each of its own dtype. The normalised result has `out_dtype`, the branch's dtype by default.
    """
    out_dtype = out_dtype or branch.dtype
    if residual.shape != branch.shape:
        raise ValueError(f"add_rms_norm: the residual is {tuple(residual.shape)} but the branch is {tuple(branch.shape)}")
    if _choose(residual, weight_C, backend) == "triton":
        from megarat.ops.kernels.rms_norm import RMSNorm

        y, total = RMSNorm.apply(residual.contiguous(), branch.contiguous(), weight_C.contiguous(), eps, out_dtype)
        return y, total
    total = residual + branch.to(residual.dtype)
    return rms_norm(total, weight_C, eps, out_dtype=out_dtype, backend="reference"), total


def _choose(x: Tensor, weight_C: Tensor, backend: str | None) -> str:
    if weight_C.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight of shape {tuple(weight_C.shape)} for {x.shape[-1]} channels")
    unsupported = None
    if x.dtype == torch.float64:
        unsupported = "the input is float64"
    elif x.shape[-1] > 16384:
        unsupported = f"{x.shape[-1]} channels do not fit one program"
    return choose_backend("rms_norm", backend, x, unsupported)
