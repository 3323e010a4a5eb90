"""Text from the sparse cache: prefill a batch of unequal prompts, then one token at a time.

Shapes: B sequences, T prompt length, C width, V vocabulary, H heads, K head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarat.errors import UserError
from megarat.infer.cache import SparseCache
from megarat.infer.forward import decode_step, prefill
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Patterns


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; ``top_p`` keeps the smallest set of tokens of that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0):  # so that NaN is refused too
            raise UserError(f"sampling: {self}: need temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0")


GREEDY = Sampling()


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
    """New tokens (B, <= max_new_tokens), int64; rows that met ``stop_id`` are filled up with it.

    ``attention_mask_BT`` (1 real, 0 padding; None: all real) may pad each row on the left or on the right. ``on_token`` sees each step's
    (B,) tokens as they are drawn. Only ids below ``vocabulary`` are drawn (a tokenizer may have fewer entries than the model; None: all).
    Raises ``UserError`` for empty prompts and for padding in the middle of a prompt.
    """
    prompts_BT, lengths_B = align_right_padded(ids_BT, attention_mask_BT)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    capacity = int(lengths_B.max()) + max_new_tokens
    cache = SparseCache(model.config, reading, len(prompts_BT), capacity, model.embedding.weight.dtype, prompts_BT.device)
    logits_BV = prefill(model, prompts_BT, lengths_B, cache)
    generator = torch.Generator(device=prompts_BT.device).manual_seed(sampling.seed)
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    stopped_B = torch.zeros(len(prompts_BT), dtype=torch.bool, device=prompts_BT.device)
    tokens: list[Tensor] = []
    while True:
        next_B = draw(logits_BV[:, :vocabulary], seen_BV[:, :vocabulary], sampling, generator)
        if stop_id is not None:
            next_B = torch.where(stopped_B, stop_id, next_B)
            stopped_B |= next_B == stop_id
        tokens.append(next_B)
        if on_token is not None:
            on_token(next_B)
        if len(tokens) == max_new_tokens or (stop_id is not None and bool(stopped_B.all())):
            return torch.stack(tokens, dim=1)
        seen_BV.scatter_(1, next_B[:, None], True)
        logits_BV = decode_step(model, next_B, cache)


def draw(logits_BV: Tensor, seen_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row (B,), int64. Tokens in ``seen_BV`` are made less likely by the repetition penalty."""
    if sampling.repetition_penalty != 1.0:
        penalised = torch.where(logits_BV > 0, logits_BV / sampling.repetition_penalty, logits_BV * sampling.repetition_penalty)
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    probabilities, order = (logits_BV / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    outside = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p  # the first token is always inside
    choice = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return order.gather(1, choice)[:, 0]


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
