"""Accuracy of one checkpoint on the needle tasks under several patterns: prompts of unequal length, greedy answers from the sparse cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

from megarat.eval.answers import Answerer
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, Sample, ruler_score, set_score
from megarat.eval.queue import PIECE, Item, short_hash
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Request
from megarat.infer.reading import Reading


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


class NeedleRun:
    """The needle tasks of one evaluation: ``samples`` validation prompts a task."""

    def __init__(self, answerer: Answerer, maker: NeedleMaker, *, samples: int, piece: int = PIECE) -> None:
        self._answerer, self._maker = answerer, maker
        self._samples, self._piece = samples, piece
        self.prompts = lru_cache(maxsize=256)(self._prompts)  # every reading answers the same ones

    def items(self, task: str, reading: Reading) -> list[Item]:
        """A task under a reading, in pieces."""
        prefix = short_hash(f"{self._maker.identity}/{reading}")
        pieces = [(first, min(first + self._piece, self._samples)) for first in range(0, self._samples, self._piece)]
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
            cache_bytes_per_sequence=cache_bytes(self._answerer.model.config, reading, longest + ANSWER_TOKENS),
            seconds=sum(part["seconds"] for part in parts),
        )

    def _prompts(self, task: str, first: int, end: int) -> list[Sample]:
        return [self._maker.sample(task, "validation", index) for index in range(first, end)]

    def _score(self, task: str, reading: Reading, first: int, end: int) -> dict[str, Any]:
        """Scores of each prompt, and what was answered."""
        prompts = self.prompts(task, first, end)
        start = time.perf_counter()
        eos = (self._answerer.tokenizer.eos_id,)
        answers = self._answerer.answers(reading, [Request(prompt.ids, ANSWER_TOKENS, stop_ids=eos) for prompt in prompts])
        return {
            "ruler": [ruler_score(text, prompt.answers) for text, prompt in zip(answers, prompts, strict=True)],
            "exact": [set_score(text, prompt.answers) for text, prompt in zip(answers, prompts, strict=True)],
            "answers": answers,
            "prompt_tokens": max(len(prompt.ids) for prompt in prompts),
            "seconds": time.perf_counter() - start,
        }
