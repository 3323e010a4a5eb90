"""Whatever happens during a save, the last good checkpoint stays and nothing half-written looks like one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_checkpoint import CONFIG, snapshot

from megarat.checkpoint import load, storage
from megarat.checkpoint import save as saving
from megarat.checkpoint.save import remove_leftovers, save
from megarat.errors import UserError


def assert_good(checkpoints: Path, pairs: set[int]) -> int:
    """The newest checkpoint is one of ``pairs``, whole, and holds the tensors of that pair; returns the pair."""
    found = load.resolve(checkpoints)
    load.verify(found)
    pair = load.load_state(found).pair
    assert pair in pairs
    expected = snapshot(pair, seed=pair).masters
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load.load_weights(found).items())
    return pair


def save_killed_at(checkpoints: Path, pair: int, event: int) -> bool:
    """Save in a child that kills itself with SIGKILL at its ``event``-th file operation; False when the save has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(name: str, arguments: tuple) -> None:
            nonlocal count
            if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        save(checkpoints, snapshot(pair, seed=pair))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_any_file_operation_of_a_save_leaves_a_good_checkpoint(tmp_path):
    torch.set_num_threads(1)  # the child is forked
    save(tmp_path, snapshot(1, seed=1))
    outcomes = []
    event = 1
    while save_killed_at(tmp_path, 2, event):
        outcomes.append(assert_good(tmp_path, {1, 2}))
        remove_leftovers(tmp_path)
        assert not list(tmp_path.glob(".staging-*"))
        if outcomes[-1] == 2:  # committed before the kill: take it away again for the next round
            saving._discard(tmp_path / "pair_00000002")
            (tmp_path / "latest").write_text("pair_00000001\n")
        event += 1
    assert len(outcomes) >= 20
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}  # the rename is the one moment of change
    assert assert_good(tmp_path, {2}) == 2


def test_what_a_killed_import_of_the_same_process_number_left_is_no_hindrance(tmp_path):
    """A container gives every command the same number; nobody clears up beside a folder that is no run's."""

    def import_it() -> Path:
        told = {"step": 1, "pattern": "dense"}
        weights = dict(snapshot(1).masters)
        return saving.save_imported(tmp_path / "out", CONFIG.model, weights, source=tmp_path / "old.pth", told=told)

    left = tmp_path / f".staging-out-{os.getpid()}"
    (left / "weights").mkdir(parents=True)
    (left / "weights" / "__7_0.distcp").write_bytes(b"half of it")
    assert "good; 3 files" in load.verify(import_it())  # state.json, one file of tensors, .metadata
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write_tensors", "write_manifest", "sync"])
def test_an_error_in_the_middle_of_a_save_removes_what_it_wrote(tmp_path, monkeypatch, error, step):
    save(tmp_path, snapshot(1, seed=1))

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(saving, step, fail)
        expected = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as raised:
            save(tmp_path, snapshot(2, seed=2))
    if expected is UserError:
        assert "No space left on device" in str(raised.value) and "pair_00000002" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "pair_00000001"]
    assert assert_good(tmp_path, {1}) == 1
    save(tmp_path, snapshot(2, seed=2))
    assert assert_good(tmp_path, {2}) == 2


@pytest.mark.parametrize("limit", [100, 5_000, 20_000, 50_000])
def test_a_disk_that_refuses_to_take_more_is_reported_and_costs_nothing(tmp_path, limit):
    """A limit on file sizes stands for a full disk; torch turns it into errors of its own."""
    save(tmp_path, snapshot(1, seed=1))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*pair_00000002: File too large. Earlier checkpoints are untouched"):
            save(tmp_path, snapshot(2, seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "pair_00000001"]
    assert assert_good(tmp_path, {1}) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # torch's threads
@pytest.mark.parametrize("part", ["weights", "masters", "optimizer"])
def test_a_file_that_a_thread_may_not_make_fails_the_save(tmp_path, monkeypatch, part):
    """torch drops what its threads raise; the checkpoint would be committed, and be found good, without that file's tensors."""
    save(tmp_path, snapshot(1, seed=1))
    opening, refused = Path.open, threading.Event()

    def no_inode(self, *arguments, **keywords):
        if self.parent.name == part and self.suffix == ".distcp":
            if threading.current_thread() is not threading.main_thread():
                refused.set()
                raise OSError(122, "Disk quota exceeded")
            assert refused.wait(60)  # so that another thread takes a file
        return opening(self, *arguments, **keywords)

    monkeypatch.setattr(storage, "_FILE_BYTES", 1000)  # so that there are several threads
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_inode)
        with pytest.raises(
            UserError, match=r"cannot write .*pair_00000002: Disk quota exceeded. Earlier checkpoints are untouched"
        ):
            save(tmp_path, snapshot(2, seed=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "pair_00000001"]
    save(tmp_path, snapshot(2, seed=2))
    assert assert_good(tmp_path, {2}) == 2


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system with room for one checkpoint, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk):
    save(small_disk, snapshot(1, seed=1))
    with pytest.raises(UserError, match="No space left on device"):
        save(small_disk, snapshot(2, seed=2))
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "pair_00000001"]
    assert assert_good(small_disk, {1}) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot write .*checkpoints/pair_00000001"):
        save(tmp_path / "checkpoints", snapshot(1))
