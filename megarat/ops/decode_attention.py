"""One token a sequence against the sparse cache [initial | ring | far] and itself.

Shapes: B sequences, H heads of one pattern (D, W, I), K head channels, S cache slots, R = K/2 rotary pairs. Keys are cached after
rotary. With n0 = I // D the slots are

    initial  slot i            holds position i                       0 <= i < I
    ring     slot I + p % W    holds position p                       of the last W tokens
    far      slot I + W + c    holds position (n0 + c + 1) D - 1      the dilated tokens at or behind position I

t = lengths_B[b] is the number of tokens sequence b already has, hence the position of its current one. With lo = max(0, t - W) the
current token sees ring positions [lo, t), initial i < min(I, lo), far c < max(0, lo // D - n0) (none for D = -1) and itself: exactly
the rule of `dilated_attention.visible`. A dilated token is written to its far slot at once and stays hidden there while the ring
still shows it, so nothing is ever copied inside the cache, and everything is a function of lengths_B on the device: rows may have
different lengths and a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megarat.ops.dilated_attention import PatternLike, check_pattern
from megarat.ops.dispatch import choose_backend, refuse_gradients
from megarat.ops.gated_scan import ScanState, state_dtype
from megarat.ops.rotary import apply_rotary


def cache_slots(pattern: PatternLike, max_length: int) -> int:
    """Slots S of a cache that serves sequences up to `max_length` tokens."""
    dilation, window, initial = check_pattern(pattern)
    far = 0 if dilation == -1 else max(0, max_length // dilation - initial // dilation)
    return initial + window + far


def _without_end(pattern: PatternLike) -> tuple[int, int, int]:
    """The pattern with a dilation longer than any sequence in the place of none (D = -1)."""
    dilation, window, initial = check_pattern(pattern)
    return (1 << 30 if dilation == -1 else dilation), window, initial


def slot_positions(slots: int, lengths_B: Tensor, pattern: PatternLike) -> Tensor:
    """The position (B, S) each slot holds when its sequence has lengths_B tokens; negative for a ring slot not yet written."""
    dilation, window, initial = _without_end(pattern)
    slot_S = torch.arange(slots, device=lengths_B.device)
    positions_BS = slot_S.expand(lengths_B.shape[0], slots)
    if window:
        newest_B1 = lengths_B[:, None] - 1
        ring_BS = newest_B1 - (newest_B1 - (slot_S - initial)) % window
        positions_BS = torch.where(slot_S >= initial, ring_BS, positions_BS)
    far_S = (initial // dilation + slot_S - initial - window + 1) * dilation - 1
    return torch.where(slot_S >= initial + window, far_S, positions_BS)


def visible_slots(slots: int, lengths_B: Tensor, pattern: PatternLike) -> Tensor:
    """Which slots (B, S) the current token sees, bool."""
    _, window, initial = check_pattern(pattern)
    slot_S = torch.arange(slots, device=lengths_B.device)
    positions_BS = slot_positions(slots, lengths_B, pattern)
    lo_B1 = (lengths_B - window).clamp_min(0)[:, None]
    in_ring_S = (slot_S >= initial) & (slot_S < initial + window)
    return torch.where(in_ring_S, positions_BS >= lo_B1, positions_BS < lo_B1)


def decode_attention(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHK: Tensor,
    k_cache_BHSK: Tensor,
    v_cache_BHSK: Tensor,
    lengths_B: Tensor,
    pattern: PatternLike,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of the current token of each sequence, (B, H, K) in q's dtype.

    q, k, v: the current token's, q and k rotated; k and v need not be in the cache yet. k_cache, v_cache: (B, H, S, K), S from
    `cache_slots`. lengths_B: int64 on the same device. scale: K ** -0.5 by default. Inference only: no gradient is defined.
    """
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    compute = state_dtype(q_BHK.dtype)
    q_BHK_ = q_BHK.to(compute) * scale
    hidden_B1S = ~visible_slots(k_cache_BHSK.shape[2], lengths_B, pattern)[:, None]
    cached_BHS = torch.einsum("bhk,bhsk->bhs", q_BHK_, k_cache_BHSK.to(compute)).masked_fill(hidden_B1S, -math.inf)
    own_BH1 = (q_BHK_ * k_BHK.to(compute)).sum(dim=-1, keepdim=True)
    weights_BHS = torch.cat((cached_BHS, own_BH1), dim=-1).softmax(dim=-1)
    # slots never written may hold anything, NaN too: their weight 0 must not meet their value
    values_BHSK = v_cache_BHSK.to(compute).masked_fill(hidden_B1S[..., None], 0.0)
    out_BHK = torch.einsum("bhs,bhsk->bhk", weights_BHS[..., :-1], values_BHSK) + weights_BHS[..., -1:] * v_BHK.to(compute)
    return out_BHK.to(q_BHK.dtype)


def cache_write(
    k_cache_BHSK: Tensor, v_cache_BHSK: Tensor, k_BHK: Tensor, v_BHK: Tensor, lengths_B: Tensor, pattern: PatternLike
) -> None:
    """Stores the current token's k (rotated) and v, in place, in each slot that is its own: initial, ring and far.

    Call it after `decode_attention`: the ring slot it takes belonged to position t - W, which the current token still sees. A far
    position behind the end of the cache is dropped, so `max_length` of `cache_slots` bounds the sequence.
    """
    dilation, window, initial = _without_end(pattern)
    slots, t_B = k_cache_BHSK.shape[2], lengths_B
    targets: list[tuple[Tensor, Tensor]] = []
    if initial:
        targets.append((t_B, t_B < initial))
    if window:
        targets.append((initial + t_B % window, torch.ones_like(t_B, dtype=torch.bool)))
    if slots > initial + window:
        far_B = initial + window + (t_B + 1) // dilation - 1 - initial // dilation
        targets.append((far_B, ((t_B + 1) % dilation == 0) & (t_B >= initial) & (far_B < slots)))
    rows_B = torch.arange(t_B.shape[0], device=t_B.device)
    for slot_B, applies_B in targets:
        slot_B = slot_B.clamp(0, slots - 1)
        for cache_BHSK, new_BHK in ((k_cache_BHSK, k_BHK), (v_cache_BHSK, v_BHK)):
            kept_BHK = cache_BHSK[rows_B, :, slot_B]
            cache_BHSK[rows_B, :, slot_B] = torch.where(applies_B[:, None, None], new_BHK.to(cache_BHSK.dtype), kept_BHK)


def gate_step(
    k_BHK: Tensor, v_BHK: Tensor, g_BHK: Tensor, state: ScanState, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, ScanState]:
    """One step of `gated_scan`: (rotated averaged k, averaged v, new state).

    k, v, g: the current token's projections, (B, H, K). cos, sin: (R,) or (B, R) at each token's position. The state is fp32, the
    outputs have the dtypes of k and v.
    """
    compute = state_dtype(k_BHK.dtype)
    u_BHK = torch.sigmoid(-g_BHK.to(compute))
    new = ScanState(
        state.k_BHK + u_BHK * (k_BHK.to(compute) - state.k_BHK), state.v_BHK + u_BHK * (v_BHK.to(compute) - state.v_BHK)
    )
    rotated_BHK = apply_rotary(new.k_BHK, cos, sin)
    return rotated_BHK.to(k_BHK.dtype), new.v_BHK.to(v_BHK.dtype), new


def decode_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHK: Tensor,
    g_BHK: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    state: ScanState,
    k_cache_BHSK: Tensor,
    v_cache_BHSK: Tensor,
    lengths_B: Tensor,
    pattern: PatternLike,
    *,
    output_gate_BHK: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Everything between the input and the output projection of one decode step, in one or two launches: (B, H, K) in q's dtype.

    q, k, v, g, output gate: the current token's projections, not rotated; any stride over B. cos, sin: fp32 tables of all positions,
    contiguous (T, R); row lengths_B[b] is taken. state (fp32) and caches (contiguous) are updated in place; lengths_B is not: add one
    after the last layer. scale: K ** -0.5 by default. backend: "triton", "reference" or None to choose (see ops.dispatch).

    It is gate_step, rotary of q, decode_attention, the output gate and cache_write, and safe inside a CUDA graph. Inference only: an input that
    requires a gradient is refused.
    """
    refuse_gradients("decode_step", q_BHK, k_BHK, v_BHK, g_BHK, output_gate_BHK, *state)
    pattern = check_pattern(pattern)
    _check_cache(k_cache_BHSK, v_cache_BHSK, q_BHK, pattern)
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else scale
    vectors, kept = (q_BHK, k_BHK, v_BHK, g_BHK, output_gate_BHK), (*state, k_cache_BHSK, v_cache_BHSK, lengths_B, cos_TR, sin_TR)
    unsupported = _unsupported(vectors, kept)
    if choose_backend("decode_step", backend, q_BHK, unsupported) == "triton":
        from megarat.ops.kernels.decode_attention import launch_step

        caches = (k_cache_BHSK, v_cache_BHSK, lengths_B)
        return launch_step(q_BHK, k_BHK, v_BHK, g_BHK, output_gate_BHK, cos_TR, sin_TR, state, *caches, pattern, scale)
    cos_BR, sin_BR = cos_TR[lengths_B], sin_TR[lengths_B]
    own_k_BHK, own_v_BHK, new = gate_step(k_BHK, v_BHK, g_BHK, state, cos_BR, sin_BR)
    q_BHK = apply_rotary(q_BHK, cos_BR, sin_BR)
    out_BHK = decode_attention(q_BHK, own_k_BHK, own_v_BHK, k_cache_BHSK, v_cache_BHSK, lengths_B, pattern, scale=scale)
    cache_write(k_cache_BHSK, v_cache_BHSK, own_k_BHK, own_v_BHK, lengths_B, pattern)
    state.k_BHK.copy_(new.k_BHK)
    state.v_BHK.copy_(new.v_BHK)
    return out_BHK if output_gate_BHK is None else out_BHK * torch.sigmoid(output_gate_BHK)


def _check_cache(k_cache_BHSK: Tensor, v_cache_BHSK: Tensor, q_BHK: Tensor, pattern: tuple[int, int, int]) -> None:
    batch, heads, slots, channels = k_cache_BHSK.shape
    if k_cache_BHSK.shape != v_cache_BHSK.shape or (batch, heads, channels) != q_BHK.shape:
        shapes = f"{tuple(k_cache_BHSK.shape)} and {tuple(v_cache_BHSK.shape)}"
        raise ValueError(f"decode_step: caches of shape {shapes} for queries of shape {tuple(q_BHK.shape)}")
    if slots < (least := pattern[1] + pattern[2]):
        raise ValueError(f"decode_step: a cache of {slots} slots for pattern {pattern}, which needs {least} and its far tokens")


def _unsupported(vectors_BHK: Sequence[Tensor | None], kept: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot serve these inputs, or None: the token's vectors, the queries first, and what outlives the step."""
    queries_BHK, *_ = given = [x for x in vectors_BHK if x is not None]
    if queries_BHK.dtype == torch.float64:
        return "the inputs are float64"
    if queries_BHK.shape[-1] not in (16, 32, 64, 128):
        return f"the head size {queries_BHK.shape[-1]} is none of 16, 32, 64 and 128"
    if any(x.stride()[1:] != (x.shape[-1], 1) for x in given) or not all(x.is_contiguous() for x in kept):
        return "the heads of an input, or a state, a cache, the lengths or a rotary table, are not contiguous"
    return None
