"""Which nodes try with which, who is to blame, and what follows from an ending: arithmetic that needs no Slurm."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarat import config

sys.path.append(str(Path(__file__).resolve().parents[2] / "slurm"))
from collective import rounds
from history import DIED, DONE, HUNG, LOST, STOPPED, UNHEALTHY, Ending, History, decide, progress
from job import culprits
from submit import ROOT, Refused, notice


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8, 33])
def test_each_node_tries_once_with_each_neighbour_on_the_ring_and_both_in_the_same_round(nodes):
    schedule = [list(rounds(node, nodes)) for node in range(nodes)]
    assert all(len(own) == 4 and own[0] == [node] for node, own in enumerate(schedule))
    met = set()
    for number in range(1, 4):
        for node in range(nodes):
            if (edge := schedule[node][number]) is not None:
                first, second = edge
                assert node in edge and schedule[first][number] == schedule[second][number]
                met.add((number, first, second))
    ring = {tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes)} if nodes > 1 else set()
    assert sorted((first, second) for _, first, second in met) == sorted(ring)


def reports(
    hosts: list[str], alone: set[str] = frozenset(), links: set[str] = frozenset(), silent: set[str] = frozenset()
) -> list[dict]:
    """What nodes report when ``alone`` cannot even do it alone, ``links`` cannot with others, ``silent`` say nothing."""
    told = []
    for node, host in enumerate(hosts):
        for others in rounds(node, len(hosts)):
            if others is not None and host not in silent:
                names = {hosts[other] for other in others}
                failed = bool(names & (alone | silent)) or (len(names) > 1 and bool(names & links))
                partner = next(iter(names - {host}), host)
                told.append({"node": host, "with": partner, "failed": "timeout" if failed else ""})
    return told


@pytest.mark.parametrize("fault", ["alone", "links", "silent"])
@pytest.mark.parametrize("nodes", [3, 4, 7])
def test_the_node_that_fails_is_named_and_its_neighbours_are_not(fault, nodes):
    hosts = [f"n{number}" for number in range(1, nodes + 1)]
    assert list(culprits(reports(hosts, **{fault: {"n2"}}), hosts)) == ["n2"]


def test_of_two_nodes_that_fail_only_with_each_other_both_are_named():
    assert set(culprits(reports(["n1", "n2"], links={"n2"}), ["n1", "n2"])) == {"n1", "n2"}
    assert culprits(reports(["n1", "n2"]), ["n1", "n2"]) == {}


@pytest.mark.parametrize(
    ("ending", "earlier", "code", "requeued"),
    [
        (Ending(DONE, 9), [], 0, False),
        (Ending(STOPPED, 4, 75), [], 75, True),
        (Ending(STOPPED, 4, 75), [Ending(STOPPED, 4), Ending(STOPPED, 4)], 1, False),
        (Ending(STOPPED, 5, 75), [Ending(STOPPED, 4), Ending(STOPPED, 4)], 75, True),
        (Ending(DIED, 4, 1), [Ending(DIED, 3)], 75, True),
        (Ending(HUNG, 4), [Ending(DIED, 4)], 1, False),
        (Ending(DIED, 4, 1), [Ending(DIED, 4), Ending(STOPPED, 4)], 75, True),
        (Ending(UNHEALTHY, 4), [Ending(UNHEALTHY, 4)], 75, True),
        (Ending(LOST, 4), [Ending(DIED, 1), Ending(DIED, 2)], 1, False),  # the third failure, of two
    ],
)
def test_what_follows_from_an_ending(ending, earlier, code, requeued):
    assert decide(ending, earlier, retries=2)[:2] == (code, requeued)


def test_a_start_without_an_ending_was_lost(tmp_path):
    history = History(tmp_path, "7", 0)
    history.record("start", pair=None)
    history.record("end", kind=DIED, pair=3, code=1)
    history.record("start", pair=3)
    assert history.open_start()
    history.record("start", pair=5)
    assert history.endings() == [Ending(DIED, 3, 1), Ending(LOST, 5)]
    assert History(tmp_path, "8", 0).endings() == []


def test_progress_is_the_last_whole_line_or_the_files_of_an_evaluation_or_a_build(tmp_path):
    run, out, build = (tmp_path / name for name in ("run", "scores", "corpus-build"))
    for folder in (run, out / "work/a", build, tmp_path / ".corpus.partial/parts"):
        folder.mkdir(parents=True)
    assert progress(run) is None
    (run / "metrics.jsonl").write_text('{"pair": 3}\n{"pair": 4}\n{"pa')
    (out / "work/a/item-1.json").write_text("{}")
    (tmp_path / ".corpus.partial/parts/1").write_text("")
    assert (progress(run), progress(out), progress(build)) == (4, 1, 2)


def test_progress_counts_pairs_that_are_saved_but_not_recorded(tmp_path):
    """As with log.every = 100: three stops of 60 pairs each, behind the first record, are no standstill."""
    (tmp_path / "metrics.jsonl").write_text('{"pair": 100}\n')
    endings = []
    for pair in (120, 150, 180):
        (tmp_path / f"checkpoints/pair_{pair:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints/.staging-pair_00000190-7").mkdir(exist_ok=True)
        endings.append(Ending(STOPPED, progress(tmp_path), 75))
    assert [ending.pair for ending in endings] == [120, 150, 180]
    assert decide(endings[-1], endings[:-1], retries=5).requeue
    (tmp_path / "metrics.jsonl").write_text('{"pair": 200}\n')
    assert progress(tmp_path) == 200


@pytest.mark.parametrize(
    ("limit", "checkpoint_bytes", "asynchronous", "seconds"),
    [
        ("24:00:00", 20e9, True, 300),  # the usual notice is longer than what is needed
        ("24:00:00", 900e9, False, 2 * 100 + 900),
        ("24:00:00", 900e9, True, 2 * 100 + 2 * 900),  # one save may just have begun; the stop waits for it, then writes its own
        ("0", 900e9, True, 2 * 100 + 2 * 900),  # no limit, for sbatch
        ("20", 20e9, True, 300),
    ],
)
def test_the_notice_before_the_limit_is_long_enough_for_a_stop(limit, checkpoint_bytes, asynchronous, seconds):
    plan = {"pair_seconds": 100, "checkpoint_bytes": checkpoint_bytes, "config": {"checkpoint": {"asynchronous": asynchronous}}}
    assert notice(argparse.Namespace(notice=None, time=limit), plan) == f"B:USR1@{seconds}"


def test_a_limit_that_a_stop_does_not_fit_into_is_refused():
    plan = {"pair_seconds": 100, "checkpoint_bytes": 900e9, "config": {"checkpoint": {"asynchronous": False}}}
    with pytest.raises(Refused, match="--time 15: two pairs and a checkpoint alone take 1100 s"):
        notice(argparse.Namespace(notice=None, time="15"), plan)


@pytest.mark.parametrize("script", ["pretrain", "adapt"])
def test_a_job_names_its_folder_to_the_run_whatever_characters_it_has(tmp_path, script):
    folder = str(tmp_path / """it's "one": {x} \\ $(false) #2""")
    shown = tmp_path / "python"
    shown.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    shown.chmod(0o755)
    settings = os.environ | {"MEGARAT_ROOT": str(ROOT), "MEGARAT_PYTHON": str(shown)}
    done = subprocess.run(
        ["bash", ROOT / f"slurm/{script}.sbatch", folder, "x.yaml"], env=settings, capture_output=True, check=True
    )
    arguments = done.stdout.decode().split("\0")[:-1]
    (tmp_path / "x.yaml").write_text("data: {shards: x}")
    assert config.load(tmp_path / "x.yaml", (arguments[arguments.index("--set") + 1],)).run.dir == folder
    assert arguments[arguments.index("--run-dir") + 1] == folder
