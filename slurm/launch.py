"""``launch.py MODULE ARGUMENTS…``: runs a module of the tree this file lies in, as one rank of a job.

A job must run the code that was copied for it: not what has been installed since, and not what lies in the working folder, which
``python -m`` would take first.

Under ``supervise.py`` a rank prints its stacks on SIGUSR2, and ends when whoever started it (Slurm's step daemon, as a rule) has died: nobody
would end it then, and it would keep the run folder locked against the next start.
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

_LOOK_S = 2.0


def end_with(parent: int) -> None:
    """Watch, in a thread, whether ``parent`` is still this process's parent; end at once when it is not."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        with contextlib.suppress(OSError):  # who started this rank was the reader of what it writes
            os.write(2, b"megarat on Slurm: the process that started this rank has died; so does the rank\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if "MEGARAT_START" in os.environ:
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        end_with(os.getppid())
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
