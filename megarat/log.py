"""What a run shows and records: progress bar, ``metrics.jsonl``, TensorBoard. Only the first rank has one.

``metrics.jsonl`` has one object a line and a pair: pair (1 = the first), tokens (so far), loss_sparse, loss_dense, grad_norm_sparse,
grad_norm_dense (before clipping), lr, tokens_per_s, stream_hash (of all token ids so far), mfu, memory_gb (peak), data_wait_s, seconds,
skipped (the pair was left out for bad numbers), skipped_total, rollbacks (of the run so far). null where a value does not exist or is not finite.

TensorBoard reads one file a run, whatever number of starts the run has: a start cuts off what was recorded beyond its checkpoint, fills in
from ``metrics.jsonl`` what a crash may have kept from the file, and appends. So every step is there once.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

from tqdm import tqdm

from megarat.config import Config
from megarat.errors import UserError
from megarat.files import replace_synced, write_whole
from megarat.heartbeat import beat

METRICS = "metrics.jsonl"
EVENTS = "tensorboard/events.out.tfevents.megarat"  # TensorBoard takes every file whose name has "tfevents" in it
_TENSORBOARD_TAGS = {
    "loss_sparse": "loss/sparse",
    "loss_dense": "loss/dense",
    "validation_sparse": "validation/sparse",
    "validation_dense": "validation/dense",
    "grad_norm_sparse": "grad_norm/sparse",
    "grad_norm_dense": "grad_norm/dense",
    "lr": "schedule/lr",
    "tokens": "schedule/tokens",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "data_wait_s": "speed/data_wait_s",
    "memory_gb": "memory/peak_gb",
    "skipped": "guard/skipped",
    "skipped_total": "guard/skipped_total",
    "rollbacks": "guard/rollbacks",
}

Metrics = Mapping[str, Any]


class RunLog:
    """Records one line a pair; use as a context manager."""

    def __init__(self, run_dir: Path, config: Config, first_pair: int, enabled: bool = True) -> None:
        """Continue the records of ``run_dir`` after ``first_pair`` pairs; what was recorded beyond them is dropped."""
        self._run_dir, self._with_tensorboard = run_dir, config.log.tensorboard
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
        beat()
        self._open(first_pair)

    def _open(self, first_pair: int) -> None:
        drop_later_lines(self._run_dir / METRICS, first_pair)
        self._metrics = (self._run_dir / METRICS).open("ab", buffering=0)  # each line is out before the next pair begins
        self._events = _continued_events(self._run_dir, first_pair) if self._with_tensorboard else None

    def _close(self) -> None:
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def rewind(self, pairs: int) -> None:
        """Go back to where ``pairs`` pairs were recorded."""
        if not self._enabled:
            return
        self._close()
        self._open(pairs)
        self._bar.n = pairs
        self._bar.refresh()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._enabled:
            self._close()

    def pair(self, metrics: Metrics) -> None:
        """Record one pair (every ``log.every``-th, the last, and those with a validation) and move the bar."""
        if not self._enabled:
            return
        beat()
        self._bar.update()
        self._bar.set_postfix(_summary(metrics), refresh=False)
        if metrics["pair"] % self._every == 0 or metrics["pair"] == self._total or "validation_dense" in metrics:
            self._record(metrics)
        if metrics["pair"] % self._checkpoint_every == 0:
            self._sync()

    def _record(self, metrics: Metrics) -> None:
        line = json.dumps({key: _finite(value) for key, value in metrics.items()})
        write_whole(self._metrics, f"{line}\n".encode())
        if self._events is not None:
            self._events.add(metrics)

    def alive(self) -> None:
        """A sign of life where no pair is recorded."""
        if self._enabled:
            beat()

    def _sync(self) -> None:
        """What a run resumes after must have been recorded, even if the power fails: later lines are dropped, not these."""
        os.fsync(self._metrics.fileno())
        if self._events is not None:
            self._events.sync()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            self._bar.write(message, file=sys.stderr)


def drop_later_lines(path: Path, pairs: int) -> None:
    """Keep the lines of the first ``pairs`` pairs: a run that resumes records the rest again. A torn last line goes, too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _pair_of(line) in range(1, pairs + 1)]
    replace_synced(path, "".join(line + "\n" for line in kept))


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


# ---- TensorBoard -------------------------------------------------------------------------------------------------------------------


class EventFile:
    """One event file of TensorBoard, opened to be gone on with: a record a pair, each out before the next pair begins.

    A record is the length of its content (8 bytes), a checksum of that, the content (an ``Event``), and its checksum. The file is cut and
    appended to in place, so a TensorBoard that is reading it goes on with what replaces the cut: records of a step have the same size.
    """

    def __init__(self, path: Path, first_pair: int) -> None:
        """Cut off records after ``first_pair``, and a torn one. Raises ``UserError`` when TensorBoard is not installed."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                f"log.tensorboard is true, but TensorBoard cannot be imported ({error}); install it or set it to false"
            ) from None
        self._event = Event
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        end, self.last_pair = self._end_of(first_pair)
        self._file.truncate(end)
        self._file.seek(end)
        self._writer = RecordWriter(SimpleNamespace(write=partial(write_whole, self._file)))
        if end == 0:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _end_of(self, first_pair: int) -> tuple[int, int]:
        """Where the last record of the first ``first_pair`` pairs ends, and its pair (0: none)."""
        end = last = 0
        for position, content in _whole_records(self._file.read()):
            step = self._event.FromString(content).step
            if step > first_pair:
                break
            end, last = position, step
        return end, last

    def add(self, metrics: Metrics) -> None:
        """One point a curve for this pair."""
        event = self._event(wall_time=time.time(), step=metrics["pair"])
        for key, tag in _TENSORBOARD_TAGS.items():
            if metrics.get(key) is not None:
                event.summary.value.add(tag=tag, simple_value=metrics[key])
        self._write(event)

    def sync(self) -> None:
        """Have it on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _continued_events(run_dir: Path, first_pair: int) -> EventFile:
    """The run's event file, with what ``metrics.jsonl`` has beyond it."""
    events = EventFile(run_dir / EVENTS, first_pair)
    for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
        recorded = json.loads(line)
        if recorded["pair"] > events.last_pair:
            events.add(recorded)
    return events


def _whole_records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The end and the content of each record, up to the first that is torn."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while start + 16 <= len(content):
        (size,) = struct.unpack_from("<Q", content, start)
        end = start + 16 + size
        body = content[start + 12 : end - 4]
        if end > len(content) or struct.unpack_from("<I", content, end - 4) != (masked_crc32c(body),):
            return
        yield end, body
        start = end
