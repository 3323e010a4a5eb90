"""The three ways through a model at inference: a whole sequence, prompts in chunks into a cache, one token a sequence from it.

All three compute the same function, for every pattern and with top-k blocks. A prompt read whole from its start takes the training forward;
in chunks, each chunk reads the cache that the ones before it left, and the recurrence goes on from their state.

Shapes: B sequences, T tokens of a prompt or chunk, C width, V vocabulary, H heads, K head channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megarat.infer.cache import GroupCache, SparseCache
from megarat.infer.reading import Reading
from megarat.infer.topk import topk_attention
from megarat.model.layers import RMSNorm
from megarat.model.lm import Block, RATPlusLM
from megarat.ops import ScanState, add_rms_norm, apply_rotary, gate_step
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
        x_BTC = x_BTC + _gated(block, mixed_BTHK, projections.o)
        x_BTC = x_BTC + block.ffn(x_BTC)
    return model.norm(x_BTC)


@torch.no_grad()
def prefill(
    model: RATPlusLM, ids_BT: Tensor, lengths_B: Tensor, cache: SparseCache, chunk: int | None = None, padded: bool = True
) -> Tensor:
    """Read right-padded prompts into a cache, from its start, and return the logits (B, V) after each prompt's last token.

    ``lengths_B`` (int64, at least 1) counts the real tokens of each row; what lies behind them influences nothing, nor does what the cache
    held. ``chunk`` bounds the tokens of a row computed at a time, and with them the memory; None is all at once. ``padded=False`` vouches
    that all rows are of full length, which spares a little work.
    """
    length = ids_BT.shape[1]
    last_BC: Tensor | None = None
    for start in range(0, length, chunk or length):
        x_BTC = _extend(model, ids_BT[:, start : start + (chunk or length)], start, lengths_B, cache, padded)
        index_B = lengths_B - 1 - start
        picked_BC = x_BTC[torch.arange(len(ids_BT), device=ids_BT.device), index_B.clamp(0, x_BTC.shape[1] - 1)]
        last_BC = picked_BC if last_BC is None else torch.where((index_B >= 0)[:, None], picked_BC, last_BC)
    assert last_BC is not None
    cache.lengths_B.copy_(lengths_B)
    return model.logits(model.norm(last_BC[:, None]))[:, 0]


def _extend(model: RATPlusLM, ids_BT: Tensor, start: int, lengths_B: Tensor, cache: SparseCache, padded: bool) -> Tensor:
    """Read one chunk of the prompts, from position ``start`` on; returns the residual stream (B, T, C) behind the last layer."""
    positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
    padding_BT = positions_T >= lengths_B[:, None] if padded else None
    rotary = tuple(table[start : start + ids_BT.shape[1]] for table in cache.rotary)
    lengths_B = lengths_B.clamp_max(start + ids_BT.shape[1])  # behind this chunk
    x_BTC = model.embed(ids_BT)
    for index, block in enumerate(model.blocks):
        x_BTC = x_BTC + _read_chunk(block, x_BTC, rotary, index, start, lengths_B, padding_BT, cache)
        x_BTC = x_BTC + block.ffn(x_BTC)
    return x_BTC


def _read_chunk(
    block: Block,
    x_BTC: Tensor,
    rotary: tuple[Tensor, ...],
    index: int,
    start: int,
    lengths_B: Tensor,
    padding_BT: Tensor | None,
    cache: SparseCache,
) -> Tensor:
    """The mixer of layer ``index`` on one chunk, (B, T, C); cache and state go on. Its activations end with the call."""
    projections = block.mixer.project(x_BTC)
    state = cache.states[index] if cache.states else None
    q, k, v, new_state = block.mixer.recur(projections, (rotary[0], rotary[1]), state if start else None, padding_BT)
    if state is not None and new_state is not None:
        for own, new in zip(state, new_state, strict=True):
            own.copy_(new)
    if start == 0 and cache.reading.topk is None:  # nothing to read but the chunk itself
        cache.append(index, k, v, start, lengths_B)
        return block.mixer.attend(projections.o, q, k, v, cache.reading.layer(index))
    return _gated(block, cache.extend(index, q, k, v, start, lengths_B), projections.o)


@torch.no_grad()
def decode_step(model: RATPlusLM, ids_B: Tensor, cache: SparseCache, advance_B: Tensor | int = 1) -> Tensor:
    """Append one token to each sequence and return the logits (B, V) of the next.

    ``advance_B`` (int64, 1 or 0) says which rows go on; the others compute along and stay where they are. Nothing waits for the device and
    every size is that of the batch, so the call can be captured in a CUDA graph.
    """
    norms = [*(block.mixer.norm for block in model.blocks[1:]), model.norm]
    x_BC = model.embed(ids_B[:, None])[:, 0]
    normal_BC = model.blocks[0].mixer.norm(x_BC)
    for index, (block, next_norm) in enumerate(zip(model.blocks, norms, strict=True)):
        mixed_BC = block.mixer.out_proj(_mix_step(block, normal_BC, cache, index).flatten(-2))
        normal_BC, x_BC = _add_norm(x_BC, mixed_BC, block.ffn.norm)
        normal_BC, x_BC = _add_norm(x_BC, block.ffn.down(functional.gelu(block.ffn.up(normal_BC))), next_norm)
    cache.lengths_B.add_(advance_B)
    return model.logits(normal_BC[:, None])[:, 0]


def _mix_step(block: Block, normal_BC: Tensor, cache: SparseCache, index: int) -> Tensor:
    """Recurrence, attention and output gate of the current tokens, (B, H, K); cache and state go on."""
    fused = block.mixer.in_proj(normal_BC)
    o, q, k, v, *gate = fused.unflatten(-1, (-1, block.mixer.heads, block.mixer.head_dim)).unbind(-3)
    groups = cache.layers[index]
    if gate and cache.reading.topk is None:
        if len(groups) == 1:
            return _fused_step(groups[0], (q, k, v, gate[0], o), cache.states[index], cache)
        mixed_BHK = torch.empty_like(q)
        for group in groups:
            state = ScanState(*(group.own(part, 1) for part in cache.states[index]))
            part_BGK = _fused_step(group, tuple(group.own(x, 1) for x in (q, k, v, gate[0], o)), state, cache)
            group.put(mixed_BHK, part_BGK, 1)
            for whole, part in zip(cache.states[index], state, strict=True):
                group.put(whole, part, 1)
        return mixed_BHK
    cos_BR, sin_BR = (table[cache.lengths_B] for table in cache.rotary)
    q = apply_rotary(q, cos_BR, sin_BR)
    if gate:
        k, v, new_state = gate_step(k, v, gate[0], cache.states[index], cos_BR, sin_BR)
        for own, new in zip(cache.states[index], new_state, strict=True):
            own.copy_(new)
    else:  # the attention-only baseline
        k = apply_rotary(k, cos_BR, sin_BR)
    return cache.step(index, q, k, v) * torch.sigmoid(o)


def _fused_step(group: GroupCache, projections: tuple[Tensor, ...], state: ScanState, cache: SparseCache) -> Tensor:
    """One head group in one or two launches."""
    q, k, v, g, o = projections
    return fused_step(
        q, k, v, g, *cache.rotary, state, group.k_BHSK, group.v_BHSK, cache.lengths_B, group.pattern, output_gate_BHK=o
    )


def _add_norm(x_BC: Tensor, branch_BC: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): a residual and the norm behind it in one launch."""
    return add_rms_norm(x_BC, branch_BC, norm.weight, norm.eps, out_dtype=norm.weight.dtype)


def _gated(block: Block, mixed_BTHK: Tensor, o_BTHK: Tensor) -> Tensor:
    """Output gate and projection of a mixer."""
    return block.mixer.out_proj((mixed_BTHK * torch.sigmoid(o_BTHK)).flatten(-2))
