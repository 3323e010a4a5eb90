"""What happens to a run folder between and beside starts: clocks that jump, two jobs at once, damage in what many ranks wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.errors import EXIT_BAD_INPUT, EXIT_STOPPED, ToldByFirstRank, UserError
from megarat.parallel import worlds
from megarat.train import loop
from megarat.train.loop import pretrain


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))


def config(run_dir: Path, shards: Path, pairs: int = 4, **changes) -> Config:
    train = {"pairs": pairs, "global_batch": 8, **changes.pop("train", {})}
    sections = {"optim": {"schedule": "constant", "warmup": 0}, "checkpoint": {"every": 1, "keep": 2}, **changes}
    return tiny_run.config(run={"dir": str(run_dir)}, data={"shards": str(shards)}, train=train, **sections)


def train(settings: Config) -> str:
    try:
        return str(pretrain(settings))
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def test_a_clock_that_jumps_changes_nothing(mesh, shards, tmp_path, monkeypatch):
    """Neither which checkpoint is the newest, nor which are kept, nor when a wall-clock limit is over."""
    original, now = loop.train_pair, time.time

    def jump(*arguments):
        years = next(jumps)
        monkeypatch.setattr(time, "time", lambda: now() + years * 365 * 86400)
        return original(*arguments)

    jumps = iter([20, -30, 5, -30, 0, 20])
    monkeypatch.setattr(loop, "train_pair", jump)
    settings = config(tmp_path / "run", shards, 3, train={"wall_clock_minutes": 100.0})
    assert pretrain(settings).name == "pair_00000003"
    folder = tmp_path / "run" / "checkpoints"
    for age, path in enumerate(sorted(folder.rglob("*"), reverse=True)):  # the newest pair has the oldest files
        os.utime(path, (1e9 - age, 1e9 - age))
    settings.train.pairs = 6
    pretrain(settings)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "pair_00000005", "pair_00000006"]
    monkeypatch.undo()
    pretrain(config(tmp_path / "whole", shards, 6))
    ours, theirs = (checkpoints.load_optimizer(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(ours[kind][name], tensor) for kind, named in theirs.items() for name, tensor in named.items())


def test_of_two_jobs_on_one_folder_one_trains_and_the_other_is_refused(shards, tmp_path):
    file, metrics = tmp_path / "run.yaml", tmp_path / "run" / "metrics.jsonl"
    file.write_text(config(tmp_path / "run", shards, 100_000, checkpoint={"every": 100_000}).to_yaml())
    command = [sys.executable, "-c", "import sys; from megarat.cli import main; sys.exit(main())", "pretrain", str(file)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alone | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    wait_for(lambda: any(job.poll() is not None for job in jobs))
    refused, trains = sorted(jobs, key=lambda job: job.poll() is None)
    wait_for(lambda: trains.poll() is not None or (metrics.exists() and metrics.read_text().endswith("}\n")))
    trains.send_signal(signal.SIGTERM)
    told = [job.communicate(timeout=300)[1] for job in (refused, trains)]
    assert [refused.returncode, trains.returncode] == [EXIT_BAD_INPUT, EXIT_STOPPED], told
    assert "is in use by process" in told[0]
    assert checkpoints.load_state(tmp_path / "run").pair == len(metrics.read_text().splitlines())
    checkpoints.verify(tmp_path / "run")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "file"),
    [(flip, "optimizer/__1_0.distcp"), (truncate, "weights/__0_0.distcp"), (Path.unlink, "weights/__1_0.distcp")],
    ids=["flipped bit", "truncated", "missing"],
)
def test_damage_in_what_one_rank_wrote_is_told_by_name_on_any_mesh(shards, tmp_path, damage, file):
    worlds.run(2, train, config(tmp_path, shards, 2))
    newest = tmp_path / "checkpoints" / "pair_00000002"
    damage(newest / file)
    with pytest.raises(UserError, match=file):
        checkpoints.verify(newest)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    for size, parallel in ((2, {"zero": 1}), (2, {"tensor": 2}), (1, {})):
        ends = worlds.run(size, train, config(tmp_path, shards, 4, parallel=parallel))
        assert ends[0].startswith("UserError: ") and "damaged checkpoint" in ends[0] and file in ends[0]
        assert all(end.startswith((ToldByFirstRank.__name__, "UserError")) for end in ends[1:])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before  # nothing started again
    newest.rename(tmp_path / "damaged")  # as the message says
    (tmp_path / "checkpoints" / "latest").write_text("pair_00000001\n")
    assert worlds.run(1, train, config(tmp_path, shards, 2))[0].endswith("pair_00000002")


def train_on_a_full_disk(settings: Config, step: str) -> str:
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, full)
        return train(settings)


@pytest.mark.parametrize(
    "step", ["megarat.train.guard.json.dump", "megarat.train.loop.record_start", "megarat.log.drop_later_lines"]
)
def test_a_disk_that_is_full_when_a_run_starts_ends_all_ranks_with_the_same_words(shards, tmp_path, step):
    """Before the first pair it is the first rank that writes; the others wait for it."""
    first, second = worlds.run(2, train_on_a_full_disk, config(tmp_path, shards), step, timeout_s=120)
    assert first.startswith(f"UserError: cannot write {tmp_path}: No space left on device")
    assert second == first.replace("UserError", ToldByFirstRank.__name__)
