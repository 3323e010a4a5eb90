"""Pairs whose numbers are bad: not finite, or far above what the pairs before had. They are left out; many in a row send the run back.

A pass is judged when its loss and gradient norm are known and before its update is made. Both are the same numbers on every rank, and what
is remembered of earlier pairs is part of every checkpoint: so the ranks decide alike, and a resumed run as the uninterrupted one.

    a bad pass                          its pair is left out: no update; of the sparse pass, then no dense pass either
    ``guard.rollback_after`` in a row   back to the last regular checkpoint from before them; training goes on with the samples after
                                        the bad ones, and all since the checkpoint are left out (they led there)
    ``train.max_skipped`` in a row      where it cannot go back any more: the run ends with an error

Going back moves the count of pairs, and with it the schedule, but not the data: pair n takes global batch n + ``state.passed_over``.
"""

from __future__ import annotations

import enum
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megarat.checkpoint.manifest import CheckpointState
from megarat.config import Config
from megarat.errors import UserError
from megarat.train.step import DENSE, SPARSE, PairResult

EVENTS = "guard.jsonl"

_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
# Least deviations: of numbers that hardly vary every change would be a spike. Relative to a loss; of the logarithm of a norm.
_LOSS_FLOOR, _NORM_FLOOR = 0.01, 0.1
_SMALLEST_NORM = 1e-30


class Decision(enum.Enum):
    """What follows from a pair."""

    TRAINED = enum.auto()
    SKIPPED = enum.auto()
    ROLL_BACK = enum.auto()


class PairGuard:
    """Judges pairs by ``state.guard``, the run's memory of earlier ones, and keeps that memory.

    state.guard["figures"]    pass -> [loss, gradient norm] of the last good pairs, oldest first
    state.guard["safe"]       pair of the checkpoint to go back to, if there is one
    state.guard["rollbacks"]  [pair the run was at, pair it went back to] of each time it did
    """

    def __init__(self, config: Config) -> None:
        self._guard, self._limit = config.guard, config.train.max_skipped
        self.why = ""  # the last pair that was left out was

    def judge(self, state: CheckpointState) -> Callable[[str, float, float], bool]:
        """Whether the update of a pass (its name) may be made, given its loss and gradient norm."""

        def accept(which: str, loss: float, norm: float) -> bool:
            spike = self._spike(which, loss, norm, state.guard.get("figures", {}).get(which, []))
            self.why = spike or self.why
            return not spike

        return accept

    def record(self, state: CheckpointState, result: PairResult) -> Decision:
        """Count pair number ``state.pair`` (from 0) and decide. Raises ``UserError`` when too many in a row were bad."""
        if result.made:
            self._remember(state, result)
            state.skipped_in_row = 0
            return Decision.TRAINED
        if not result.finite:
            self.why = "a loss or gradient is not finite"
        state.skipped.append(state.pair)
        state.skipped_in_row += 1
        if self._may_go_back(state):
            return Decision.ROLL_BACK
        if state.skipped_in_row >= self._limit:
            raise UserError(
                f"{state.skipped_in_row} pairs in a row had a loss or gradient that is not finite or far above those before "
                f"(train.max_skipped = {self._limit}; the last is pair {state.pair + 1}: {self.why}); look at the losses and the data before "
                "it (a lower optim.lr needs a run.dir of its own)"
            )
        return Decision.SKIPPED

    def _spike(self, which: str, loss: float, norm: float, figures: Sequence[Sequence[float]]) -> str:
        """What is far above the pairs before, in words; empty for nothing, or before there are enough of them."""
        limit = self._guard.deviations
        if not limit or len(figures) < max(1, self._guard.window // 2):
            return ""
        losses, norms = zip(*figures, strict=True)
        middle, deviation = _middle(losses)
        deviation = max(deviation, _LOSS_FLOOR * abs(middle))
        if loss > middle + limit * deviation:
            return f"the {which} loss is {loss:.4g}, {(loss - middle) / deviation:.1f} deviations above the median {middle:.4g}"
        middle, deviation = _middle([_log(value) for value in norms])
        deviation = max(deviation, _NORM_FLOOR)
        if _log(norm) > middle + limit * deviation:
            return (
                f"the {which} gradient norm is {norm:.4g}, {(_log(norm) - middle) / deviation:.1f} deviations of its logarithm above the "
                f"median {math.exp(middle):.4g}"
            )
        return ""

    def _remember(self, state: CheckpointState, result: PairResult) -> None:
        if not self._guard.deviations:
            return
        figures = state.guard.setdefault("figures", {})
        for which, update in ((SPARSE, result.sparse), (DENSE, result.dense)):
            if update is not None:
                earlier = figures.get(which, [])
                figures[which] = [*earlier, [update.loss, update.grad_norm]][-self._guard.window :]

    def _may_go_back(self, state: CheckpointState) -> bool:
        safe, after = state.guard.get("safe"), self._guard.rollback_after
        if not after or state.skipped_in_row < after or safe is None:
            return False
        return sum(to == safe for _, to in state.guard.get("rollbacks", [])) < self._guard.max_rollbacks


def gone_back(state: CheckpointState, to: CheckpointState) -> CheckpointState:
    """``to``, the state of the checkpoint gone back to from ``state``, which is past its last bad pair."""
    to.guard["rollbacks"] = [*state.guard.get("rollbacks", []), [state.pair, to.pair]]
    return to


def mark_safe(state: CheckpointState) -> None:
    """A regular checkpoint of this moment is one to go back to, unless the pairs before it were bad."""
    if not state.skipped_in_row:
        state.guard["safe"] = state.pair


def record_event(run_dir: Path, event: str, pair: int, **details: Any) -> None:
    """Add a line to ``RUN/guard.jsonl``; the first rank alone does."""
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, "pair": pair, **details})
    with (run_dir / EVENTS).open("ab") as file:
        file.write(f"{line}\n".encode())


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the deviation that a normal distribution of this median absolute deviation has."""
    middle = statistics.median(values)
    return middle, _NORMAL * statistics.median(abs(value - middle) for value in values)


def _log(norm: float) -> float:
    return math.log(max(norm, _SMALLEST_NORM))
