"""Token ids from the sparse cache: prefill a batch of unequal prompts, then one token at a time.

Shapes: B sequences, T prompt length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megarat.errors import UserError
from megarat.infer.decoder import Decoder
from megarat.infer.reading import Reading
from megarat.infer.sampling import GREEDY, Sampling
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Patterns

__all__ = ["GREEDY", "Sampling", "align_right_padded", "generate"]

_WORTH_A_GRAPH = 32  # tokens; capturing costs as much time as some eager steps


@torch.no_grad()
def generate(
    model: RATPlusLM,
    ids_BT: Tensor,
    max_new_tokens: int,
    reading: Reading | Patterns,
    *,
    attention_mask_BT: Tensor | None = None,
    sampling: Sampling = GREEDY,
    stop_id: int | None = None,
    vocabulary: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """New tokens (B, <= max_new_tokens), int64; rows that met ``stop_id`` are filled up with it. Row b draws with the seed + b.

    ``attention_mask_BT`` (1 real, 0 padding; None: all real) may pad each row on the left or on the right. ``on_token`` sees each step's
    (B,) tokens as they are drawn. Only ids below ``vocabulary`` are drawn (a tokenizer may have fewer entries than the model; None: all).
    Raises ``UserError`` for empty prompts and for padding in the middle of a prompt.
    """
    prompts_BT, lengths_B = align_right_padded(ids_BT, attention_mask_BT)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    reading = reading if isinstance(reading, Reading) else Reading(reading)
    rows, capacity = len(prompts_BT), int(lengths_B.max()) + max_new_tokens
    graphs = max_new_tokens >= _WORTH_A_GRAPH
    decoder = Decoder(model, reading, rows, capacity, vocabulary, buckets=(rows,), graphs=graphs)
    samplings = [replace(sampling, seed=sampling.seed + row) for row in range(rows)]
    decoder.read_padded(0, prompts_BT, lengths_B, samplings)
    stopped_B = torch.zeros(rows, dtype=torch.bool, device=decoder.ids_B.device)
    has_stopped = [False] * rows  # the same for the host, which learns of it while the device goes on
    tokens: list[Tensor] = []
    while True:
        next_B = decoder.ids_B.clone()
        if stop_id is not None:
            next_B.masked_fill_(stopped_B, stop_id)
            stopped_B |= next_B == stop_id
        tokens.append(next_B)
        snapshot = decoder.snapshot(rows)
        is_last = len(tokens) == max_new_tokens
        if not is_last:
            decoder.step(list(range(rows)), sampling.takes_the_likeliest)
        if on_token is not None:
            on_token(next_B)
        if stop_id is not None:
            has_stopped = [done or token == stop_id for done, token in zip(has_stopped, snapshot.tokens(), strict=True)]
        if is_last or all(has_stopped):
            return torch.stack(tokens, dim=1)


def align_right_padded(ids_BT: Tensor, attention_mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move every prompt to the start of its row: (ids, lengths). Positions count real tokens, so padding never shifts them."""
    if ids_BT.dim() != 2 or ids_BT.shape[1] == 0:
        raise UserError(f"prompts: expected token ids of shape (batch, length >= 1), found {tuple(ids_BT.shape)}")
    if attention_mask_BT is None:
        return ids_BT, torch.full((len(ids_BT),), ids_BT.shape[1], dtype=torch.int64, device=ids_BT.device)
    if attention_mask_BT.shape != ids_BT.shape:
        raise UserError(f"prompts: the attention mask has shape {tuple(attention_mask_BT.shape)}, the ids {tuple(ids_BT.shape)}")
    real_BT = attention_mask_BT.to(torch.bool)
    lengths_B = real_BT.sum(dim=1)
    if bool((lengths_B == 0).any()):
        raise UserError("prompts: a row of the attention mask is all padding; every prompt needs a token")
    starts_B = real_BT.int().argmax(dim=1)
    steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    inside_BT = (steps_T >= starts_B[:, None]) & (steps_T < (starts_B + lengths_B)[:, None])
    if not torch.equal(inside_BT, real_BT):
        raise UserError("prompts: the attention mask has padding between real tokens; pad on the left or on the right only")
    return ids_BT.gather(1, (starts_B[:, None] + steps_T) % ids_BT.shape[1]), lengths_B
