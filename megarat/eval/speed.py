"""How fast a pattern is where it is evaluated: one prompt to its first token, and steps of a full batch behind such prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

from megarat import comm
from megarat.data.tokenizer import Tokenizer
from megarat.eval.queue import Item, short_hash
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.memory import largest_batch
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM

_STEPS = 24  # of which the first few are not counted: kernels are compiled and steps captured


@dataclass(frozen=True)
class SpeedScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    sequences: int  # decoded together
    prompt_tokens: int
    prefill_tokens_per_s: float  # of one prompt alone
    decode_tokens_per_s: float  # of all sequences together
    cache_bytes_per_sequence: int  # bf16, for prompt and steps

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


def speed_items(model: RATPlusLM, readings: Sequence[Reading], length: int, batch: int) -> list[Item]:
    """One item a reading: sequences of ``length`` tokens, ``batch`` at a time or as many as fit."""
    return [
        Item(f"speed-{short_hash(f'{reading}/{length}')}", 1, partial(measure, model, reading, length, batch))
        for reading in readings
    ]


def measure(model: RATPlusLM, reading: Reading, length: int, batch: int) -> dict[str, Any]:
    """The row of one reading, with prompts that fill ``length`` tokens but for the steps; all 0 where not one sequence fits."""
    weight = model.embedding.weight
    fitting = min(batch, largest_batch(cache_bytes(model.config, reading, length, weight.dtype), weight.device))
    rows = _fewest(fitting, model.ranks, weight.device)
    new = max(2, min(_STEPS, length // 2))
    prompt = [1 + n % (model.config.vocab - 1) for n in range(max(1, length - new))]
    size = cache_bytes(model.config, reading, length)
    if rows == 0:
        return SpeedScore(str(reading), 0, len(prompt), 0.0, 0.0, size).to_dict()
    engine = Engine(model, reading, NoText(model.config.vocab), rows=rows, capacity=len(prompt) + new, buckets=(rows,))
    first_tokens = [_seconds(lambda: engine.run([Request(prompt, 1)])) for _ in range(3)]
    for _ in range(rows):
        engine.submit(Request(prompt, new))
    steps = []
    while engine.busy:
        steps.append(_seconds(engine.step))
    return SpeedScore(
        pattern=str(reading),
        sequences=rows,
        prompt_tokens=len(prompt),
        prefill_tokens_per_s=len(prompt) / min(first_tokens[1:]),
        decode_tokens_per_s=rows / median(steps[len(steps) // 3 :]),
        cache_bytes_per_sequence=size,
    ).to_dict()


def _fewest(rows: int, ranks: comm.Ranks, device: torch.device) -> int:
    """The smallest number of all ranks that share the model: not all have the same memory free, and all must take the same step."""
    if ranks.size == 1:
        return rows
    fewest = torch.tensor(rows, device=device)
    distributed.all_reduce(fewest, distributed.ReduceOp.MIN, group=ranks.group)
    return int(fewest)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
