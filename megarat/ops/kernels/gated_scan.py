"""Triton kernels of the gated scan: one pass over memory forward and backward, for any batch and length.

A *block* of S * L consecutive steps and 2 * BH channels of one head (BH rotary pairs) is held in registers by one program. The S rows
of its tiles are consecutive *segments* of L steps each, walked in step by every thread:

1. every segment runs from a zero state: its decay A (the product of its gates) and its local averages;
2. one associative scan over the S rows joins (A, averages) to the effect of the block so far;
3. the program waits for the state in front of its block, publishes the one behind it, and
4. the segments run again from their true states; k is rotated and stored.

The blocks of a column form a chain along time, so k, v and g are read once however few columns there are. Handing a state from one
program to the next takes a round trip through the L2 cache, whatever its size; where few columns make the chain long, a block may
also publish its map s -> a s + x, which waits for nobody. Then the maps of the BACK - 1 blocks in front of a block are joined to its own
first, and its state comes from BACK blocks in front of it. BACK is fixed by the shape, so everything folds in one fixed order: results
are bit-reproducible. An entry of the chain, or of the maps, is its own flag: it starts as a NaN pattern no arithmetic produces. Programs
are numbered with time slowest, so a program only waits for lower-numbered ones, which the hardware starts first.

The backward is the same machine with time reversed. Besides the inputs it needs the fp32 states in front of its blocks (`saved`, 8 bytes
per S * L elements), from which it recomputes the averages of a block on the way.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.parts import GradientPlace

EMPTY = tl.constexpr(-1)  # int32 bits of a chain entry nobody has written: a NaN that no arithmetic instruction returns
LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """How a launch is cut up.

    A program holds `pairs` rotary pairs (BH) of `segments` (S) segments of `steps` (L) steps each, in `warps` warps of threads with at most
    `registers` registers, and takes its state from `back` (BACK) blocks in front of it. While it is `patient`, it polls one word alone until the
    entry before its own is there: programs that wait far behind in the line then leave the L2 cache to those whose turn it is.
    """

    pairs: int
    segments: int
    steps: int
    warps: int
    registers: int
    back: int
    patient: bool = False


# forward and backward, by regime; a backward block must be a whole number of forward segments. Chosen by timing on an H200.
MANY_COLUMNS = Tile(64, 8, 8, 8, 128, 1), Tile(64, 4, 8, 4, 255, 1)
FEW_COLUMNS = Tile(64, 8, 16, 8, 255, 1), Tile(32, 8, 8, 4, 255, 2)
MANY_CHANNELS = 8192  # of all rows: from so many on, short blocks give enough programs and long ones only lengthen the chain


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


def _polling(streams: int, pack: int, pairs: int, patient: bool = False) -> str:
    """PTX that loads two tiles of fp32 from each of `streams` addresses (there, and `pairs` words behind) until no word of them is EMPTY.

    `pack` words of a tile lie in one thread, which polls them alone: no vote, no barrier. Relaxed loads read the L2, never a stale L1
    line. Operands: `pack` words of each result, then `pack` addresses of each stream; patient, also those of a word to wait for first.
    """
    words = range(2 * streams * pack)
    first = len(words)  # of the addresses
    address = [f"${first + word // (2 * pack) * pack + word % pack}+{word // pack % 2 * 4 * pairs}" for word in words]
    early = f"early: ld.relaxed.gpu.global.b32 word, [${first + streams * pack}]; setp.eq.u32 empty, word, 0xffffffff; @empty bra early; "
    loads = " ".join(f"ld.relaxed.gpu.global.b32 ${word}, [{address[word]}];" for word in words)
    checks = " ".join(f"setp.eq.or.u32 empty, ${word}, 0xffffffff, empty;" for word in words[1:])
    again = f"again: {loads} setp.eq.u32 empty, $0, 0xffffffff; {checks} @empty bra again;"
    return f"{{ .reg .pred empty; .reg .b32 word; {early if patient else ''}{again} }}"


@triton.jit
def _await_entry(entry_SC, early_SC, stream, R: tl.constexpr, POLL: tl.constexpr, PACK: tl.constexpr, PATIENT: tl.constexpr):
    """An entry of the chain as soon as it is there: both halves of k's and of v's channels. PACK 0: it is there.

    PATIENT: the word at `early` is written before it (see `_polling`).
    """
    if PACK == 0:
        k1, k2, v1, v2 = tl.load(entry_SC), tl.load(entry_SC + R), tl.load(entry_SC + stream), tl.load(entry_SC + stream + R)
    elif PATIENT:
        k1, k2, v1, v2 = tl.inline_asm_elementwise(
            POLL, "=r" + ",=r" * (4 * PACK - 1) + ",l" * (3 * PACK),
            [entry_SC.to(tl.int64), (entry_SC + stream).to(tl.int64), early_SC.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        k1, k2, v1, v2 = tl.inline_asm_elementwise(
            POLL, "=r" + ",=r" * (4 * PACK - 1) + ",l" * (2 * PACK), [entry_SC.to(tl.int64), (entry_SC + stream).to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=PACK,
        )  # fmt: skip
    return k1, k2, v1, v2


@triton.jit
def _await_map(map_SC, stream, R: tl.constexpr, POLL_MAP: tl.constexpr, PACK: tl.constexpr):
    """A block's map as soon as it is there: decay, k and v of both halves of the channels."""
    x_SC, y_SC = map_SC + stream, map_SC + 2 * stream
    if PACK == 0:
        a1, a2, k1, k2 = tl.load(map_SC), tl.load(map_SC + R), tl.load(x_SC), tl.load(x_SC + R)
        v1, v2 = tl.load(y_SC), tl.load(y_SC + R)
    else:
        a1, a2, k1, k2, v1, v2 = tl.inline_asm_elementwise(
            POLL_MAP, "=r" + ",=r" * (6 * PACK - 1) + ",l" * (3 * PACK), [map_SC.to(tl.int64), x_SC.to(tl.int64), y_SC.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=PACK,
        )  # fmt: skip
    return a1, a2, k1, k2, v1, v2


@triton.jit
def _arrive(
    chain_ptr, maps_ptr, order, stream, column, c_SC, front1, front2, s_k1, s_k2, s_v1, s_v2,
    R: tl.constexpr, BACK: tl.constexpr, POLL: tl.constexpr, POLL_MAP: tl.constexpr, PACK: tl.constexpr, PATIENT: tl.constexpr,
):  # fmt: skip
    """The states in front of every segment of block number `order`, from the maps (front, s) of all that precedes it in the block.

    First the maps of BACK - 1 blocks, which wait for nobody, then the entry of the chain in front of them.
    """
    for i in tl.static_range(1, BACK):
        if order >= i:
            map_SC = maps_ptr + (order - i).to(tl.int64) * 3 * stream + column + c_SC
            decay1, decay2, x_k1, x_k2, x_v1, x_v2 = _await_map(map_SC, stream, R, POLL_MAP, PACK)
            s_k1, s_k2, s_v1, s_v2 = front1 * x_k1 + s_k1, front2 * x_k2 + s_k2, front1 * x_v1 + s_v1, front2 * x_v2 + s_v2
            front1, front2 = front1 * decay1, front2 * decay2
    link = order + 1 - BACK
    if link > 0:
        entry_ptr = chain_ptr + link.to(tl.int64) * 2 * stream + column
        early_SC = entry_ptr - 2 * stream + tl.zeros(c_SC.shape, tl.int32)
        k1, k2, v1, v2 = _await_entry(entry_ptr + c_SC, early_SC, stream, R, POLL, PACK, PATIENT)
    else:  # the chain's first entry is always there
        k1, k2, v1, v2 = _await_entry(chain_ptr + column + c_SC, chain_ptr + c_SC, stream, R, POLL, 0, PATIENT)
    return front1 * k1 + s_k1, front2 * k2 + s_k2, front1 * v1 + s_v1, front2 * v2 + s_v2


@triton.jit
def _publish(entry_C, R, stream, k1_SC, k2_SC, v1_SC, v2_SC, is_row_S1):
    """Writes one row of the four tiles as the state behind a block."""
    at_SC = entry_C[None, :] + tl.zeros(k1_SC.shape, tl.int32)
    tl.store(at_SC, k1_SC, mask=is_row_S1)
    tl.store(at_SC + R, k2_SC, mask=is_row_S1)
    tl.store(at_SC + stream, v1_SC, mask=is_row_S1)
    tl.store(at_SC + stream + R, v2_SC, mask=is_row_S1)


@triton.jit
def _publish_map(
    entry_C, R, stream, front1, front2, decay1, decay2, s_k1, s_k2, s_v1, s_v2, end_k1, end_k2, end_v1, end_v2, is_row_S1
):  # fmt: skip
    """Writes the map of a whole block: what its outermost segment does behind (front, s), the rest of the block."""
    at_SC = entry_C[None, :] + tl.zeros(front1.shape, tl.int32)
    tl.store(at_SC, decay1 * front1, mask=is_row_S1)
    tl.store(at_SC + R, decay2 * front2, mask=is_row_S1)
    outer1, outer2 = decay1 * s_k1 + end_k1, decay2 * s_k2 + end_k2
    _publish(entry_C + stream, R, stream, outer1, outer2, decay1 * s_v1 + end_v1, decay2 * s_v2 + end_v2, is_row_S1)


@triton.jit
def _gated_scan_chain_kernel(chain_ptr, k_ptr, v_ptr, stream, size, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Fills the chain: the first state (zeros unless GIVEN), then EMPTY."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if GIVEN:
        k = tl.load(k_ptr + at, mask=at < stream, other=0)
        v = tl.load(v_ptr + at - stream, mask=(at >= stream) & (at < 2 * stream), other=0)
        first = tl.where(at < stream, k, v)
    else:
        first = tl.zeros([BLOCK], tl.int32)
    tl.store(chain_ptr + at, tl.where(at < 2 * stream, first, EMPTY), mask=at < size)


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
def _load_tables(cos_ptr, sin_ptr, offs_SC, t_S, T, R, L: tl.constexpr, ROTATE: tl.constexpr, MASKED: tl.constexpr):
    """Cosines and sines of every step; unread (and 1, 0) without rotation."""
    if ROTATE:
        cos = _load_steps(cos_ptr, offs_SC, R, t_S, T, 1.0, L, MASKED)
        sin = _load_steps(sin_ptr, offs_SC, R, t_S, T, 0.0, L, MASKED)
    else:
        cos, sin = (), ()
        for _ in tl.static_range(L):
            cos = cos + (1.0,)
            sin = sin + (0.0,)
    return cos, sin


@triton.jit
def _gated_scan_forward_kernel(
    k_ptr, v_ptr, g_ptr, cos_ptr, sin_ptr, starts_ptr, k_out_ptr, v_out_ptr, chain_ptr, maps_ptr, saved_ptr,
    B, T, H, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, table_b,
    R: tl.constexpr, BH: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BACK: tl.constexpr,
    POLL: tl.constexpr, POLL_MAP: tl.constexpr, PACK: tl.constexpr, PATIENT: tl.constexpr,
    SAVE_STEPS: tl.constexpr, ROTATE: tl.constexpr, HAS_STARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = R // BH
    block = tl.program_id(0) // (B * H * columns)
    group = tl.program_id(0) % (B * H * columns)
    b, h, first = (group // columns // H).to(tl.int64), (group // columns) % H, (group % columns) * BH
    rows_S, c_C = tl.arange(0, S), tl.arange(0, BH)
    is_last_S1 = (rows_S == S - 1)[:, None]
    k_ptr += b * k_b + h * k_h + first
    v_ptr += b * v_b + h * v_h + first
    g_ptr += b * g_b + h * g_h + first
    out_t = H * (2 * R)
    out_0 = b * T * out_t + h * (2 * R) + first
    k_offs, v_offs = (rows_S * L * k_t)[:, None] + c_C[None, :], (rows_S * L * v_t)[:, None] + c_C[None, :]
    g_offs, out_offs = (rows_S * L * g_t)[:, None] + c_C[None, :], (rows_S * L * out_t)[:, None] + c_C[None, :]
    table_offs = (rows_S * L * R)[:, None] + c_C[None, :]
    inf: tl.constexpr = float("inf")

    stream = B * H * (2 * R)
    column = (group // columns) * (2 * R) + first
    c_SC = c_C[None, :] + tl.zeros([S, BH], tl.int32)
    t0 = block * (S * L)
    t_S, start = t0 + rows_S * L, t0.to(tl.int64)
    g1 = _load_steps(g_ptr + start * g_t, g_offs, g_t, t_S, T, inf, L, MASKED)
    k1 = _load_steps(k_ptr + start * k_t, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v1 = _load_steps(v_ptr + start * v_t, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    g2 = _load_steps(g_ptr + start * g_t + R, g_offs, g_t, t_S, T, inf, L, MASKED)
    k2 = _load_steps(k_ptr + start * k_t + R, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v2 = _load_steps(v_ptr + start * v_t + R, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    table_0 = b * table_b + start * R + first
    keep = _load_keeps(starts_ptr + b * T, t_S, T, L, HAS_STARTS)
    u1, u2 = (), ()
    for i in tl.static_range(L):
        u1 = u1 + (_input_weight(g1[i]),)
        u2 = u2 + (_input_weight(g2[i]),)
    decay1, end_k1, end_v1 = _local_pass(k1, v1, u1, keep, L)
    decay2, end_k2, end_v2 = _local_pass(k2, v2, u2, keep, L)
    front1, s_k1, s_v1 = _in_front(decay1, end_k1, end_v1, False)
    front2, s_k2, s_v2 = _in_front(decay2, end_k2, end_v2, False)

    if BACK > 1:
        entry_C = maps_ptr + block.to(tl.int64) * 3 * stream + column + c_C
        _publish_map(
            entry_C, R, stream, front1, front2, decay1, decay2, s_k1, s_k2, s_v1, s_v2, end_k1, end_k2, end_v1, end_v2, is_last_S1
        )  # fmt: skip
    s_k1, s_k2, s_v1, s_v2 = _arrive(
        chain_ptr, maps_ptr, block, stream, column, c_SC, front1, front2, s_k1, s_k2, s_v1, s_v2, R, BACK, POLL, POLL_MAP, PACK, PATIENT
    )  # fmt: skip
    end_k1, end_k2 = decay1 * s_k1 + end_k1, decay2 * s_k2 + end_k2
    end_v1, end_v2 = decay1 * s_v1 + end_v1, decay2 * s_v2 + end_v2
    entry_C = chain_ptr + (block + 1).to(tl.int64) * 2 * stream + column + c_C
    _publish(entry_C, R, stream, end_k1, end_k2, end_v1, end_v2, is_last_S1)
    if SAVE_STEPS > 0:
        at_SC = (t_S // SAVE_STEPS).to(tl.int64)[:, None] * 2 * stream + column + c_C[None, :]
        begins_S1 = ((t_S % SAVE_STEPS == 0) & (t_S < T))[:, None]
        tl.store(saved_ptr + at_SC, s_k1, mask=begins_S1)
        tl.store(saved_ptr + at_SC + R, s_k2, mask=begins_S1)
        tl.store(saved_ptr + at_SC + stream, s_v1, mask=begins_S1)
        tl.store(saved_ptr + at_SC + stream + R, s_v2, mask=begins_S1)
    cos, sin = _load_tables(cos_ptr + table_0, sin_ptr + table_0, table_offs, t_S, T, R, L, ROTATE, MASKED)

    k_to, v_to = k_out_ptr + out_0 + start * out_t, v_out_ptr + out_0 + start * out_t
    # all outputs before the first store: no load can be moved up past a store, and the tables' loads should be
    out_k1, out_k2, out_v1, out_v2 = (), (), (), ()
    out_type = k_out_ptr.dtype.element_ty
    for i in tl.static_range(L):
        a1, a2 = (1.0 - u1[i]) * keep[i], (1.0 - u2[i]) * keep[i]
        s_k1, s_k2 = a1 * s_k1 + u1[i] * k1[i].to(tl.float32), a2 * s_k2 + u2[i] * k2[i].to(tl.float32)
        s_v1, s_v2 = a1 * s_v1 + u1[i] * v1[i].to(tl.float32), a2 * s_v2 + u2[i] * v2[i].to(tl.float32)
        out_k1 = out_k1 + ((s_k1 * cos[i] - s_k2 * sin[i]).to(out_type),)
        out_k2 = out_k2 + ((s_k2 * cos[i] + s_k1 * sin[i]).to(out_type),)
        out_v1 = out_v1 + (s_v1.to(out_type),)
        out_v2 = out_v2 + (s_v2.to(out_type),)
    for i in tl.static_range(L):
        _store_step(k_to + i * out_t, out_offs, out_k1[i], t_S + i, T, MASKED)
        _store_step(k_to + i * out_t + R, out_offs, out_k2[i], t_S + i, T, MASKED)
        _store_step(v_to + i * out_t, out_offs, out_v1[i], t_S + i, T, MASKED)
        _store_step(v_to + i * out_t + R, out_offs, out_v2[i], t_S + i, T, MASKED)


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
def _store_gradients(
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
def _gated_scan_backward_kernel(
    k_ptr, v_ptr, g_ptr, cos_ptr, sin_ptr, starts_ptr, dk_out_ptr, dv_out_ptr, saved_ptr, chain_ptr, maps_ptr, dk_ptr, dv_ptr, dg_ptr,
    B, T, H, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, out_t, table_b, blocks,
    R: tl.constexpr, BH: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BACK: tl.constexpr,
    POLL: tl.constexpr, POLL_MAP: tl.constexpr, PACK: tl.constexpr, PATIENT: tl.constexpr,
    ROTATE: tl.constexpr, HAS_STARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = R // BH
    order = tl.program_id(0) // (B * H * columns)
    block = blocks - 1 - order
    group = tl.program_id(0) % (B * H * columns)
    b, h, first = (group // columns // H).to(tl.int64), (group // columns) % H, (group % columns) * BH
    rows_S, c_C = tl.arange(0, S), tl.arange(0, BH)
    is_first_S1 = (rows_S == 0)[:, None]
    k_ptr += b * k_b + h * k_h + first
    v_ptr += b * v_b + h * v_h + first
    g_ptr += b * g_b + h * g_h + first
    dk_out_ptr += b * dk_b + h * dk_h + first
    dv_out_ptr += b * dv_b + h * dv_h + first
    out_0 = b * T * out_t + h * (2 * R) + first
    k_offs, v_offs = (rows_S * L * k_t)[:, None] + c_C[None, :], (rows_S * L * v_t)[:, None] + c_C[None, :]
    g_offs, out_offs = (rows_S * L * g_t)[:, None] + c_C[None, :], (rows_S * L * out_t)[:, None] + c_C[None, :]
    dk_offs, dv_offs = (rows_S * L * dk_t)[:, None] + c_C[None, :], (rows_S * L * dv_t)[:, None] + c_C[None, :]
    table_offs = (rows_S * L * R)[:, None] + c_C[None, :]
    inf: tl.constexpr = float("inf")

    stream = B * H * (2 * R)
    column = (group // columns) * (2 * R) + first
    c_SC = c_C[None, :] + tl.zeros([S, BH], tl.int32)
    t0 = block * (S * L)
    t_S, start = t0 + rows_S * L, t0.to(tl.int64)
    g1 = _load_steps(g_ptr + start * g_t, g_offs, g_t, t_S, T, inf, L, MASKED)
    g2 = _load_steps(g_ptr + start * g_t + R, g_offs, g_t, t_S, T, inf, L, MASKED)
    r1 = _load_steps(dk_out_ptr + start * dk_t, dk_offs, dk_t, t_S, T, 0.0, L, MASKED)
    r2 = _load_steps(dk_out_ptr + start * dk_t + R, dk_offs, dk_t, t_S, T, 0.0, L, MASKED)
    e_v1 = _load_steps(dv_out_ptr + start * dv_t, dv_offs, dv_t, t_S, T, 0.0, L, MASKED)
    e_v2 = _load_steps(dv_out_ptr + start * dv_t + R, dv_offs, dv_t, t_S, T, 0.0, L, MASKED)
    k1 = _load_steps(k_ptr + start * k_t, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    k2 = _load_steps(k_ptr + start * k_t + R, k_offs, k_t, t_S, T, 0.0, L, MASKED)
    v1 = _load_steps(v_ptr + start * v_t, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    v2 = _load_steps(v_ptr + start * v_t + R, v_offs, v_t, t_S, T, 0.0, L, MASKED)
    table_0 = b * table_b + start * R + first
    cos, sin = _load_tables(cos_ptr + table_0, sin_ptr + table_0, table_offs, t_S, T, R, L, ROTATE, MASKED)
    keep = _load_keeps(starts_ptr + b * T, t_S, T, L, HAS_STARTS)
    state = saved_ptr + block.to(tl.int64) * 2 * stream + column + c_C
    in_k1, in_k2 = tl.load(state), tl.load(state + R)
    in_v1, in_v2 = tl.load(state + stream), tl.load(state + stream + R)
    u1, u2, e_k1, e_k2 = (), (), (), ()
    for i in tl.static_range(L):
        u1 = u1 + (_input_weight(g1[i]),)
        u2 = u2 + (_input_weight(g2[i]),)
        d1, d2 = r1[i].to(tl.float32), r2[i].to(tl.float32)
        e_k1 = e_k1 + (d1 * cos[i] + d2 * sin[i],)
        e_k2 = e_k2 + (d2 * cos[i] - d1 * sin[i],)

    decay1, end_k1, end_v1 = _reverse_local_pass(e_k1, e_v1, u1, keep, L)
    decay2, end_k2, end_v2 = _reverse_local_pass(e_k2, e_v2, u2, keep, L)
    behind1, p_k1, p_v1 = _in_front(decay1, end_k1, end_v1, True)
    behind2, p_k2, p_v2 = _in_front(decay2, end_k2, end_v2, True)
    if BACK > 1:
        entry_C = maps_ptr + order.to(tl.int64) * 3 * stream + column + c_C
        _publish_map(
            entry_C, R, stream, behind1, behind2, decay1, decay2, p_k1, p_k2, p_v1, p_v2, end_k1, end_k2, end_v1, end_v2, is_first_S1
        )  # fmt: skip
    p_k1, p_k2, p_v1, p_v2 = _arrive(
        chain_ptr, maps_ptr, order, stream, column, c_SC, behind1, behind2, p_k1, p_k2, p_v1, p_v2, R, BACK, POLL, POLL_MAP, PACK, PATIENT
    )  # fmt: skip
    end_k1, end_k2 = decay1 * p_k1 + end_k1, decay2 * p_k2 + end_k2
    end_v1, end_v2 = decay1 * p_v1 + end_v1, decay2 * p_v2 + end_v2
    entry_C = chain_ptr + (order + 1).to(tl.int64) * 2 * stream + column + c_C
    _publish(entry_C, R, stream, end_k1, end_k2, end_v1, end_v2, is_first_S1)

    # the averages of the block once more, for the gates' gradient
    decay1, s_k1, s_v1 = _local_pass(k1, v1, u1, keep, L)
    decay2, s_k2, s_v2 = _local_pass(k2, v2, u2, keep, L)
    front1, s_k1, s_v1 = _in_front(decay1, s_k1, s_v1, False)
    front2, s_k2, s_v2 = _in_front(decay2, s_k2, s_v2, False)
    s_k1, s_v1 = front1 * in_k1[None, :] + s_k1, front1 * in_v1[None, :] + s_v1
    s_k2, s_v2 = front2 * in_k2[None, :] + s_k2, front2 * in_v2[None, :] + s_v2
    dk_to, dv_to, dg_to = (dk_ptr + out_0 + start * out_t, dv_ptr + out_0 + start * out_t, dg_ptr + out_0 + start * out_t)
    total_k1, total_v1 = _reverse_pass(e_k1, e_v1, u1, keep, p_k1, p_v1, L)
    _store_gradients(k1, v1, u1, keep, s_k1, s_v1, total_k1, total_v1, dk_to, dv_to, dg_to, out_offs, out_t, t_S, T, L, MASKED)
    total_k2, total_v2 = _reverse_pass(e_k2, e_v2, u2, keep, p_k2, p_v2, L)
    _store_gradients(
        k2, v2, u2, keep, s_k2, s_v2, total_k2, total_v2, dk_to + R, dv_to + R, dg_to + R, out_offs, out_t, t_S, T, L, MASKED
    )


def _strides(*tensors_BTHK: Tensor) -> list[int]:
    return [stride for x in tensors_BTHK for stride in x.stride()[:3]]


def _new_chain(blocks: int, back: int, like_BTHK: Tensor, first: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The chain (blocks + 1, 2, B, H, K), its first entry given (zeros without one), and maps (blocks, 3, B, H, K) if links look back."""
    batch, _, heads, channels = like_BTHK.shape
    stream = batch * heads * channels
    sizes = 2 * stream * (blocks + 1), 3 * stream * blocks if back > 1 else 0
    bits = torch.empty(sum(sizes), dtype=torch.int32, device=like_BTHK.device)
    first_k, first_v = (bits, bits) if first is None else (x.contiguous().view(torch.int32) for x in first)
    _gated_scan_chain_kernel[(triton.cdiv(sum(sizes), 4096),)](
        bits, first_k, first_v, stream, sum(sizes), GIVEN=first is not None, BLOCK=4096, num_warps=4
    )
    chain, maps = bits.view(torch.float32).split(sizes)
    return chain.view(blocks + 1, 2, batch, heads, channels), maps


def _table_arguments(cos: Tensor | None, sin: Tensor | None, filler: Tensor) -> tuple[Tensor, Tensor, int]:
    if cos is None or sin is None:
        return filler, filler, 0
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return cos, sin, cos.stride(0) if cos.dim() == 3 else 0


def _tiles(k_BTHK: Tensor) -> tuple[Tile, Tile]:
    """The tiles (forward, backward) for inputs of this shape."""
    batch, _, heads, channels = k_BTHK.shape
    return MANY_COLUMNS if batch * heads * channels >= MANY_CHANNELS else FEW_COLUMNS


def _launch_shape(tile: Tile, like_BTHK: Tensor) -> tuple[tuple[int], int, dict[str, Any]]:
    """The grid, the number of blocks along time, and the options both kernels share."""
    batch, length, heads, channels = like_BTHK.shape
    pairs = next(p for p in (64, 32, 16, 8) if p <= tile.pairs and channels % (2 * p) == 0)  # channels are a multiple of 16
    block = tile.segments * tile.steps
    blocks = triton.cdiv(length, block)
    warps = min(tile.warps, max(1, tile.segments * pairs // 32))  # no thread without an entry of its own: see _polling
    options = {
        "R": channels // 2, "BH": pairs, "S": tile.segments, "L": tile.steps, "BACK": tile.back, "num_warps": warps,
        "maxnreg": tile.registers, "MASKED": length % block != 0,
    }  # fmt: skip
    pack = min(2, tile.segments * pairs // (32 * warps))
    grid = batch * heads * (channels // 2 // pairs) * blocks
    return (grid,), blocks, {**options, **_polls(pack, channels // 2, tile.patient)}


def _polls(pack: int, pairs: int, patient: bool) -> dict[str, Any]:
    """The options of `_arrive`; interpreted programs run one behind the other, and so need not wait."""
    pack = 0 if triton.knobs.runtime.interpret else pack
    return {"PACK": pack, "PATIENT": patient, "POLL": _polling(2, pack, pairs, patient), "POLL_MAP": _polling(3, pack, pairs)}


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
    """Launches the forward: (k_out, v_out, last states (2, B, H, K) fp32, states in front of every backward block or None)."""
    batch, length, heads, _ = k_BTHK.shape
    tile, backward_tile = _tiles(k_BTHK)
    grid, blocks, options = _launch_shape(tile, k_BTHK)
    k_out, v_out = (torch.empty(k_BTHK.shape, dtype=out_dtype, device=k_BTHK.device) for _ in range(2))
    chain, maps = _new_chain(blocks, tile.back, k_BTHK, start)
    save_steps = backward_tile.segments * backward_tile.steps if save else 0
    saved = chain.new_empty(triton.cdiv(length, save_steps), *chain.shape[1:]) if save else None
    cos, sin, table_b = _table_arguments(cos, sin, k_BTHK)
    _gated_scan_forward_kernel[grid](
        k_BTHK, v_BTHK, g_BTHK, cos, sin, k_BTHK if starts_BT is None else starts_BT, k_out, v_out, chain, maps,
        chain if saved is None else saved, batch, length, heads, *_strides(k_BTHK, v_BTHK, g_BTHK), table_b,
        SAVE_STEPS=save_steps, ROTATE=cos is not k_BTHK, HAS_STARTS=starts_BT is not None, **options,
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
    dlast: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward, `saved` from the forward: (dk, dv, dg, gradient of the initial states (2, B, H, K) fp32)."""
    batch, length, heads, _ = k_BTHK.shape
    tile = _tiles(k_BTHK)[1]
    grid, blocks, options = _launch_shape(tile, k_BTHK)
    places = [GradientPlace.of(x).claimed() for x in (k_BTHK, v_BTHK, g_BTHK)]
    if len({place.row_stride for place in places}) > 1:  # the kernel knows one stride for all three
        places = [place.alone() for place in places]
    dk, dv, dg = (place.empty() for place in places)
    chain, maps = _new_chain(blocks, tile.back, k_BTHK, dlast)
    cos, sin, table_b = _table_arguments(cos, sin, k_BTHK)
    _gated_scan_backward_kernel[grid](
        k_BTHK, v_BTHK, g_BTHK, cos, sin, k_BTHK if starts_BT is None else starts_BT, dk_out_BTHK, dv_out_BTHK, saved,
        chain, maps, dk, dv, dg,
        batch, length, heads, *_strides(k_BTHK, v_BTHK, g_BTHK, dk_out_BTHK, dv_out_BTHK), places[0].row_stride,
        table_b, blocks,
        ROTATE=cos is not k_BTHK, HAS_STARTS=starts_BT is not None, **options,
    )  # fmt: skip
    return dk, dv, dg, chain[-1]


class GatedScan(torch.autograd.Function):
    """Autograd around the two launches; outputs (k_out, v_out, last k state, last v state)."""

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
        """Launches the forward and keeps the inputs, and the states that a backward starts its blocks from."""
        start = None if start_k_BHK is None or start_v_BHK is None else (start_k_BHK, start_v_BHK)
        k_out, v_out, last, saved = scan_forward(k_BTHK, v_BTHK, g_BTHK, cos, sin, start, starts_BT, out_dtype, save)
        ctx.save_for_backward(k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved)
        ctx.has_start = start is not None
        ctx.set_materialize_grads(False)
        return k_out, v_out, last[0], last[1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dk_out_BTHK: Tensor | None,
        dv_out_BTHK: Tensor | None,
        dlast_k_BHK: Tensor | None,
        dlast_v_BHK: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Launches the backward; outputs that nothing used have no gradient and count as zeros."""
        k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved = ctx.saved_tensors
        dk_out_BTHK, dv_out_BTHK = (torch.zeros_like(k_BTHK) if d is None else d for d in (dk_out_BTHK, dv_out_BTHK))
        dk_out_BTHK, dv_out_BTHK = (d if d.stride(-1) == 1 else d.contiguous() for d in (dk_out_BTHK, dv_out_BTHK))
        dlast = None
        if dlast_k_BHK is not None or dlast_v_BHK is not None:
            dlast_k, dlast_v = (torch.zeros_like(saved[0, 0]) if d is None else d for d in (dlast_k_BHK, dlast_v_BHK))
            dlast = dlast_k, dlast_v
        dk, dv, dg, dstart = scan_backward(k_BTHK, v_BTHK, g_BTHK, cos, sin, starts_BT, saved, dk_out_BTHK, dv_out_BTHK, dlast)
        dstart_k, dstart_v = dstart if ctx.has_start else (None, None)
        return dk, dv, dg, None, None, dstart_k, dstart_v, None, None, None
