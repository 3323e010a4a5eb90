"""What a run shows and records: progress bar, ``metrics.jsonl``, TensorBoard. Only the first rank has one.

``metrics.jsonl`` has one object a line and a pair: pair (1 = the first), tokens (so far), loss_sparse, loss_dense, grad_norm_sparse,
grad_norm_dense (before clipping), lr, tokens_per_s, stream_hash (of all token ids so far), mfu, memory_gb (peak), data_wait_s, seconds,
skipped (dropped for non-finite values). null where a value does not exist or is not finite.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megarat.config import Config
from megarat.errors import UserError

METRICS = "metrics.jsonl"
_TENSORBOARD_TAGS = {
    "loss_sparse": "loss/sparse",
    "loss_dense": "loss/dense",
    "grad_norm_sparse": "grad_norm/sparse",
    "grad_norm_dense": "grad_norm/dense",
    "lr": "schedule/lr",
    "tokens": "schedule/tokens",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "data_wait_s": "speed/data_wait_s",
    "memory_gb": "memory/peak_gb",
    "skipped": "guard/skipped",
}

Metrics = Mapping[str, Any]


class RunLog:
    """Records one line a pair; use as a context manager."""

    def __init__(self, run_dir: Path, config: Config, first_pair: int, enabled: bool = True) -> None:
        """Continue the records of ``run_dir`` after ``first_pair`` pairs; what was recorded beyond them is dropped."""
        self._every = config.log.every
        self._checkpoint_every = config.checkpoint.every
        self._total = config.train.pairs
        self._enabled = enabled
        self._bar: tqdm[Any] = tqdm(
            total=self._total,
            initial=first_pair,
            unit="pair",
            desc=run_dir.name,
            disable=not (enabled and config.log.progress),
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file gets a line now and then
            dynamic_ncols=True,
        )
        if not enabled:
            return
        drop_later_lines(run_dir / METRICS, first_pair)
        self._metrics = (run_dir / METRICS).open("ab", buffering=0)  # each line is out before the next pair begins
        self._tensorboard = _tensorboard_writer(run_dir / "tensorboard", first_pair) if config.log.tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._enabled:
            self._metrics.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def pair(self, metrics: Metrics) -> None:
        """Record one pair (every ``log.every``-th and the last) and move the bar."""
        if not self._enabled:
            return
        self._bar.update()
        self._bar.set_postfix(_summary(metrics), refresh=False)
        if metrics["pair"] % self._every and metrics["pair"] != self._total:
            return
        line = json.dumps({key: _finite(value) for key, value in metrics.items()})
        self._metrics.write(f"{line}\n".encode())
        if self._tensorboard is not None:
            for key, tag in _TENSORBOARD_TAGS.items():
                if metrics.get(key) is not None:
                    self._tensorboard.add_scalar(tag, metrics[key], metrics["pair"])
            if metrics["pair"] % self._checkpoint_every == 0:
                self._tensorboard.flush()  # what a killed run resumes after must be on the disk: later points are purged, not these

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)


def drop_later_lines(path: Path, pairs: int) -> None:
    """Keep the lines of the first ``pairs`` pairs: a run that resumes records the rest again. A torn last line goes, too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _pair_of(line) in range(1, pairs + 1)]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def last_recorded_pair(path: Path) -> int:
    """The highest pair of a ``metrics.jsonl``; 0 when there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((_pair_of(line) or 0 for line in lines), default=0)


def _pair_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["pair"])
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summary(metrics: Metrics) -> dict[str, str]:
    losses = {name: metrics[f"loss_{name}"] for name in ("sparse", "dense")}
    summary = {name: f"{loss:.3f}" for name, loss in losses.items() if loss is not None}
    return summary | {"tok/s": f"{metrics['tokens_per_s']:,.0f}"}


def _tensorboard_writer(folder: Path, first_pair: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"log.tensorboard is true, but TensorBoard cannot be imported ({error}); install it or set it to false"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_pair + 1)  # hides what an interrupted run recorded beyond its checkpoint
