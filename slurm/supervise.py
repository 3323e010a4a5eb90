"""Runs one command on all ranks of a job, and decides what happens when it ends. Called by the sbatch files; needs nothing but Python.

    every node healthy?  ->  srun, one process a task  ->  how did it end?

    ended with              then
    0                       the job is done
    2                       bad input: the job fails, the message is in its log; starting again would not help
    75                      stopped on request, with a checkpoint: requeued, the same command goes on
    70                      a rank found that it hangs, and left its stacks in RUN_DIR/stacks; counts as died
    anything else           died: requeued, within the budget of retries; twice in a row at the same pair: the job fails and says so
    no sign of life         for MEGARAT_HANG seconds: stacks are asked for, the ranks are killed; counts as died
    nothing (node lost)     counts as died; Slurm has requeued the job itself
    an unhealthy node       requeued without that node, within the budget

SIGUSR1 (Slurm's, before the time limit) and SIGTERM (preemption) are passed on to every rank. A job that somebody cancels is not requeued.
Every start and ending is a line of RUN_DIR/slurm/history.jsonl, which ``megarat status`` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from history import (
    DIED,
    DONE,
    EXIT_HUNG,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_STOPPED,
    HUNG,
    LOST,
    REFUSED,
    STOPPED,
    UNHEALTHY,
    Decision,
    Ending,
    History,
    decide,
    newest_checkpoint,
    now,
    progress,
)
from job import ROOT, Job, end, python, srun

_LOOK_S = 1.0  # between looks at a running step
_LOCK_S = 300.0  # that an earlier start's ranks get to end; after that, this start's are refused and say by whom
_STACKS_S = 15.0  # that hanging ranks get to print where they are

# ---- one start ---------------------------------------------------------------------------------------------------------------------


class Heartbeat:
    """A file that the command touches as it goes on, and in which it finds out whether it is still the present start of this job."""

    def __init__(self, run_dir: Path, job: Job) -> None:
        self.limit = float(os.environ.get("MEGARAT_HANG", 2400))  # seconds without a sign of life; 0: do not watch
        self._path = (run_dir / f"slurm/heartbeat-{job.id}").absolute()
        start = f"{job.id}.{job.restart}"
        self._path.write_text(start + "\n", encoding="utf-8")
        os.environ |= {"MEGARAT_HEARTBEAT": str(self._path), "MEGARAT_START": start}
        self._last, self._since = self._touched(), time.monotonic()

    def silence(self) -> float:
        """Seconds since the file last changed, as seen here: clocks of nodes and of file servers may differ."""
        if (touched := self._touched()) != self._last:
            self._last, self._since = touched, time.monotonic()
        return time.monotonic() - self._since

    def _touched(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None


class Ranks:
    """The command on all ranks. A rank that ends takes the others with it, but not before they could finish a checkpoint."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the last signal that was passed on
        self._srun: subprocess.Popen[bytes] | None = None
        self._parent = os.getppid()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str], heartbeat: Heartbeat) -> tuple[str, int | None]:
        """How the ranks ended, and srun's exit code: the highest of all ranks, 128 + signal for a rank that was killed."""
        if self.asked is not None:
            return STOPPED, None
        wait = os.environ.get("MEGARAT_RANK_WAIT", "60")
        step = self._srun = subprocess.Popen(srun("--kill-on-bad-exit=0", f"--wait={wait}", "--label") + list(command))
        if self.asked is not None:  # it came while srun was being started
            step.send_signal(signal.SIGUSR1)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = step.wait(_LOOK_S)
                code = 128 - code if code < 0 else code
                return classify(code, self.asked), code
            if os.getppid() != self._parent:
                _say("the step daemon of this script has died: ending the ranks")
                end(step)
                return DIED, None
            if 0 < heartbeat.limit < (silence := heartbeat.silence()):
                _say(f"no sign of life for {silence:.0f} s: asking the ranks where they are, then killing them")
                step.send_signal(signal.SIGUSR2)
                time.sleep(_STACKS_S)
                end(step)
                return HUNG, None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name}: asking all ranks to stop with a checkpoint")
        self.asked = number
        if self._srun is not None and self._srun.poll() is None:
            self._srun.send_signal(signal.SIGUSR1)  # srun hands this on; on SIGTERM it would kill the ranks


def classify(code: int, asked: int | None) -> str:
    """The kind of ending that srun's exit code means; a rank may be hit by a signal before it listens to it."""
    if asked is not None and code in (128 + asked, 128 + signal.SIGUSR1):
        return STOPPED
    return {EXIT_OK: DONE, EXIT_REFUSED: REFUSED, EXIT_HUNG: HUNG, EXIT_STOPPED: STOPPED}.get(code, DIED)


def main() -> int:
    """Supervise one start of the job."""
    arguments = _arguments()
    ranks, job = Ranks(), Job()
    history = History(arguments.run_dir, job.id, job.restart)
    if history.open_start():
        ending = Ending(LOST, progress(arguments.run_dir))
        decision = decide(ending, history.endings(), arguments.retries)
        history.record("end", kind=LOST, pair=ending.pair, why=decision.why, requeued=decision.requeue)
        _say(f"start {job.restart} of job {job.id} {decision.why}")
        if not decision.requeue:
            return decision.code
    if lost := history.lost_checkpoint(arguments.run_dir):
        _say(lost)
        return EXIT_REFUSED
    return _one_start(arguments, ranks, job, history)


def _one_start(arguments: argparse.Namespace, ranks: Ranks, job: Job, history: History) -> int:
    earlier, run_dir = history.endings(), arguments.run_dir
    begin = newest_checkpoint(run_dir) or "the beginning (there is no checkpoint yet)"
    _say(f"start {job.restart + 1} of job {job.id} on {job.nodes}, from {begin}")
    bad = job.unhealthy_nodes(os.environ.get("MEGARAT_HEALTH", "full"))
    history.record("start", nodes=job.nodes, pair=progress(run_dir), unhealthy=bad)
    for node, faults in bad.items():
        _say(f"{node or job.nodes} is not healthy: {faults}")
    if bad:
        kind, code = UNHEALTHY, None
    else:
        heartbeat = Heartbeat(run_dir, job)
        if earlier:
            _wait_for_earlier_ranks(run_dir / "lock")
        kind, code = ranks.run([*python(), str(ROOT / "slurm/launch.py"), *arguments.command], heartbeat)
    ending = Ending(kind, progress(run_dir), code)
    decision = decide(ending, earlier, arguments.retries)
    history.record(
        "end", kind=kind, pair=ending.pair, code=code, why=decision.why, requeued=decision.requeue,
        checkpoint=newest_checkpoint(run_dir),
    )  # fmt: skip
    _say(decision.why)
    return _requeue(job, decision, [node for node in bad if node])


def _wait_for_earlier_ranks(lock: Path) -> None:
    """Wait until no rank of an earlier start holds the run's lock: on a node that Slurm lost, it takes some time to learn that it has to end."""
    deadline = time.monotonic() + _LOCK_S
    while lock.exists() and time.monotonic() < deadline:
        with lock.open("a") as file, contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_LOOK_S)


def _requeue(job: Job, decision: Decision, without: Sequence[str]) -> int:
    """Queue the job again where that was decided and Slurm is not ending it; returns the exit code."""
    if not decision.requeue:
        return decision.code
    if job.is_ending():
        _say("Slurm is ending this job: whether it runs again is Slurm's decision (preempted: yes, cancelled: no)")
    elif complaint := job.requeue(without):
        _say(f"cannot requeue this job ({complaint}); submit it again to go on")
    else:
        _say("requeued" + (f", not on {', '.join(without)}" if without else ""))
    return decision.code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the run is and its history is kept")
    parser.add_argument(
        "--retries", type=int, default=int(os.environ.get("MEGARAT_RETRIES", 5)), help="failures that a job may have (default: 5)"
    )
    parser.add_argument("command", nargs="+", help="module and arguments, after --")
    return parser.parse_args()


def _say(message: str) -> None:
    print(f"[{now()}] megarat on Slurm: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
