"""``launch.py MODULE ARGUMENTS…``: runs a module of the tree this file lies in, as one rank of a job.

A job must run the code that was copied for it: not what has been installed since, and not what lies in the working folder, which
``python -m`` would take first.

Under ``supervise.py`` a rank prints its stacks on SIGUSR2, and ends when Slurm's step daemon above it has died (where it sees none, the process
that started it): nobody would end it then, and it would keep the run folder locked against the next start.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

_LOOK_S = 2.0


class Process(NamedTuple):
    """What /proc says of a process."""

    name: str
    state: str
    parent: int
    began: str  # in ticks since the machine started: with its number, this names a process for good

    @classmethod
    def of(cls, number: int) -> Process | None:
        """None where there is none, or none of this namespace."""
        try:
            head, _, rest = Path(f"/proc/{number}/stat").read_text().rpartition(") ")
        except OSError:
            return None
        words = rest.split()
        return cls(head.partition("(")[2], words[0], int(words[1]), words[19])


def starter() -> tuple[int, str | None]:
    """The step daemon above this process, whatever stands between them (a container's runtime may), and when it began; or else the parent."""
    number = os.getppid()
    while (process := Process.of(number)) is not None:
        if process.name == "slurmstepd":
            return number, process.began
        number = process.parent
    return os.getppid(), None


def is_there(number: int, began: str | None) -> bool:
    """Whether the process that began then lives on; without that, which /proc may hide, whether it is still the parent."""
    if began is None:
        return os.getppid() == number
    process = Process.of(number)
    return process is not None and process.began == began and process.state not in "ZX"


def end_with(number: int, began: str | None) -> None:
    """Watch, in a thread, whether the process that started this one is still there; end at once when it is not."""

    def watch() -> None:
        while is_there(number, began):
            time.sleep(_LOOK_S)
        with contextlib.suppress(OSError):  # who started this rank was the reader of what it writes
            os.write(2, b"megarat on Slurm: the process that started this rank has died; so does the rank\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if "MEGARAT_START" in os.environ:
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        end_with(*starter())
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
