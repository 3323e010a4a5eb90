"""Real training on a real Slurm, submitted by slurm/submit.py: stopped, killed, refused, and whole lives in one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_run
from cluster import history, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarat.config import Config
from megarat.status import read

SUBMIT = Path(__file__).resolve().parents[2] / "slurm/submit.py"
TIMINGS = ("tokens_per_s", "memory_gb", "data_wait_s", "seconds")
PAIRS = 200
PATIENCE = 240  # seconds; a busy machine takes a minute to import what training needs on several ranks at once
PATTERNS = {"dense": "dense", "D=4,W=0,I=0": "D4-W0-I0", "D=4,W=3,I=2": "D4-W3-I2"}  # pattern -> its run folder


class Runs(NamedTuple):
    """Folders and jobs of everything that is submitted at the start of the module."""

    base: Path
    stopped: str  # job of the run that is stopped and killed, on two nodes
    whole: str  # of the same run without that
    chain: dict[str, str]  # job ids by kind


def tiny(base: Path, run: str, **changes) -> Config:
    train = {"pairs": PAIRS, **changes.pop("train", {})}
    return tiny_run.config(run={"dir": str(base / run)}, data={"shards": str(base / "shards")}, train=train, **changes)


def pairs_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def submit(cluster, base: Path, *arguments: str, check: bool = True) -> str:
    """Standard output and error of submit.py."""
    command = [sys.executable, str(SUBMIT), *arguments, "--time=30:00"]
    environment = {**os.environ, **cluster.environment, "MEGARAT_RANK_WAIT": "30"}
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def job_in(printed: str, name: str) -> str:
    return printed.split(f"{name}: job ")[1].split(",")[0]


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Runs:
    base = tmp_path_factory.mktemp("life")
    tiny_run.write_shards(base / "shards")
    tiny_run.write_shards(base / "held-out", seed=1)
    (base / "held-out/train").rename(base / "shards/validation")
    for run in ("stopped", "whole"):
        settings = tiny(base, run, checkpoint={"every": 20}, log={"tensorboard": True})
        (base / f"{run}.yaml").write_text(settings.to_yaml())
    short = {"train": {"pairs": 4}}
    (base / "pretrain.yaml").write_text(tiny(base, "pretrain", **short).to_yaml())
    (base / "adapt.yaml").write_text(tiny(base, "adapted", **short).to_yaml())
    stopped, whole = (
        job_in(submit(cluster, base, "pretrain", f"{run}.yaml", "--nodes=2"), f"pretrain-{run}") for run in ("stopped", "whole")
    )
    patterns = [option for pattern in PATTERNS for option in ("--pattern", pattern)]
    printed = submit(cluster, base, "pretrain", "pretrain.yaml", "--chain", "adapt.yaml", *patterns)
    names = ("pretrain-pretrain", "adapt-adapted", "eval-adapted", "report-adapted")
    return Runs(base, stopped, whole, {name.partition("-")[0]: job_in(printed, name) for name in names})


def test_stopped_and_killed_a_run_goes_on_exactly_and_a_second_one_is_refused(cluster, runs, monkeypatch):
    run = runs.base / "stopped"
    wait_until((run / "lock").exists, PATIENCE, "the run to begin")
    second = job_in(submit(cluster, runs.base, "pretrain", "stopped.yaml"), "pretrain-stopped")
    wait_until(lambda: recorded(run) > 30, PATIENCE, "30 pairs")
    os.kill(holder(run), signal.SIGSTOP)  # the run waits until the second one has met it
    cluster.wait_for_state(second, "FAILED", "COMPLETED", seconds=PATIENCE)
    os.kill(holder(run), signal.SIGCONT)
    assert cluster.field(second, "ExitCode") == "2:0" and cluster.field(second, "Restarts") == "0"
    log = next((run / "slurm").glob(f"*-{second}.out")).read_text()
    assert "is in use by process" in log and "not requeued" in log

    cluster.command("scancel", "--signal=USR1", "--batch", runs.stopped)
    wait_until(lambda: len(endings(run, runs.stopped)) == 1, PATIENCE, "the run to stop")
    stopped_at = endings(run, runs.stopped)[0][1]
    wait_until(lambda: recorded(run) > stopped_at + 30, PATIENCE, "30 more pairs")
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    status = read(run)
    assert status.restarts >= 1 and status.pairs == PAIRS and status.checkpoint
    assert status.jobs[runs.stopped].startswith("RUNNING on n[1-2], ") and "of its limit left" in status.jobs[runs.stopped]
    os.kill(second_rank(run), signal.SIGKILL)
    for job in (runs.stopped, runs.whole):
        cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=PATIENCE)
    assert [kind for kind, _ in endings(run, runs.stopped)] == ["stopped", "died", "done"]

    assert endings(runs.base / "whole", runs.whole) == [("done", PAIRS)]
    assert pairs_of(run) == pairs_of(runs.base / "whole")  # every loss, norm and hash of the stream, bit for bit


def test_tensorboard_has_each_step_once(runs):
    events = EventAccumulator(str(runs.base / "stopped/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/dense")] == list(range(1, PAIRS + 1))


def test_one_command_ends_in_a_report_of_all_patterns(cluster, runs):
    cluster.wait_for_state(runs.chain["report"], "COMPLETED", "FAILED", seconds=PATIENCE)
    report = (runs.base / "adapted/report.md").read_text()
    for pattern in PATTERNS:
        assert f"| {pattern} | 4 |" in report
    for folder in PATTERNS.values():
        results = json.loads((runs.base / f"adapted/{folder}/eval/results.json").read_text())
        assert f"{results['tasks']['ppl'][0]['loss']:.4f}" in report
    parent = json.loads(next((runs.base / "adapted/D4-W0-I0/checkpoints").glob("pair_*/state.json")).read_text())["parent"]
    assert parent["path"].startswith(str(runs.base / "pretrain/checkpoints"))


def test_what_a_submission_leaves_in_the_run_folder(runs):
    folder = next(path for path in (runs.base / "pretrain/slurm").iterdir() if path.is_dir())
    assert (folder / "code/megarat/train/loop.py").exists() and (folder / "code/slurm/env.sh").exists()
    assert "pairs: 4" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "submission.json").read_text())["command"][1] == "pretrain"


def test_a_run_that_cannot_be_is_not_submitted(cluster, runs):
    printed = submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--nodes=3", check=False)
    assert printed.startswith("submit: error:") and "train.global_batch is 4" in printed
    printed = submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--set", "train.pears=3", check=False)
    assert "did you mean train.pairs?" in printed
    assert "sbatch: " in submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--sbatch=--partition=none", check=False)


def holder(run: Path) -> int:
    """The process that holds the run's lock: its first rank."""
    return int(json.loads((run / "lock").read_text())["pid"])


def second_rank(run: Path) -> int:
    """The process of rank 1."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has just ended, or is nobody's business
            continue
        if b"SLURM_PROCID=1" in environment and f'run.dir="{run}"'.encode() in arguments:
            return int(process.name)
    raise AssertionError(f"{run} has no second rank")


def endings(run: Path, job: str) -> list[tuple[str, int]]:
    return [(line["kind"], line["pair"]) for line in history(run) if line["event"] == "end" and line["job"] == job]
