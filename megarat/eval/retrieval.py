"""Accuracy of one checkpoint on the needle tasks under several patterns: prompts of unequal length, greedy answers from the sparse cache.

Shapes: B prompts of a batch, T tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, Sample, ruler_score, set_score
from megarat.infer.cache import cache_bytes
from megarat.infer.generate import generate
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM


@dataclass(frozen=True)
class NeedleScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    task: str
    ruler: float  # mean share of the answers that occur in the prediction
    exact: float  # mean share of the answers that are a comma-separated part of it
    samples: int
    prompt_tokens: int  # of the longest prompt
    cache_bytes_per_sequence: int  # bf16, for that prompt and its answer
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


class Prompt(NamedTuple):
    """A sample and its token ids."""

    sample: Sample
    ids: list[int]


def prompts_of(maker: NeedleMaker, tokenizer: Tokenizer, task: str, samples: int, vocab: int) -> list[Prompt]:
    """The validation prompts of a task. Raises ``UserError`` where the tokenizer has ids that the model lacks."""
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {vocab}; name the right one"
        )
    made = [maker.sample(task, "validation", index) for index in range(samples)]
    return [Prompt(sample, ids) for sample, ids in zip(made, tokenizer.encode([sample.prompt for sample in made]), strict=True)]


def score_needle(
    model: RATPlusLM,
    readings: Sequence[Reading],
    task: str,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    batch: int,
    on_batch: Callable[[int], object] = lambda _: None,
) -> list[NeedleScore]:
    """One row a pattern, all on the same prompts, ``batch`` at a time; ``on_batch`` hears how many were answered."""
    longest = max(len(prompt.ids) for prompt in prompts)
    rows = []
    for reading in readings:
        start = time.perf_counter()
        ruler = exact = 0.0
        for chunk in _batches(prompts, batch):
            for prompt, text in zip(chunk, answer(model, reading, chunk, tokenizer), strict=True):
                ruler += ruler_score(text, prompt.sample.answers)
                exact += set_score(text, prompt.sample.answers)
            on_batch(len(chunk))
        rows.append(
            NeedleScore(
                pattern=str(reading),
                task=task,
                ruler=ruler / len(prompts),
                exact=exact / len(prompts),
                samples=len(prompts),
                prompt_tokens=longest,
                cache_bytes_per_sequence=cache_bytes(model.config, reading, longest + ANSWER_TOKENS),
                seconds=time.perf_counter() - start,
            )
        )
    return rows


def answer(model: RATPlusLM, reading: Reading, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[str]:
    """The greedy answers, up to EOS or ``ANSWER_TOKENS`` tokens."""
    device = model.embedding.weight.device
    ids_BT = pad_sequence([torch.tensor(prompt.ids) for prompt in prompts], batch_first=True).to(device)
    lengths_B = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    tokens_BN = generate(
        model,
        ids_BT,
        ANSWER_TOKENS,
        reading,
        attention_mask_BT=torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None],
        stop_id=tokenizer.eos_id,
        vocabulary=tokenizer.vocab_size,
    )
    return [tokenizer.decode(_until(tokenizer.eos_id, row)) for row in tokens_BN]


def _until(eos_id: int, row_N: Tensor) -> list[int]:
    ids = row_N.tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _batches(prompts: Sequence[Prompt], batch: int) -> Iterator[list[Prompt]]:
    """Neighbours in length share a batch, so that little of it is padding; longest first, to meet a lack of memory at once."""
    by_length = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    for first in range(0, len(by_length), batch):
        yield by_length[first : first + batch]
