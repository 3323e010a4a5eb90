"""Rotary position embedding, half-split (NeoX) pairing: channel i turns with channel i + K/2.

Shapes: B batch, T length, H heads, K head channels, R = K/2 rotation pairs. RAT+ (arXiv 2602.18196) rotates the query and the
recurred key by the token's absolute position, after the recurrence, so that the recurrent state itself is free of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarat.ops.dispatch import choose_backend, refuse_gradients


def rotary_tables(
    positions: Tensor, head_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `position * base ** (-2 r / K)`.

    positions: integer or float tensor of any shape, (T,) or (B, T) as a rule. Returns two tensors of shape (..., K/2) in `dtype`;
    the angles are taken in float64, since fp32 angles are off by 1e-2 rad at position 131072.
    """
    if head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim {head_dim} is odd; channels turn in pairs")
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] * base ** (-2.0 * pairs / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in fp32 (float64 for float64 input) by torch operations; the result has x's dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = x.to(compute).chunk(2, dim=-1)
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rotary(x_BTHK: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotates every head of x by its token's angles.

    x_BTHK: any float dtype, any strides; or one token a row, (B, H, K). cos, sin: (T, R) shared by all rows, or (B, T, R); for one token
    a row (R,) or (B, R). The rotation is done in fp32 (float64 for float64 input); the result has x's dtype.
    backend: "triton", "reference" or None to choose (see ops.dispatch).
    """
    check_tables("apply_rotary", cos, sin, x_BTHK)
    if choose_backend("apply_rotary", backend, x_BTHK, _unsupported(x_BTHK)) == "reference":
        return apply_rotary_ref(x_BTHK, cos, sin)
    from megarat.ops.kernels.rotary import Rotary

    refuse_gradients("the rotary table of apply_rotary", cos, sin)
    if x_BTHK.dim() == 3:  # rows as the tokens of one sequence
        cos, sin = (table.expand(x_BTHK.shape[0], -1) for table in (cos, sin))
        return Rotary.apply(x_BTHK.unsqueeze(0), cos.float().contiguous(), sin.float().contiguous()).squeeze(0)
    return Rotary.apply(x_BTHK, cos.float().contiguous(), sin.float().contiguous())


def check_tables(op: str, cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Refuses tables that are not of x's angles: x (B, T, H, K) wants (T, R) or (B, T, R), one token a row (B, H, K) wants (R,) or (B, R)."""
    *tokens, _, channels = x.shape
    if cos.shape[-1] * 2 != channels:
        raise ValueError(f"{op}: tables of {cos.shape[-1]} pairs for heads of {channels} channels")
    if cos.shape != sin.shape or tuple(cos.shape[:-1]) not in (tuple(tokens), tuple(tokens[1:])):
        raise ValueError(f"{op}: rotary tables {tuple(cos.shape)} and {tuple(sin.shape)} for inputs of shape {tuple(x.shape)}")


def _unsupported(x: Tensor) -> str | None:
    """Why the kernel cannot serve this input, or None."""
    if x.dtype == torch.float64:
        return "the input is float64"
    if x.shape[-1] not in (16, 32, 64, 128, 256):
        return f"the head size {x.shape[-1]} is none of 16, 32, 64, 128 and 256"
    if x.stride(-1) != 1:
        return "the channels of the input are not contiguous"
    return None
