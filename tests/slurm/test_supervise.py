"""How a job ends and what follows, on a real Slurm with a stand-in for megarat that ends as a test tells it to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from cluster import CUT, PATIENCE, alive, history, parent, wait_until
from standin import APPTAINER, CHARLIECLOUD, ENROOT, IMAGE_MARK, Submitted


def test_signals_stop_every_rank_and_the_job_goes_on_in_its_queue(cluster, jobs):
    for how, ranks in (("USR1", 4), ("TERM", 1)):
        jobs[how].waits(ranks)
        cluster.command("scancel", f"--signal={how}", "--batch", jobs[how].job)
    for how in ("USR1", "TERM"):
        cluster.wait_for_state(jobs[how].job, "COMPLETED", "FAILED")
        assert jobs[how].endings == [("stopped", 4), ("done", 8)]
        assert cluster.field(jobs[how].job, "Restarts") == "1"


def test_preempted_by_a_job_of_higher_priority(cluster, jobs):
    low = jobs["preempted"]
    low.waits()
    cluster.command("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait_for_state(low.job, "COMPLETED", "FAILED")
    assert low.endings == [("stopped", 4), ("done", 8)]
    assert cluster.field(low.job, "Restarts") == "1"


def test_cancelled_means_cancelled(cluster, jobs):
    cancelled = jobs["cancelled"]
    cancelled.waits()
    cluster.command("scancel", cancelled.job)
    cluster.wait_for_state(cancelled.job, "CANCELLED")
    wait_until(lambda: cancelled.endings, PATIENCE, "the supervisor to record the ending")
    assert cancelled.endings == [("stopped", 4)]
    assert cluster.field(cancelled.job, "Restarts") == "0"


def test_a_run_on_a_lost_node_goes_on_elsewhere(cluster, jobs):
    lost = jobs["node lost"]
    lost.waits()
    cluster.lose_node("n3")
    assert cluster.wait_for_state(lost.job, "COMPLETED", "FAILED") == "COMPLETED"
    assert lost.endings == [("lost", 4), ("done", 8)]
    assert [line["nodes"] for line in history(lost.run) if line["event"] == "start"] == ["n3", "n6"]


def test_a_run_whose_checkpoint_went_away_does_not_begin_again(cluster, jobs):
    gone = jobs["checkpoint gone"]
    gone.waits()
    cluster.command("scancel", "--signal=USR1", "--batch", gone.job)
    wait_until(lambda: gone.endings, PATIENCE, "the ending")
    shutil.rmtree(gone.run / "checkpoints")
    cluster.wait_for_state(gone.job, "FAILED", "COMPLETED")
    assert cluster.field(gone.job, "ExitCode") == "2:0"
    assert "left the checkpoint pair_00000004" in gone.log and "holds none; restore it" in gone.log


@pytest.mark.slow
def test_a_rank_whose_step_daemon_is_killed_does_not_live_on_and_the_job_goes_on(cluster, jobs):
    """Its srun learns nothing of that: the rank ends by itself, and the job by the silence of the others."""
    run = jobs["step daemon killed"]
    run.waits(ranks=2)
    rank = int((run.run / "listening-1").read_text())
    os.kill(parent(rank), signal.SIGKILL)
    wait_until(lambda: not alive(rank), PATIENCE, "the rank to end")
    cluster.wait_for_state(run.job, "COMPLETED", "FAILED")
    assert run.endings == [("hung", 4), ("done", 8)]


def test_a_script_whose_step_daemon_is_killed_ends_its_ranks_and_is_requeued(cluster, jobs):
    run = jobs["script's daemon killed"]
    run.waits()
    os.kill(cluster.script_daemon(run.job), signal.SIGKILL)
    wait_until(lambda: cluster.field(run.job, "Restarts") == "1", PATIENCE, "the job to be requeued")
    cluster.wait_for_state(run.job, "COMPLETED", "FAILED")
    assert run.endings == [("died", 4), ("done", 8)]
    assert "the step daemon of this script has died" in run.log


def test_ranks_that_hang_say_where_and_are_killed_and_the_job_goes_on(cluster, jobs):
    cluster.wait_for_state(jobs["hangs"].job, "COMPLETED", "FAILED")
    assert jobs["hangs"].endings == [("hung", 4), ("done", 8)]
    assert "most recent call first" in jobs["hangs"].log and "no sign of life for" in jobs["hangs"].log


def test_a_node_that_fails_its_health_check_is_left_out(cluster, jobs):
    unhealthy = jobs["unhealthy"]
    cluster.wait_for_state(unhealthy.job, "COMPLETED", "FAILED")
    assert unhealthy.endings == [("unhealthy", None), ("done", 9)]
    assert cluster.field(unhealthy.job, "ExcNodeList") == "n2"
    assert [line["nodes"] for line in history(unhealthy.run) if line["event"] == "start"] == ["n[1-2]", "n[1,6]"]
    assert "n2 is not healthy: 'test" in unhealthy.log


def test_a_check_that_no_node_could_run_accuses_none(cluster, jobs):
    """An image that is not there, say: leaving out all nodes would let the job wait for ever."""
    run = jobs["no image"]
    assert cluster.wait_for_state(run.job, "FAILED", "COMPLETED") == "FAILED"
    assert run.endings == [("unhealthy", None)] * 2
    assert "came back from none of them" in run.log and "--retries is 1: not requeued" in run.log
    assert cluster.field(run.job, "ExcNodeList") == "(null)"


def test_a_node_that_others_cannot_reach_is_found_and_left_out(cluster, jobs):
    """The job asks for all nodes of its partition, so it waits from then on."""
    cut = jobs["cut off"]
    wait_until(lambda: cut.endings, PATIENCE, "the nodes to be checked")
    assert cut.endings == [("unhealthy", None)]
    assert list(next(line for line in history(cut.run) if line["event"] == "start")["unhealthy"]) == [CUT]
    wait_until(lambda: cluster.field(cut.job, "ExcNodeList") == CUT, PATIENCE, "the node to be left out")
    cluster.command("scancel", cut.job)


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


def test_an_image_runs_the_health_check_and_every_rank_with_its_binds(cluster, jobs):
    for name, image in {"apptainer": APPTAINER, "enroot": ENROOT}.items():
        cluster.wait_for_state(jobs[name].job, "COMPLETED", "FAILED")
        assert jobs[name].endings == [("done", 9)]
        calls = [json.loads(line) for line in (jobs[name].run / "images").read_text().splitlines()]
        assert len(calls) == 2 and all(call[: len(image)] == image for call in calls)
    scripts = [call[len(APPTAINER) :] for call in map(json.loads, (jobs["apptainer"].run / "images").read_text().splitlines())]
    assert [(python, script.rpartition("/")[2]) for python, script, *_ in scripts] == [
        (sys.executable, "health.py"),
        (sys.executable, "launch.py"),
    ]


def test_a_job_lives_in_a_real_image(cluster, jobs):
    if "image" not in jobs:
        pytest.skip(f"no {CHARLIECLOUD} here; apt-get install --no-install-recommends charliecloud")
    image = jobs["image"]
    image.waits(ranks=2)
    for rank in (0, 1):
        pid = (image.run / f"listening-{rank}").read_text()
        assert Path(f"/proc/{pid}/root/{IMAGE_MARK}").exists()
    cluster.command("scancel", "--signal=USR1", "--batch", image.job)
    cluster.wait_for_state(image.job, "COMPLETED", "FAILED")
    assert image.endings == [("stopped", 4), ("done", 8)]


def test_tasks_of_an_array_are_requeued_alone(cluster, jobs, tmp_path):
    tree = jobs["refused"].run.parent / "tree"
    patterns, scripts = {"D4": "D=4", "D16-W2-I1": "D=16,W=2,I=1"}, ("3 1\n7 0", "7 0")
    (tmp_path / "patterns.txt").write_text("".join(f"{pattern}\n" for pattern in patterns.values()))
    for folder, script in zip(patterns, scripts, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "script").write_text(script)
    settings = {
        "MEGARAT_ROOT": str(tree),
        "MEGARAT_PYTHON": sys.executable,
        "MEGARAT_PATTERNS": str(tmp_path / "patterns.txt"),
        "MEGARAT_HEALTH": "off",
    }
    options = ("--parsable", "--array=0-1", f"--output={tmp_path}/%a.out", str(tree / "slurm/adapt.sbatch"))
    job = cluster.command("sbatch", *options, str(tmp_path), "config.yaml", "--from", "parent", changes=settings)
    after = cluster.command("sbatch", "--parsable", f"--dependency=afterok:{job}", "--output=/dev/null", "--wrap=true")
    assert cluster.wait_for_state(after, "COMPLETED", "CANCELLED") == "COMPLETED"
    first, second = (Submitted(f"{job}_{task}", tmp_path / folder) for task, folder in enumerate(patterns))
    assert first.endings == [("died", 3), ("done", 7)] and second.endings == [("done", 7)]
    assert {line["job"] for line in history(first.run)} == {f"{job}_0"}


def test_slurms_own_signal_before_the_time_limit(cluster, jobs):
    """Slurm signals at a moment of its own choosing, up to a minute early: at which pair, and whether once more, is not ours to say."""
    limited = jobs["time limit"]
    assert cluster.wait_for_state(limited.job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED"
    kinds = [kind for kind, _ in limited.endings]
    assert kinds[0] == "stopped" and set(kinds[:-1]) == {"stopped"} and limited.endings[-1] == ("done", 8)
    assert "SIGUSR1" in limited.log


def test_a_job_that_ends_while_the_controller_is_away_is_requeued_when_it_is_back(cluster, jobs):
    away = jobs["controller away"]
    away.waits()
    with cluster.without_controller():
        os.kill(int((away.run / "listening-0").read_text()), signal.SIGKILL)
        wait_until(lambda: away.endings, PATIENCE, "the supervisor to record the ending")
        time.sleep(5)  # in which it asks the controller for the first time
    cluster.wait_for_state(away.job, "COMPLETED", "FAILED")
    assert away.endings == [("died", 4), ("done", 8)]
