"""The three ways through a model at inference: a whole sequence, prompts in chunks into a cache, one token a sequence from it.

All three compute the same function, for every pattern and with top-k blocks. A prompt read whole from its start takes the training forward;
in chunks, each chunk reads the cache that the ones before it left, and the recurrence goes on from their state.

Shapes: B sequences, T tokens of a prompt or chunk, C width, V vocabulary, H heads, K head channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarat.infer.cache import SparseCache
from megarat.infer.reading import Reading
from megarat.infer.topk import topk_attention
from megarat.model.lm import Block, RATPlusLM
from megarat.model.mixer import Projections
from megarat.ops import apply_rotary, gate_step
from megarat.ops import decode_step as fused_step


@torch.no_grad()
def hidden(model: RATPlusLM, ids_BT: Tensor, reading: Reading) -> Tensor:
    """Final normed hidden states (B, T, C) of whole sequences."""
    if reading.topk is None:
        return model.hidden(ids_BT, reading.patterns)
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    rotary = model.rotary(positions_T)
    x_BTC = model.embed(ids_BT)
    for index, block in enumerate(model.blocks):
        projections = block.mixer.project(x_BTC)
        q, k, v, _ = block.mixer.recur(projections, rotary)
        mixed_BTHK = torch.empty_like(q)
        for pattern, heads in reading.layer(index):
            own = list(heads)
            own_q, own_k, own_v = (x[:, :, own] for x in (q, k, v))
            mixed_BTHK[:, :, own] = topk_attention(
                own_q, own_k, own_v, positions_T.expand(len(ids_BT), -1), pattern, reading.topk
            )
        x_BTC = _rest_of_block(block, x_BTC, mixed_BTHK, projections)
    return model.norm(x_BTC)


@torch.no_grad()
def prefill(model: RATPlusLM, ids_BT: Tensor, lengths_B: Tensor, cache: SparseCache, chunk: int | None = None) -> Tensor:
    """Read right-padded prompts into an empty cache and return the logits (B, V) after each prompt's last token.

    ``lengths_B`` (int64, at least 1) counts the real tokens of each row; what lies behind them influences nothing. ``chunk`` bounds the
    tokens of a row computed at a time, and with them the memory; None is all at once.
    """
    length = ids_BT.shape[1]
    last_BC: Tensor | None = None
    for start in range(0, length, chunk or length):
        x_BTC = _extend(model, ids_BT[:, start : start + (chunk or length)], start, lengths_B, cache)
        index_B = lengths_B - 1 - start
        picked_BC = x_BTC[torch.arange(len(ids_BT), device=ids_BT.device), index_B.clamp(0, x_BTC.shape[1] - 1)]
        last_BC = picked_BC if last_BC is None else torch.where((index_B >= 0)[:, None], picked_BC, last_BC)
    assert last_BC is not None
    cache.lengths_B.copy_(lengths_B)
    return model.logits(model.norm(last_BC[:, None]))[:, 0]


def _extend(model: RATPlusLM, ids_BT: Tensor, start: int, lengths_B: Tensor, cache: SparseCache) -> Tensor:
    """Read one chunk of the prompts, from position ``start`` on; returns the residual stream (B, T, C) behind the last layer."""
    positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
    rotary = model.rotary(positions_T)
    padding_BT = positions_T >= lengths_B[:, None]
    lengths_B = lengths_B.clamp_max(start + ids_BT.shape[1])  # behind this chunk
    x_BTC = model.embed(ids_BT)
    for index, block in enumerate(model.blocks):
        projections = block.mixer.project(x_BTC)
        q, k, v, cache.states[index] = block.mixer.recur(projections, rotary, cache.states[index], padding_BT)
        if start == 0 and cache.reading.topk is None:  # nothing to read but the chunk itself
            cache.append(index, k, v, start, lengths_B)
            x_BTC = x_BTC + block.mixer.attend(projections.o, q, k, v, cache.reading.layer(index))
            x_BTC = x_BTC + block.ffn(x_BTC)
        else:
            x_BTC = _rest_of_block(block, x_BTC, cache.extend(index, q, k, v, start, lengths_B), projections)
    return x_BTC


@torch.no_grad()
def decode_step(model: RATPlusLM, ids_B: Tensor, cache: SparseCache) -> Tensor:
    """Append one token to each sequence and return the logits (B, V) of the next."""
    tables = cache.rotary_tables(model)
    cos, sin = (table[cache.lengths_B] for table in tables)
    x_B1C = model.embed(ids_B[:, None])
    for index, block in enumerate(model.blocks):
        projections = block.mixer.project(x_B1C)
        o, q, k, v = (part[:, 0] for part in projections[:4])
        state, groups = cache.states[index], cache.layers[index]
        if projections.g is not None and state is not None and len(groups) == 1 and cache.reading.topk is None:
            gate, [group] = projections.g[:, 0], groups
            slots = (group.k_BHSK, group.v_BHSK, cache.lengths_B)
            mixed_BHK = fused_step(q, k, v, gate, *tables, state, *slots, group.pattern, output_gate_BHK=o)
        else:
            q = apply_rotary(q, cos, sin)
            if projections.g is None or state is None:  # the attention-only baseline
                k = apply_rotary(k, cos, sin)
            else:
                k, v, cache.states[index] = gate_step(k, v, projections.g[:, 0], state, cos, sin)
            mixed_BHK = cache.step(index, q, k, v) * torch.sigmoid(o)
        x_B1C = x_B1C + block.mixer.out_proj(mixed_BHK.flatten(-2))[:, None]
        x_B1C = x_B1C + block.ffn(x_B1C)
    cache.lengths_B += 1
    return model.logits(model.norm(x_B1C))[:, 0]


def _rest_of_block(block: Block, x_BTC: Tensor, mixed_BTHK: Tensor, projections: Projections) -> Tensor:
    """Output gate and projection, and the feed-forward network, each with its residual."""
    x_BTC = x_BTC + block.mixer.out_proj((mixed_BTHK * torch.sigmoid(projections.o)).flatten(-2))
    return x_BTC + block.ffn(x_BTC)
