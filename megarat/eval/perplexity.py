"""Held-out loss and perplexity of one checkpoint under several patterns.

The loss is the token-weighted mean cross entropy over the validation stream, in nats; tokens whose input ends a document are not scored
(as in training). All patterns read the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megarat.errors import UserError
from megarat.infer.cache import cache_bytes
from megarat.infer.forward import hidden
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM
from megarat.ops import linear_cross_entropy


@dataclass(frozen=True)
class PatternScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    loss: float  # nats a token
    perplexity: float
    tokens: int  # scored tokens
    cache_bytes_per_sequence: int  # bf16, for a sequence of the evaluated length
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def score_patterns(
    model: RATPlusLM, readings: Sequence[Reading], batches: Iterable[tuple[Tensor, Tensor]], length: int
) -> list[PatternScore]:
    """Score every pattern on the same ``batches`` of (inputs, labels), both (b, T) int64 on any device.

    ``length`` is T, for the cache size. Raises ``UserError`` when the batches hold no scored token.
    """
    totals = [0.0] * len(readings)
    seconds = [0.0] * len(readings)
    tokens = 0
    device = model.embedding.weight.device
    for inputs_BT, labels_BT in batches:
        inputs_BT, labels_BT = inputs_BT.to(device), labels_BT.to(device)
        tokens += int((labels_BT != -100).sum())
        for index, reading in enumerate(readings):
            start = time.perf_counter()
            totals[index] += batch_loss(model, inputs_BT, labels_BT, reading)
            seconds[index] += time.perf_counter() - start
    if tokens == 0:
        raise UserError("the evaluation corpus holds no token to score: every input token in it ends a document")
    return [
        PatternScore(
            pattern=str(reading),
            loss=total / tokens,
            perplexity=math.exp(total / tokens),
            tokens=tokens,
            cache_bytes_per_sequence=cache_bytes(model.config, reading, length),
            seconds=spent,
        )
        for reading, total, spent in zip(readings, totals, seconds, strict=True)
    ]


def batch_loss(model: RATPlusLM, inputs_BT: Tensor, labels_BT: Tensor, reading: Reading) -> float:
    """Summed cross entropy of one batch, in nats."""
    hidden_BTC = hidden(model, inputs_BT, reading)
    total, _ = linear_cross_entropy(hidden_BTC.flatten(0, 1), model.embedding.weight, labels_BT.flatten(), reduction="sum")
    return float(total)
