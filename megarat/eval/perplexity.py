"""Held-out loss and perplexity of one checkpoint under several patterns.

The loss is the token-weighted mean cross entropy over the validation stream, in nats; tokens whose input ends a document are not scored
(as in training). All patterns read the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarat.data.loader import number_documents, read_samples, to_micro_batch
from megarat.data.plan import SequentialPlan
from megarat.data.reader import Reader
from megarat.errors import UserError
from megarat.eval.queue import Item, short_hash
from megarat.infer.cache import cache_bytes
from megarat.infer.forward import hidden
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM

_PIECE = 16  # sequences of an item of work, at least


class HeldOut:
    """A corpus in sequences of ``length`` tokens that do not overlap, in order: as many as ``limit_tokens`` allow, but at least one.

    ``separate``: documents do not see each other, as the model was trained. Raises ``UserError`` where it is shorter than one sequence.
    """

    def __init__(self, reader: Reader, length: int, limit_tokens: int | None, separate: bool = False) -> None:
        self.reader, self.length, self._separate = reader, length, separate
        self._plan = SequentialPlan(reader.num_tokens, length)
        self.sequences = self._plan.samples_per_epoch
        if limit_tokens is not None:
            self.sequences = min(self.sequences, max(1, limit_tokens // length))

    def batch(self, rows: range) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some sequences, each (b, T) int64."""
        return to_micro_batch(read_samples(self.reader, self._plan, np.array(rows)), self.reader.eos_id)

    def documents(self, inputs_BT: Tensor) -> Tensor | None:
        """Which document of its sequence each input is of, where documents are kept apart."""
        return number_documents(inputs_BT, self.reader.eos_id) if self._separate else None


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


def perplexity_items(model: RATPlusLM, readings: Sequence[Reading], corpus: HeldOut, batch: int) -> list[Item]:
    """The corpus in pieces, each of them for all readings; ``batch`` sequences are computed at a time."""
    piece = max(_PIECE, batch)
    pieces = [range(first, min(first + piece, corpus.sequences)) for first in range(0, corpus.sequences, piece)]
    prefix = "ppl-" + short_hash(f"{corpus.reader.identity}/{[str(reading) for reading in readings]}")
    return [
        Item(
            f"{prefix}-{rows.start}-{rows.stop}",
            len(rows) * corpus.length,
            partial(_sum_losses, model, readings, corpus, rows, batch),
        )
        for rows in pieces
    ]


def combine(model: RATPlusLM, readings: Sequence[Reading], parts: Sequence[dict[str, Any]], length: int) -> list[PatternScore]:
    """One row a reading from the items' results. Raises ``UserError`` when they hold no scored token."""
    tokens = sum(part["tokens"] for part in parts)
    if tokens == 0:
        raise UserError("the evaluation corpus holds no token to score: every input token in it ends a document")
    totals, seconds = (np.sum([part[key] for part in parts], axis=0).tolist() for key in ("totals", "seconds"))
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


def _sum_losses(model: RATPlusLM, readings: Sequence[Reading], corpus: HeldOut, rows: range, batch: int) -> dict[str, Any]:
    """Summed cross entropy (nats) and time of each reading, and the scored tokens, over some sequences of the corpus."""
    totals, seconds, tokens = [0.0] * len(readings), [0.0] * len(readings), 0
    device = model.embedding.weight.device
    for first in rows[::batch]:
        inputs_BT, labels_BT = (part.to(device) for part in corpus.batch(range(first, min(first + batch, rows.stop))))
        documents_BT = corpus.documents(inputs_BT)
        tokens += int((labels_BT != -100).sum())
        for index, reading in enumerate(readings):
            start = time.perf_counter()
            totals[index] += batch_loss(model, inputs_BT, labels_BT, reading, documents_BT)
            seconds[index] += time.perf_counter() - start
    return {"totals": totals, "seconds": seconds, "tokens": tokens}


@torch.no_grad()
def batch_loss(
    model: RATPlusLM, inputs_BT: Tensor, labels_BT: Tensor, reading: Reading, documents_BT: Tensor | None = None
) -> float:
    """Summed cross entropy of one batch, in nats."""
    hidden_BTC = hidden(model, inputs_BT, reading, documents_BT)
    total, _ = model.embedding.cross_entropy(hidden_BTC.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    return float(total)
