"""A rank and the process above it, without Slurm: a shell by the name of its step daemon."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import parent

LAUNCH = Path(__file__).resolve().parents[2] / "slurm/launch.py"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def below(command: str) -> str:
    """A shell's command that does not take the shell's place."""
    return f"{command}; true"


@pytest.mark.parametrize("between", [False, True], ids=["started by the daemon", "started by an image's runtime"])
def test_a_rank_ends_with_the_step_daemon_above_it(tmp_path, between):
    daemon = tmp_path / "slurmstepd"
    shutil.copy(shutil.which("sh"), daemon)
    rank = below(shlex.join([sys.executable, str(LAUNCH), "timeit", "-n", "1", "-r", "1", SLEEP]))
    command = [daemon, "-c", below(f"sh -c {shlex.quote(rank)}") if between else rank]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "MEGARAT_START": "1"}, **piped) as process:
        number = int(process.stdout.readline())
        assert (parent(number) == process.pid) is not between
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=30)  # ends when the rank has closed its end, too
    assert "so does the rank" in said
