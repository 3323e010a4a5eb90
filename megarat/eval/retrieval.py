"""Accuracy of one checkpoint on the needle tasks under several patterns: prompts of unequal length, greedy answers from the sparse cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, Sample, ruler_score, set_score
from megarat.eval.queue import Item, short_hash
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM

_PIECE = 25  # prompts of an item of work, at least


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


class NeedleRun:
    """The needle tasks of one evaluation: ``samples`` validation prompts a task, answered ``batch`` at a time.

    Raises ``UserError`` where the tokenizer has ids that the model lacks.
    """

    def __init__(self, model: RATPlusLM, maker: NeedleMaker, tokenizer: Tokenizer, *, samples: int, batch: int) -> None:
        if tokenizer.vocab_size > model.config.vocab:
            raise UserError(
                f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {model.config.vocab}; name the right one"
            )
        self._model, self._maker, self._tokenizer = model, maker, tokenizer
        self._samples, self._batch = samples, batch
        self.prompts = lru_cache(maxsize=64)(self._prompts)  # every reading answers the same ones

    def items(self, task: str, reading: Reading) -> list[Item]:
        """A task under a reading, in pieces."""
        piece = max(_PIECE, self._batch)
        prefix = short_hash(f"{self._maker.identity}/{reading}")
        pieces = [(first, min(first + piece, self._samples)) for first in range(0, self._samples, piece)]
        return [
            Item(f"needle-{task}-{prefix}-{first}-{end}", end - first, partial(self._score, task, reading, first, end))
            for first, end in pieces
        ]

    def combine(self, task: str, reading: Reading, parts: Sequence[dict[str, Any]]) -> NeedleScore:
        """The row of a task under a reading from its items' results."""
        longest = max(part["prompt_tokens"] for part in parts)
        ruler, exact = ([score for part in parts for score in part[key]] for key in ("ruler", "exact"))
        return NeedleScore(
            pattern=str(reading),
            task=task,
            ruler=sum(ruler) / len(ruler),
            exact=sum(exact) / len(exact),
            samples=len(ruler),
            prompt_tokens=longest,
            cache_bytes_per_sequence=cache_bytes(self._model.config, reading, longest + ANSWER_TOKENS),
            seconds=sum(part["seconds"] for part in parts),
        )

    def _prompts(self, task: str, first: int, end: int) -> list[Prompt]:
        made = [self._maker.sample(task, "validation", index) for index in range(first, end)]
        encoded = self._tokenizer.encode([sample.prompt for sample in made])
        return [Prompt(sample, ids) for sample, ids in zip(made, encoded, strict=True)]

    def _score(self, task: str, reading: Reading, first: int, end: int) -> dict[str, Any]:
        """Scores of each prompt, and what was answered."""
        prompts = self.prompts(task, first, end)
        start = time.perf_counter()
        answers = answer(self._model, reading, prompts, self._tokenizer, self._batch)
        return {
            "ruler": [ruler_score(text, prompt.sample.answers) for text, prompt in zip(answers, prompts, strict=True)],
            "exact": [set_score(text, prompt.sample.answers) for text, prompt in zip(answers, prompts, strict=True)],
            "answers": answers,
            "prompt_tokens": max(len(prompt.ids) for prompt in prompts),
            "seconds": time.perf_counter() - start,
        }


def answer(model: RATPlusLM, reading: Reading, prompts: Sequence[Prompt], tokenizer: Tokenizer, batch: int) -> list[str]:
    """The greedy answers, up to EOS or ``ANSWER_TOKENS`` tokens, ``batch`` at a time."""
    capacity = max(len(prompt.ids) for prompt in prompts) + ANSWER_TOKENS
    engine = Engine(model, reading, tokenizer, rows=min(batch, len(prompts)), capacity=capacity)
    requests = [Request(prompt.ids, ANSWER_TOKENS, stop_ids=(tokenizer.eos_id,)) for prompt in prompts]
    return [generation.text for generation in engine.run(requests)]
