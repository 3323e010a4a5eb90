"""What may end a run before its last pair, or keep it from its first: a signal, the wall clock, another process on the same folder."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from megarat.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether somebody wants the run to end at the next pair, and who."""

    def __init__(self, wall_clock_minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + 60 * wall_clock_minutes if wall_clock_minutes else None
        self._limit = wall_clock_minutes
        self._signal: str | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop, in words; None to go on."""
        if self._signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return f"train.wall_clock_minutes = {self._limit:g} is over"
        return self._signal

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take SIGTERM, SIGUSR1 and SIGINT as requests for the length of the block; a second Ctrl-C interrupts at once."""
        previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir/lock`` for the length of the block; raises ``UserError`` while another process does, and where there are no locks.

    The lock is the system's (POSIX record lock), so it ends with the process that holds it however that dies; the file names the holder.
    """
    try:
        file = (run_dir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot write there: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
            raise UserError(
                f"{run_dir} is in use by {_holder(file)}; wait for that job or stop it, or give this one another run.dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"run.dir {run_dir}: cannot lock {file.name}: {error.strerror}; the file system must have locks (Lustre: mount it with flock), "
                "or choose a run.dir elsewhere"
            ) from None
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
