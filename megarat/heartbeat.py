"""Signs of life, for whoever watches over this program; nothing at all where nobody does.

``slurm/supervise.py`` names a file (``MEGARAT_HEARTBEAT``) that says which start of the job is the present one (``MEGARAT_START``). A program
touches it as it goes on; a job whose file has grown old hangs. A program that belongs to an earlier start, because Slurm lost sight of its node
and queued the job again, learns it there and ends before it writes anything that the present one would write, too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

_EVERY_S = 1.0
_next = 0.0


def beat() -> None:
    """Touch the file, at most once a second."""
    global _next
    path, start = os.environ.get("MEGARAT_HEARTBEAT"), os.environ.get("MEGARAT_START")
    if path is None or start is None or time.monotonic() < _next:
        return
    _next = time.monotonic() + _EVERY_S
    try:
        present = Path(path).read_text(encoding="utf-8").strip()
        os.utime(path)
    except OSError:
        return  # the disk is away for a moment, or the file is gone: training needs neither
    if present != start:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            print(f"megarat: start {present} of this job has taken over; start {start} ends here", file=sys.stderr, flush=True)
        os._exit(1)  # not even what is done on a way out may touch the run
