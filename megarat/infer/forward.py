"""The three ways through a model at inference: a whole sequence, prompts in chunks into a cache, one token a sequence from it.

All three compute the same function, for every pattern and with top-k blocks. A prompt read whole from its start takes the training forward;
in chunks, each chunk reads the cache that the ones before it left, and the recurrence goes on from their state.

Shapes: B sequences, T tokens of a prompt or chunk, C width, V vocabulary, H heads, K head channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megarat.errors import UserError
from megarat.infer.cache import GroupCache, SparseCache
from megarat.infer.reading import Reading
from megarat.infer.snapkv import keys_to_keep, observing
from megarat.infer.topk import topk_attention
from megarat.model.layers import RMSNorm
from megarat.model.lm import Block, RATPlusLM
from megarat.model.mixer import Projections
from megarat.ops import ScanState, add_rms_norm, apply_rotary, gate_step
from megarat.ops import decode_step as fused_step


@torch.no_grad()
def hidden(model: RATPlusLM, ids_BT: Tensor, reading: Reading, document_ids_BT: Tensor | None = None) -> Tensor:
    """Final normed hidden states (B, T, C) of whole sequences, nothing crossing from one document into another where their ids are given.

    Raises ``UserError`` under SnapKV, which is about answers behind a prompt, and for top-k blocks within documents.
    """
    if reading.snapkv is not None:
        raise UserError(
            f"pattern '{reading}': snapkv thins out the cache of a prompt before its answer, so it can be judged by answers only "
            "(needle, longbench, generate, serve); there are none in perplexities and likelihoods"
        )
    if reading.topk is None:
        return model.hidden(ids_BT, reading.patterns, document_ids_BT)
    if document_ids_BT is not None:
        raise UserError(
            f"pattern '{reading}': the run kept documents apart (data.documents: separate), but top-k blocks reach across; score it by answers, "
            "or without top-k"
        )
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    rotary = model.rotary(positions_T)
    x_BTC = model.embed(ids_BT)
    for index, block in enumerate(model.blocks):
        projections = block.mixer.project(x_BTC)
        q, k, v, _ = block.mixer.recur(projections, rotary)
        mixed_BTHK = torch.empty_like(q)
        for pattern, heads in reading.layer(index).part(model.own_heads):
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
    if cache.reading.snapkv is not None:
        return _prefill_snapkv(model, ids_BT, lengths_B, cache, chunk, padded)
    return _read(model, ids_BT, lengths_B, cache, chunk, padded)


def _prefill_snapkv(
    model: RATPlusLM, ids_BT: Tensor, lengths_B: Tensor, cache: SparseCache, chunk: int | None, padded: bool
) -> Tensor:
    """Read prompts with all their keys, then keep those that SnapKV chooses."""
    policy = cache.reading.snapkv
    assert policy is not None
    weight, length = model.embedding.weight, ids_BT.shape[1]
    whole = SparseCache(model.config, cache.reading.patterns, len(ids_BT), length, weight.dtype, weight.device, model.own_heads)
    observed: dict[int, Tensor] = {}

    def observe(index: int, q_BTHK: Tensor, start: int) -> None:
        observed[index] = observing(q_BTHK, start, lengths_B, policy.window, observed.get(index))

    logits_BV = _read(model, ids_BT, lengths_B, whole, chunk, padded, observe)
    for index, ([group], [full]) in enumerate(zip(cache.layers, whole.layers, strict=True)):
        kept_BHS = keys_to_keep(observed[index], full.k_BHSK, lengths_B, policy)
        index_BHSK = kept_BHS[..., None].expand(-1, -1, -1, full.k_BHSK.shape[-1])
        group.k_BHSK[:, :, : kept_BHS.shape[2]] = full.k_BHSK.gather(2, index_BHSK)
        group.v_BHSK[:, :, : kept_BHS.shape[2]] = full.v_BHSK.gather(2, index_BHSK)
    for own, state in zip(cache.states, whole.states, strict=True):
        _overwrite(own, state)
    cache.lengths_B.copy_(lengths_B)
    cache.dropped_B.copy_((lengths_B - policy.size).clamp_min(0))
    return logits_BV


def _read(
    model: RATPlusLM,
    ids_BT: Tensor,
    lengths_B: Tensor,
    cache: SparseCache,
    chunk: int | None,
    padded: bool,
    observe: Callable[[int, Tensor, int], None] | None = None,
) -> Tensor:
    """Prompts into a cache that keeps what its pattern says. ``observe`` hears of each layer's rotated queries, and where they start."""
    length = ids_BT.shape[1]
    last_BC: Tensor | None = None
    for start in range(0, length, chunk or length):
        normal_BTC = _extend(model, ids_BT[:, start : start + (chunk or length)], start, lengths_B, cache, padded, observe)
        index_B = lengths_B - 1 - start
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        picked_BC = normal_BTC[rows_B, index_B.clamp(0, normal_BTC.shape[1] - 1)]
        last_BC = picked_BC if last_BC is None else torch.where((index_B >= 0)[:, None], picked_BC, last_BC)
    assert last_BC is not None
    cache.lengths_B.copy_(lengths_B)
    return model.logits(last_BC[:, None])[:, 0]


def _extend(
    model: RATPlusLM,
    ids_BT: Tensor,
    start: int,
    lengths_B: Tensor,
    cache: SparseCache,
    padded: bool,
    observe: Callable[[int, Tensor, int], None] | None,
) -> Tensor:
    """Read one chunk of the prompts, from position ``start`` on; returns the final normed hidden states (B, T, C)."""
    positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
    padding_BT = positions_T >= lengths_B[:, None] if padded else None
    cos_TR, sin_TR = (table[start : start + ids_BT.shape[1]] for table in cache.rotary)
    lengths_B = lengths_B.clamp_max(start + ids_BT.shape[1])  # behind this chunk

    def mix(block: Block, index: int, normal_BTC: Tensor) -> Tensor:
        projections = _project(block, normal_BTC)
        state = cache.states[index] if cache.states else None
        q, k, v, new_state = block.mixer.recur(projections, (cos_TR, sin_TR), state if start else None, padding_BT)
        if state is not None and new_state is not None:
            _overwrite(state, new_state)
        if observe is not None:
            observe(index, q, start)
        if start == 0 and cache.reading.topk is None:  # nothing to read but the chunk itself
            cache.append(index, k, v, start, lengths_B)
            return block.mixer.attend(projections.o, q, k, v, cache.reading.layer(index))
        return _gated(block, cache.extend(index, q, k, v, start, lengths_B), projections.o)

    return _through_layers(model, model.embed(ids_BT), mix)


@torch.no_grad()
def decode_step(model: RATPlusLM, ids_B: Tensor, cache: SparseCache, advance_B: Tensor | int = 1) -> Tensor:
    """Append one token to each sequence and return the logits (B, V) of the next.

    ``advance_B`` (int64, 1 or 0) says which rows go on; the others compute along and stay where they are. Nothing waits for the device and
    every size is that of the batch, so the call can be captured in a CUDA graph.
    """

    def mix(block: Block, index: int, normal_BTC: Tensor) -> Tensor:
        mixed_BHK = _mix_step(_project(block, normal_BTC[:, 0]), cache, index)
        return block.mixer.out_proj(mixed_BHK.flatten(-2))[:, None]

    normal_BTC = _through_layers(model, model.embed(ids_B[:, None]), mix)
    cache.lengths_B.add_(advance_B)
    return model.logits(normal_BTC)[:, 0]


def _through_layers(model: RATPlusLM, x_BTC: Tensor, mix: Callable[[Block, int, Tensor], Tensor]) -> Tensor:
    """The residual stream through all blocks and the last norm, (B, T, C); ``mix`` is the mixer behind its norm.

    Each residual is added in the launch of the norm that follows it. The activations of a mixer end with its call.
    """
    norms = [*(block.mixer.norm for block in model.blocks[1:]), model.norm]
    normal_BTC = model.blocks[0].mixer.norm(x_BTC)
    for index, (block, next_norm) in enumerate(zip(model.blocks, norms, strict=True)):
        normal_BTC, x_BTC = _add_norm(x_BTC, mix(block, index, normal_BTC), block.ffn.norm)
        normal_BTC, x_BTC = _add_norm(x_BTC, block.ffn.down(functional.gelu(block.ffn.up(normal_BTC))), next_norm)
    return normal_BTC


def _project(block: Block, normal: Tensor) -> Projections:
    """The mixer's projections of normed states (..., C), each (..., H, K)."""
    fused = block.mixer.in_proj(normal)
    o, q, k, v, *gate = fused.unflatten(-1, (-1, block.mixer.heads, block.mixer.head_dim)).unbind(-3)
    return Projections(o, q, k, v, gate[0] if gate else None)


def _mix_step(projections: Projections, cache: SparseCache, index: int) -> Tensor:
    """Recurrence, attention and output gate of the current tokens, (B, H, K); cache and state go on."""
    o, q, k, v, g = projections
    groups = cache.layers[index]
    if g is not None and cache.reading.is_plain:
        if len(groups) == 1:
            return _fused_step(groups[0], projections, cache.states[index], cache)
        mixed_BHK = torch.empty_like(q)
        for group in groups:
            state = ScanState(*(group.own(part, 1) for part in cache.states[index]))
            own = Projections(*(group.own(x, 1) for x in (o, q, k, v, g)))
            group.put(mixed_BHK, _fused_step(group, own, state, cache), 1)
            for whole, part in zip(cache.states[index], state, strict=True):
                group.put(whole, part, 1)
        return mixed_BHK
    cos_BR, sin_BR = (table[cache.lengths_B] for table in cache.rotary)
    q = apply_rotary(q, cos_BR, sin_BR)
    if g is None:  # the attention-only baseline
        k = apply_rotary(k, cos_BR, sin_BR)
    else:
        k, v, new_state = gate_step(k, v, g, cache.states[index], cos_BR, sin_BR)
        _overwrite(cache.states[index], new_state)
    return cache.step(index, q, k, v) * torch.sigmoid(o)


def _fused_step(group: GroupCache, projections: Projections, state: ScanState, cache: SparseCache) -> Tensor:
    """One head group in one or two launches."""
    o, q, k, v, g = projections
    assert g is not None
    slots = (group.k_BHSK, group.v_BHSK, cache.lengths_B)
    return fused_step(q, k, v, g, *cache.rotary, state, *slots, group.pattern, output_gate_BHK=o)


def _overwrite(state: ScanState, new: ScanState) -> None:
    state.k_BHK.copy_(new.k_BHK)
    state.v_BHK.copy_(new.v_BHK)


def _add_norm(x_BC: Tensor, branch_BC: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum): a residual and the norm behind it in one launch."""
    return add_rms_norm(x_BC, branch_BC, norm.weight, norm.eps, out_dtype=norm.weight.dtype)


def _gated(block: Block, mixed_BTHK: Tensor, o_BTHK: Tensor) -> Tensor:
    """Output gate and projection of a mixer."""
    return block.mixer.out_proj((mixed_BTHK * torch.sigmoid(o_BTHK)).flatten(-2))
