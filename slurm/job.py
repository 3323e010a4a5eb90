"""A job, seen from inside it: Slurm's own variables and commands, and the check of its nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_NODE_SECONDS = 300  # for the part of the check that each node makes alone
_CONTROLLER_SECONDS = 900  # that Slurm's controller may be away: it is being restarted, or moves to another host
_AWAY = ("contact slurm controller", "timed out", "Zero Bytes", "onnection")  # what its clients say then
_IMPORT_SECONDS = 240  # for torch, which every node of a large job reads at once from a shared file system
_NOBODY = (
    "the check came back from none of them: look above for why; are the image, MEGARAT_PYTHON and the options of srun right?"
)


class Job:
    """This job."""

    def __init__(self) -> None:
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        # The number of an array's last task is also that of the array: by it, all tasks would be requeued.
        self.id = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self.num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        self.ranks = int(os.environ.get("SLURM_NTASKS", self.num_nodes))  # without a number of tasks, srun starts one a node
        self.gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))

    def is_ending(self) -> bool:
        """Whether Slurm itself is ending this job: it was cancelled, preempted or has met its time limit. Waits for a controller that is away."""
        state = _output("squeue", "-h", "-j", self.id, "-o", "%T", patience=_CONTROLLER_SECONDS)
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

    # ---- the check of the nodes ----------------------------------------------------------------------------------------------------

    def unhealthy_nodes(self, depth: str) -> dict[str, str]:
        """Node -> what is wrong with it. ``depth`` is "off", "node" (each node alone) or "full" (and what they can do together)."""
        if depth == "off":
            return {}
        faults = self._faults_alone()
        if faults or depth == "node" or (self.ranks == 1 and not self.gpus):
            return faults
        return self._faults_together()

    def _faults_alone(self) -> dict[str, str]:
        """What ``health.py`` finds on each node; a node from which it does not come back is bad as well."""
        command = srun("--nodes", str(self.num_nodes), "--ntasks", str(self.num_nodes), "--ntasks-per-node=1")
        command += [*python(), str(ROOT / "slurm/health.py"), "--gpus", str(self.gpus)]
        reports = _reports(command, _NODE_SECONDS)
        if not reports and self.num_nodes > 1:
            return {"": _NOBODY}
        found = {str(report["node"]): "; ".join(report["faults"]) for report in reports}
        silent = {node: "the health check did not come back" for node in self._hosts() if node not in found}
        return {node: faults for node, faults in (found | silent).items() if faults}

    def _faults_together(self) -> dict[str, str]:
        """What ``collective.py`` finds on all ranks; when they fail together, the nodes that fail with each of their neighbours."""
        hosts, seconds = self._hosts(), int(os.environ.get("MEGARAT_HEALTH_SECONDS", 120))
        command = [*python(), str(ROOT / "slurm/collective.py"), "--hosts", ",".join(hosts), "--seconds", str(seconds)]
        together = _reports([*srun("--kill-on-bad-exit=0"), *command], _IMPORT_SECONDS + seconds)
        broken = _by_node(together, "gpu")
        if broken or (len(together) == self.ranks and not _by_node(together, "failed")):
            return broken
        attempts = _reports([*srun("--kill-on-bad-exit=0"), *command, "--find"], _IMPORT_SECONDS + 4 * seconds)
        if not (together or attempts) and self.num_nodes > 1:
            return {"": _NOBODY}
        return culprits(attempts, hosts) or {"": "an all-reduce over all ranks fails, though any two neighbours can do it"}

    def _hosts(self) -> list[str]:
        return (_output("scontrol", "show", "hostnames", self.nodes) or "").split()


def culprits(attempts: Sequence[Mapping[str, object]], hosts: Sequence[str]) -> dict[str, str]:
    """The nodes that failed alone, or else with each neighbour that did not, from the reports of ``collective.py --find``."""
    faults = dict.fromkeys(hosts, "its ranks did not come back from an all-reduce")
    for report in attempts:
        faults.pop(str(report["node"]), None)
    faults |= {
        str(r["node"]): f"an all-reduce of its own ranks: {r['failed']}"
        for r in attempts
        if r["failed"] and r["with"] == r["node"]
    }
    pairs: dict[str, list[str]] = {}
    for report in attempts:
        if report["with"] not in faults and report["node"] not in faults and report["with"] != report["node"]:
            pairs.setdefault(str(report["node"]), []).append(str(report["failed"]))
    for node, failures in pairs.items():
        if all(failures):
            faults[node] = f"an all-reduce with each of its neighbours: {failures[0]}"
    return faults


def srun(*options: str) -> list[str]:
    """The command that starts something on all tasks of the job."""
    return ["srun", *options, *shlex.split(os.environ.get("MEGARAT_SRUN_OPTIONS", ""))]


def python() -> list[str]:
    """The command before a script: the image's, if there is one, and Python."""
    return [*shlex.split(os.environ.get("MEGARAT_CONTAINER", "")), os.environ.get("MEGARAT_PYTHON", sys.executable)]


def _reports(command: Sequence[str], seconds: float) -> list[dict[str, object]]:
    """Lines of JSON that the tasks of a step print; those of the ones that did within ``seconds``."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as step:
        try:
            printed, _ = step.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            end(step)
            printed, _ = step.communicate()
    reports = []
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):  # libraries print as well
            reports.append(json.loads(line))
    return [report for report in reports if isinstance(report, dict)]


def end(step: subprocess.Popen[bytes] | subprocess.Popen[str], patience: float = 30) -> None:
    """End a step: srun kills its tasks on SIGTERM; one that does not end by that is killed itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        step.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(patience)
            return


def _by_node(reports: Sequence[Mapping[str, object]], key: str) -> dict[str, str]:
    return {str(report["node"]): str(report[key]) for report in reports if report.get(key)}


def _output(*command: str, patience: float = 0) -> str | None:
    """What a command prints, None when it fails; tried again for ``patience`` seconds while Slurm's controller does not answer."""
    deadline = time.monotonic() + patience
    while True:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        if time.monotonic() > deadline or not any(words in done.stderr for words in _AWAY):
            return None
        time.sleep(5)


def _complaint(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None


def _field(job: str, name: str) -> str:
    shown = _output("scontrol", "-o", "show", "job", job) or ""
    return next((item.partition("=")[2] for item in shown.split() if item.startswith(f"{name}=")), "")
