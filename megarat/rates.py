"""How fast one GPU was measured to be: ``benchmarks/results.csv`` (single operations) and ``benchmarks/train.csv`` (whole training steps).

``megarat plan`` makes the time of a step from these, where they are there for the kind of GPU that is asked for. The last row of a kind counts.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megarat.model.flops import visible_pairs
from megarat.model.pattern import Pattern

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
_TOKENS, _HIDDEN, _LENGTH = 8 * 4096, 2048, 4096  # of the rows below
_VISIBLE_DENSE, _VISIBLE_SPARSE = (
    visible_pairs(pattern, _LENGTH) / _LENGTH for pattern in (Pattern(), Pattern(64))
)  # keys a query
_SCAN, _ATTENTION = "B=8 T=4096 C=2048", "B=8 T=4096 D=64,W=0,I=0"
_DENSE = "cuDNN SDPA, dense"  # what runs the dense pass


class Rates(NamedTuple):
    """One GPU. Seconds of operations are both ways (forward and backward), of a token and a channel."""

    matmul: float  # FLOP/s of large bf16 matrix products, on a GPU that is as warm as training makes it where train.csv has runs
    copy: float  # bytes/s, each byte counted once as read and once as written
    scan_s: float
    attention_s: float  # of attention that sees nothing
    visible_s: float  # for each key that is seen
    source: str


def measured(gpu: str, folder: Path = FOLDER) -> Rates | None:
    """The rates of a kind of GPU such as "H200"; None where it was not measured."""
    rows = {(row["op"], row["shape"], row["implementation"]): row for row in _rows(folder / "results.csv") if gpu in row["gpu"]}
    sustained = [float(row["matmul_tflop_s"]) for row in _rows(folder / "train.csv") if gpu in row["gpu"]]
    try:
        last = rows[("gated_scan forward", _SCAN, "megarat")]
        scan = _both_ways(rows, "gated_scan", _SCAN, "megarat")
        sparse = _both_ways(rows, "dilated_attention", _ATTENTION, "megarat")
        dense = _both_ways(rows, "dilated_attention", _ATTENTION, _DENSE)
    except KeyError:
        return None
    # The sparse attention is bound by memory and the dense one by arithmetic: the keys seen make the difference between them.
    visible = (dense - sparse) / (_VISIBLE_DENSE - _VISIBLE_SPARSE)
    return Rates(
        statistics.median(sustained or [float(last["matmul_tflop_s"])]) * 1e12, float(last["copy_tb_s"]) * 1e12, scan,
        sparse - visible * _VISIBLE_SPARSE, visible,
        f"benchmarks/results.csv: {last['gpu']}, torch {last['torch']}, commit {last['commit']}",
    )  # fmt: skip


class Step(NamedTuple):
    """A training step that was timed: what it was made of, and what came out."""

    size: str
    gpus: int
    parallel: dict[str, int | str | bool]  # keys of the section of the config
    length: int
    micro_batch: int
    accumulation: int
    tokens_per_s: float
    peak_bytes: float
    source: str


def steps(gpu: str, folder: Path = FOLDER) -> list[Step]:
    """Timed steps of megarat on GPUs of this kind (train.csv, mesh.csv), the last of each, without settings that the plan knows nothing of."""
    found: dict[str, Step] = {}
    for row in [*_rows(folder / "train.csv"), *_rows(folder / "mesh.csv")]:
        settings = row.get("settings", "").split()
        usual = row.get("implementation", "megarat") == "megarat" and not row.get("run", "").startswith("one-")
        if gpu not in row["gpu"] or not usual or any(not setting.startswith("parallel.") for setting in settings):
            continue
        parallel = _mesh(row["mesh"]) | {
            key.removeprefix("parallel."): value for key, _, value in (s.partition("=") for s in settings)
        }
        step = Step(
            row["size"], int(row["gpus"]), parallel, int(row.get("length", 4096)), int(row["micro_batch"]), int(row["accumulation"]),
            float(row.get("joint_tokens_s") or row["tokens_s"]), float(row["peak_gb"]) * 1e9,
            f"{row['gpu']}, torch {row['torch']}, commit {row['commit']}",
        )  # fmt: skip
        found[repr(step[:6])] = step
    return list(found.values())


def _mesh(text: str) -> dict[str, int | str | bool]:
    """ "tensor 2, context 1, data 1, pipeline 1, sequence, ZeRO 1" as keys of a config; the data axis follows from the number of GPUs."""
    words = [part.split() for part in text.lower().split(", ")]
    return {word[0]: int(word[1]) if len(word) == 2 else True for word in words if word[0] != "data"}


def _both_ways(rows: Mapping[tuple[str, str, str], Mapping[str, str]], op: str, shape: str, implementation: str) -> float:
    """Seconds of a token and a channel, forward and backward."""
    way = (float(rows[f"{op} {way}", shape, implementation]["median_ms"]) for way in ("forward", "backward"))
    return sum(way) / 1000 / (_TOKENS * _HIDDEN)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
