"""Triton kernels of dilated attention: one online softmax over self, far keys and window; a backward without atomics.

Every kernel works on the range algebra of `megarat.ops.dilated_attention`: the far keys of a sequence (initial and dilated tokens)
are one list sorted by position, of which query i sees the first `far_count(i - W)`; so far tiles need a mask only at their end. The
softmax starts from the query's own key, computed row by row: it is always visible, hence no row is ever empty, and with W = 0 the
128-wide diagonal tile of a causal kernel disappears altogether.

Backward, three launches, each writing what it alone owns:
  queries  dq, the gate's gradient, delta = rowsum(dout * out), and for W = 0 the own key's part of dk and dv
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
from torch.autograd.function import once_differentiable

from megarat.ops.dilated_attention import far_positions

LOG2E = 1.4426950408889634
NO_DILATION = 1 << 30  # stands for D = -1: no position of a real sequence is a multiple of it
FAR_PROGRAMS = 512  # the far gradient splits its queries until about so many programs exist

# (M, N, warps, stages); chosen by timing on an H200
FORWARD_TILE = (128, 64, 8, 3)
QUERY_TILE = (64, 64, 4, 2)
KEY_TILE = (64, 64, 4, 2)


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
def _attend(
    acc_MK, top_M, sum_M, q_MK, k_ptr, v_ptr, k_t, v_t, begin, end, rows, from_M, below_M, all_from, all_below, scale,
    K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end) of `rows`, of which row m sees [from_M, below_M), and every row [all_from, all_below)."""
    for n0 in tl.range(begin, end, N):
        n_N = n0 + tl.arange(0, N)
        in_N1 = (n_N < rows)[:, None]
        k_NK = tl.load(_rows(k_ptr, n_N.to(tl.int64), k_t, K), mask=in_N1, other=0.0)
        v_NK = tl.load(_rows(v_ptr, n_N.to(tl.int64), v_t, K), mask=in_N1, other=0.0)
        s_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision="ieee") * scale
        if (n0 < all_from) | (n0 + N > all_below):
            s_MN = tl.where((n_N[None, :] >= from_M[:, None]) & (n_N[None, :] < below_M[:, None]), s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, axis=1))
        p_MN = tl.exp2(s_MN - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        acc_MK = tl.dot(p_MN.to(v_NK.dtype), v_NK, acc_MK * shrink_M[:, None], input_precision="ieee")
        top_M, sum_M = new_top_M, sum_M * shrink_M + tl.sum(p_MN, axis=1)
    return acc_MK, top_M, sum_M


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, k_far_ptr, v_far_ptr, gate_ptr, out_ptr, lse_ptr, T, H, F, dilation, window, initial, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, kf_b, kf_t, kf_h, vf_b, vf_t, vf_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest rows of work start first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    i_M = first + tl.arange(0, M)
    in_M1, local_M = (i_M < T)[:, None], tl.arange(0, M)
    start = first.to(tl.int64)
    q_MK = tl.load(_rows(q_ptr + b * q_b + start * q_t + h * q_h, local_M, q_t, K), mask=in_M1, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    own_k_MK = tl.load(_rows(k_ptr + start * k_t, local_M, k_t, K), mask=in_M1, other=0.0)
    own_v_MK = tl.load(_rows(v_ptr + start * v_t, local_M, v_t, K), mask=in_M1, other=0.0)
    top_M = tl.sum(q_MK.to(tl.float32) * own_k_MK.to(tl.float32), axis=1) * scale
    sum_M = tl.full([M], 1.0, tl.float32)
    acc_MK = own_v_MK.to(tl.float32)

    far_M = _far_count(tl.maximum(i_M - window, 0), dilation, initial)
    far_all = _far_count(tl.maximum(first - window, 0), dilation, initial)
    far_any = tl.minimum(_far_count(tl.maximum(first + M - 1 - window, 0), dilation, initial), F)
    acc_MK, top_M, sum_M = _attend(
        acc_MK, top_M, sum_M, q_MK, k_far_ptr + b * kf_b + h * kf_h, v_far_ptr + b * vf_b + h * vf_h, kf_t, vf_t,
        0, far_any, F, far_M * 0, far_M, 0, far_all, scale, K, N,
    )  # fmt: skip
    if WINDOWED:
        acc_MK, top_M, sum_M = _attend(
            acc_MK, top_M, sum_M, q_MK, k_ptr, v_ptr, k_t, v_t, tl.maximum(first - window, 0), tl.minimum(first + M, T), T,
            i_M - window, i_M, first + M - 1 - window, first, scale, K, N,
        )  # fmt: skip

    out_MK = acc_MK / sum_M[:, None]
    if GATED:
        gate_ptr += b * gate_b + start * gate_t + h * gate_h
        out_MK *= tl.sigmoid(tl.load(_rows(gate_ptr, local_M, gate_t, K), mask=in_M1, other=0.0).to(tl.float32))
    out_ptr += ((b * T + start) * H + h) * K
    tl.store(_rows(out_ptr, local_M, H * K, K), out_MK.to(out_ptr.dtype.element_ty), mask=in_M1)
    tl.store(lse_ptr + (b * H + h) * T + i_M, (top_M + tl.log2(sum_M)) / 1.4426950408889634, mask=i_M < T)


@triton.jit
def _query_gradient(
    dq_MK, q_MK, dout_MK, lse_M, delta_M, k_ptr, v_ptr, k_t, v_t, begin, end, rows, from_M, below_M, all_from, all_below, scale,
    K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, end) to dq, in units of 1 / score scale; the ranges are those of `_attend`."""
    for n0 in tl.range(begin, end, N):
        n_N = n0 + tl.arange(0, N)
        in_N1 = (n_N < rows)[:, None]
        k_NK = tl.load(_rows(k_ptr, n_N.to(tl.int64), k_t, K), mask=in_N1, other=0.0)
        v_NK = tl.load(_rows(v_ptr, n_N.to(tl.int64), v_t, K), mask=in_N1, other=0.0)
        p_MN = tl.exp2(tl.dot(q_MK, tl.trans(k_NK), input_precision="ieee") * scale - lse_M[:, None])
        if (n0 < all_from) | (n0 + N > all_below):
            p_MN = tl.where((n_N[None, :] >= from_M[:, None]) & (n_N[None, :] < below_M[:, None]), p_MN, 0.0)
        ds_MN = p_MN * (tl.dot(dout_MK, tl.trans(v_NK), input_precision="ieee") - delta_M[:, None])
        dq_MK = tl.dot(ds_MN.to(k_NK.dtype), k_NK, dq_MK, input_precision="ieee")
    return dq_MK


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, k_far_ptr, v_far_ptr, gate_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, open_dout_ptr, delta_ptr, T, H, F, dilation, window, initial, scale, plain_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, kf_b, kf_t, kf_h, vf_b, vf_t, vf_h, gate_b, gate_t, gate_h,
    dout_b, dout_t, dout_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr, GATED: tl.constexpr, HAS_DLSE: tl.constexpr,
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
        tl.store(_rows(dgate_ptr + row_0, local_M, H * K, K), dgate_MK.to(dgate_ptr.dtype.element_ty), mask=in_M1)
        dout_MK = (dout_MK.to(tl.float32) * open_MK).to(dout_MK.dtype)
        tl.store(_rows(open_dout_ptr + row_0, local_M, H * K, K), dout_MK, mask=in_M1)
    if HAS_DLSE:
        delta_M -= tl.load(dlse_ptr + (b * H + h) * T + i_M, mask=i_M < T, other=0.0)
    tl.store(delta_ptr + (b * H + h) * T + i_M, delta_M, mask=i_M < T)
    lse_M = tl.load(lse_ptr + (b * H + h) * T + i_M, mask=i_M < T, other=0.0) * 1.4426950408889634

    q_MK = tl.load(_rows(q_ptr + b * q_b + start * q_t + h * q_h, local_M, q_t, K), mask=in_M1, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    own_k_MK = tl.load(_rows(k_ptr + start * k_t, local_M, k_t, K), mask=in_M1, other=0.0).to(tl.float32)
    own_v_MK = tl.load(_rows(v_ptr + start * v_t, local_M, v_t, K), mask=in_M1, other=0.0).to(tl.float32)
    own_p_M = tl.exp2(tl.sum(q_MK.to(tl.float32) * own_k_MK, axis=1) * scale - lse_M)
    own_ds_M = own_p_M * (tl.sum(dout_MK.to(tl.float32) * own_v_MK, axis=1) - delta_M)
    if not WINDOWED:
        dk_MK = q_MK.to(tl.float32) * (own_ds_M * plain_scale)[:, None]
        dv_MK = dout_MK.to(tl.float32) * own_p_M[:, None]
        tl.store(_rows(dk_ptr + row_0, local_M, H * K, K), dk_MK.to(dk_ptr.dtype.element_ty), mask=in_M1)
        tl.store(_rows(dv_ptr + row_0, local_M, H * K, K), dv_MK.to(dv_ptr.dtype.element_ty), mask=in_M1)
    dq_MK = own_k_MK * own_ds_M[:, None]

    far_M = _far_count(tl.maximum(i_M - window, 0), dilation, initial)
    far_all = _far_count(tl.maximum(first - window, 0), dilation, initial)
    far_any = tl.minimum(_far_count(tl.maximum(first + M - 1 - window, 0), dilation, initial), F)
    dq_MK = _query_gradient(
        dq_MK, q_MK, dout_MK, lse_M, delta_M, k_far_ptr + b * kf_b + h * kf_h, v_far_ptr + b * vf_b + h * vf_h, kf_t, vf_t,
        0, far_any, F, far_M * 0, far_M, 0, far_all, scale, K, N,
    )  # fmt: skip
    if WINDOWED:
        dq_MK = _query_gradient(
            dq_MK, q_MK, dout_MK, lse_M, delta_M, k_ptr, v_ptr, k_t, v_t, tl.maximum(first - window, 0), tl.minimum(first + M, T), T,
            i_M - window, i_M, first + M - 1 - window, first, scale, K, N,
        )  # fmt: skip
    dq_MK *= plain_scale
    tl.store(_rows(dq_ptr + row_0, local_M, H * K, K), dq_MK.to(dq_ptr.dtype.element_ty), mask=in_M1)


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, H, keys, dilation, window, initial, scale, plain_scale, stretch, split_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dout_b, dout_t, dout_h,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr,
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
    k_NK = tl.load(_rows(k_ptr + b * k_b + h * k_h, n_N.to(tl.int64), k_t, K), mask=in_N1, other=0.0)
    v_NK = tl.load(_rows(v_ptr + b * v_b + h * v_h, n_N.to(tl.int64), v_t, K), mask=in_N1, other=0.0)
    dk_NK, dv_NK = tl.zeros([N, K], tl.float32), tl.zeros([N, K], tl.float32)
    q_ptr += b * q_b + h * q_h
    dout_ptr += b * dout_b + h * dout_h
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    for i0 in tl.range(begin, end, M):
        i_M = i0 + tl.arange(0, M)
        in_M = i_M < end
        q_MK = tl.load(_rows(q_ptr, i_M.to(tl.int64), q_t, K), mask=in_M[:, None], other=0.0)
        dout_MK = tl.load(_rows(dout_ptr, i_M.to(tl.int64), dout_t, K), mask=in_M[:, None], other=0.0)
        lse_M = tl.load(lse_ptr + i_M, mask=in_M, other=float("inf")) * 1.4426950408889634
        delta_M = tl.load(delta_ptr + i_M, mask=in_M, other=0.0)
        # a query outside of the sequence has lse = inf, hence weight 0
        p_NM = tl.exp2(tl.dot(k_NK, tl.trans(q_MK), input_precision="ieee") * scale - lse_M[None, :])
        if FAR:
            if i0 < everyone:
                p_NM = tl.where(i_M[None, :] > j_N[:, None] + window, p_NM, 0.0)
        else:
            if (i0 < everyone) | (i0 + M - 1 > n_first + window):
                p_NM = tl.where((i_M[None, :] >= j_N[:, None]) & (i_M[None, :] <= j_N[:, None] + window), p_NM, 0.0)
        dv_NK = tl.dot(p_NM.to(dout_MK.dtype), dout_MK, dv_NK, input_precision="ieee")
        ds_NM = p_NM * (tl.dot(v_NK, tl.trans(dout_MK), input_precision="ieee") - delta_M[None, :])
        dk_NK = tl.dot(ds_NM.to(q_MK.dtype), q_MK, dk_NK, input_precision="ieee")
    dk_NK *= plain_scale
    at = split * split_stride.to(tl.int64) + (b * keys * H + h) * K
    tl.store(_rows(dk_ptr + at, n_N.to(tl.int64), H * K, K), dk_NK.to(dk_ptr.dtype.element_ty), mask=in_N1)
    tl.store(_rows(dv_ptr + at, n_N.to(tl.int64), H * K, K), dv_NK.to(dv_ptr.dtype.element_ty), mask=in_N1)


@triton.jit
def _add_far_kernel(
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


def _pack_far(x_BTHK: Tensor, pattern: tuple[int, int, int]) -> Tensor:
    """The far list (B, F, H, K) of keys or values: a strided view if it is dilated tokens only, else a copy."""
    dilation, _, initial = pattern
    if initial == 0 and dilation != -1:
        return x_BTHK[:, dilation - 1 :: dilation]
    return x_BTHK[:, far_positions(x_BTHK.shape[1], pattern, x_BTHK.device)]


def _pattern_arguments(pattern: tuple[int, int, int]) -> dict[str, int]:
    dilation, window, initial = pattern
    return {"dilation": NO_DILATION if dilation == -1 else dilation, "window": window, "initial": initial}


def attention_forward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, gate_BTHK: Tensor | None, pattern: tuple[int, int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Launches the forward: (out_BTHK, gated if a gate is given; lse_BHT fp32)."""
    m, n, warps, stages = FORWARD_TILE
    batch, length, heads, channels = q_BTHK.shape
    k_far, v_far = _pack_far(k_BTHK, pattern), _pack_far(v_BTHK, pattern)
    out_BTHK = torch.empty(q_BTHK.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
    lse_BHT = torch.empty(batch, heads, length, dtype=torch.float32, device=q_BTHK.device)
    gate = q_BTHK if gate_BTHK is None else gate_BTHK
    _forward_kernel[(triton.cdiv(length, m), batch * heads)](
        q_BTHK, k_BTHK, v_BTHK, k_far, v_far, gate, out_BTHK, lse_BHT, length, heads, k_far.shape[1],
        **_pattern_arguments(pattern), scale=scale * LOG2E,
        **_named_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, kf=k_far, vf=v_far, gate=gate),
        K=channels, M=m, N=n, WINDOWED=pattern[1] > 0, GATED=gate_BTHK is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_BTHK, lse_BHT


def _named_strides(**tensors_BTHK: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(d) for name, x in tensors_BTHK.items() for d, axis in enumerate("bth")}


def attention_backward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    gate_BTHK: Tensor | None,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
    dout_BTHK: Tensor,
    dlse_BHT: Tensor | None,
    pattern: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launches the backward: (dq, dk, dv, gradient of the gate or None)."""
    m, n, warps, stages = QUERY_TILE
    batch, length, heads, channels = q_BTHK.shape
    k_far, v_far = _pack_far(k_BTHK, pattern), _pack_far(v_BTHK, pattern)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHK, k_BTHK, v_BTHK))
    gated = gate_BTHK is not None
    gate, dgate = (q_BTHK, dq) if gate_BTHK is None else (gate_BTHK, torch.empty_like(dq, dtype=gate_BTHK.dtype))
    open_dout = torch.empty_like(out_BTHK) if gated else dout_BTHK
    delta_BHT = torch.empty_like(lse_BHT)
    shared = {**_pattern_arguments(pattern), "scale": scale * LOG2E, "plain_scale": scale}
    _queries_kernel[(triton.cdiv(length, m), batch * heads)](
        q_BTHK, k_BTHK, v_BTHK, k_far, v_far, gate, out_BTHK, lse_BHT, dout_BTHK, lse_BHT if dlse_BHT is None else dlse_BHT,
        dq, dk, dv, dgate, open_dout, delta_BHT, length, heads, k_far.shape[1], **shared,
        **_named_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, kf=k_far, vf=v_far, gate=gate, dout=dout_BTHK),
        K=channels, M=m, N=n, WINDOWED=pattern[1] > 0, GATED=gated, HAS_DLSE=dlse_BHT is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    m, n, warps, stages = KEY_TILE
    options = {"K": channels, "M": m, "N": n, "num_warps": warps, "num_stages": stages}
    if pattern[1] > 0:
        _keys_kernel[(triton.cdiv(length, n), batch * heads, 1)](
            q_BTHK, k_BTHK, v_BTHK, open_dout, lse_BHT, delta_BHT, dk, dv, length, heads, length, **shared,
            stretch=length, split_stride=0, **_named_strides(q=q_BTHK, k=k_BTHK, v=v_BTHK, dout=open_dout),
            FAR=False, **options,
        )  # fmt: skip
    if k_far.shape[1] > 0:
        _add_far_gradient(dk, dv, q_BTHK, k_far, v_far, open_dout, lse_BHT, delta_BHT, shared, options)
    return dq, dk, dv, dgate if gated else None


def _add_far_gradient(
    dk: Tensor,
    dv: Tensor,
    q_BTHK: Tensor,
    k_far_BFHK: Tensor,
    v_far_BFHK: Tensor,
    dout_BTHK: Tensor,
    lse_BHT: Tensor,
    delta_BHT: Tensor,
    shared: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Adds the far keys' gradients to dk and dv, in place."""
    batch, length, heads, channels = q_BTHK.shape
    far, tiles = k_far_BFHK.shape[1], triton.cdiv(k_far_BFHK.shape[1], options["N"])
    splits = max(1, min(FAR_PROGRAMS // (tiles * batch * heads), triton.cdiv(length, 4 * options["M"])))
    stretch = triton.cdiv(triton.cdiv(length, splits), options["M"]) * options["M"]
    parts = torch.empty(2, splits, batch, far, heads, channels, dtype=torch.float32, device=q_BTHK.device)
    split_stride = parts.stride(1)
    _keys_kernel[(tiles, batch * heads, splits)](
        q_BTHK, k_far_BFHK, v_far_BFHK, dout_BTHK, lse_BHT, delta_BHT, parts[0], parts[1], length, heads, far, **shared,
        stretch=stretch, split_stride=split_stride, **_named_strides(q=q_BTHK, k=k_far_BFHK, v=v_far_BFHK, dout=dout_BTHK),
        FAR=True, **options,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(heads * channels))
    _add_far_kernel[(far, batch, triton.cdiv(heads * channels, block))](
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
        pattern: tuple[int, int, int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Launches the forward and keeps its inputs and per-row results."""
        out_BTHK, lse_BHT = attention_forward(q_BTHK, k_BTHK, v_BTHK, gate_BTHK, pattern, scale)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHK, gate_BTHK, out_BTHK, lse_BHT)
        ctx.pattern, ctx.scale = pattern, scale
        ctx.set_materialize_grads(False)
        return out_BTHK, lse_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHK: Tensor | None, dlse_BHT: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launches the backward."""
        q_BTHK, k_BTHK, v_BTHK, gate_BTHK, out_BTHK, lse_BHT = ctx.saved_tensors
        dout_BTHK = torch.zeros_like(out_BTHK) if dout_BTHK is None else dout_BTHK
        dout_BTHK = dout_BTHK if dout_BTHK.stride(-1) == 1 else dout_BTHK.contiguous()
        dlse_BHT = None if dlse_BHT is None else dlse_BHT.contiguous()
        gradients = attention_backward(
            q_BTHK, k_BTHK, v_BTHK, gate_BTHK, out_BTHK, lse_BHT, dout_BTHK, dlse_BHT, ctx.pattern, ctx.scale
        )
        return (*gradients, None, None)
