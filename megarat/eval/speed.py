"""How fast a pattern is where it is evaluated: one prompt to its first token, and steps of a full batch behind such prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from megarat.data.tokenizer import Tokenizer
from megarat.eval.answers import Answerer
from megarat.eval.queue import Item, short_hash
from megarat.infer.engine import Request
from megarat.infer.reading import Reading

_STEPS = 24  # of which the first few are not counted: kernels are compiled and steps captured


@dataclass(frozen=True)
class SpeedScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    sequences: int  # decoded together
    prompt_tokens: int
    prefill_tokens_per_s: float  # of one prompt alone
    decode_tokens_per_s: float  # of all sequences together

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


class NoText(Tokenizer):
    """Every id of a model and no text: speed is the same whatever is drawn, and imported checkpoints may lack a tokenizer."""

    kind, eos_id, bos_id = "none", 0, None

    def __init__(self, vocabulary: int) -> None:
        super().__init__(Path("none"))
        self.vocab_size = vocabulary

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """There are no ids of a text."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


def speed_items(answerer: Answerer, readings: Sequence[Reading], length: int) -> list[Item]:
    """One item a reading."""
    return [
        Item(f"speed-{short_hash(f'{reading}/{length}')}", 1, partial(measure, answerer, reading, length)) for reading in readings
    ]


def measure(answerer: Answerer, reading: Reading, length: int) -> dict[str, Any]:
    """The row of one reading, with prompts that fill ``length`` tokens but for the steps."""
    engine = answerer.engine(reading)
    rows = answerer.batch
    new = max(2, min(_STEPS, length // 2))
    prompt = [1 + n % (answerer.model.config.vocab - 1) for n in range(max(1, length - new))]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        engine.run([Request(prompt, 1)])
        times.append(time.perf_counter() - start)
    generations = [engine.submit(Request(prompt, new)) for _ in range(rows)]
    steps = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    assert all(generation.finish == "length" for generation in generations)
    return SpeedScore(
        pattern=str(reading),
        sequences=rows,
        prompt_tokens=len(prompt),
        prefill_tokens_per_s=len(prompt) / min(times[1:]),
        decode_tokens_per_s=rows / median(steps[len(steps) // 3 :]),
    ).to_dict()
