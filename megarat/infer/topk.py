"""Top-k block attention on a RAT+ model: every query reads the few blocks of keys that score highest for it.

The sequence is cut into blocks of ``size`` positions. Query i lies in block c = i // size; each head on its own reads

    block 0 and block c (causally), always,
    of the blocks 1 … c - 1 the ``blocks - 2`` with the highest score,
    and whatever the pattern (D, W, I) shows besides: with D = -1, W = 0 nothing, with D = 16 the dilated keys of all other blocks.

So ``blocks`` counts everything but the pattern's own keys: the budget is blocks * size keys. A block is scored by its rotated keys k~,

    max    sum over channels of max(q_c max_j k_jc, q_c min_j k_jc), an upper bound of every q . k_j (Quest, arXiv 2406.10774)
    mean   q . mean_j k_j                                                                            (MoBA, arXiv 2502.13189)

All keys stay in the cache, as in those methods; what is saved is reading them. This is the plain form, for measuring quality: it computes
every score under a mask.

Shapes: B sequences, T queries, H heads, K head channels, S positions with keys, N whole blocks among them.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megarat.errors import UserError
from megarat.ops.dilated_attention import PatternLike, visible

_QUERIES = 256  # computed at a time: bounds the memory of the scores


class TopK(NamedTuple):
    """``blocks`` read a query, the first and the current one among them; positions of a block; how blocks are scored."""

    blocks: int
    size: int = 64
    score: str = "max"

    @classmethod
    def parse(cls, text: str) -> TopK:
        """Read ``blocks=16,size=64,score=max`` (size 64 and score max by default). Raises ``UserError``."""
        how = "write for example 'topk blocks=16,size=64,score=max'"
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in cls._fields or not equals or key in values:
                raise UserError(f"topk {text.strip()!r}: cannot read {part.strip()!r}; {how}")
            values[key] = value
        numbers = {key: values.get(key, default) for key, default in (("blocks", ""), ("size", "64"))}
        if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers.values()):
            raise UserError(f"topk {text.strip()!r}: blocks and size must be whole numbers; {how}")
        parsed = cls(int(numbers["blocks"]), int(numbers["size"]), values.get("score", "max"))
        if parsed.blocks < 2 or parsed.size < 1:
            raise UserError(
                f"topk {text.strip()!r}: needs blocks >= 2 (the first and the current one are always read) and size >= 1"
            )
        if parsed.score not in ("max", "mean"):
            raise UserError(f"topk {text.strip()!r}: score is {parsed.score!r}; expected max or mean")
        return parsed

    def __str__(self) -> str:
        return f"topk blocks={self.blocks},size={self.size},score={self.score}"


def topk_attention(
    q_BTHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    positions_BT: Tensor,
    pattern: PatternLike,
    topk: TopK,
    scale: float | None = None,
) -> Tensor:
    """Attention (B, T, H, K) of queries at ``positions_BT`` to the keys of positions 0 … S - 1, all heads under one pattern.

    Keys behind a query's position may hold anything (a cache that is not full). Scores and softmax in fp32 at least.
    """
    pooled = block_bounds(k_BSHK, topk)
    parts = []
    for first in range(0, q_BTHK.shape[1], _QUERIES):
        chunk = slice(first, first + _QUERIES)
        seen_BHTS = readable(q_BTHK[:, chunk], pooled, positions_BT[:, chunk], k_BSHK.shape[1], pattern, topk)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK[:, chunk], k_BSHK, v_BSHK))
        parts.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_BHTS, scale=scale).transpose(1, 2))
    return torch.cat(parts, dim=1)


def block_bounds(k_BSHK: Tensor, topk: TopK) -> tuple[Tensor, Tensor]:
    """What blocks are scored by, twice (B, N, H, K): their largest and smallest keys by channel, or twice their mean."""
    whole = k_BSHK.shape[1] // topk.size
    blocks = k_BSHK[:, : whole * topk.size].unflatten(1, (whole, topk.size))
    if topk.score == "mean":
        mean = blocks.to(_wide(k_BSHK)).mean(dim=2)
        return mean, mean
    return blocks.amax(dim=2), blocks.amin(dim=2)


def readable(
    q_BTHK: Tensor, bounds: tuple[Tensor, Tensor], positions_BT: Tensor, length: int, pattern: PatternLike, topk: TopK
) -> Tensor:
    """Which keys each query and head reads, bool (B, H, T, S)."""
    keys_S = torch.arange(length, device=q_BTHK.device)
    current_BT1 = (positions_BT // topk.size)[..., None]
    chosen_BHTN = _chosen(q_BTHK, bounds, current_BT1[:, None], topk)
    blocks = math.ceil(length / topk.size)
    chosen_BHTN = functional.pad(chosen_BHTN, (0, blocks - chosen_BHTN.shape[-1]))
    block_N = torch.arange(blocks, device=q_BTHK.device)
    chosen_BHTN = chosen_BHTN | ((block_N == 0) | (block_N == current_BT1))[:, None]
    in_block_BHTS = chosen_BHTN.repeat_interleave(topk.size, dim=-1)[..., :length]
    causal_BTS = keys_S <= positions_BT[..., None]
    return (in_block_BHTS & causal_BTS[:, None]) | visible(positions_BT, keys_S, pattern)[:, None]


def _chosen(q_BTHK: Tensor, bounds: tuple[Tensor, Tensor], current_B1T1: Tensor, topk: TopK) -> Tensor:
    """The best of the blocks between the first and the current one, bool (B, H, T, N)."""
    high, low = (bound.to(_wide(q_BTHK)) for bound in bounds)
    q = q_BTHK.to(high.dtype)
    scores_BHTN = torch.einsum("bthk,bnhk->bhtn", q.clamp_min(0), high) + torch.einsum("bthk,bnhk->bhtn", q.clamp_max(0), low)
    block_N = torch.arange(scores_BHTN.shape[-1], device=q.device)
    eligible_B1TN = (block_N >= 1) & (block_N < current_B1T1)
    scores_BHTN = scores_BHTN.masked_fill(~eligible_B1TN, -math.inf)
    best = scores_BHTN.topk(min(topk.blocks - 2, scores_BHTN.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores_BHTN, dtype=torch.bool).scatter_(-1, best, True) & eligible_B1TN


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
