"""Saving while training goes on: the same bytes, one copy at a time, failures that are told and cost nothing."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.checkpoint import background, load
from megarat.checkpoint.background import Moment, Saver
from megarat.checkpoint.manifest import CheckpointState
from megarat.config import CheckpointConfig, Config
from megarat.errors import StoppedEarly, ToldByFirstRank, UserError
from megarat.parallel import worlds
from megarat.parallel.fragments import Box, Fragments
from megarat.train import loop
from megarat.train.loop import pretrain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))


def run_config(run_dir: Path, shards: Path, pairs: int = 4, asynchronous: bool = True, **train) -> Config:
    return tiny_run.config(
        run={"dir": str(run_dir)},
        data={"shards": str(shards)},
        train={"pairs": pairs, "global_batch": 8, **train},
        checkpoint={"every": 1, "keep": 3, "asynchronous": asynchronous},
    )


def state(seed: int) -> dict[str, dict[str, Fragments]]:
    """What an engine holds: views into one piece of memory, as ZeRO's are."""
    generator = torch.Generator().manual_seed(seed)
    kinds = {}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        flat = torch.randn(40, generator=generator)
        kinds[kind] = {
            "a": Fragments((3, 5), torch.float32, (Box((0, 0), flat[:15].view(3, 5)),)),
            "b": Fragments((25,), torch.float32, (Box((0,), flat[15:20]), Box((5,), flat[20:]))),
        }
    return kinds


def moment(pair: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Moment:
    description = CheckpointState("pretrain", pair, 0, tiny_run.config(), "dense", "bf16")
    return Moment(description, state(seed), dtype)


def saver(folder: Path, asynchronous: bool = True) -> Saver:
    return Saver(folder, CheckpointConfig(asynchronous=asynchronous), CPU)


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.distcp"))}


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Saves begin to write only when it is open."""
    opened, save = threading.Event(), background.save

    def save_later(*arguments):
        assert opened.wait(60)
        return save(*arguments)

    monkeypatch.setattr(background, "save", save_later)
    yield opened
    opened.set()


def test_what_changes_after_the_copy_is_not_saved(mesh, tmp_path, gate):
    saving, given = saver(tmp_path), moment(1)
    kept = {kind: {name: held.map(torch.clone) for name, held in named.items()} for kind, named in given.state.items()}
    saving.begin(given)
    for named in given.state.values():
        for held in named.values():
            for _, box in held.boxes:
                box.fill_(7)
    given.description.pair = 99
    gate.set()
    assert saving.wait() == tmp_path / "pair_00000001"
    found = load.load_optimizer(tmp_path)
    for kind, named in kept.items():
        for name, held in named.items():
            assert torch.equal(found[kind][name].flatten(), torch.cat([box.flatten() for _, box in held.boxes]))
    assert load.load_state(tmp_path).pair == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_are_the_same_as_of_a_save_that_waits(mesh, tmp_path, dtype):
    for name, asynchronous in (("now", False), ("later", True)):
        saving = saver(tmp_path / name, asynchronous)
        saving.begin(moment(1, dtype=dtype))
        saving.wait()
    now, later = (tensor_files(tmp_path / name / "pair_00000001") for name in ("now", "later"))
    assert now == later and len(now) == (2 if dtype == torch.float32 else 3)


def test_a_second_save_waits_for_the_first_and_takes_its_place_on_the_host(mesh, tmp_path, gate):
    saving = saver(tmp_path)
    saving.begin(moment(1))
    second = threading.Thread(target=saving.begin, args=(moment(2, seed=1),))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not list(tmp_path.glob("pair_*"))
    gate.set()
    second.join(60)
    assert saving.wait() == tmp_path / "pair_00000002"
    for pair in (1, 2):
        load.verify(tmp_path / f"pair_{pair:08d}")
        expected = state(pair - 1)["exp_avg"]["a"].boxes[0].tensor
        assert torch.equal(load.load_optimizer(tmp_path / f"pair_{pair:08d}")["exp_avg"]["a"], expected)


def test_a_failed_save_is_known_raised_once_and_costs_no_checkpoint(mesh, tmp_path):
    saving = saver(tmp_path)
    saving.begin(moment(1))
    saving.wait()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        saving.begin(moment(2))
        saving.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert saving.failed
    with pytest.raises(UserError, match=r"cannot write .*pair_00000002: File too large"):
        saving.begin(moment(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "pair_00000001"]
    saving.begin(moment(3))
    assert saving.wait() == tmp_path / "pair_00000003"


def test_a_run_learns_of_a_failed_save_at_the_next_pair(mesh, monkeypatch, shards, tmp_path):
    save = background.save

    def failing(folder, snapshot, group):
        if snapshot.state.pair == 4:
            raise UserError("cannot write pair 4")
        return save(folder, snapshot, group)

    original, pairs = loop.train_pair, []

    def train_pair(engine, *rest):
        pairs.append(None)
        for thread in threading.enumerate():
            if thread.name == "megarat-saver":
                thread.join(60)  # a save ends, or fails, in the pair after it
        return original(engine, *rest)

    monkeypatch.setattr(background, "save", failing)
    monkeypatch.setattr(loop, "train_pair", train_pair)
    settings = run_config(tmp_path, shards, pairs=50)
    settings.checkpoint.every = 2
    with pytest.raises(UserError, match="cannot write pair 4"):
        pretrain(settings)
    assert len(pairs) in (4, 5)  # the next save, which would have told it, is after pair 6
    assert load.find_latest(tmp_path).name == "pair_00000002"
    load.verify(tmp_path)


def test_a_stop_waits_for_the_save_under_way_and_adds_its_own(mesh, monkeypatch, shards, tmp_path, gate):
    original, pairs = loop.train_pair, []

    def train_pair(engine, *rest):
        pairs.append(None)
        if len(pairs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not list((tmp_path / "checkpoints").glob("pair_*"))
            threading.Timer(0.2, gate.set).start()
        return original(engine, *rest)

    monkeypatch.setattr(loop, "train_pair", train_pair)
    with pytest.raises(StoppedEarly, match=r"stopped after pair 2 .*pair_00000002 is complete"):
        pretrain(run_config(tmp_path, shards, pairs=50))
    for pair in (1, 2):
        load.verify(tmp_path / "checkpoints" / f"pair_{pair:08d}")


def train(config: Config) -> str:
    try:
        return str(pretrain(config))
    except (UserError, StoppedEarly) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_on_many_ranks_the_files_are_the_same_as_of_saves_that_wait(shards, tmp_path):
    for name, asynchronous in (("now", False), ("later", True)):
        worlds.run(2, train, run_config(tmp_path / name, shards, 3, asynchronous, precision="bf16"))
    for pair in (1, 2, 3):
        now, later = (tensor_files(tmp_path / name / "checkpoints" / f"pair_{pair:08d}") for name in ("now", "later"))
        assert now == later and len(now) == 6


def train_with_a_failing_thread(config: Config, writes: int) -> str:
    """One of the threads that write rank 1's part of pair 2 finds its disk full after so many writes."""
    from megarat.checkpoint import storage

    write, begun = storage._HashingFile.write, []

    def full(self, data):
        if os.environ["RANK"] == "1" and "pair_00000002" in str(self._file.name) and "__1_1" in str(self._file.name):
            begun.append(data)
            if len(begun) > writes:
                raise OSError(28, "No space left on device")
        return write(self, data)

    storage._HashingFile.write = full
    storage._FILE_BYTES = 1000  # so that there are several threads
    return train(config)


@pytest.mark.parametrize("writes", [0, 1])  # within a record, as nearly always, torch complains of its place in the file instead
def test_an_error_in_any_writing_thread_of_any_rank_fails_the_save_on_all(shards, tmp_path, writes):
    ends = worlds.run(2, train_with_a_failing_thread, run_config(tmp_path, shards, 1000), writes)
    assert ends[0].startswith("UserError: cannot write") and "No space left on device" in ends[0]
    assert ends[1].startswith(ToldByFirstRank.__name__)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "pair_00000001"]
    load.verify(tmp_path)


def train_with_a_file_that_loses_its_end(config: Config, rank: str) -> str:
    """What this rank wrote of pair 2 is shorter when it is synced, as where a network's file system fails late."""
    from megarat.checkpoint import save as saving

    sync = saving.sync

    def lose(path):
        sync(path)
        if os.environ["RANK"] == rank and "pair_00000002" in str(path) and path.suffix == ".distcp":
            os.truncate(path, 10)

    saving.sync = lose
    return train(config)


@pytest.mark.parametrize(("rank", "asynchronous"), [("0", True), ("1", False)])
def test_a_file_that_lost_its_end_fails_the_save_on_all_ranks_with_the_same_words(shards, tmp_path, rank, asynchronous):
    settings = run_config(tmp_path, shards, 1000, asynchronous)
    first, second = worlds.run(2, train_with_a_file_that_loses_its_end, settings, rank, timeout_s=120)
    assert first.startswith("UserError: cannot write") and "bytes were written, but the file has 10" in first
    assert second == first.replace("UserError", ToldByFirstRank.__name__)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "pair_00000001"]
    load.verify(tmp_path)


def train_beside_a_checkpoint_that_stays(config: Config) -> str:
    """Pair 1's is a mount point, say."""
    rename = Path.rename

    def busy(self, target):
        if self.name == "pair_00000001":
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        return train(config)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_that_the_system_does_not_let_go_ends_all_ranks_with_the_same_words(shards, tmp_path, asynchronous):
    settings = run_config(tmp_path, shards, 1000, asynchronous)
    first, second = worlds.run(2, train_beside_a_checkpoint_that_stays, settings, timeout_s=120)
    assert re.match(r"UserError: cannot remove .*/pair_00000001: Device or resource busy\. All checkpoints are whole", first)
    assert second == first.replace("UserError", ToldByFirstRank.__name__)
    assert load.find_latest(tmp_path).name == "pair_00000004"
    load.verify(tmp_path)
