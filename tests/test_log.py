"""What a run records, over interruptions: read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarat.log import EVENTS, METRICS, RunLog

SETTINGS = tiny_run.config(train={"pairs": 10**6}, checkpoint={"every": 5}, log={"tensorboard": True})

# Records pairs as fast as it can until it is killed; the loss of a pair says which start recorded it.
ENDLESS = """
import sys, yaml
from pathlib import Path
from megarat.config import from_dict
from megarat.log import RunLog
run, first, mark = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with RunLog(run, from_dict(yaml.safe_load(sys.stdin.read())), first) as log:
    for pair in range(first + 1, 10**6):
        log.pair({"pair": pair, "loss_sparse": None, "loss_dense": mark, "tokens_per_s": 1.0, "skipped": False})
"""


def record(run: Path, first: int, last: int, loss: float = 1.0) -> None:
    """One start that records the pairs after ``first`` up to ``last``."""
    run.mkdir(exist_ok=True)
    with RunLog(run, SETTINGS, first) as log:
        for pair in range(first + 1, last + 1):
            log.pair({"pair": pair, "loss_sparse": loss + 1, "loss_dense": loss, "tokens_per_s": 1.0, "skipped": False})


def curve(run: Path, tag: str = "loss/dense") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_start_replaces_what_was_recorded_beyond_its_checkpoint(tmp_path):
    record(tmp_path, 0, 8, loss=1.0)
    record(tmp_path, 5, 12, loss=2.0)
    record(tmp_path, 12, 13, loss=3.0)
    assert curve(tmp_path) == [*((pair, 1.0) for pair in range(1, 6)), *((pair, 2.0) for pair in range(6, 13)), (13, 3.0)]
    assert curve(tmp_path, "loss/sparse") == [(pair, loss + 1) for pair, loss in curve(tmp_path)]
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == [Path(EVENTS).name]


@pytest.mark.parametrize("name", [METRICS, EVENTS])
def test_a_record_that_the_disk_takes_in_part_is_an_error_and_written_again(tmp_path, name):
    """A limit on file sizes stands for a disk with 20 bytes left; what came behind half a record would be lost with it."""
    record(tmp_path, 0, 3)
    settings = tiny_run.config(train={"pairs": 10**6}, log={"tensorboard": name == EVENTS})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, settings, 3) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / name).stat().st_size + 20, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                log.pair({"pair": 4, "loss_sparse": 1.0, "loss_dense": 1.0, "tokens_per_s": 1.0, "skipped": False})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record(tmp_path, 3, 5)
    assert [json.loads(line)["pair"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert [pair for pair, _ in curve(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_record_torn_at_any_byte_is_written_again(tmp_path):
    record(tmp_path, 0, 3)
    whole = (tmp_path / EVENTS).read_bytes()
    expected = curve(tmp_path)
    for end in range(0, len(whole), 7):
        (tmp_path / EVENTS).write_bytes(whole[:end])
        record(tmp_path, 3, 3)
        assert curve(tmp_path) == expected


def test_a_record_that_the_disk_lost_is_filled_in_from_the_metrics(tmp_path):
    record(tmp_path, 0, 4)
    size = (tmp_path / EVENTS).stat().st_size
    with (tmp_path / EVENTS).open("r+b") as file:
        file.seek(size - 20)
        file.write(bytes(20))  # what a file system leaves of blocks that it had not written when the power failed
    record(tmp_path, 4, 6, loss=2.0)
    assert curve(tmp_path) == [*((pair, 1.0) for pair in range(1, 5)), (5, 2.0), (6, 2.0)]


@pytest.fixture
def on_the_disk(monkeypatch):
    """What a power cut leaves of a file: as much as there was at its last fsync, nothing where there was none."""
    sizes, fsync = {}, os.fsync

    def note(descriptor):
        fsync(descriptor)
        sizes[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", note)
    return lambda path: path.read_bytes()[: sizes.get(path.stat().st_ino, 0)]


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_what_a_checkpoint_makes_final_is_on_the_disk_whichever_pairs_are_recorded(tmp_path, on_the_disk, every):
    settings = tiny_run.config(train={"pairs": 100}, checkpoint={"every": 5}, log={"every": every})

    def recorded_for_good() -> list[int]:
        return [json.loads(line)["pair"] for line in on_the_disk(tmp_path / METRICS).splitlines()]

    with RunLog(tmp_path, settings, 0) as log:
        for pair in range(1, 13):
            log.pair({"pair": pair, "loss_sparse": None, "loss_dense": 4.0, "tokens_per_s": 1.0})
    assert recorded_for_good() == [pair for pair in range(1, 11) if pair % every == 0]
    with RunLog(tmp_path, settings, 10):
        assert recorded_for_good() == [pair for pair in range(1, 11) if pair % every == 0]


def test_a_run_whose_curves_are_switched_on_later_has_all_of_them(tmp_path):
    with RunLog(tmp_path, tiny_run.config(), 0) as log:
        log.pair({"pair": 1, "loss_sparse": None, "loss_dense": 4.0, "tokens_per_s": 1.0})
    record(tmp_path, 1, 2)
    assert curve(tmp_path) == [(1, 4.0), (2, 1.0)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_each_step_is_there_once(tmp_path, number):
    """Three starts, each killed while it records; each goes on from the last multiple of five, as from a checkpoint."""
    first = 0
    for start in range(3):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path, str(first), str(start)], stdin=subprocess.PIPE)
        process.stdin.write(SETTINGS.to_yaml().encode())
        process.stdin.close()
        while recorded(tmp_path) < first + 40:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == -number
        checkpoint = recorded(tmp_path) // 5 * 5
        if start < 2:
            first = checkpoint
    record(tmp_path, checkpoint, checkpoint + 1, loss=9.0)
    steps, losses = zip(*curve(tmp_path), strict=True)
    assert steps == tuple(range(1, checkpoint + 2))
    assert set(losses) == {0.0, 1.0, 2.0, 9.0} and list(losses) == sorted(losses)
    lines = [json.loads(line)["pair"] for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == list(steps)


def recorded(run: Path) -> int:
    """The last pair whose line is whole."""
    path = run / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["pair"] if lines else 0
