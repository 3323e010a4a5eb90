"""What has become of the starts of a job (RUN_DIR/slurm/history.jsonl), and what follows from how one ends."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXIT_OK, EXIT_GAVE_UP, EXIT_REFUSED, EXIT_HUNG, EXIT_STOPPED = 0, 1, 2, 70, 75
DONE, REFUSED, STOPPED, DIED, HUNG, LOST, UNHEALTHY = "done", "refused", "stopped", "died", "hung", "lost", "unhealthy"
_AT_WORK = (DIED, HUNG, LOST)  # failures of the command, which may lie in what it was doing
_FAILURES = (*_AT_WORK, UNHEALTHY)  # what uses up retries
_STALLS = 3  # stops in a row without progress, after which the time limit must be too short
_TAIL_BYTES = 1 << 16


class Ending(NamedTuple):
    """How a start of a job ended, and how far the run had come by then (None: it records nothing)."""

    kind: str
    pair: int | None = None  # the last one recorded or saved; of an evaluation, the items done
    code: int | None = None


class Decision(NamedTuple):
    """What comes next: the exit code of the job, whether it is requeued, and why."""

    code: int
    requeue: bool
    why: str


def decide(ending: Ending, earlier: Sequence[Ending], retries: int) -> Decision:
    """What follows from this ending, after the ``earlier`` ones of the same job."""
    if ending.kind == DONE:
        return Decision(EXIT_OK, False, "done")
    if ending.kind == REFUSED:
        return Decision(EXIT_REFUSED, False, "bad input or a run folder in use: see the message above; not requeued")
    at = "" if ending.pair is None else f" after pair {ending.pair}"
    if ending.kind == STOPPED:
        if [(past.kind, past.pair) for past in earlier[1 - _STALLS :]] == [(STOPPED, ending.pair)] * (_STALLS - 1):
            return Decision(
                EXIT_GAVE_UP, False, f"stopped {_STALLS} times in a row{at}, with nothing done in between: raise the time limit"
            )
        return Decision(EXIT_STOPPED, True, f"stopped on request{at}")
    failures = sum(past.kind in _FAILURES for past in [*earlier, ending])
    what = {
        DIED: "died" if ending.code is None else f"died with exit code {ending.code}",
        HUNG: "gave no sign of life any more",
        LOST: "was lost with its node",
        UNHEALTHY: "had an unhealthy node",
    }[ending.kind]
    if ending.kind in _AT_WORK and earlier and earlier[-1].kind in _AT_WORK and earlier[-1].pair == ending.pair:
        return Decision(EXIT_GAVE_UP, False, f"{what}{at}, for the second time at the same place: not requeued, look at the log")
    if failures > retries:
        return Decision(EXIT_GAVE_UP, False, f"{what}{at}; that was failure {failures}, and --retries is {retries}: not requeued")
    return Decision(EXIT_STOPPED, True, f"{what}{at} (failure {failures}, {retries} are allowed)")


class History:
    """RUN_DIR/slurm/history.jsonl as far as it concerns this job."""

    def __init__(self, run_dir: Path, job: str, restart: int) -> None:
        self.path = run_dir / "slurm" / "history.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._own = {"job": job, "restart": restart}

    def record(self, event: str, **details: Any) -> None:
        """Append one line."""
        line = json.dumps({"event": event, "time": now(), **self._own, **details})
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the run; a torn one is left out."""
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def endings(self) -> list[Ending]:
        """Earlier endings of this job; a start without one was lost."""
        endings: list[Ending] = []
        started = None
        for line in self.lines():
            if line["job"] != self._own["job"]:
                continue
            if line["event"] == "start":
                endings += [Ending(LOST, line.get("pair"))] if started else []
                started = line
            elif line["event"] == "end":
                endings.append(Ending(line["kind"], line.get("pair"), line.get("code")))
                started = None
        return endings

    def open_start(self) -> bool:
        """Whether the last start of this job has no ending: the node went away with everything on it."""
        own = [line for line in self.lines() if line["job"] == self._own["job"]]
        return bool(own) and own[-1]["event"] == "start"

    def lost_checkpoint(self, run_dir: Path) -> str | None:
        """A complaint when an earlier start left a checkpoint and there is none now: nothing may silently begin again without it."""
        left = [line["checkpoint"] for line in self.lines() if line.get("checkpoint")]
        if left and newest_checkpoint(run_dir) is None:
            return f"{run_dir}: an earlier start left the checkpoint {left[-1]}, but {run_dir / 'checkpoints'} holds none; restore it"
        return None


def progress(run_dir: Path) -> int | None:
    """The last pair that a run has recorded or saved; else how many files an evaluation or a build of shards has done; None without any."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().splitlines()
    except OSError:
        unfinished = run_dir.parent / f".{run_dir.name.removesuffix('-build')}.partial"  # of data_tools.build_shards
        return sum(1 for _ in (*run_dir.glob("work/*/*.json"), *unfinished.rglob("*"))) or None
    # With log.every above 1 a start may save more pairs than it records, and may record none at all.
    return max((pair for pair in (_last_recorded(tail), _saved(run_dir)) if pair is not None), default=None)


def _last_recorded(lines: Sequence[bytes]) -> int | None:
    """The pair of the last whole line."""
    for line in reversed(lines):
        try:
            return int(json.loads(line)["pair"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _saved(run_dir: Path) -> int | None:
    """The pair of the newest checkpoint."""
    number = (newest_checkpoint(run_dir) or "").removeprefix("pair_")
    return int(number) if number.isdigit() else None


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name of the newest checkpoint, or None."""
    return max((folder.name for folder in (run_dir / "checkpoints").glob("pair_*")), default=None)


def now() -> str:
    """The time, as it stands in logs and histories."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
