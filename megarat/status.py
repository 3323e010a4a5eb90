"""``megarat status RUN…``: where runs stand, from their folders alone (and ``squeue``, where there is one). Needs no GPU and no torch.

A run folder is read while a job writes to it: whole lines of ``metrics.jsonl`` and ``slurm/history.jsonl``, names of checkpoint folders.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megarat.errors import UserError

_RECENT = 20  # pairs whose median speed and loss count as the present
_TAIL_BYTES = 1 << 18
_SILENT = 20  # times a pair's usual length after the next record was due, a running job that records nothing is called silent
_SPIKE = 1.5  # of the recent median loss
_SQUEUE_S = 60.0  # that a busy controller may take to answer


@dataclass
class RunStatus:
    """What one run folder says."""

    run_dir: Path
    pairs: int | None = None  # how many the config asks for
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the last lines of metrics.jsonl
    seconds_since: float | None = None  # the last of them was written
    checkpoint: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # starts and endings of its Slurm jobs
    jobs: dict[str, str] = field(default_factory=dict)  # job id -> what squeue says of it
    pieces: int | None = None  # of its work that an evaluation has done; None: this is none

    @property
    def pair(self) -> int:
        """Pairs done."""
        return int(self.metrics[-1]["pair"]) if self.metrics else 0

    @property
    def pair_seconds(self) -> float | None:
        """Median seconds of a recent pair."""
        recent = [line["seconds"] for line in self.metrics[-_RECENT:] if line.get("seconds")]
        return statistics.median(recent) if recent else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last pair, at the present speed."""
        if self.pairs is None or self.pair_seconds is None:
            return None
        return max(0, self.pairs - self.pair) * self.pair_seconds

    @property
    def restarts(self) -> int:
        """Starts on Slurm after the first."""
        return max(0, sum(line["event"] == "start" for line in self.history) - 1)

    @property
    def health(self) -> list[str]:
        """What somebody should look at; empty when all is well."""
        notes = [*self._loss_notes(), *self._ending_notes()]
        patience = self._patience
        running = any(state.startswith("RUNNING") for state in self.jobs.values())
        if running and patience and self.seconds_since and self.seconds_since > patience:
            notes.append(f"no pair for {duration(self.seconds_since)}, though the job runs")
        return notes

    @property
    def _patience(self) -> float | None:
        """Seconds after which a running job that records nothing is called silent; with ``log.every`` its lines are some pairs apart."""
        pairs = [0, *(int(line["pair"]) for line in self.metrics)][-_RECENT - 1 :]
        if self.pair_seconds is None:
            return None
        apart = statistics.median(later - earlier for earlier, later in itertools.pairwise(pairs))
        return max(120, (apart - 1 + _SILENT) * self.pair_seconds)

    def _loss_notes(self) -> list[str]:
        recent = self.metrics[-_RECENT:]
        skipped = [line["pair"] for line in recent if line.get("skipped")]
        notes = [f"pairs skipped for values that are not finite or for spikes: {', '.join(map(str, skipped))}"] if skipped else []
        losses = [line["loss_dense"] for line in recent if line.get("loss_dense") is not None]
        if len(losses) > 3 and losses[-1] > _SPIKE * statistics.median(losses):
            notes.append(f"the loss has jumped to {losses[-1]:.3f} (recent median {statistics.median(losses):.3f})")
        return notes

    def _ending_notes(self) -> list[str]:
        endings = [line for line in self.history if line["event"] == "end"]
        if not endings or endings[-1]["kind"] in ("done", "stopped"):
            return []
        return [f"the last start {endings[-1].get('why') or endings[-1]['kind']}"]


def read(run_dir: str | Path) -> RunStatus:
    """Look into a run folder. Raises ``UserError`` when it is none."""
    folder = Path(run_dir)
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "slurm", "checkpoints")):
        raise UserError(f"{run_dir} is no run folder: it holds neither config.yaml, metrics.jsonl, checkpoints/ nor slurm/")
    status = RunStatus(
        folder, metrics=_tail(folder / "metrics.jsonl", "pair"), history=_tail(folder / "slurm/history.jsonl", "event")
    )
    status.pairs = _pairs(folder / "config.yaml")
    if status.metrics:
        status.seconds_since = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    names = [entry.name for entry in (folder / "checkpoints").glob("pair_*") if entry.name[5:].isdigit()]
    status.checkpoint = max(names, key=lambda name: int(name[5:]), default=None)
    if (folder / "work").exists():
        status.pieces = sum(1 for _ in folder.glob("work/*/*.json"))
    status.jobs = _queue(list(dict.fromkeys(str(line["job"]) for line in status.history if "job" in line)))
    return status


def report(run_dirs: Sequence[str | Path]) -> Iterator[str]:
    """One paragraph a run, and one for each run below a folder of several, such as adaptations.

    Raises ``UserError`` that names what is no run folder, after all the others.
    """
    faults = []
    for run_dir in run_dirs:
        below = (
            []
            if (Path(run_dir) / "config.yaml").exists()
            else sorted(path.parent for path in Path(run_dir).glob("*/config.yaml"))
        )
        try:
            yield describe(read(run_dir))
        except UserError as error:
            faults += [] if below else [str(error)]
        for folder in below:
            yield describe(read(folder))
    if faults:
        raise UserError("; ".join(faults))


def describe(status: RunStatus) -> str:
    """The lines of one run; few of a folder in which nothing is trained."""
    jobs = ", ".join(f"{job} {state}" for job, state in status.jobs.items()) or "none in the queue"
    health = "; ".join(status.health) or "nothing to complain about"
    if status.pieces is not None:
        rows = {
            "jobs": jobs,
            "pieces": f"{status.pieces:,} of an evaluation are done",
            "restarts": str(status.restarts),
            "health": health,
        }
    elif status.pairs is None and not status.metrics:
        rows = {"jobs": jobs, "checkpoint": status.checkpoint or "none yet", "restarts": str(status.restarts), "health": health}
    else:
        rows = _rows_of_training(status, jobs, health)
    return "\n".join([str(status.run_dir), *(f"  {name:<11} {value}" for name, value in rows.items())])


def _rows_of_training(status: RunStatus, jobs: str, health: str) -> dict[str, str]:
    last = status.metrics[-1] if status.metrics else {}
    return {
        "jobs": jobs,
        "pair": f"{status.pair:,}" + (f" of {status.pairs:,}" if status.pairs else ""),
        "tokens": f"{last['tokens']:,}" if last else "0",
        "loss": ", ".join(f"{name} {_number(last.get(f'loss_{name}'))}" for name in ("sparse", "dense") if last) or "-",
        "tokens/s": _number(_recent_median(status.metrics, "tokens_per_s"), ",.0f"),
        "time left": "-" if status.seconds_left is None else duration(status.seconds_left),
        "restarts": str(status.restarts),
        "checkpoint": status.checkpoint or "none yet",
        "last pair": "-" if status.seconds_since is None else f"{duration(status.seconds_since)} ago",
        "health": health,
    }


def duration(seconds: float) -> str:
    """Such as ``3 d 4 h``, ``2 h 05 min``, ``41 s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _pairs(path: Path) -> int | None:
    """How many pairs a run's resolved config asks for, whatever other keys it has: the job runs its own copy of the code, perhaps an older one."""
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["pairs"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _tail(path: Path, key: str) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON objects that have ``key``."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:  # the first may be cut by the tail, the last is being written
            continue
        if isinstance(value, dict) and key in value:
            found.append(value)
    return found


def _queue(jobs: list[str]) -> dict[str, str]:
    """What squeue says of those jobs that it still has; nothing where there is no Slurm."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "-h", "-o", "%i %T on %N, %L of its limit left, %r", "-j", ",".join(jobs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_S)
    except subprocess.TimeoutExpired:
        return {jobs[-1]: "(squeue does not answer)"}
    pairs = (line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return {job: _plain(state) for job, state in pairs}


def _plain(state: str) -> str:
    """RUNNING jobs have nodes and time left but no reason; waiting ones the reverse."""
    name = state.split(" ", 1)[0]
    return state.rsplit(",", 1)[0] if name == "RUNNING" else f"{name} ({state.rsplit(', ', 1)[-1]})"


def _recent_median(metrics: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in metrics[-_RECENT:] if line.get(key)]
    return statistics.median(values) if values else None


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
