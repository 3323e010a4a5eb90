"""The sparse key/value cache of a RAT+ model (arXiv 2602.18196, decoding).

For every layer and every group of heads with one pattern (D, W, I) the cache keeps rotated keys and values in slots
[initial I | ring W | far], and for every layer the fp32 state of the recurrence before rotary. ``megarat.ops.decode_attention``
defines which position a slot holds; everything is a function of the sequences' lengths, so rows of a batch may differ. With top-k
blocks every key is kept (slot j holds position j) and the choice is made when they are read; under SnapKV some keys of a long prompt
are left out, and the others stand close together.

Shapes: B sequences, T tokens of a chunk, H heads, K head channels, S slots of a head group.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from megarat.config import ModelConfig
from megarat.infer.memory import check_fits
from megarat.infer.reading import Reading
from megarat.infer.topk import TopK, topk_attention
from megarat.model.pattern import HeadGroup, Pattern, Patterns, layer_groups
from megarat.ops import ScanState, cache_slots, cache_write, decode_attention, rotary_tables
from megarat.ops.decode_attention import slot_positions
from megarat.ops.dilated_attention import visible
from megarat.ops.gated_scan import state_dtype

_QUERIES = 4096  # of a later chunk computed at a time: bounds the memory of the mask


@dataclass
class GroupCache:
    """Slots of the heads that share a pattern in one layer; keys and values are (B, heads of the group, S, K).

    ``kept`` is the pattern by which slots hold positions; ``pattern`` the one queries read by. They differ only under top-k.
    """

    pattern: Pattern
    kept: Pattern
    topk: TopK | None
    heads_G: Tensor | None  # the group's heads, int64 on the device; None where they are all
    k_BHSK: Tensor
    v_BHSK: Tensor

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This group's part of a tensor whose dimension ``dim`` counts all heads."""
        return x if self.heads_G is None else x.index_select(dim, self.heads_G)

    def put(self, whole: Tensor, part: Tensor, dim: int) -> None:
        """Write this group's part of a tensor whose dimension ``dim`` counts all heads."""
        if self.heads_G is None:
            whole.copy_(part)
        else:
            whole.index_copy_(dim, self.heads_G, part)

    def rows(self, first: int, end: int) -> GroupCache:
        """Some of the rows, sharing their memory."""
        return replace(self, k_BHSK=self.k_BHSK[first:end], v_BHSK=self.v_BHSK[first:end])

    def append(self, k_BTHK: Tensor, v_BTHK: Tensor, start: int, lengths_B: Tensor) -> None:
        """Keep what each row leaves behind of the tokens at positions ``start`` … ``lengths_B`` - 1 (none where that is no range)."""
        positions_BS = slot_positions(self.k_BHSK.shape[2], lengths_B, self.kept)
        fresh_B1S1 = ((positions_BS >= start) & (positions_BS < lengths_B[:, None]))[:, None, :, None]
        index_BS = (positions_BS - start).clamp(0, k_BTHK.shape[1] - 1)
        for cache_BHSK, full_BTHK in ((self.k_BHSK, k_BTHK), (self.v_BHSK, v_BTHK)):
            if len(index_BS) == 1:
                new_BHSK = full_BTHK.index_select(1, index_BS[0]).transpose(1, 2)
            else:
                new_BHSK = full_BTHK.transpose(1, 2).gather(2, index_BS[:, None, :, None].expand_as(cache_BHSK))
            cache_BHSK.copy_(torch.where(fresh_B1S1, new_BHSK, cache_BHSK))

    def extend(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, start: int, lengths_B: Tensor) -> Tensor:
        """Attention (B, T, H, K) of the tokens from ``start`` on to all before them and among themselves; then keep them.

        Only the first ``lengths_B - start`` tokens of a row are real; what the others get means nothing.
        """
        positions_T = torch.arange(start, start + q_BTHK.shape[1], device=q_BTHK.device)
        if self.topk is not None:
            self.append(k_BTHK, v_BTHK, start, lengths_B)
            return self._attend_blocks(q_BTHK, positions_T.expand(len(q_BTHK), -1))
        k_BHSK = torch.cat((self.k_BHSK, k_BTHK.transpose(1, 2)), dim=2)
        v_BHSK = torch.cat((self.v_BHSK, v_BTHK.transpose(1, 2)), dim=2)
        parts = []
        for first in range(0, len(positions_T), _QUERIES):
            own_T = positions_T[first : first + _QUERIES]
            seen_TS = torch.cat((self._visible_slots(own_T, start), visible(own_T, positions_T, self.pattern)), dim=1)
            q_BHTK = q_BTHK[:, first : first + _QUERIES].transpose(1, 2)
            parts.append(functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=seen_TS))
        self.append(k_BTHK, v_BTHK, start, lengths_B)
        return torch.cat(parts, dim=2).transpose(1, 2)

    def step(self, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, lengths_B: Tensor) -> Tensor:
        """Attention of the current tokens of this group's heads, and keep their keys and values."""
        if self.topk is not None:
            cache_write(self.k_BHSK, self.v_BHSK, k_BHK, v_BHK, lengths_B, self.kept)
            return self._attend_blocks(q_BHK[:, None], lengths_B[:, None])[:, 0]
        out_BHK = decode_attention(q_BHK, k_BHK, v_BHK, self.k_BHSK, self.v_BHSK, lengths_B, self.pattern)
        cache_write(self.k_BHSK, self.v_BHSK, k_BHK, v_BHK, lengths_B, self.kept)
        return out_BHK

    def _attend_blocks(self, q_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        assert self.topk is not None
        return topk_attention(
            q_BTHK, self.k_BHSK.transpose(1, 2), self.v_BHSK.transpose(1, 2), positions_BT, self.pattern, self.topk
        )

    def _visible_slots(self, positions_T: Tensor, start: int) -> Tensor:
        """Which slots, filled up to ``start`` tokens, the queries at ``positions_T`` see: bool (T, S).

        As in `megarat.ops.decode_attention`: behind a query's window only the initial and far slots count, within it only the ring.
        """
        slots, (_, window, initial) = self.k_BHSK.shape[2], self.pattern
        held_S = slot_positions(slots, torch.tensor([start], device=positions_T.device), self.pattern)[0]
        slot_S = torch.arange(slots, device=positions_T.device)
        in_ring_S = (slot_S >= initial) & (slot_S < initial + window)
        lo_T1 = (positions_T - window).clamp_min(0)[:, None]
        return torch.where(in_ring_S, held_S >= lo_T1, held_S < lo_T1) & (held_S < start)


class SparseCache:
    """All layers' slots and states for a batch of sequences of at most ``capacity`` tokens.

    ``lengths_B`` (int64, on the device) counts the tokens each sequence already has; ``states`` are empty without the recurrence. All of it is
    taken here. Raises ``UserError`` where that does not fit into the device's memory, before anything is taken.
    """

    def __init__(
        self,
        config: ModelConfig,
        reading: Reading | Patterns,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        heads: range | None = None,
    ) -> None:
        """``heads`` are those of the rank where ranks share a model; None: all."""
        heads = range(config.heads) if heads is None else heads
        reading = reading if isinstance(reading, Reading) else Reading(reading)
        check_fits(batch, cache_bytes(config, reading, capacity, dtype, heads), capacity, device)
        self.reading = reading
        self.capacity = capacity
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.dropped_B = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens without a slot, under SnapKV
        wide = state_dtype(dtype)
        state_shape = (batch, len(heads), config.head_dim)
        self.states = [
            ScanState(*(torch.zeros(state_shape, dtype=wide, device=device) for _ in range(2)))
            for _ in range(config.layers if config.recurrence else 0)
        ]
        positions_T = torch.arange(capacity, device=device)
        self.rotary = rotary_tables(positions_T, config.head_dim, config.rope_base, wide)  # cos and sin of each position, (T, R)
        self.layers = [
            [_empty_group(group, len(layer) == 1, reading, config.head_dim, (batch, capacity), dtype, device) for group in layer]
            for layer in (patterns.part(heads) for patterns in reading.patterns)
        ]

    @property
    def bytes(self) -> int:
        """Memory held by slots and states."""
        slots = [tensor for layer in self.layers for group in layer for tensor in (group.k_BHSK, group.v_BHSK)]
        states = [tensor for state in self.states for tensor in state]
        return sum(tensor.numel() * tensor.element_size() for tensor in slots + states)

    def rows(self, first: int, end: int) -> SparseCache:
        """Some of the rows as a cache of their own that shares their memory."""
        view = copy.copy(self)
        view.lengths_B, view.dropped_B = self.lengths_B[first:end], self.dropped_B[first:end]
        view.states = [ScanState(*(part[first:end] for part in state)) for state in self.states]
        view.layers = [[group.rows(first, end) for group in layer] for layer in self.layers]
        return view

    def copy_(self, other: SparseCache) -> None:
        """Take over the sequences of another cache of the same reading and capacity, row by row, or one sequence into every row."""
        self.lengths_B.copy_(other.lengths_B.expand_as(self.lengths_B))
        self.dropped_B.copy_(other.dropped_B.expand_as(self.dropped_B))
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for group, source in zip(mine, theirs, strict=True):
                group.k_BHSK.copy_(source.k_BHSK.expand_as(group.k_BHSK))
                group.v_BHSK.copy_(source.v_BHSK.expand_as(group.v_BHSK))
        for own, state in zip(self.states, other.states, strict=True):
            for part, source_part in zip(own, state, strict=True):
                part.copy_(source_part.expand_as(part))

    def append(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor, start: int, lengths_B: Tensor) -> None:
        """Keep one layer's keys and values of a chunk, without reading anything."""
        for group in self.layers[layer]:
            group.append(group.own(k_BTHK, 2), group.own(v_BTHK, 2), start, lengths_B)

    def extend(self, layer: int, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, start: int, lengths_B: Tensor) -> Tensor:
        """One layer's attention of a chunk of tokens from ``start`` on, (B, T, H, K), head group by head group; then keep them."""
        out_BTHK = torch.empty_like(q_BTHK)
        for group in self.layers[layer]:
            q, k, v = (group.own(x, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
            group.put(out_BTHK, group.extend(q, k, v, start, lengths_B), 2)
        return out_BTHK

    def step(self, layer: int, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor) -> Tensor:
        """One layer's attention of the current tokens, (B, H, K), head group by head group; then keep them."""
        out_BHK = torch.empty_like(q_BHK)
        filled_B = (self.lengths_B - self.dropped_B).clamp_min(0)  # of a row that nobody reads any more, nothing
        for group in self.layers[layer]:
            q, k, v = (group.own(x, 1) for x in (q_BHK, k_BHK, v_BHK))
            group.put(out_BHK, group.step(q, k, v, filled_B), 1)
        return out_BHK


def _empty_group(
    group: HeadGroup,
    is_whole: bool,
    reading: Reading,
    head_dim: int,
    batch_and_capacity: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> GroupCache:
    batch, capacity = batch_and_capacity
    pattern = _within(group.pattern, capacity)
    kept = pattern if reading.is_plain else Pattern()
    size = (batch, len(group.heads), _slots(kept, reading, capacity), head_dim)
    k, v = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
    heads_G = None if is_whole else torch.tensor(group.heads, device=device)
    return GroupCache(pattern, kept, reading.topk, heads_G, k, v)


def _slots(kept: Pattern, reading: Reading, capacity: int) -> int:
    if reading.snapkv is not None:
        return reading.snapkv.slots(capacity)
    return cache_slots(_within(kept, capacity), capacity)


def _within(pattern: Pattern, capacity: int) -> Pattern:
    """The same visibility for sequences up to ``capacity``, without slots that could never be filled."""
    return pattern._replace(window=min(pattern.window, capacity), initial=min(pattern.initial, capacity))


def cache_bytes(
    config: ModelConfig,
    reading: Reading | Patterns,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    heads: range | None = None,
) -> int:
    """Bytes one sequence of up to ``length`` tokens keeps while decoding, of some of the heads where ranks share a model (None: all).

    Per layer: 2 K bytes(dtype) (I + W + floor(length / D) - floor(I / D)) for each head, and 8 K for its fp32 state of k~ and v~. Top-k
    keeps what a dense cache keeps; SnapKV its share of a prompt and the answer.
    """
    heads = range(config.heads) if heads is None else heads
    reading = reading if isinstance(reading, Reading) else Reading(reading)
    kept = tuple(layer.part(heads) for layer in reading.kept)
    slots = sum(len(group.heads) * _slots(group.pattern, reading, length) for _, group in layer_groups(kept))
    state = 8 * config.head_dim * len(heads) * config.layers if config.recurrence else 0
    return 2 * config.head_dim * dtype.itemsize * slots + state
