"""Triton kernels of a decode step: gate, state, rotary, attention over the sparse cache, output gate and cache write.

One program per sequence, head and split of the visible slots. One query has one multiply-add per cached element, so the kernel is a
stream of bytes: each of the N rows of a tile keeps its own online softmax and its own accumulator, and rows meet only once, at the
end. All sizes come from `lengths` on the device. With one split the program also writes the cache, behind its own reads; with more, a
second launch combines the parts and writes, because the ring slot the new token takes is still read by some split.

Letters: H heads, K channels, R = K / 2, N cache slots of a tile, S slots of the cache.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
# (up to so many cache slots, (slots N of a tile, warps, load stages)); chosen by timing on an H200
TILES = ((128, (16, 2, 2)), (1024, (32, 2, 3)), (1 << 30, (64, 4, 3)))
PROGRAMS = 528  # splits are added until there are about four programs for each of an H200's 132 multiprocessors
LOWEST = tl.constexpr(-1e30)  # a finite "minus infinity": differences of two of them are 0, not NaN


@triton.jit
def _rotate(x_K, partner_K, cos_K, sin_K, c_K, R: tl.constexpr):
    """Rotary of a vector, its partner channels (c + R) mod K given beside it."""
    return x_K * cos_K + tl.where(c_K < R, -partner_K, partner_K) * sin_K


@triton.jit
def _write_cache(
    k_cache_ptr, v_cache_ptr, k_K, v_K, t, dilation, window, initial, S, c_K, K: tl.constexpr
):  # fmt: skip
    """The current token into each slot that is its own: initial, ring, far."""
    k_new, v_new = k_K.to(k_cache_ptr.dtype.element_ty), v_K.to(v_cache_ptr.dtype.element_ty)
    tl.store(k_cache_ptr + t * K + c_K, k_new, mask=c_K * 0 + t < initial)
    tl.store(v_cache_ptr + t * K + c_K, v_new, mask=c_K * 0 + t < initial)
    if window > 0:
        ring = initial + t % window
        tl.store(k_cache_ptr + ring * K + c_K, k_new)
        tl.store(v_cache_ptr + ring * K + c_K, v_new)
    far = initial + window + (t + 1) // dilation - 1 - initial // dilation
    keeps = ((t + 1) % dilation == 0) & (t >= initial) & (far < S)
    tl.store(k_cache_ptr + far * K + c_K, k_new, mask=(c_K >= 0) & keeps)
    tl.store(v_cache_ptr + far * K + c_K, v_new, mask=(c_K >= 0) & keeps)


@triton.jit
def _decode_step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, gate_ptr, cos_ptr, sin_ptr, state_k_ptr, state_v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr,
    out_ptr, part_ptr, H, S, dilation, window, initial, scale, q_b, k_b, v_b, g_b, gate_b, splits,
    K: tl.constexpr, R: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """part_ptr: (B, H, splits, K + 2) fp32 and then (B, H, 2, K) for the current key and value; unused without splits."""
    b, h, split = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    c_K = tl.arange(0, K)
    partner_K = (c_K + R) % K
    t = tl.load(lengths_ptr + b).to(tl.int32)
    cos_K, sin_K = tl.load(cos_ptr + t * R + c_K % R), tl.load(sin_ptr + t * R + c_K % R)
    q_ptr += b * q_b + h * K
    q_K = _rotate(tl.load(q_ptr + c_K).to(tl.float32), tl.load(q_ptr + partner_K).to(tl.float32), cos_K, sin_K, c_K, R)
    # rounded as the prefill's rotated queries and keys are
    q_K = q_K.to(q_ptr.dtype.element_ty).to(tl.float32) * scale

    # one step of the recurrence, its partner channels beside it for the rotation
    row = (b * H + h).to(tl.int64)
    g_ptr += b * g_b + h * K
    k_ptr += b * k_b + h * K
    u_K = 1.0 / (1.0 + tl.exp(tl.load(g_ptr + c_K).to(tl.float32)))
    u_partner_K = 1.0 / (1.0 + tl.exp(tl.load(g_ptr + partner_K).to(tl.float32)))
    old_k_K, old_partner_K = tl.load(state_k_ptr + row * K + c_K), tl.load(state_k_ptr + row * K + partner_K)
    old_v_K = tl.load(state_v_ptr + row * K + c_K)
    state_k_K = old_k_K + u_K * (tl.load(k_ptr + c_K).to(tl.float32) - old_k_K)
    state_partner_K = old_partner_K + u_partner_K * (tl.load(k_ptr + partner_K).to(tl.float32) - old_partner_K)
    state_v_K = old_v_K + u_K * (tl.load(v_ptr + b * v_b + h * K + c_K).to(tl.float32) - old_v_K)
    own_k_K = _rotate(state_k_K, state_partner_K, cos_K, sin_K, c_K, R).to(k_ptr.dtype.element_ty).to(tl.float32)
    own_v_K = state_v_K.to(v_ptr.dtype.element_ty).to(tl.float32)

    lo = tl.maximum(t - window, 0)
    far = tl.maximum(lo // dilation - initial // dilation, 0)
    slots = tl.minimum(initial + window + far, S)
    share = tl.cdiv(tl.cdiv(slots, splits), N) * N
    n_N = tl.arange(0, N)
    top_N, sum_N = tl.full([N], LOWEST, tl.float32), tl.zeros([N], tl.float32)
    acc_NK = tl.zeros([N, K], tl.float32)
    k_cache_ptr += row * S * K
    v_cache_ptr += row * S * K
    for n0 in tl.range(split * share, tl.minimum((split + 1) * share, slots), N, num_stages=STAGES):
        slot_N = n0 + n_N
        in_ring_N = (slot_N >= initial) & (slot_N < initial + tl.minimum(window, t))
        in_far_N = (slot_N >= initial + window) & (slot_N < slots)
        seen_N = (slot_N < tl.minimum(initial, lo)) | in_ring_N | in_far_N
        at_NK = slot_N[:, None] * K + c_K[None, :]
        k_NK = tl.load(k_cache_ptr + at_NK, mask=seen_N[:, None], other=0.0).to(tl.float32)
        v_NK = tl.load(v_cache_ptr + at_NK, mask=seen_N[:, None], other=0.0).to(tl.float32)
        s_N = tl.where(seen_N, tl.sum(q_K[None, :] * k_NK, axis=1), float("-inf"))
        new_top_N = tl.maximum(top_N, s_N)
        shrink_N, p_N = tl.exp2(top_N - new_top_N), tl.exp2(s_N - new_top_N)
        acc_NK = acc_NK * shrink_N[:, None] + p_N[:, None] * v_NK
        sum_N = sum_N * shrink_N + p_N
        top_N = new_top_N

    own = tl.where(split == 0, tl.sum(q_K * own_k_K, axis=0), LOWEST)
    top = tl.maximum(tl.max(top_N, axis=0), own)
    rows_N, own_p = tl.exp2(top_N - top), tl.where(split == 0, tl.exp2(own - top), 0.0)
    total = tl.sum(sum_N * rows_N, axis=0) + own_p
    acc_K = tl.sum(acc_NK * rows_N[:, None], axis=0) + own_p * own_v_K
    if SPLIT:
        part_ptr += (row * splits + split) * (K + 2)
        tl.store(part_ptr + c_K, acc_K)
        tl.store(part_ptr + K, top)
        tl.store(part_ptr + K + 1, total)
        if split == 0:
            own_ptr = part_ptr + (tl.num_programs(0) * splits - row * splits) * (K + 2) + row * 2 * K
            tl.store(own_ptr + c_K, state_k_K)
            tl.store(own_ptr + K + c_K, state_v_K)
    else:
        out_K = acc_K / total
        if GATED:
            out_K *= tl.sigmoid(tl.load(gate_ptr + b * gate_b + h * K + c_K).to(tl.float32))
        tl.store(out_ptr + row * K + c_K, out_K.to(out_ptr.dtype.element_ty))
        tl.debug_barrier()  # every thread has read the ring and the state before one of them overwrites either
        tl.store(state_k_ptr + row * K + c_K, state_k_K)
        tl.store(state_v_ptr + row * K + c_K, state_v_K)
        _write_cache(k_cache_ptr, v_cache_ptr, own_k_K, own_v_K, t, dilation, window, initial, S, c_K, K)


@triton.jit
def _decode_combine_kernel(
    gate_ptr, cos_ptr, sin_ptr, state_k_ptr, state_v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, out_ptr, part_ptr,
    H, S, dilation, window, initial, gate_b, splits, K: tl.constexpr, R: tl.constexpr, P: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Joins the splits (at most P), then writes state and cache."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.program_id(0).to(tl.int64)
    c_K, s_P = tl.arange(0, K), tl.arange(0, P)
    t = tl.load(lengths_ptr + b).to(tl.int32)
    own_ptr = part_ptr + tl.num_programs(0).to(tl.int64) * splits * (K + 2) + row * 2 * K
    part_ptr += (row * splits + s_P) * (K + 2)
    top_P = tl.load(part_ptr + K, mask=s_P < splits, other=LOWEST)
    weight_P = tl.exp2(top_P - tl.max(top_P, axis=0))
    total = tl.sum(weight_P * tl.load(part_ptr + K + 1, mask=s_P < splits, other=0.0), axis=0)
    acc_PK = tl.load(part_ptr[:, None] + c_K[None, :], mask=(s_P < splits)[:, None], other=0.0)
    out_K = tl.sum(acc_PK * weight_P[:, None], axis=0) / total
    if GATED:
        out_K *= tl.sigmoid(tl.load(gate_ptr + b * gate_b + h * K + c_K).to(tl.float32))
    tl.store(out_ptr + row * K + c_K, out_K.to(out_ptr.dtype.element_ty))
    cos_K, sin_K = tl.load(cos_ptr + t * R + c_K % R), tl.load(sin_ptr + t * R + c_K % R)
    state_k_K, state_v_K = tl.load(own_ptr + c_K), tl.load(own_ptr + K + c_K)
    own_k_K = _rotate(state_k_K, tl.load(own_ptr + (c_K + R) % K), cos_K, sin_K, c_K, R)
    tl.store(state_k_ptr + row * K + c_K, state_k_K)
    tl.store(state_v_ptr + row * K + c_K, state_v_K)
    at = row * S * K
    _write_cache(k_cache_ptr + at, v_cache_ptr + at, own_k_K, state_v_K, t, dilation, window, initial, S, c_K, K)


def launch_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHK: Tensor,
    g_BHK: Tensor,
    gate_BHK: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    state: tuple[Tensor, Tensor],
    k_cache_BHSK: Tensor,
    v_cache_BHSK: Tensor,
    lengths_B: Tensor,
    pattern: tuple[int, int, int],
    scale: float,
) -> Tensor:
    """Launches one step for every sequence; state and caches change in place. Returns out_BHK."""
    batch, heads, channels = q_BHK.shape
    slots, (dilation, window, initial) = k_cache_BHSK.shape[2], pattern
    tile, warps, stages = next(tile for limit, tile in TILES if slots <= limit)
    splits = max(1, min(PROGRAMS // (batch * heads), triton.cdiv(slots, 2 * tile), 64))
    out_BHK = torch.empty(q_BHK.shape, dtype=q_BHK.dtype, device=q_BHK.device)
    parts = out_BHK
    if splits > 1:
        parts = torch.empty(batch * heads * (splits * (channels + 2) + 2 * channels), dtype=torch.float32, device=q_BHK.device)
    gate = q_BHK if gate_BHK is None else gate_BHK
    shared = {
        "H": heads, "S": slots, "dilation": 1 << 30 if dilation == -1 else min(dilation, 1 << 30), "window": window, "initial": initial,
        "gate_b": gate.stride(0), "splits": splits, "K": channels, "R": channels // 2, "GATED": gate_BHK is not None,
    }  # fmt: skip
    caches = (k_cache_BHSK, v_cache_BHSK, lengths_B)
    _decode_step_kernel[(batch * heads, splits)](
        q_BHK, k_BHK, v_BHK, g_BHK, gate, cos_TR, sin_TR, *state, *caches, out_BHK, parts, scale=scale * LOG2E,
        q_b=q_BHK.stride(0), k_b=k_BHK.stride(0), v_b=v_BHK.stride(0), g_b=g_BHK.stride(0),
        N=tile, STAGES=stages, SPLIT=splits > 1, num_warps=warps, **shared,
    )  # fmt: skip
    if splits > 1:
        _decode_combine_kernel[(batch * heads,)](
            gate, cos_TR, sin_TR, *state, *caches, out_BHK, parts, P=triton.next_power_of_2(splits), num_warps=4, **shared
        )
    return out_BHK
