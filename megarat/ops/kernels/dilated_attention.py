"""Triton kernels of dilated attention: one online softmax over self, far keys and window; a backward without atomics.

Every kernel works on the range algebra of `megarat.ops.dilated_attention`: the far keys of a sequence (initial and dilated tokens)
are one list sorted by position, of which query i sees those in front of lo = max(0, i - W), and its window is [lo, i]. A program walks
the far tiles and then the window tiles in one loop, reading whole rows of K at their positions, and masks only at the ends of the two
ranges. With W = 0 the wide diagonal tile of a causal kernel disappears altogether: the softmax starts from the query's own key, computed
row by row. Where documents share a sequence, both ranges begin at the query's document.

Backward, three launches, each writing what it alone owns:
  queries  dq, the gate's gradient, delta = rowsum(dout * out), and for W = 0 the own key's part of dk and dv, computed row by row
  window   (W > 0) dk and dv from the queries in [j, j + W], the own one included
  far      dk and dv of the far keys from the queries behind j + W, split over stretches of queries; added to dk and dv at the end

Scores are kept in units of log 2. Letters: B batch, T length, H heads, K channels, F far keys, M queries of a tile, N keys of a tile.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.parts import GradientPlace

LOG2E = 1.4426950408889634
NO_DILATION = 1 << 23  # stands for D = -1: longer than any sequence, and a tile of its multiples still fits 32 bits
LOWEST = tl.constexpr(-1e30)  # a finite "minus infinity": differences of two of them are 0, not NaN
FAR_PROGRAMS = 512  # the far gradient splits its queries until about so many programs exist

Tile = tuple[int, int, int, int, int]

# (M, N, warps, stages, registers a thread); chosen by timing on an H200, and every one fits the 99 KB of shared memory that GPUs of
# compute capability 8.6 or 8.9 have. A forward with few keys a query is bound by memory and wants small tiles, one with many by the
# matrix units; 128 registers instead of some 160 let four programs share a multiprocessor. fp32 tiles serve no training.
FORWARD_TILES = (
    (64, (64, 16, 4, 3, 128)),
    (768, (64, 32, 4, 2, 128)),
    (NO_DILATION, (128, 64, 8, 2, 128)),
)  # (up to so many keys a query, tile)
QUERY_TILES = ((64, (64, 16, 4, 2, 255)), (256, (64, 32, 4, 3, 255)), (1 << 30, (64, 64, 4, 2, 255)))
KEY_TILE = (32, 64, 4, 3, 255)
FP32_TILE = (32, 32, 4, 1, 255)


@triton.jit
def _far_count(lo, dilation, initial):
    """How many keys of the far list lie in front of position lo."""
    return tl.minimum(lo, initial) + tl.maximum(lo // dilation - initial // dilation, 0)


@triton.jit
def _far_position(f, dilation, initial):
    """Position of entry f of the far list."""
    return tl.where(f < initial, f, (initial // dilation + f - initial + 1) * dilation - 1)


@triton.jit
def _rows(ptr, rows, stride, K: tl.constexpr):
    """Pointers to whole rows of K channels."""
    return ptr + rows[:, None] * stride + tl.arange(0, K)[None, :]


@triton.jit
def _documents(starts_ptr, i_M, first, T, M: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where the documents of queries [first, first + M) start: of each (M,), of the first one and of the last one; 0 without documents."""
    if DOCUMENTS:
        start_M = tl.load(starts_ptr + i_M, mask=i_M < T, other=0)
        lowest, highest = tl.load(starts_ptr + first), tl.load(starts_ptr + tl.minimum(first + M, T) - 1)
    else:
        start_M, lowest, highest = tl.zeros([M], tl.int32), 0, 0
    return start_M, lowest, highest


@triton.jit
def _key_tile(
    tile, far_tiles, first, lowest, highest, window, dilation, initial,
    M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the keys that queries [first, first + M) see: positions (N,), whether it is a far tile, and whether some
    query does not see all of it."""
    is_far = tile < far_tiles
    f_N = tile * N + tl.arange(0, N)
    # dilated entries are evenly spaced, and so are window tiles: one product a row whichever it is
    begin, step = (initial // dilation + tile * N - initial + 1) * dilation - 1, dilation
    end = _far_position(tile * N + N - 1, dilation, initial)
    partial = end >= first - window
    if DOCUMENTS:
        partial = partial | (_far_position(tile * N, dilation, initial) < highest)
    if WINDOWED:
        n0 = tl.maximum(tl.maximum(first - window, 0), lowest) + (tile - far_tiles) * N
        begin, step = tl.where(is_far, begin, n0), tl.where(is_far, step, 1)
        cut = (n0 < first + M - 1 - window) | (n0 + N > first)
        if DOCUMENTS:
            cut = cut | (n0 < highest)
        partial = (is_far & partial) | ((tile >= far_tiles) & cut)
        initial = tl.where(is_far, initial, 0)
    j_N = tl.where(f_N < initial, f_N, begin + tl.arange(0, N) * step)
    return j_N, is_far, partial


@triton.jit
def _seen(j_N, is_far, i_M, start_M, window, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(M, N): far keys lie in front of the window, the others inside of it, the own one too; none in front of the query's document."""
    lo_M = tl.maximum(i_M - window, 0)
    if WINDOWED:
        from_M = tl.maximum(tl.where(is_far, 0, lo_M), start_M)
        to_M = tl.where(is_far, lo_M, i_M + 1)
        seen_MN = (j_N[None, :] >= from_M[:, None]) & (j_N[None, :] < to_M[:, None])
    elif DOCUMENTS:
        seen_MN = (j_N[None, :] >= start_M[:, None]) & (j_N[None, :] < lo_M[:, None])
    else:
        seen_MN = j_N[None, :] < lo_M[:, None]
    return seen_MN


@triton.jit
def _tile_counts(first, T, lowest, window, dilation, initial, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr):
    """What queries [first, first + M) walk: the number of their first far tile, the end of the far tiles, and the end of all."""
    last = tl.minimum(first + M, T) - 1
    far_tiles = tl.cdiv(_far_count(tl.maximum(last - window, 0), dilation, initial), N)
    first_tile = tl.minimum(_far_count(lowest, dilation, initial) // N, far_tiles)
    tiles = far_tiles
    if WINDOWED:
        tiles += tl.cdiv(last + 1 - tl.maximum(tl.maximum(first - window, 0), lowest), N)
    return first_tile, far_tiles, tiles


@triton.jit
def _load_keys(k_ptr, v_ptr, j_N, T, k_t, v_t, K: tl.constexpr, WIDE: tl.constexpr):
    """Rows of K and V at positions j; WIDE where a sequence's offsets need 64 bits."""
    in_N1 = (j_N < T)[:, None]
    if WIDE:
        j_N = j_N.to(tl.int64)
    return tl.load(_rows(k_ptr, j_N, k_t, K), mask=in_N1, other=0.0), tl.load(_rows(v_ptr, j_N, v_t, K), mask=in_N1, other=0.0)


@triton.jit
def _dilated_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, starts_ptr, out_ptr, lse_ptr, T, H, dilation, window, initial, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOWED: tl.constexpr, GATED: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest rows of work start first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_M = first + tl.arange(0, M)
    in_M1, local_M = (i_M < T)[:, None], tl.arange(0, M)
    start = first.to(tl.int64)
    q_MK = tl.load(_rows(q_ptr + b * q_b + start * q_t + h * q_h, local_M, q_t, K), mask=in_M1, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    if WINDOWED:
        top_M, sum_M = tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32)
        acc_MK = tl.zeros([M, K], tl.float32)
    else:
        own_k_MK = tl.load(_rows(k_ptr + start * k_t, local_M, k_t, K), mask=in_M1, other=0.0)
        acc_MK = tl.load(_rows(v_ptr + start * v_t, local_M, v_t, K), mask=in_M1, other=0.0).to(tl.float32)
        top_M = tl.sum(q_MK.to(tl.float32) * own_k_MK.to(tl.float32), axis=1) * scale
        sum_M = tl.full([M], 1.0, tl.float32)

    start_M, lowest, highest = _documents(starts_ptr + b * T, i_M, first, T, M, DOCUMENTS)
    first_tile, far_tiles, tiles = _tile_counts(first, T, lowest, window, dilation, initial, M, N, WINDOWED)
    for tile in tl.range(first_tile, tiles):
        j_N, is_far, partial = _key_tile(
            tile, far_tiles, first, lowest, highest, window, dilation, initial, M, N, WINDOWED, DOCUMENTS
        )
        k_NK, v_NK = _load_keys(k_ptr, v_ptr, j_N, T, k_t, v_t, K, WIDE)
        s_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="tf32x3")
        if partial:
            s_MN = tl.where(_seen(j_N, is_far, i_M, start_M, window, WINDOWED, DOCUMENTS), s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, axis=1) * scale)
        p_MN = tl.exp2(s_MN * scale - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        acc_MK = tl.dot(p_MN.to(v_NK.dtype), v_NK, acc_MK * shrink_M[:, None], input_precision="tf32x3")
        top_M, sum_M = new_top_M, sum_M * shrink_M + tl.sum(p_MN, axis=1)

    out_MK = acc_MK / sum_M[:, None]
    if GATED:
        gate_ptr += b * gate_b + start * gate_t + h * gate_h
        out_MK *= tl.sigmoid(tl.load(_rows(gate_ptr, local_M, gate_t, K), mask=in_M1, other=0.0).to(tl.float32))
    out_ptr += ((b * T + start) * H + h) * K
    tl.store(_rows(out_ptr, local_M, H * K, K), out_MK.to(out_ptr.dtype.element_ty), mask=in_M1)
    tl.store(lse_ptr + (b * H + h) * T + i_M, (top_M + tl.log2(sum_M)) / 1.4426950408889634, mask=i_M < T)


@triton.jit
def _dilated_attention_queries_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, starts_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, dgate_t, open_dout_ptr, delta_ptr, T, H, dilation, window, initial, scale, plain_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h,
    dout_b, dout_t, dout_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOWED: tl.constexpr, GATED: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_M = first + tl.arange(0, M)
    in_M1, local_M = (i_M < T)[:, None], tl.arange(0, M)
    start = first.to(tl.int64)
    row_0 = ((b * T + start) * H + h) * K  # of the contiguous tensors
    dout_ptr += b * dout_b + start * dout_t + h * dout_h
    dout_MK = tl.load(_rows(dout_ptr, local_M, dout_t, K), mask=in_M1, other=0.0)
    out_MK = tl.load(_rows(out_ptr + row_0, local_M, H * K, K), mask=in_M1, other=0.0).to(tl.float32)
    delta_M = tl.sum(dout_MK.to(tl.float32) * out_MK, axis=1)
    if GATED:
        # out is the gated output: dout * out sums to the same delta, and the gate's gradient needs nothing else
        gate_ptr += b * gate_b + start * gate_t + h * gate_h
        open_MK = tl.sigmoid(tl.load(_rows(gate_ptr, local_M, gate_t, K), mask=in_M1, other=0.0).to(tl.float32))
        dgate_MK = dout_MK.to(tl.float32) * out_MK * (1.0 - open_MK)
        dgate_ptr += (b * T + start) * dgate_t + h * K
        tl.store(_rows(dgate_ptr, local_M, dgate_t, K), dgate_MK.to(dgate_ptr.dtype.element_ty), mask=in_M1)
        dout_MK = (dout_MK.to(tl.float32) * open_MK).to(dout_MK.dtype)
        tl.store(_rows(open_dout_ptr + row_0, local_M, H * K, K), dout_MK, mask=in_M1)
    if HAS_DLSE:
        delta_M -= tl.load(dlse_ptr + (b * H + h) * T + i_M, mask=i_M < T, other=0.0)
    tl.store(delta_ptr + (b * H + h) * T + i_M, delta_M, mask=i_M < T)
    lse_M = tl.load(lse_ptr + (b * H + h) * T + i_M, mask=i_M < T, other=0.0) * 1.4426950408889634

    q_MK = tl.load(_rows(q_ptr + b * q_b + start * q_t + h * q_h, local_M, q_t, K), mask=in_M1, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    if WINDOWED:
        dq_MK = tl.zeros([M, K], tl.float32)
    else:
        own_k_MK = tl.load(_rows(k_ptr + start * k_t, local_M, k_t, K), mask=in_M1, other=0.0).to(tl.float32)
        own_v_MK = tl.load(_rows(v_ptr + start * v_t, local_M, v_t, K), mask=in_M1, other=0.0).to(tl.float32)
        own_p_M = tl.exp2(tl.sum(q_MK.to(tl.float32) * own_k_MK, axis=1) * scale - lse_M)
        own_ds_M = own_p_M * (tl.sum(dout_MK.to(tl.float32) * own_v_MK, axis=1) - delta_M)
        dk_MK = q_MK.to(tl.float32) * (own_ds_M * plain_scale)[:, None]
        dv_MK = dout_MK.to(tl.float32) * own_p_M[:, None]
        tl.store(_rows(dk_ptr + row_0, local_M, H * K, K), dk_MK.to(dk_ptr.dtype.element_ty), mask=in_M1)
        tl.store(_rows(dv_ptr + row_0, local_M, H * K, K), dv_MK.to(dv_ptr.dtype.element_ty), mask=in_M1)
        dq_MK = own_k_MK * own_ds_M[:, None]

    start_M, lowest, highest = _documents(starts_ptr + b * T, i_M, first, T, M, DOCUMENTS)
    first_tile, far_tiles, tiles = _tile_counts(first, T, lowest, window, dilation, initial, M, N, WINDOWED)
    for tile in tl.range(first_tile, tiles):
        j_N, is_far, partial = _key_tile(
            tile, far_tiles, first, lowest, highest, window, dilation, initial, M, N, WINDOWED, DOCUMENTS
        )
        k_NK, v_NK = _load_keys(k_ptr, v_ptr, j_N, T, k_t, v_t, K, WIDE)
        p_MN = tl.exp2(tl.dot(q_MK, tl.trans(k_NK), input_precision="tf32x3") * scale - lse_M[:, None])
        if partial:
            p_MN = tl.where(_seen(j_N, is_far, i_M, start_M, window, WINDOWED, DOCUMENTS), p_MN, 0.0)
        ds_MN = p_MN * (tl.dot(dout_MK, tl.trans(v_NK), input_precision="tf32x3") - delta_M[:, None])
        dq_MK = tl.dot(ds_MN.to(k_NK.dtype), k_NK, dq_MK, input_precision="tf32x3")
    dq_MK *= plain_scale
    tl.store(_rows(dq_ptr + row_0, local_M, H * K, K), dq_MK.to(dq_ptr.dtype.element_ty), mask=in_M1)


@triton.jit
def _dilated_attention_keys_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, H, keys, dilation, window, initial, scale, plain_scale, stretch, split_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dout_b, dout_t, dout_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr, DOCUMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys: of the far list (FAR; from queries behind j + W) or of all keys (from those in [j, j + W]).

    FAR programs see the queries of one stretch only and store fp32 partial sums into their own slab.
    """
    n_first, split = tl.program_id(0) * N, tl.program_id(2)
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    n_N = n_first + tl.arange(0, N)
    in_N1 = (n_N < keys)[:, None]
    last = tl.minimum(n_first + N, keys) - 1
    if FAR:
        j_N = _far_position(n_N, dilation, initial)
        begin = tl.maximum(_far_position(n_first, dilation, initial) + window + 1, split * stretch)
        everyone = _far_position(last, dilation, initial) + window + 1  # from here on every query sees every key of the tile
        end = tl.minimum(T, (split + 1) * stretch)
    else:
        j_N = n_N
        begin, end = n_first, tl.minimum(T, last + window + 1)
        everyone = last  # queries in [last, first key + W] see every key of the tile
    if DOCUMENTS:
        starts_ptr += b * T
        shared_until = tl.load(ends_ptr + b * T + (_far_position(n_first, dilation, initial) if FAR else n_first))
        end = tl.minimum(end, tl.load(ends_ptr + b * T + (_far_position(last, dilation, initial) if FAR else last)))
    k_NK = tl.load(_rows(k_ptr + b * k_b + h * k_h, j_N.to(tl.int64), k_t, K), mask=in_N1, other=0.0)
    v_NK = tl.load(_rows(v_ptr + b * v_b + h * v_h, j_N.to(tl.int64), v_t, K), mask=in_N1, other=0.0)
    dk_NK, dv_NK = tl.zeros([N, K], tl.float32), tl.zeros([N, K], tl.float32)
    q_ptr += b * q_b + h * q_h
    dout_ptr += b * dout_b + h * dout_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    for i0 in tl.range(begin, end, M):
        i_M = i0 + tl.arange(0, M)
        in_M = i_M < end
        row_M = i_M
        if WIDE:
            row_M = i_M.to(tl.int64)
        q_MK = tl.load(_rows(q_ptr, row_M, q_t, K), mask=in_M[:, None], other=0.0)
        dout_MK = tl.load(_rows(dout_ptr, row_M, dout_t, K), mask=in_M[:, None], other=0.0)
        lse_M = tl.load(lse_ptr + i_M, mask=in_M, other=float("inf")) * 1.4426950408889634
        delta_M = tl.load(delta_ptr + i_M, mask=in_M, other=0.0)
        # a query outside of the sequence has lse = inf, hence weight 0
        p_NM = tl.exp2(tl.dot(k_NK, tl.trans(q_MK), input_precision="tf32x3") * scale - lse_M[None, :])
        if FAR:
            if i0 < everyone:
                p_NM = tl.where(i_M[None, :] > j_N[:, None] + window, p_NM, 0.0)
        else:
            if (i0 < everyone) | (i0 + M - 1 > n_first + window):
                p_NM = tl.where((i_M[None, :] >= j_N[:, None]) & (i_M[None, :] <= j_N[:, None] + window), p_NM, 0.0)
        if DOCUMENTS:  # noqa: SIM102 (decided when the kernel is compiled, the next line when it runs)
            if i0 + M > shared_until:
                start_M = tl.load(starts_ptr + i_M, mask=in_M, other=0)
                p_NM = tl.where(start_M[None, :] <= j_N[:, None], p_NM, 0.0)
        dv_NK = tl.dot(p_NM.to(dout_MK.dtype), dout_MK, dv_NK, input_precision="tf32x3")
        ds_NM = p_NM * (tl.dot(v_NK, tl.trans(dout_MK), input_precision="tf32x3") - delta_M[None, :])
        dk_NK = tl.dot(ds_NM.to(q_MK.dtype), q_MK, dk_NK, input_precision="tf32x3")
    dk_NK *= plain_scale
    at = split * split_stride.to(tl.int64) + (b * keys * H + h) * K
    tl.store(_rows(dk_ptr + at, n_N.to(tl.int64), H * K, K), dk_NK.to(dk_ptr.dtype.element_ty), mask=in_N1)
    tl.store(_rows(dv_ptr + at, n_N.to(tl.int64), H * K, K), dv_NK.to(dv_ptr.dtype.element_ty), mask=in_N1)


@triton.jit
def _dilated_attention_far_kernel(
    dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr, T, F, C, dilation, initial, splits, split_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """dk, dv at the far positions += the sum of their partial gradients, in one fixed order."""
    f, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = (b * T + _far_position(f, dilation, initial)) * C + c
    dk = tl.load(dk_ptr + at, mask=c < C, other=0.0).to(tl.float32)
    dv = tl.load(dv_ptr + at, mask=c < C, other=0.0).to(tl.float32)
    part = (b * F + f) * C + c
    for split in range(splits):
        dk += tl.load(dk_parts_ptr + split * split_stride.to(tl.int64) + part, mask=c < C, other=0.0)
        dv += tl.load(dv_parts_ptr + split * split_stride.to(tl.int64) + part, mask=c < C, other=0.0)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=c < C)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=c < C)


def _pattern_arguments(pattern: tuple[int, int, int]) -> dict[str, int]:
    dilation, window, initial = pattern
    return {"dilation": NO_DILATION if dilation == -1 else min(dilation, NO_DILATION), "window": window, "initial": initial}


def _far_keys(length: int, pattern: tuple[int, int, int]) -> int:
    """Length F of the far list of a sequence."""
    dilation, _, initial = pattern
    return min(initial, length) + (0 if dilation == -1 else max(0, length // dilation - initial // dilation))


def _tile(table: tuple[tuple[int, Tile], ...], length: int, pattern: tuple[int, int, int], dtype: torch.dtype) -> Tile:
    """The tile of a table for so many keys a query as this pattern shows on average."""
    if dtype == torch.float32:
        return FP32_TILE
    keys = _far_keys(length, pattern) // 2 + min(pattern[1], length)
    return next(tile for limit, tile in table if keys <= limit)


def _tile_options(tile: Tile) -> dict[str, int]:
    return dict(zip(("M", "N", "num_warps", "num_stages", "maxnreg"), tile, strict=True))


def _is_wide(*tensors_BTHK: Tensor) -> bool:
    """Whether offsets inside of one sequence need 64 bits."""
    return any(x.shape[1] * x.stride(1) >= 1 << 31 for x in tensors_BTHK)


def _strides(**tensors_BTHK: Tensor) -> dict[str, int]:
    """Strides over B, T and H by the kernels' argument names."""
    return {f"{name}_{axis}": x.stride(d) for name, x in tensors_BTHK.items() for d, axis in enumerate("bth")}


def attention_forward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    gate_BTHK: Tensor | None,
    starts_BT: Tensor | None,
    pattern: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launches the forward: (out_BTHK, gated if a gate is given; lse_BHT fp32).

    starts_BT: int32, the position at which each token's document starts, or None for whole sequences.
    """
    batch, length, heads, channels = q_BTHK.shape
    tile = _tile(FORWARD_TILES, length, pattern, q_BTHK.dtype)
    out_BTHK = torch.empty(q_BTHK.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
    lse_BHT = torch.empty(batch, heads, length, dtype=torch.float32, device=q_BTHK.device)
    gate = q_BTHK if gate_BTHK is None else gate_BTHK
    _dilated_attention_forward_kernel[(triton.cdiv(length, tile[0]), batch * heads)](
        q_BTHK, k_BTHK, v_BTHK, gate, lse_BHT if starts_BT is None else starts_BT, out_BTHK, lse_BHT, length, heads,
        **_pattern_arguments(pattern), scale=scale * LOG2E, **_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, gate=gate),
        K=channels, WINDOWED=pattern[1] > 0, GATED=gate_BTHK is not None, DOCUMENTS=starts_BT is not None,
        WIDE=_is_wide(k_BTHK, v_BTHK), **_tile_options(tile),
    )  # fmt: skip
    return out_BTHK, lse_BHT


def attention_backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    gate_BTHK: Tensor | None,
    starts_BT: Tensor | None,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
    dout_BTHK: Tensor,
    dlse_BHT: Tensor | None,
    pattern: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launches the backward: (dq, dk, dv, gradient of the gate or None)."""
    batch, length, heads, channels = q_BTHK.shape
    tile = _tile(QUERY_TILES, length, pattern, q_BTHK.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHK, k_BTHK, v_BTHK))
    gated = gate_BTHK is not None
    gate = q_BTHK if gate_BTHK is None else gate_BTHK
    place = GradientPlace.of(gate).claimed()
    dgate = dq if gate_BTHK is None else place.empty()
    open_dout = torch.empty_like(out_BTHK) if gated else dout_BTHK
    delta_BHT = torch.empty_like(lse_BHT)
    shared = {**_pattern_arguments(pattern), "scale": scale * LOG2E, "plain_scale": scale}
    documents = {"DOCUMENTS": starts_BT is not None, "WIDE": _is_wide(q_BTHK, k_BTHK, v_BTHK, open_dout)}
    _dilated_attention_queries_kernel[(triton.cdiv(length, tile[0]), batch * heads)](
        q_BTHK, k_BTHK, v_BTHK, gate, lse_BHT if starts_BT is None else starts_BT, out_BTHK, lse_BHT, dout_BTHK,
        lse_BHT if dlse_BHT is None else dlse_BHT, dq, dk, dv, dgate, place.row_stride, open_dout, delta_BHT, length, heads, **shared,
        **_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, gate=gate, dout=dout_BTHK),
        K=channels, WINDOWED=pattern[1] > 0, GATED=gated, HAS_DLSE=dlse_BHT is not None, **documents, **_tile_options(tile),
    )  # fmt: skip
    options = {"K": channels, **documents, **_tile_options(FP32_TILE if q_BTHK.dtype == torch.float32 else KEY_TILE)}
    bounds = (lse_BHT, lse_BHT) if starts_BT is None else (starts_BT, _document_ends(starts_BT))
    if pattern[1] > 0:
        _dilated_attention_keys_kernel[(triton.cdiv(length, options["N"]), batch * heads, 1)](
            q_BTHK, k_BTHK, v_BTHK, *bounds, open_dout, lse_BHT, delta_BHT, dk, dv, length, heads, length, **shared,
            stretch=length, split_stride=0, **_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, dout=open_dout),
            FAR=False, **options,
        )  # fmt: skip
    far = _far_keys(length, pattern)
    if far > 0:
        _add_far_gradient(dk, dv, q_BTHK, k_BTHK, v_BTHK, bounds, open_dout, lse_BHT, delta_BHT, far, shared, options)
    return dq, dk, dv, dgate if gated else None


def _document_ends(starts_BT: Tensor) -> Tensor:
    """The position behind each token's document, from the positions at which the documents start; int32."""
    length = starts_BT.shape[1]
    begins_BT = starts_BT == torch.arange(length, dtype=torch.int32, device=starts_BT.device)
    next_BT = torch.where(begins_BT, starts_BT, length)[:, 1:]  # where the next token begins a document, that is the end
    ends_BT = torch.nn.functional.pad(next_BT, (0, 1), value=length)
    return ends_BT.flip(1).cummin(1).values.flip(1).contiguous()


def _add_far_gradient(
    dk: Tensor,
    dv: Tensor,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    bounds: tuple[Tensor, Tensor],
    dout_BTHK: Tensor,
    lse_BHT: Tensor,
    delta_BHT: Tensor,
    far: int,
    shared: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Adds the far keys' gradients to dk and dv, in place."""
    batch, length, heads, channels = q_BTHK.shape
    tiles = triton.cdiv(far, options["N"])
    splits = max(1, min(FAR_PROGRAMS // (tiles * batch * heads), triton.cdiv(length, 4 * options["M"])))
    stretch = triton.cdiv(triton.cdiv(length, splits), options["M"]) * options["M"]
    parts = torch.empty(2, splits, batch, far, heads, channels, dtype=torch.float32, device=q_BTHK.device)
    split_stride = parts.stride(1)
    _dilated_attention_keys_kernel[(tiles, batch * heads, splits)](
        q_BTHK, k_BTHK, v_BTHK, *bounds, dout_BTHK, lse_BHT, delta_BHT, parts[0], parts[1], length, heads, far, **shared,
        stretch=stretch, split_stride=split_stride, **_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, dout=dout_BTHK),
        FAR=True, **options,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(heads * channels))
    _dilated_attention_far_kernel[(far, batch, triton.cdiv(heads * channels, block))](
        dk, dv, parts[0], parts[1], length, far, heads * channels, shared["dilation"], shared["initial"], splits, split_stride,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


class DilatedAttention(torch.autograd.Function):
    """Autograd around the launches; outputs (out_BTHK, lse_BHT), both differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        gate_BTHK: Tensor | None,
        starts_BT: Tensor | None,
        pattern: tuple[int, int, int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Launches the forward and keeps its inputs and per-row results."""
        out_BTHK, lse_BHT = attention_forward(q_BTHK, k_BTHK, v_BTHK, gate_BTHK, starts_BT, pattern, scale)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHK, gate_BTHK, starts_BT, out_BTHK, lse_BHT)
        ctx.pattern, ctx.scale = pattern, scale
        ctx.set_materialize_grads(False)
        return out_BTHK, lse_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHK: Tensor | None, dlse_BHT: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launches the backward."""
        q_BTHK, k_BTHK, v_BTHK, gate_BTHK, starts_BT, out_BTHK, lse_BHT = ctx.saved_tensors
        dout_BTHK = torch.zeros_like(out_BTHK) if dout_BTHK is None else dout_BTHK
        dout_BTHK = dout_BTHK if dout_BTHK.stride(-1) == 1 else dout_BTHK.contiguous()
        dlse_BHT = None if dlse_BHT is None else dlse_BHT.contiguous()
        gradients = attention_backward(
            q_BTHK, k_BTHK, v_BTHK, gate_BTHK, starts_BT, out_BTHK, lse_BHT, dout_BTHK, dlse_BHT, ctx.pattern, ctx.scale
        )
        return (*gradients, None, None, None)
