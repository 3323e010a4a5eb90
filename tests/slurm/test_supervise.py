"""How a job ends and what follows, on a real Slurm with a stand-in for megarat that ends as a test tells it to."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from cluster import history, wait_until

ROOT = Path(__file__).resolve().parents[2]

# Each start takes the next line of RUN/script: a pair to record, then an exit code, or "save" (and exit 75), or "listen" (for a signal, then save).
STAND_IN = """
import json, os, pathlib, re, signal, sys, time
run = pathlib.Path(re.search('"(.*)"', sys.argv[-1])[1])
lines = (run / "script").read_text().split("\\n")
pair, ending = lines[int(os.environ.get("SLURM_RESTART_COUNT", 0))].split()
def save(*_):
    time.sleep(2)
    (run / "checkpoints" / f"pair_{int(pair):08d}").mkdir(parents=True, exist_ok=True)
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, save)
with open(run / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"pair": int(pair)}) + "\\n")
if ending == "listen":
    (run / f"listening-{os.environ['SLURM_PROCID']}").touch()
    time.sleep(100)
if ending == "save":
    save()
sys.exit(int(ending))
"""


class Submitted(NamedTuple):
    job: str
    run: Path

    @property
    def endings(self) -> list[tuple[str, int]]:
        return [(line["kind"], line["pair"]) for line in history(self.run) if line["event"] == "end"]

    @property
    def log(self) -> str:
        return (self.run / "job.out").read_text()

    def listens(self, ranks: int = 1) -> None:
        wait_until(lambda: len(list(self.run.glob("listening-*"))) == ranks, 60, f"{self.run} to listen")


# What the starts of each run do, and options of its job. They are submitted together, for most of their time goes by in the queue.
SCENARIOS: dict[str, tuple[list[str], dict[str, str]]] = {
    "dies twice": (["3 1", "5 1", "5 1", "9 0"], {}),
    "dies often": (["1 1", "2 1", "3 1", "4 0"], {"MEGARAT_RETRIES": "2"}),
    "refused": (["0 2", "9 0"], {}),
    "USR1": (["4 listen", "8 0"], {"options": "--nodes=2 --ntasks-per-node=2"}),
    "TERM": (["4 listen", "8 0"], {}),
    "time limit": (["4 listen", "8 0"], {"options": "--nodelist=n1 --time=1 --signal=B:USR1@55"}),
    "preempted": (["4 listen", "8 0"], {"options": "--nodelist=n4 --exclusive"}),
    "node lost": (["4 listen", "8 0"], {"options": "--exclude=n1,n2"}),
    "cancelled": (["4 listen", "8 0"], {}),
    "unhealthy": (["9 0", "9 0"], {"options": "--nodes=2 --exclude=n3", "MEGARAT_HEALTH_COMMAND": 'test "$SLURMD_NODENAME" != n2'}),
    "stalls": (["4 save", "4 save", "4 save", "9 0"], {}),
    "checkpoint gone": (["4 listen", "9 0"], {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory) -> dict[str, Submitted]:
    """All scenarios as jobs of pretrain.sbatch, from a tree with the repository's slurm folder and the stand-in."""
    base = tmp_path_factory.mktemp("runs")
    shutil.copytree(ROOT / "slurm", base / "tree/slurm")
    (base / "tree/megarat").mkdir()
    (base / "tree/megarat/__main__.py").write_text(STAND_IN)
    submitted = {}
    for name, (script, changes) in SCENARIOS.items():
        run = base / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "script").write_text("\n".join(script))
        settings = {"MEGARAT_ROOT": str(base / "tree"), "MEGARAT_PYTHON": sys.executable, "MEGARAT_RANK_WAIT": "10", **changes}
        options = ["--parsable", f"--chdir={base}", f"--output={run}/job.out", *settings.pop("options", "--nodelist=n1").split()]
        job = cluster.command(
            "sbatch", *options, str(base / "tree/slurm/pretrain.sbatch"), str(run), "config.yaml", env={**os.environ, **settings}
        )
        submitted[name] = Submitted(job, run)
    submitted["node lost"].listens()
    cluster.lose_node("n3")  # Slurm needs most of a minute to notice; the last test looks at what follows
    return submitted


def test_signals_stop_every_rank_and_the_job_goes_on_in_its_queue(cluster, jobs):
    for how, ranks in (("USR1", 4), ("TERM", 1)):
        jobs[how].listens(ranks)
        cluster.command("scancel", f"--signal={how}", "--batch", jobs[how].job)
    for how in ("USR1", "TERM"):
        cluster.wait_for_state(jobs[how].job, "COMPLETED", "FAILED")
        assert jobs[how].endings == [("stopped", 4), ("done", 8)]
        assert cluster.field(jobs[how].job, "Restarts") == "1"


def test_preempted_by_a_job_of_higher_priority(cluster, jobs):
    low = jobs["preempted"]
    low.listens()
    cluster.command("sbatch", "--partition=high", "--nodelist=n4", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait_for_state(low.job, "COMPLETED", "FAILED")
    assert low.endings == [("stopped", 4), ("done", 8)]
    assert cluster.field(low.job, "Restarts") == "1"


def test_cancelled_means_cancelled(cluster, jobs):
    cancelled = jobs["cancelled"]
    cancelled.listens()
    cluster.command("scancel", cancelled.job)
    cluster.wait_for_state(cancelled.job, "CANCELLED")
    wait_until(lambda: bool(cancelled.endings), 10, "the supervisor to record the ending")
    assert cancelled.endings == [("stopped", 4)]
    assert cluster.field(cancelled.job, "Restarts") == "0"


def test_a_run_whose_checkpoint_went_away_does_not_begin_again(cluster, jobs):
    gone = jobs["checkpoint gone"]
    gone.listens()
    cluster.command("scancel", "--signal=USR1", "--batch", gone.job)
    wait_until(lambda: bool(gone.endings), 10, "the ending")
    shutil.rmtree(gone.run / "checkpoints")
    cluster.wait_for_state(gone.job, "FAILED", "COMPLETED")
    assert cluster.field(gone.job, "ExitCode") == "2:0"
    assert "holds none; restore it" in gone.log


def test_a_node_that_fails_its_health_check_is_left_out(cluster, jobs):
    unhealthy = jobs["unhealthy"]
    cluster.wait_for_state(unhealthy.job, "COMPLETED", "FAILED")
    assert unhealthy.endings == [("unhealthy", None), ("done", 9)]
    assert cluster.field(unhealthy.job, "ExcNodeList") in ("n[2-3]", "n3,n2")
    assert history(unhealthy.run)[2]["nodes"] == "n[1,4]"
    assert "n2 is not healthy: 'test" in unhealthy.log


def test_bad_input_ends_the_job_at_once(cluster, jobs):
    cluster.wait_for_state(jobs["refused"].job, "FAILED", "COMPLETED")
    assert jobs["refused"].endings == [("refused", 0)]
    assert cluster.field(jobs["refused"].job, "ExitCode") == "2:0"


def test_a_run_that_dies_goes_on_and_one_that_dies_twice_at_the_same_pair_does_not(cluster, jobs):
    assert cluster.wait_for_state(jobs["dies twice"].job, "FAILED", "COMPLETED") == "FAILED"
    assert jobs["dies twice"].endings == [("died", 3), ("died", 5), ("died", 5)]
    assert "after pair 5, for the second time at the same place: not requeued" in jobs["dies twice"].log


def test_the_budget_of_retries_ends_a_job_that_dies_again_and_again(cluster, jobs):
    assert cluster.wait_for_state(jobs["dies often"].job, "FAILED", "COMPLETED") == "FAILED"
    assert jobs["dies often"].endings == [("died", 1), ("died", 2), ("died", 3)]
    assert "that was failure 3, and --retries is 2" in jobs["dies often"].log


def test_stops_without_progress_end_after_the_third(cluster, jobs):
    assert cluster.wait_for_state(jobs["stalls"].job, "FAILED", "COMPLETED") == "FAILED"
    assert jobs["stalls"].endings == [("stopped", 4)] * 3
    assert "raise the time limit" in jobs["stalls"].log


def test_tasks_of_an_array_are_requeued_alone(cluster, jobs, tmp_path):
    tree = jobs["refused"].run.parent / "tree"
    patterns, scripts = {"D4": "D=4", "D16-W2-I1": "D=16,W=2,I=1"}, ("3 1\n7 0", "7 0")
    (tmp_path / "patterns.txt").write_text("".join(f"{pattern}\n" for pattern in patterns.values()))
    for folder, script in zip(patterns, scripts, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "script").write_text(script)
    settings = {"MEGARAT_ROOT": str(tree), "MEGARAT_PYTHON": sys.executable, "MEGARAT_PATTERNS": str(tmp_path / "patterns.txt")}
    options = ("--parsable", "--array=0-1", f"--output={tmp_path}/%a.out", str(tree / "slurm/adapt.sbatch"))
    job = cluster.command("sbatch", *options, str(tmp_path), "config.yaml", "--from", "parent", env={**os.environ, **settings})
    after = cluster.command("sbatch", "--parsable", f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap=true")
    assert cluster.wait_for_state(after, "COMPLETED", "CANCELLED") == "COMPLETED"
    first, second = (Submitted(f"{job}_{task}", tmp_path / folder) for task, folder in enumerate(patterns))
    assert first.endings == [("died", 3), ("done", 7)] and second.endings == [("done", 7)]
    assert {line["job"] for line in history(first.run)} == {f"{job}_0"}


def test_slurms_own_signal_before_the_time_limit(cluster, jobs):
    limited = jobs["time limit"]
    assert cluster.wait_for_state(limited.job, "COMPLETED", "FAILED", "TIMEOUT", seconds=90) == "COMPLETED"
    assert [kind for kind, _ in limited.endings] == [
        "stopped",
        "done",
    ]  # Slurm may signal up to a minute early: the pair is not ours to say
    assert limited.endings[-1] == ("done", 8) and "SIGUSR1" in limited.log


def test_a_run_on_a_lost_node_goes_on_elsewhere(cluster, jobs):
    lost = jobs["node lost"]
    assert cluster.wait_for_state(lost.job, "COMPLETED", "FAILED", seconds=120) == "COMPLETED"
    assert lost.endings == [("lost", 4), ("done", 8)]
    assert [line["nodes"] for line in history(lost.run) if line["event"] == "start"] == ["n3", "n4"]
