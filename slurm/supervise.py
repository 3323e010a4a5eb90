"""Runs one command on all ranks of a job, and decides what happens when it ends. Called by the sbatch files; needs nothing but Python.

    every node healthy?  ->  srun, one process a task  ->  how did it end?

    ended with              then
    0                       the job is done
    2                       bad input: the job fails, the message is in its log; starting again would not help
    75                      stopped on request, with a checkpoint: requeued, the same command goes on
    anything else           died: requeued, within the budget of retries; twice in a row at the same pair: the job fails and says so
    nothing (node lost)     counts as died; Slurm has requeued the job itself
    an unhealthy node       requeued without that node, within the budget

SIGUSR1 (Slurm's, before the time limit) and SIGTERM (preemption) are passed on to every rank. A job that somebody cancels is not requeued.
Every start and ending is a line of RUN_DIR/slurm/history.jsonl, which ``megarat status`` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

EXIT_OK, EXIT_GAVE_UP, EXIT_REFUSED, EXIT_STOPPED = 0, 1, 2, 75
DONE, REFUSED, STOPPED, DIED, LOST, UNHEALTHY = "done", "refused", "stopped", "died", "lost", "unhealthy"
_FAILURES = (DIED, LOST, UNHEALTHY)  # what uses up retries
_STALLS = 3  # stops in a row without a new pair, after which the time limit must be too short
_HEALTH_SECONDS = 300
_TAIL_BYTES = 1 << 16


class Ending(NamedTuple):
    """How a start of a job ended, and the last pair that the run had recorded by then (None: it records none)."""

    kind: str
    pair: int | None = None
    code: int | None = None


class Decision(NamedTuple):
    """What comes next: the exit code of the job, whether it is requeued, and why."""

    code: int
    requeue: bool
    why: str


def decide(ending: Ending, earlier: Sequence[Ending], retries: int) -> Decision:
    """What follows from this ending, after the ``earlier`` ones of the same job."""
    if ending.kind == DONE:
        return Decision(EXIT_OK, False, "done")
    if ending.kind == REFUSED:
        return Decision(EXIT_REFUSED, False, "bad input or a run folder in use: see the message above; not requeued")
    at = "" if ending.pair is None else f" after pair {ending.pair}"
    if ending.kind == STOPPED:
        if [(past.kind, past.pair) for past in earlier[1 - _STALLS :]] == [(STOPPED, ending.pair)] * (_STALLS - 1):
            return Decision(
                EXIT_GAVE_UP, False, f"stopped {_STALLS} times in a row{at}, with nothing done in between: raise the time limit"
            )
        return Decision(EXIT_STOPPED, True, f"stopped on request{at}")
    failures = sum(past.kind in _FAILURES for past in [*earlier, ending])
    what = {DIED: f"died with exit code {ending.code}", LOST: "was lost with its node", UNHEALTHY: "had an unhealthy node"}[
        ending.kind
    ]
    if ending.kind != UNHEALTHY and earlier and earlier[-1].kind in (DIED, LOST) and earlier[-1].pair == ending.pair:
        return Decision(EXIT_GAVE_UP, False, f"{what}{at}, for the second time at the same place: not requeued, look at the log")
    if failures > retries:
        return Decision(EXIT_GAVE_UP, False, f"{what}{at}; that was failure {failures}, and --retries is {retries}: not requeued")
    return Decision(EXIT_STOPPED, True, f"{what}{at} (failure {failures}, {retries} are allowed)")


# ---- records -----------------------------------------------------------------------------------------------------------------------


class History:
    """RUN_DIR/slurm/history.jsonl as far as it concerns this job."""

    def __init__(self, run_dir: Path, job: str, restart: int) -> None:
        self.path = run_dir / "slurm" / "history.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._own = {"job": job, "restart": restart}

    def record(self, event: str, **details: Any) -> None:
        """Append one line."""
        line = json.dumps({"event": event, "time": _now(), **self._own, **details})
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{line}\n".encode())

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the run; a torn one is left out."""
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def endings(self) -> list[Ending]:
        """Earlier endings of this job; a start without one was lost."""
        endings: list[Ending] = []
        started = None
        for line in self.lines():
            if line["job"] != self._own["job"]:
                continue
            if line["event"] == "start":
                endings += [Ending(LOST, line.get("pair"))] if started else []
                started = line
            elif line["event"] == "end":
                endings.append(Ending(line["kind"], line.get("pair"), line.get("code")))
                started = None
        return endings

    def open_start(self) -> bool:
        """Whether the last start of this job has no ending: the node went away with everything on it."""
        own = [line for line in self.lines() if line["job"] == self._own["job"]]
        return bool(own) and own[-1]["event"] == "start"


def last_pair(run_dir: Path) -> int | None:
    """The last pair in the run's ``metrics.jsonl``; None when it has none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(tail):
        try:
            return int(json.loads(line)["pair"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def newest_checkpoint(run_dir: Path) -> str | None:
    """The name of the newest checkpoint, or None."""
    return max((folder.name for folder in (run_dir / "checkpoints").glob("pair_*")), default=None)


# ---- Slurm -------------------------------------------------------------------------------------------------------------------------


class Job:
    """This job, by Slurm's own variables and commands."""

    def __init__(self) -> None:
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        # The number of an array's last task is also that of the array: by it, all tasks would be requeued.
        self.id = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self.num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        self.gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))

    def is_ending(self) -> bool:
        """Whether Slurm itself is ending this job: it was cancelled, preempted or has met its time limit."""
        state = _output("squeue", "-h", "-j", self.id, "-o", "%T")
        return state is not None and state not in ("RUNNING", "")

    def requeue(self, without: Sequence[str]) -> str | None:
        """Queue this job again, not on the nodes ``without``; returns Slurm's complaint, if it has one."""
        excluded = _field(self.id, "ExcNodeList")  # before: what this job starts while it is being requeued is killed with it
        complaint = _complaint("scontrol", "requeue", self.id)
        if complaint or not without:
            return complaint
        nodes = ",".join([*([] if excluded in ("", "(null)") else [excluded]), *without])
        for _ in range(50):  # only a pending job can be told; one that is requeued waits some seconds before it starts
            if not (complaint := _complaint("scontrol", "update", f"JobId={self.id}", f"ExcNodeList={nodes}")):
                return None
            time.sleep(0.1)
        return complaint

    def unhealthy_nodes(self, root: Path) -> dict[str, str]:
        """Node -> what is wrong with it, for the nodes that ``health.py`` complains about or does not come back from."""
        command = _srun("--nodes", str(self.num_nodes), "--ntasks", str(self.num_nodes), "--ntasks-per-node=1")
        command += [*_python(), str(root / "slurm" / "health.py"), "--gpus", str(self.gpus)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_HEALTH_SECONDS)
            lines = done.stdout.splitlines()
        except subprocess.TimeoutExpired as late:
            lines = (late.stdout or b"").decode().splitlines()
        reports = [json.loads(line) for line in lines if line.startswith("{")]
        found = {report["node"]: "; ".join(report["faults"]) for report in reports}
        expected = (_output("scontrol", "show", "hostnames", self.nodes) or "").split()
        silent = {node: "the health check did not come back" for node in expected if node not in found}
        return {node: faults for node, faults in (found | silent).items() if faults}


def _srun(*options: str) -> list[str]:
    return ["srun", *options, *shlex.split(os.environ.get("MEGARAT_SRUN_OPTIONS", ""))]


def _python() -> list[str]:
    return [*shlex.split(os.environ.get("MEGARAT_CONTAINER", "")), os.environ.get("MEGARAT_PYTHON", sys.executable)]


def _output(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _complaint(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None


def _field(job: str, name: str) -> str:
    shown = _output("scontrol", "-o", "show", "job", job) or ""
    return next((item.partition("=")[2] for item in shown.split() if item.startswith(f"{name}=")), "")


# ---- one start ---------------------------------------------------------------------------------------------------------------------


class Ranks:
    """The command on all ranks. A rank that ends takes the others with it, but not before they could finish a checkpoint."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the last signal that was passed on
        self._srun: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def run(self, command: Sequence[str]) -> int:
        """Exit code of srun: the highest of all ranks, 128 + signal for a rank that was killed."""
        if self.asked is not None:
            return 128 + self.asked
        wait = os.environ.get("MEGARAT_RANK_WAIT", "60")
        self._srun = subprocess.Popen(_srun("--kill-on-bad-exit=0", f"--wait={wait}", "--label") + list(command))
        if self.asked is not None:  # it came while srun was being started
            self._srun.send_signal(signal.SIGUSR1)
        code = self._srun.wait()
        return 128 - code if code < 0 else code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name}: asking all ranks to stop with a checkpoint")
        self.asked = number
        if self._srun is not None and self._srun.poll() is None:
            self._srun.send_signal(signal.SIGUSR1)  # srun hands this on; on SIGTERM it would kill the ranks


def classify(code: int, asked: int | None) -> str:
    """The kind of ending that srun's exit code means; a rank may be hit by a signal before it listens to it."""
    if asked is not None and code in (128 + asked, 128 + signal.SIGUSR1):
        return STOPPED
    return {EXIT_OK: DONE, EXIT_REFUSED: REFUSED, EXIT_STOPPED: STOPPED}.get(code, DIED)


def main() -> int:
    """Supervise one start of the job."""
    arguments = _arguments()
    ranks, job = Ranks(), Job()
    history = History(arguments.run_dir, job.id, job.restart)
    if history.open_start():
        ending = Ending(LOST, last_pair(arguments.run_dir))
        decision = decide(ending, history.endings(), arguments.retries)
        history.record("end", kind=LOST, pair=ending.pair)
        _say(f"start {job.restart} of job {job.id} {decision.why}")
        if not decision.requeue:
            return decision.code
    if lost := _lost_checkpoint(history, arguments.run_dir):
        _say(lost)
        return EXIT_REFUSED
    return _one_start(arguments, ranks, job, history)


def _one_start(arguments: argparse.Namespace, ranks: Ranks, job: Job, history: History) -> int:
    earlier = history.endings()
    root = Path(__file__).resolve().parents[1]
    begin = newest_checkpoint(arguments.run_dir) or "the beginning (there is no checkpoint yet)"
    _say(f"start {job.restart + 1} of job {job.id} on {job.nodes}, from {begin}")
    bad = {} if os.environ.get("MEGARAT_HEALTH") == "off" else job.unhealthy_nodes(root)
    history.record("start", nodes=job.nodes, pair=last_pair(arguments.run_dir), unhealthy=bad)
    if bad:
        for node, faults in bad.items():
            _say(f"{node} is not healthy: {faults}")
        ending = Ending(UNHEALTHY, last_pair(arguments.run_dir))
    else:
        code = ranks.run([*_python(), str(root / "slurm" / "launch.py"), *arguments.command])
        ending = Ending(classify(code, ranks.asked), last_pair(arguments.run_dir), code)
    decision = decide(ending, earlier, arguments.retries)
    history.record("end", kind=ending.kind, pair=ending.pair, code=ending.code, why=decision.why, requeued=decision.requeue)
    _say(decision.why)
    return _requeue(job, decision, list(bad))


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


def _lost_checkpoint(history: History, run_dir: Path) -> str | None:
    """A run that has once stopped with a checkpoint must not silently begin again without it."""
    stopped = [
        line
        for line in history.lines()
        if line["event"] == "end" and line["kind"] == STOPPED and line.get("code") == EXIT_STOPPED
    ]
    if stopped and newest_checkpoint(run_dir) is None:
        return f"{run_dir}: was stopped with a checkpoint after pair {stopped[-1]['pair']}, but {run_dir / 'checkpoints'} holds none; restore it"
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the run is and its history is kept")
    parser.add_argument(
        "--retries", type=int, default=int(os.environ.get("MEGARAT_RETRIES", 5)), help="failures that a job may have (default: 5)"
    )
    parser.add_argument("command", nargs="+", help="module and arguments, after --")
    return parser.parse_args()


def _say(message: str) -> None:
    print(f"[{_now()}] megarat on Slurm: {message}", flush=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
