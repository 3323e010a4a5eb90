"""The arms' JSON files, and the quantities that tables and figures show of them.

A folder of results holds one folder an experiment (a size and a number of tokens) with one file an arm and seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from examples.claim import arms
from megarat.errors import UserError

Record = dict[str, Any]


class Experiment(NamedTuple):
    """One folder of results."""

    name: str
    records: list[Record]

    def of(self, arm: str) -> list[Record]:
        """The arm's seeds."""
        return [record for record in self.records if record["arm"] == arm and "scores" in record]

    def shown(self, arm: str) -> Record:
        """The seed that a figure shows: the one that most arms have, so that they are compared on the same batches; else the arm's first."""
        seeds = Counter(record["seed"] for record in self.records if "scores" in record)
        return max(self.of(arm), key=lambda record: seeds[record["seed"]])

    @property
    def present(self) -> list[str]:
        """The arms that were scored, in their usual order."""
        return [arm for arm in arms.ARMS if self.of(arm)]


class Spread(NamedTuple):
    """A mean over seeds, and half the distance between the smallest and the largest."""

    mean: float
    half_range: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(sum(values) / len(values), (max(values) - min(values)) / 2, len(values))

    def text(self, sign: str = "", digits: int = 3) -> str:
        """``3.255`` of one seed, ``3.255 ± 0.004`` of several."""
        return f"{self.mean:{sign}.{digits}f}" + (f" ± {self.half_range:.{digits}f}" if self.seeds > 1 else "")


def read_results(folder: str | Path) -> list[Experiment]:
    """All experiments of a folder, by name. Raises ``UserError`` when there is none."""
    found: dict[str, list[Record]] = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        raise UserError(f"{folder}: holds no EXPERIMENT/ARM-SEED.json")
    return [Experiment(name, records) for name, records in found.items()]


def loss(record: Record, reading: str) -> float | None:
    """Held-out loss of the pretrained weights (nats)."""
    return find(record["scores"], reading)


def adapted_loss(record: Record, reading: str, share: float = arms.LONG) -> float | None:
    """Held-out loss after the adaptation to a reading."""
    return find(_adapted_scores(record, share), reading)


def _adapted_scores(record: Record, share: float) -> list[Record]:
    """Scores of the adaptations that took this share of the pretraining's batches."""
    batches = arms.batches_of(share, record["config"]["train"]["pairs"])
    return [row["score"] for row in record.get("adaptations", []) if row["batches"] == batches]


def find(rows: Sequence[Record], reading: str) -> float | None:
    """The loss of the row of a reading, as ``megarat eval`` names it (it writes W and I out)."""
    for row in rows:
        if plain(row["pattern"]) == plain(reading):
            return float(row["loss"])
    return None


def plain(reading: str) -> str:
    """A reading without spaces and without zeros that ``megarat eval`` writes out."""
    return reading.replace(" ", "").replace(",W=0,I=0", "")


def gap(record: Record, reading: str) -> float | None:
    """Loss under a reading minus dense loss, both of the pretrained weights."""
    sparse, dense = loss(record, reading), loss(record, "dense")
    return None if sparse is None or dense is None else sparse - dense


def adapted_gap(record: Record, reading: str) -> float | None:
    """Loss after the adaptation to a reading minus the dense loss of the pretrained weights."""
    sparse, dense = adapted_loss(record, reading), loss(record, "dense")
    return None if sparse is None or dense is None else sparse - dense


def spread(records: Sequence[Record], of: Callable[[Record], float | None]) -> Spread | None:
    """A figure over the seeds that have it."""
    values = [value for record in records if (value := of(record)) is not None]
    return Spread.of(values) if values else None


def loss_of(reading: str) -> Callable[[Record], float | None]:
    """``loss`` of a reading, as a function of the record; likewise the next ones."""
    return lambda record: loss(record, reading)


def adapted_of(reading: str, share: float) -> Callable[[Record], float | None]:
    """After the adaptation that took a share of the pretraining."""
    return lambda record: adapted_loss(record, reading, share)


def gap_of(reading: str) -> Callable[[Record], float | None]:
    """Before adaptation."""
    return lambda record: gap(record, reading)


def adapted_gap_of(reading: str) -> Callable[[Record], float | None]:
    """After the longest adaptation."""
    return lambda record: adapted_gap(record, reading)


def ratio(experiment: Experiment, arm: str, of: Callable[[Record], float | None]) -> float | None:
    """An arm's mean over that of (a); None where one of them was not measured."""
    theirs, ours = (spread(experiment.of(one), of) for one in (arm, "ratplus"))
    return None if theirs is None or ours is None else theirs.mean / ours.mean


def best_gap_of(reading: str) -> Callable[[Record], float | None]:
    """The smaller of the two that were measured."""

    def best(record: Record) -> float | None:
        gaps = [found for found in (gap(record, reading), adapted_gap(record, reading)) if found is not None]
        return min(gaps, default=None)

    return best


def cache_mib(experiment: Experiment, arm: str, reading: str) -> float | None:
    """The KV cache of a sequence under a reading, in MiB."""
    for row in experiment.shown(arm)["scores"]:
        if plain(row["pattern"]) == reading:
            return float(row["cache_bytes_per_sequence"]) / 2**20
    return None


def best_loss(record: Record, reading: str) -> float | None:
    """Before adaptation or after it, whichever is lower."""
    losses = [found for found in (loss(record, reading), adapted_loss(record, reading)) if found is not None]
    return min(losses, default=None)


def topk_of(reading: str) -> Callable[[Record], float | None]:
    """Held-out loss by top-k blocks."""
    return lambda record: find(record.get("topk", []), reading)


def needles_of(reading: str, task: str, trained: str = "pair") -> Callable[[Record], float | None]:
    """Share of the needles of a task found."""

    def share(record: Record) -> float | None:
        for tuning in record.get("needles", []):
            for row in tuning["scores"]:
                if (tuning["trained"], plain(row["pattern"]), row["task"]) == (trained, plain(reading), task):
                    return float(row["ruler"])
        return None

    return share


def mean(experiment: Experiment, arm: str, of: Callable[[Record], float | None]) -> float | None:
    """Over an arm's seeds; None where it was not measured."""
    found = spread(experiment.of(arm), of)
    return None if found is None else found.mean


def letter(arm: str) -> str:
    """``(a)`` of an arm's title."""
    return arms.TITLES[arm].partition(" ")[0]


def by_size(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Those that have (a), the fewest parameters first."""
    return sorted((experiment for experiment in experiments if experiment.of("ratplus")), key=_size)


def _size(experiment: Experiment) -> tuple[int, int, str]:
    ours = experiment.of("ratplus")[0]
    return ours["parameters"], ours["pretraining"]["tokens"], experiment.name


def kinds_of(experiment: Experiment, arm: str, kind: str | None = None) -> list[Record]:
    """The seeds that were read by kind of text; with a kind, their scores on it alone."""
    records = [record for record in experiment.of(arm) if "kinds" in record]
    return records if kind is None else [{"scores": record["kinds"][kind]} for record in records]


STRETCHES = 10


def course(record: Record) -> list[float]:
    """Means over equal stretches of the loss curve."""
    curve = record["pretraining"]["curve"]
    apart = [point["loss_sparse"] - point["loss_dense"] for point in curve]
    edges = [len(apart) * stretch // STRETCHES for stretch in range(STRETCHES + 1)]
    return [sum(apart[first:end]) / (end - first) for first, end in pairwise(edges)]
