"""Ends a rank on which nothing goes on any more, so that the job can be started again, and leaves its stacks in the run folder.

Where one rank hangs or dies, the others wait for it in their next collective: every rank's watchdog runs out within the same time, and
RUN/stacks/ then shows who waited and who did something else. A rank that raises leaves its trace there, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megarat.errors import EXIT_HUNG, StoppedEarly, UserError

STACKS = "stacks"
_BACKUP_S = 15.0  # later than the watchdog's own thread, which a hang inside of the interpreter would hold up
_NEVER = -1.0
_LEAVING_S = 300.0  # for a rank that failed to leave: other ranks may have nobody left who answers


class Watchdog:
    """Runs out when ``beat`` is not called for ``minutes`` (0: never)."""

    def __init__(self, run_dir: Path, rank: int, ranks: int, minutes: float) -> None:
        self.path = run_dir / STACKS / f"rank{rank}.txt"
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._alone = ranks == 1
        self._limit_s = 60 * minutes
        self._what = "starting"
        self._deadline = float("inf")
        self._changed = threading.Condition()
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch for the length of the block; what is raised in it is added to the file, which goes when it is empty."""
        self.path.parent.mkdir(exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")  # open all along: a hang may be one of the file system
        threading.Thread(target=self._watch, name="megarat-watchdog", daemon=True).start()
        self.beat("starting")
        try:
            yield self
        except (UserError, StoppedEarly, KeyboardInterrupt):
            self._end()
            raise
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk may be the error
                self._tell(f"raised an error, while {self._what}")
                traceback.print_exc(file=self._file)
                self._file.flush()
            if self._alone:
                self._stop()
            else:
                self._expect_within(min(self._limit_s or _LEAVING_S, _LEAVING_S), "leaving after that error")
            raise
        else:
            self._end()

    def beat(self, what: str) -> None:
        """Life goes on, with ``what``."""
        if self._limit_s:
            self._expect_within(self._limit_s, what)

    def _expect_within(self, seconds: float, what: str) -> None:
        assert self._file is not None
        with self._changed:
            self._what, self._allowed_s, self._deadline = what, seconds, time.monotonic() + seconds
            self._changed.notify()
        faulthandler.dump_traceback_later(seconds + _BACKUP_S, exit=True, file=self._file)

    def _stop(self) -> None:
        with self._changed:
            self._deadline = _NEVER
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._file.close()

    def _end(self) -> None:
        self._stop()
        with contextlib.suppress(OSError):  # other ranks may have files there
            if not self.path.stat().st_size:
                self.path.unlink()
            self.path.parent.rmdir()

    def _watch(self) -> None:
        with self._changed:
            while (left := self._deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            if self._deadline == _NEVER:
                return
        self._give_up()

    def _give_up(self) -> None:
        """Write the stacks of all threads and end at once: nothing that others wait for can be put right here."""
        assert self._file is not None
        message = self._tell(f"{self._what} has taken more than {self._allowed_s / 60:g} minutes (guard.hang_minutes)")
        print(f"megarat: {message}; stacks: {self.path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)
        os._exit(EXIT_HUNG)

    def _tell(self, what: str) -> str:
        assert self._file is not None
        message = f"{self._name}: {what}"
        self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {message}\n")
        self._file.flush()
        return message
