"""What `megarat status` says of a run folder, while a run writes to it and afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from megarat.cli import main
from megarat.status import describe, duration, read


def write_lines(path: Path, lines: list[dict], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 10 pairs that has done 6 of 2 s each, was started twice, and is writing its next line."""
    (tmp_path / "config.yaml").write_text(tiny_run.config(run={"dir": str(tmp_path)}).to_yaml())
    metrics = [
        {"pair": pair, "tokens": 64 * pair, "loss_sparse": 4.5, "loss_dense": 4.25, "tokens_per_s": 32.0, "seconds": 2.0}
        for pair in range(1, 7)
    ]
    write_lines(tmp_path / "metrics.jsonl", metrics, torn='{"pair": 7, "tok')
    write_lines(
        tmp_path / "slurm/history.jsonl",
        [
            {"event": "start", "job": "5", "restart": 0},
            {"event": "end", "job": "5", "restart": 0, "kind": "stopped", "pair": 4},
            {"event": "start", "job": "5", "restart": 1},
        ],
    )
    (tmp_path / "checkpoints/pair_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/.staging-pair_00000006").mkdir()
    return tmp_path


def test_numbers_of_a_run(run):
    status = read(run)
    assert (status.pair, status.pairs, status.seconds_left, status.restarts) == (6, 10, 8.0, 1)
    assert status.checkpoint == "pair_00000004" and status.health == []


def test_a_config_of_other_code_is_no_hindrance(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("train:\n", "train:\n  a_key_of_tomorrow: 3\n"))
    assert "a_key_of_tomorrow" in config.read_text() and read(run).pairs == 10


def test_printed(run, capsys):
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    for line in (
        "pair        6 of 10",
        "tokens      384",
        "loss        sparse 4.5000, dense 4.2500",
        "tokens/s    32",
        "time left   8 s",
    ):
        assert line in printed
    assert "restarts    1" in printed and "checkpoint  pair_00000004" in printed


def test_a_jump_of_the_loss_skipped_pairs_and_a_bad_end_are_told(run):
    lines = [{"pair": pair, "tokens": 1, "loss_dense": 4.0, "skipped": pair == 3} for pair in range(1, 6)]
    write_lines(run / "metrics.jsonl", [*lines, {"pair": 6, "tokens": 1, "loss_dense": 7.0}])
    with (run / "slurm/history.jsonl").open("a") as file:
        file.write(json.dumps({"event": "end", "job": "5", "kind": "died", "pair": 6, "why": "died with exit code 1"}) + "\n")
    health = read(run).health
    assert "pairs skipped for values that are not finite or for spikes: 3" in health
    assert "the loss has jumped to 7.000 (recent median 4.000)" in health
    assert "the last start died with exit code 1" in health


@pytest.mark.parametrize(("every", "silent_s", "told"), [(1, 1200, True), (50, 1200, False), (50, 2400, True)])
def test_a_run_that_records_some_pairs_only_is_silent_for_longer(run, monkeypatch, every, silent_s, told):
    """A pair takes 30 s: with log.every = 50 there are 25 minutes between two lines, and nothing is wrong."""
    lines = [{"pair": every * number, "seconds": 30.0, "tokens": 1} for number in range(1, 7)]
    write_lines(run / "metrics.jsonl", lines)
    os.utime(run / "metrics.jsonl", (time.time() - silent_s,) * 2)
    monkeypatch.setattr("megarat.status._queue", lambda jobs: {"5": "RUNNING on n1"})
    assert any("no pair for" in note for note in read(run).health) == told


def test_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "slurm").mkdir()
    assert "none yet" in describe(read(tmp_path))


def test_no_run_folder(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_folder_of_several_runs_shows_each_and_what_is_no_run_comes_last(run, tmp_path, capsys):
    together, other = tmp_path / "adapted", tmp_path / "other"
    for name in ("D4", "D16"):
        (together / name).mkdir(parents=True)
        (together / name / "config.yaml").write_text((run / "config.yaml").read_text())
        write_lines(together / name / "metrics.jsonl", [{"pair": int(name[1:]), "tokens": 1}])
    write_lines(together / "slurm/history.jsonl", [{"event": "submitted", "job": "9"}])
    other.mkdir()
    assert main(["status", str(other), str(together)]) == 2
    printed = capsys.readouterr()
    paragraphs = printed.out.split("\n\n")
    assert [paragraph.partition("\n")[0] for paragraph in paragraphs] == [str(together / name) for name in ("", "D16", "D4")]
    assert "pair        16 of 10" in paragraphs[1] and "pair " not in paragraphs[0] and str(other) in printed.err


def test_an_evaluation_is_counted_in_pieces_of_work(tmp_path):
    write_lines(tmp_path / "work/ppl/1.json", [{}])
    write_lines(tmp_path / "work/ppl/2.json", [{}])
    write_lines(tmp_path / "slurm/history.jsonl", [{"event": "start", "job": "9"}])
    printed = describe(read(tmp_path))
    assert "pieces      2 of" in printed and "pair" not in printed


def test_neither_torch_nor_numpy_is_imported(run):
    code = f"import sys\nfrom megarat.cli import main\nmain(['status', {str(run)!r}])\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_durations():
    assert [duration(s) for s in (41, 125, 7500, 273600)] == ["41 s", "2 min 05 s", "2 h 05 min", "3 d 4 h"]
