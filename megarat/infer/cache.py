"""The sparse key/value cache of a RAT+ model (arXiv 2602.18196, decoding).

For every layer and every group of heads with one pattern (D, W, I) the cache keeps rotated keys and values in slots
[initial I | ring W | far], and for every layer the fp32 state of the recurrence before rotary. ``megarat.ops.decode_attention``
defines which position a slot holds; everything is a function of the sequences' lengths, so rows of a batch may differ.

Shapes: B sequences, H heads, K head channels, T prompt length, S slots of a head group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarat.config import ModelConfig
from megarat.model.pattern import HeadGroup, Pattern, Patterns, layer_groups
from megarat.ops import ScanState, cache_slots, cache_write, decode_attention
from megarat.ops.decode_attention import slot_positions


@dataclass
class GroupCache:
    """Slots of the heads that share a pattern in one layer; keys and values are (B, heads of the group, S, K)."""

    pattern: Pattern
    heads: tuple[int, ...]
    k_BHSK: Tensor
    v_BHSK: Tensor

    def fill(self, k_BTHK: Tensor, v_BTHK: Tensor, lengths_B: Tensor) -> None:
        """Keep what each row of a right-padded prompt leaves behind after ``lengths_B`` tokens."""
        positions_BS = slot_positions(self.k_BHSK.shape[2], lengths_B, self.pattern)
        last = k_BTHK.shape[1] - 1
        index_BHSK = positions_BS.clamp(0, last)[:, None, :, None].expand_as(
            self.k_BHSK
        )  # empty slots hold anything: they stay hidden
        for cache, full_BTHK in ((self.k_BHSK, k_BTHK), (self.v_BHSK, v_BTHK)):
            cache.copy_(full_BTHK.transpose(1, 2)[:, list(self.heads)].gather(2, index_BHSK))

    def attend(self, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, lengths_B: Tensor) -> Tensor:
        """Attention of the current tokens of this group's heads, then store their keys and values."""
        out_BHK = decode_attention(q_BHK, k_BHK, v_BHK, self.k_BHSK, self.v_BHSK, lengths_B, self.pattern)
        cache_write(self.k_BHSK, self.v_BHSK, k_BHK, v_BHK, lengths_B, self.pattern)
        return out_BHK


class SparseCache:
    """All layers' slots and states for a batch of sequences of at most ``capacity`` tokens.

    ``lengths_B`` (int64, on the device) counts the tokens each sequence already has.
    """

    def __init__(
        self, config: ModelConfig, patterns: Patterns, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.capacity = capacity
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.states: list[ScanState | None] = [None] * config.layers
        self.layers = [
            [_empty_group(group, batch, capacity, config.head_dim, dtype, device) for group in layer] for layer in patterns
        ]

    @property
    def bytes(self) -> int:
        """Memory held by slots and states."""
        slots = [tensor for layer in self.layers for group in layer for tensor in (group.k_BHSK, group.v_BHSK)]
        states = [tensor for state in self.states if state is not None for tensor in state]
        return sum(tensor.numel() * tensor.element_size() for tensor in slots + states)

    def fill(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor, state: ScanState | None, lengths_B: Tensor) -> None:
        """Take over one layer's keys, values and state after a prompt."""
        for group in self.layers[layer]:
            group.fill(k_BTHK, v_BTHK, lengths_B)
        self.states[layer] = state

    def attend(self, layer: int, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor) -> Tensor:
        """One layer's attention of the current tokens, (B, H, K), head group by head group."""
        groups = self.layers[layer]
        if len(groups) == 1:
            return groups[0].attend(q_BHK, k_BHK, v_BHK, self.lengths_B)
        out_BHK = torch.empty_like(q_BHK)
        for group in groups:
            heads = list(group.heads)
            out_BHK[:, heads] = group.attend(q_BHK[:, heads], k_BHK[:, heads], v_BHK[:, heads], self.lengths_B)
        return out_BHK


def _empty_group(
    group: HeadGroup, batch: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> GroupCache:
    pattern = _within(group.pattern, capacity)
    shape = (batch, len(group.heads), cache_slots(pattern, capacity), head_dim)
    return GroupCache(
        pattern, group.heads, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    )


def _within(pattern: Pattern, capacity: int) -> Pattern:
    """The same visibility for sequences up to ``capacity``, without slots that could never be filled."""
    return pattern._replace(window=min(pattern.window, capacity), initial=min(pattern.initial, capacity))


def cache_bytes(config: ModelConfig, patterns: Patterns, length: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes one sequence of up to ``length`` tokens keeps while decoding.

    Per layer: 2 K bytes(dtype) (I + W + floor(length / D) - floor(I / D)) for each head, and 8 C for the fp32 state of k~ and v~.
    """
    slots = sum(len(group.heads) * cache_slots(_within(group.pattern, length), length) for _, group in layer_groups(patterns))
    state = 8 * config.hidden * config.layers if config.recurrence else 0
    return 2 * config.head_dim * dtype.itemsize * slots + state
