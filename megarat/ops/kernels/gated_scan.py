"""Triton kernels of the gated scan: one pass over memory forward and backward, for any batch and length.

A *block* of S * L consecutive steps and 2 * BH channels of one head (BH rotary pairs) belongs to one program, which holds all of it
in registers. The S rows of its tiles are consecutive *segments* of L steps each, walked in step by every thread:

1. every segment runs from a zero state: its decay A (the product of its gates) and its local averages;
2. one associative scan over the S rows joins (A, averages) to the effect of the block so far;
3. the program waits for the state in front of its block, publishes the state behind it, and
4. runs its segments again from their true states, rotates k and stores.

Blocks of the same channels so form a chain along time, whose links are one load, one fused multiply-add and one store: it runs far
ahead of memory traffic, needs no second pass over k, v and g, and folds in one fixed order, so results are bit-reproducible. A
link's `chain` entry is its own flag: entries start as a NaN pattern no arithmetic produces. Programs are numbered with time
slowest, so a program only waits for lower-numbered ones, which the hardware starts first.

The backward is the same machine with time reversed; it recomputes the forward averages of a block from `saved`, the fp32 states in
front of every backward block (0.125 bytes per element and byte of state).
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

EMPTY = tl.constexpr(-1)  # int32 bits of a chain entry nobody has written: a NaN that no arithmetic instruction returns
LOG2E = tl.constexpr(1.4426950408889634)

# (segments S, steps L, warps) of a block; chosen by timing on an H200. Backward blocks must tile the forward's.
FORWARD_TILE = (16, 8, 4)
BACKWARD_TILE = (16, 4, 4)


@triton.jit
def _compose(a_l, k_l, v_l, a0_l, k0_l, v0_l, a_r, k_r, v_r, a0_r, k0_r, v0_r):
    """First the left stretch of time, then the right one, as maps s -> a s + x of the two states.

    a0, k0, v0 is the stretch without its last segment: scanned along, it becomes everything in front of a segment.
    """
    return (
        a_l * a_r, a_r * k_l + k_r, a_r * v_l + v_r,
        a_l * a0_r, a0_r * k_l + k0_r, a0_r * v_l + v0_r,
    )  # fmt: skip


@triton.jit
def _in_front(decay_SC, k_SC, v_SC, REVERSE: tl.constexpr):
    """From the map of every segment, the map of all that precedes it in its block (follows it, if REVERSE)."""
    one, nothing = tl.full(decay_SC.shape, 1.0, tl.float32), tl.zeros(decay_SC.shape, tl.float32)
    scanned = tl.associative_scan((decay_SC, k_SC, v_SC, one, nothing, nothing), 0, _compose, reverse=REVERSE)
    return scanned[3], scanned[4], scanned[5]


@triton.jit
def _await(k1_ptr, k2_ptr, v1_ptr, v2_ptr):
    """Polls four (C,) vectors of int32 bits until no entry is EMPTY; volatile loads read the L2, never a stale L1 line."""
    k1, k2 = tl.load(k1_ptr, volatile=True), tl.load(k2_ptr, volatile=True)
    v1, v2 = tl.load(v1_ptr, volatile=True), tl.load(v2_ptr, volatile=True)
    while tl.max(((k1 == EMPTY) | (k2 == EMPTY) | (v1 == EMPTY) | (v2 == EMPTY)).to(tl.int32), axis=0) > 0:
        k1, k2 = tl.load(k1_ptr, volatile=True), tl.load(k2_ptr, volatile=True)
        v1, v2 = tl.load(v1_ptr, volatile=True), tl.load(v2_ptr, volatile=True)
    return (
        k1.to(tl.float32, bitcast=True),
        k2.to(tl.float32, bitcast=True),
        v1.to(tl.float32, bitcast=True),
        v2.to(tl.float32, bitcast=True),
    )


@triton.jit
def _publish(link_C, R, stream, k1_SC, k2_SC, v1_SC, v2_SC, is_last_S):
    """Writes the last row of the four tiles as the next link of the chain."""
    at_SC, mask = link_C[None, :] + tl.zeros(k1_SC.shape, tl.int32), is_last_S[:, None]
    tl.store(at_SC, k1_SC, mask=mask)
    tl.store(at_SC + R, k2_SC, mask=mask)
    tl.store(at_SC + stream, v1_SC, mask=mask)
    tl.store(at_SC + stream + R, v2_SC, mask=mask)


@triton.jit
def _input_weight(g):
    """u = 1 - sigmoid(g) = 1 / (1 + e^g), exactly 0 at g = +inf; rsqrt squared is half the instructions of a division."""
    root = tl.rsqrt(1.0 + tl.exp2(g.to(tl.float32) * LOG2E))
    return root * root


@triton.jit
def _load_steps(ptr, offs_SC, stride_t, t_S, T, other, L: tl.constexpr, MASKED: tl.constexpr):
    """L tiles, one per step of the segments; rows behind the end of the sequence read as `other`."""
    tiles = ()
    for i in tl.static_range(L):
        if MASKED:
            tiles = tiles + (tl.load(ptr + offs_SC + i * stride_t, mask=(t_S + i < T)[:, None], other=other),)
        else:
            tiles = tiles + (tl.load(ptr + offs_SC + i * stride_t),)
    return tiles


@triton.jit
def _load_keeps(starts_ptr, t_S, T, L: tl.constexpr, HAS_STARTS: tl.constexpr):
    """Per step a factor (S, 1): 0 in front of a document, else 1."""
    keeps = ()
    for i in tl.static_range(L):
        if HAS_STARTS:
            starts_S = tl.load(starts_ptr + t_S + i, mask=t_S + i < T, other=0)
            keeps = keeps + (1.0 - starts_S.to(tl.float32)[:, None],)
        else:
            keeps = keeps + (1.0,)
    return keeps


@triton.jit
def _local_pass(k, v, u, keep, L: tl.constexpr):
    """Every segment from a zero state: its decay and its averages, (S, C) each."""
    decay, s_k, s_v = tl.full(u[0].shape, 1.0, tl.float32), tl.zeros(u[0].shape, tl.float32), tl.zeros(u[0].shape, tl.float32)
    for i in tl.static_range(L):
        a = (1.0 - u[i]) * keep[i]
        s_k = a * s_k + u[i] * k[i].to(tl.float32)
        s_v = a * s_v + u[i] * v[i].to(tl.float32)
        decay = decay * a
    return decay, s_k, s_v


@triton.jit
def _store_step(ptr, offs_SC, x_SC, t_S, T, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + offs_SC, x_SC.to(ptr.dtype.element_ty), mask=(t_S < T)[:, None])
    else:
        tl.store(ptr + offs_SC, x_SC.to(ptr.dtype.element_ty))


@triton.jit
def _forward_kernel(
    k_ptr, v_ptr, g_ptr, cos_ptr, sin_ptr, starts_ptr, k_out_ptr, v_out_ptr, chain_ptr, saved_ptr,
    B, T, H, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, table_b,
    R: tl.constexpr, BH: tl.constexpr, S: tl.constexpr, L: tl.constexpr, SAVE_STEPS: tl.constexpr,
    ROTATE: tl.constexpr, HAS_STARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = R // BH
    block = tl.program_id(0) // (B * H * columns)
    group = tl.program_id(0) % (B * H * columns)
    b, h, first = (group // columns // H).to(tl.int64), (group // columns) % H, (group % columns) * BH
    rows_S = tl.arange(0, S)
    c_C = tl.arange(0, BH)
    t0 = block * (S * L)
    t_S = t0 + rows_S * L

    k_ptr += b * k_b + t0.to(tl.int64) * k_t + h * k_h + first
    v_ptr += b * v_b + t0.to(tl.int64) * v_t + h * v_h + first
    g_ptr += b * g_b + t0.to(tl.int64) * g_t + h * g_h + first
    k_offs, v_offs = (rows_S * L * k_t)[:, None] + c_C[None, :], (rows_S * L * v_t)[:, None] + c_C[None, :]
    g_offs = (rows_S * L * g_t)[:, None] + c_C[None, :]
    inf: tl.constexpr = float("inf")
    g1 = _load_steps(g_ptr, g_offs, g_t, t_S, T, inf, L, MASKED)
    k1 = _load_steps(k_ptr, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v1 = _load_steps(v_ptr, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    g2 = _load_steps(g_ptr + R, g_offs, g_t, t_S, T, inf, L, MASKED)
    k2 = _load_steps(k_ptr + R, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v2 = _load_steps(v_ptr + R, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    keep = _load_keeps(starts_ptr + b * T, t_S, T, L, HAS_STARTS)
    u1, u2 = (), ()
    for i in tl.static_range(L):
        u1 = u1 + (_input_weight(g1[i]),)
        u2 = u2 + (_input_weight(g2[i]),)

    decay1, s_k1, s_v1 = _local_pass(k1, v1, u1, keep, L)
    decay2, s_k2, s_v2 = _local_pass(k2, v2, u2, keep, L)
    front1, front_k1, front_v1 = _in_front(decay1, s_k1, s_v1, False)
    front2, front_k2, front_v2 = _in_front(decay2, s_k2, s_v2, False)

    # the link of the chain: wait, one fused multiply-add, publish
    stream = B * H * (2 * R)
    link = chain_ptr + block.to(tl.int64) * 2 * stream + (group // columns) * (2 * R) + first + c_C
    link_bits = link.to(tl.pointer_type(tl.int32))
    in_k1, in_k2, in_v1, in_v2 = _await(link_bits, link_bits + R, link_bits + stream, link_bits + stream + R)
    front_k1, front_k2 = front1 * in_k1[None, :] + front_k1, front2 * in_k2[None, :] + front_k2
    front_v1, front_v2 = front1 * in_v1[None, :] + front_v1, front2 * in_v2[None, :] + front_v2
    _publish(
        link + 2 * stream, R, stream, decay1 * front_k1 + s_k1, decay2 * front_k2 + s_k2, decay1 * front_v1 + s_v1,
        decay2 * front_v2 + s_v2, rows_S == S - 1,
    )  # fmt: skip
    s_k1, s_k2, s_v1, s_v2 = front_k1, front_k2, front_v1, front_v2
    if SAVE_STEPS > 0:
        offs_SC = (t_S // SAVE_STEPS).to(tl.int64)[:, None] * 2 * stream + (group // columns) * (2 * R) + first + c_C[None, :]
        begins_S1 = ((t_S % SAVE_STEPS == 0) & (t_S < T))[:, None]
        tl.store(saved_ptr + offs_SC, s_k1, mask=begins_S1)
        tl.store(saved_ptr + offs_SC + R, s_k2, mask=begins_S1)
        tl.store(saved_ptr + offs_SC + stream, s_v1, mask=begins_S1)
        tl.store(saved_ptr + offs_SC + stream + R, s_v2, mask=begins_S1)

    out_t = H * (2 * R)
    out_offs = (rows_S * L * out_t)[:, None] + c_C[None, :]
    k_out_ptr += (b * T + t0) * out_t + h * (2 * R) + first
    v_out_ptr += (b * T + t0) * out_t + h * (2 * R) + first
    table_offs = (rows_S * L * R)[:, None] + c_C[None, :]
    table_0 = b * table_b + t0 * R + first
    for i in tl.static_range(L):
        a1, a2 = (1.0 - u1[i]) * keep[i], (1.0 - u2[i]) * keep[i]
        s_k1, s_k2 = a1 * s_k1 + u1[i] * k1[i].to(tl.float32), a2 * s_k2 + u2[i] * k2[i].to(tl.float32)
        s_v1, s_v2 = a1 * s_v1 + u1[i] * v1[i].to(tl.float32), a2 * s_v2 + u2[i] * v2[i].to(tl.float32)
        out1, out2 = s_k1, s_k2
        if ROTATE:
            in_table = (t_S + i < T)[:, None]
            cos = tl.load(cos_ptr + table_0 + table_offs + i * R, mask=in_table, other=1.0)
            sin = tl.load(sin_ptr + table_0 + table_offs + i * R, mask=in_table, other=0.0)
            out1, out2 = s_k1 * cos - s_k2 * sin, s_k2 * cos + s_k1 * sin
        _store_step(k_out_ptr + i * out_t, out_offs, out1, t_S + i, T, MASKED)
        _store_step(k_out_ptr + i * out_t + R, out_offs, out2, t_S + i, T, MASKED)
        _store_step(v_out_ptr + i * out_t, out_offs, s_v1, t_S + i, T, MASKED)
        _store_step(v_out_ptr + i * out_t + R, out_offs, s_v2, t_S + i, T, MASKED)


@triton.jit
def _reverse_local_pass(e_k, e_v, u, keep, L: tl.constexpr):
    """What every segment passes to the state in front of it when nothing arrives from behind, and its decay."""
    decay, p_k, p_v = tl.full(u[0].shape, 1.0, tl.float32), tl.zeros(u[0].shape, tl.float32), tl.zeros(u[0].shape, tl.float32)
    for i in tl.static_range(L):
        a = (1.0 - u[L - 1 - i]) * keep[L - 1 - i]
        p_k = a * (p_k + e_k[L - 1 - i])
        p_v = a * (p_v + e_v[L - 1 - i].to(tl.float32))
        decay = decay * a
    return decay, p_k, p_v


@triton.jit
def _reverse_pass(e_k, e_v, u, keep, p_k, p_v, L: tl.constexpr):
    """The whole gradients S_t reaching the averages, in order of time, from what arrives behind each segment."""
    total_k, total_v = (), ()
    for i in tl.static_range(L):
        s_k, s_v = p_k + e_k[L - 1 - i], p_v + e_v[L - 1 - i].to(tl.float32)
        a = (1.0 - u[L - 1 - i]) * keep[L - 1 - i]
        p_k, p_v = a * s_k, a * s_v
        total_k = (s_k,) + total_k
        total_v = (s_v,) + total_v
    return total_k, total_v


@triton.jit
def _backward_half(
    k, v, u, keep, s_k, s_v, total_k, total_v, dk_ptr, dv_ptr, dg_ptr, offs_SC, out_t, t_S, T,
    L: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Walks the segments forward once more and stores the three gradients of BH channels."""
    for i in tl.static_range(L):
        off_k, off_v = k[i].to(tl.float32) - keep[i] * s_k, v[i].to(tl.float32) - keep[i] * s_v
        dg = -u[i] * (1.0 - u[i]) * (off_k * total_k[i] + off_v * total_v[i])
        _store_step(dk_ptr + i * out_t, offs_SC, u[i] * total_k[i], t_S + i, T, MASKED)
        _store_step(dv_ptr + i * out_t, offs_SC, u[i] * total_v[i], t_S + i, T, MASKED)
        _store_step(dg_ptr + i * out_t, offs_SC, dg, t_S + i, T, MASKED)
        s_k, s_v = keep[i] * s_k + u[i] * off_k, keep[i] * s_v + u[i] * off_v


@triton.jit
def _backward_kernel(
    k_ptr, v_ptr, g_ptr, cos_ptr, sin_ptr, starts_ptr, dk_out_ptr, dv_out_ptr, saved_ptr, chain_ptr, dk_ptr, dv_ptr, dg_ptr,
    B, T, H, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, table_b, blocks,
    R: tl.constexpr, BH: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    ROTATE: tl.constexpr, HAS_STARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = R // BH
    block = blocks - 1 - tl.program_id(0) // (B * H * columns)
    group = tl.program_id(0) % (B * H * columns)
    b, h, first = (group // columns // H).to(tl.int64), (group // columns) % H, (group % columns) * BH
    rows_S = tl.arange(0, S)
    c_C = tl.arange(0, BH)
    t0 = block * (S * L)
    t_S = t0 + rows_S * L

    k_ptr += b * k_b + t0.to(tl.int64) * k_t + h * k_h + first
    v_ptr += b * v_b + t0.to(tl.int64) * v_t + h * v_h + first
    g_ptr += b * g_b + t0.to(tl.int64) * g_t + h * g_h + first
    dk_out_ptr += b * dk_b + t0.to(tl.int64) * dk_t + h * dk_h + first
    dv_out_ptr += b * dv_b + t0.to(tl.int64) * dv_t + h * dv_h + first
    k_offs, v_offs = (rows_S * L * k_t)[:, None] + c_C[None, :], (rows_S * L * v_t)[:, None] + c_C[None, :]
    g_offs = (rows_S * L * g_t)[:, None] + c_C[None, :]
    dk_offs, dv_offs = (rows_S * L * dk_t)[:, None] + c_C[None, :], (rows_S * L * dv_t)[:, None] + c_C[None, :]
    inf: tl.constexpr = float("inf")
    g1 = _load_steps(g_ptr, g_offs, g_t, t_S, T, inf, L, MASKED)
    g2 = _load_steps(g_ptr + R, g_offs, g_t, t_S, T, inf, L, MASKED)
    r1 = _load_steps(dk_out_ptr, dk_offs, dk_t, t_S, T, 0.0, L, MASKED)
    r2 = _load_steps(dk_out_ptr + R, dk_offs, dk_t, t_S, T, 0.0, L, MASKED)
    e_v1 = _load_steps(dv_out_ptr, dv_offs, dv_t, t_S, T, 0.0, L, MASKED)
    e_v2 = _load_steps(dv_out_ptr + R, dv_offs, dv_t, t_S, T, 0.0, L, MASKED)
    k1 = _load_steps(k_ptr, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    k2 = _load_steps(k_ptr + R, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v1 = _load_steps(v_ptr, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    v2 = _load_steps(v_ptr + R, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    keep = _load_keeps(starts_ptr + b * T, t_S, T, L, HAS_STARTS)
    stream = B * H * (2 * R)
    saved_ptr += block.to(tl.int64) * 2 * stream + (group // columns) * (2 * R) + first + c_C
    in_k1, in_k2 = tl.load(saved_ptr), tl.load(saved_ptr + R)
    in_v1, in_v2 = tl.load(saved_ptr + stream), tl.load(saved_ptr + stream + R)
    table_offs = (rows_S * L * R)[:, None] + c_C[None, :]
    table_0 = b * table_b + t0 * R + first
    u1, u2, e_k1, e_k2 = (), (), (), ()
    for i in tl.static_range(L):
        u1 = u1 + (_input_weight(g1[i]),)
        u2 = u2 + (_input_weight(g2[i]),)
        d1, d2 = r1[i].to(tl.float32), r2[i].to(tl.float32)
        if ROTATE:
            in_table = (t_S + i < T)[:, None]
            cos = tl.load(cos_ptr + table_0 + table_offs + i * R, mask=in_table, other=1.0)
            sin = tl.load(sin_ptr + table_0 + table_offs + i * R, mask=in_table, other=0.0)
            d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        e_k1 = e_k1 + (d1,)
        e_k2 = e_k2 + (d2,)

    decay1, p_k1, p_v1 = _reverse_local_pass(e_k1, e_v1, u1, keep, L)
    decay2, p_k2, p_v2 = _reverse_local_pass(e_k2, e_v2, u2, keep, L)
    behind1, behind_k1, behind_v1 = _in_front(decay1, p_k1, p_v1, True)
    behind2, behind_k2, behind_v2 = _in_front(decay2, p_k2, p_v2, True)

    link = chain_ptr + (block + 1).to(tl.int64) * 2 * stream + (group // columns) * (2 * R) + first + c_C
    link_bits = link.to(tl.pointer_type(tl.int32))
    from_k1, from_k2, from_v1, from_v2 = _await(link_bits, link_bits + R, link_bits + stream, link_bits + stream + R)
    behind_k1, behind_k2 = behind1 * from_k1[None, :] + behind_k1, behind2 * from_k2[None, :] + behind_k2
    behind_v1, behind_v2 = behind1 * from_v1[None, :] + behind_v1, behind2 * from_v2[None, :] + behind_v2
    _publish(
        link - 2 * stream, R, stream, decay1 * behind_k1 + p_k1, decay2 * behind_k2 + p_k2, decay1 * behind_v1 + p_v1,
        decay2 * behind_v2 + p_v2, rows_S == 0,
    )  # fmt: skip
    total_k1, total_v1 = _reverse_pass(e_k1, e_v1, u1, keep, behind_k1, behind_v1, L)
    total_k2, total_v2 = _reverse_pass(e_k2, e_v2, u2, keep, behind_k2, behind_v2, L)

    # the forward averages of the block once more, for the gates' gradient
    decay1, s_k1, s_v1 = _local_pass(k1, v1, u1, keep, L)
    decay2, s_k2, s_v2 = _local_pass(k2, v2, u2, keep, L)
    front1, front_k1, front_v1 = _in_front(decay1, s_k1, s_v1, False)
    front2, front_k2, front_v2 = _in_front(decay2, s_k2, s_v2, False)
    front_k1, front_k2 = front1 * in_k1[None, :] + front_k1, front2 * in_k2[None, :] + front_k2
    front_v1, front_v2 = front1 * in_v1[None, :] + front_v1, front2 * in_v2[None, :] + front_v2
    out_t = H * (2 * R)
    out_offs = (rows_S * L * out_t)[:, None] + c_C[None, :]
    out_0 = (b * T + t0) * out_t + h * (2 * R) + first
    _backward_half(
        k1, v1, u1, keep, front_k1, front_v1, total_k1, total_v1,
        dk_ptr + out_0, dv_ptr + out_0, dg_ptr + out_0, out_offs, out_t, t_S, T, L, MASKED,
    )  # fmt: skip
    _backward_half(
        k2, v2, u2, keep, front_k2, front_v2, total_k2, total_v2,
        dk_ptr + out_0 + R, dv_ptr + out_0 + R, dg_ptr + out_0 + R, out_offs, out_t, t_S, T, L, MASKED,
    )  # fmt: skip


def pair_block(head_dim: int) -> int:
    """Rotary pairs per program: the largest of 32, 16 and 8 that divides K / 2 (K is a multiple of 16)."""
    return next(pairs for pairs in (32, 16, 8) if head_dim % (2 * pairs) == 0)


def _strides(*tensors_BTHK: Tensor) -> list[int]:
    return [stride for x in tensors_BTHK for stride in x.stride()[:3]]


def _new_chain(blocks: int, like_BTHK: Tensor) -> Tensor:
    """(blocks + 1, 2, B, H, K) fp32, all entries EMPTY."""
    batch, _, heads, channels = like_BTHK.shape
    chain = torch.empty(blocks + 1, 2, batch, heads, channels, dtype=torch.float32, device=like_BTHK.device)
    chain.view(torch.int32).fill_(-1)
    return chain


def _table_arguments(cos: Tensor | None, sin: Tensor | None, filler: Tensor) -> tuple[Tensor, Tensor, int]:
    if cos is None or sin is None:
        return filler, filler, 0
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 else 0


def scan_forward(
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTHK: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    start: tuple[Tensor, Tensor] | None,
    starts_BT: Tensor | None,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launches the forward: (k_out, v_out, final states (2, B, H, K) fp32, states in front of every backward block or None)."""
    segments, steps, warps = FORWARD_TILE
    batch, length, heads, channels = k_BTHK.shape
    pairs, blocks = pair_block(channels), triton.cdiv(length, segments * steps)
    save_steps = BACKWARD_TILE[0] * BACKWARD_TILE[1] if save else 0
    k_out, v_out = (torch.empty(k_BTHK.shape, dtype=out_dtype, device=k_BTHK.device) for _ in range(2))
    chain = _new_chain(blocks, k_BTHK)
    if start is None:
        chain[0].zero_()
    else:
        chain[0, 0].copy_(start[0])
        chain[0, 1].copy_(start[1])
    saved = chain.new_empty(triton.cdiv(length, save_steps), *chain.shape[1:]) if save else None
    cos, sin, table_b = _table_arguments(cos, sin, k_BTHK)
    _forward_kernel[(blocks * batch * heads * (channels // 2 // pairs),)](
        k_BTHK, v_BTHK, g_BTHK, cos, sin, k_BTHK if starts_BT is None else starts_BT, k_out, v_out, chain,
        chain if saved is None else saved, batch, length, heads, *_strides(k_BTHK, v_BTHK, g_BTHK), table_b,
        R=channels // 2, BH=pairs, S=segments, L=steps, SAVE_STEPS=save_steps, ROTATE=cos is not k_BTHK,
        HAS_STARTS=starts_BT is not None, MASKED=length % (segments * steps) != 0, num_warps=warps,
    )  # fmt: skip
    return k_out, v_out, chain[-1], saved


def scan_backward(
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTHK: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts_BT: Tensor | None,
    saved: Tensor,
    dk_out_BTHK: Tensor,
    dv_out_BTHK: Tensor,
    dlast: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward: (dk, dv, dg, gradient of the initial states (2, B, H, K) fp32)."""
    segments, steps, warps = BACKWARD_TILE
    batch, length, heads, channels = k_BTHK.shape
    pairs, blocks = pair_block(channels), triton.cdiv(length, segments * steps)
    dk, dv, dg = (torch.empty(k_BTHK.shape, dtype=x.dtype, device=x.device) for x in (k_BTHK, v_BTHK, g_BTHK))
    chain = _new_chain(blocks, k_BTHK)
    chain[-1, 0].copy_(dlast[0])
    chain[-1, 1].copy_(dlast[1])
    cos, sin, table_b = _table_arguments(cos, sin, k_BTHK)
    _backward_kernel[(blocks * batch * heads * (channels // 2 // pairs),)](
        k_BTHK, v_BTHK, g_BTHK, cos, sin, k_BTHK if starts_BT is None else starts_BT, dk_out_BTHK, dv_out_BTHK, saved, chain,
        dk, dv, dg, batch, length, heads, *_strides(k_BTHK, v_BTHK, g_BTHK, dk_out_BTHK, dv_out_BTHK), table_b, blocks,
        R=channels // 2, BH=pairs, S=segments, L=steps, ROTATE=cos is not k_BTHK, HAS_STARTS=starts_BT is not None,
        MASKED=length % (segments * steps) != 0, num_warps=warps,
    )  # fmt: skip
    return dk, dv, dg, chain[0]


class GatedScan(torch.autograd.Function):
    """Autograd around the two launches; outputs (k_out, v_out, final k state, final v state)."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        g_BTHK: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        start_k_BHK: Tensor | None,
        start_v_BHK: Tensor | None,
        starts_BT: Tensor | None,
        out_dtype: torch.dtype,
        save: bool,
    ) -> tuple[Tensor, ...]:
        """Launches the forward and keeps its inputs and per-row results."""
        start = None if start_k_BHK is None or start_v_BHK is None else (start_k_BHK, start_v_BHK)
        k_out, v_out, last, saved = scan_forward(k_BTHK, v_BTHK, g_BTHK, cos, sin, start, starts_BT, out_dtype, save)
        ctx.save_for_backward(k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved)
        ctx.has_start = start is not None
        return k_out, v_out, last[0].clone(), last[1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dk_out_BTHK: Tensor, dv_out_BTHK: Tensor, dlast_k_BHK: Tensor, dlast_v_BHK: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Launches the backward."""
        k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved = ctx.saved_tensors
        dk_out_BTHK, dv_out_BTHK = (d if d.stride(-1) == 1 else d.contiguous() for d in (dk_out_BTHK, dv_out_BTHK))
        dk, dv, dg, dstart = scan_backward(
            k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved, dk_out_BTHK, dv_out_BTHK, (dlast_k_BHK, dlast_v_BHK)
        )
        dstart_k, dstart_v = dstart if ctx.has_start else (None, None)
        return dk, dv, dg, None, None, dstart_k, dstart_v, None, None, None
