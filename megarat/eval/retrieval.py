"""Accuracy of one checkpoint on the needle tasks under several patterns: prompts of unequal length, greedy answers from the sparse cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, Sample, ruler_score, set_score
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Engine, Request
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
    on_answers: Callable[[int], object] = lambda _: None,
) -> list[NeedleScore]:
    """One row a reading, all on the same prompts, ``batch`` at a time; ``on_answers`` hears how many have just been answered."""
    longest = max(len(prompt.ids) for prompt in prompts)
    rows = []
    for reading in readings:
        start = time.perf_counter()
        ruler = exact = 0.0
        for prompt, text in zip(prompts, answer(model, reading, prompts, tokenizer, batch, on_answers), strict=True):
            ruler += ruler_score(text, prompt.sample.answers)
            exact += set_score(text, prompt.sample.answers)
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


def answer(
    model: RATPlusLM,
    reading: Reading,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    batch: int,
    on_answers: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """The greedy answers, up to EOS or ``ANSWER_TOKENS`` tokens, ``batch`` at a time."""
    capacity = max(len(prompt.ids) for prompt in prompts) + ANSWER_TOKENS
    engine = Engine(model, reading, tokenizer, rows=min(batch, len(prompts)), capacity=capacity)
    requests = [Request(prompt.ids, ANSWER_TOKENS, stop_ids=(tokenizer.eos_id,)) for prompt in prompts]
    return [generation.text for generation in engine.run(requests, on_answers)]
