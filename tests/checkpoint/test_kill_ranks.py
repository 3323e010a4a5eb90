"""kill -9 in the middle of a save of two ranks: at random file operations of one of them, of both, and right after the rename."""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import distributed

from megarat.checkpoint import load
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import Snapshot, remove_leftovers, save
from megarat.parallel import worlds
from megarat.parallel.fragments import Box, Fragments

RANKS, POINTS = 2, 60
CONFIG = tiny_run.config()
_FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")


def whole(pair: int) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint of that pair; those of two pairs share no value."""
    generator = torch.Generator().manual_seed(pair)
    return {name: torch.randn(6, 4, generator=generator) for name in ("a", "b", "c")}


def own_part(pair: int, rank: int) -> Snapshot:
    """Every second row of every tensor."""

    def part(tensor: torch.Tensor) -> Fragments:
        boxes = tuple(Box((row, 0), tensor[row : row + 1]) for row in range(rank, 6, RANKS))
        return Fragments((6, 4), torch.float32, boxes)

    held = {name: part(tensor) for name, tensor in whole(pair).items()}
    return Snapshot(CheckpointState("pretrain", pair, pair, CONFIG, "dense", "fp32"), held, moments={"exp_avg": held})


def one_rank(checkpoints: Path, pair: int, rank: int, meeting: Path, kill_at: int | None, record: Path | None) -> None:
    """The life of a rank: joins, saves, and kills itself at its ``kill_at``-th file operation. Does not return."""
    seen: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event in _FILE_OPERATIONS and str(checkpoints) in str(arguments[:2]):
            seen.append(" ".join(map(str, (event, *arguments[:2]))))
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what the surviving rank has to say)
        store = distributed.FileStore(str(meeting), RANKS)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
        sys.addaudithook(watch)
        save(checkpoints, own_part(pair, rank), distributed.group.WORLD)
        if record is not None:
            record.write_text("\n".join(seen))
    except BaseException:
        os._exit(1)
    os._exit(0)


def save_on_ranks(checkpoints: Path, pair: int, meeting: Path, kill_at: dict[int, int], record: bool = False) -> None:
    """Both ranks as children of this process; waits for their ends."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            one_rank(checkpoints, pair, rank, meeting, kill_at.get(rank), meeting.with_suffix(f".{rank}") if record else None)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def pair_of_newest(checkpoints: Path) -> int:
    """The newest checkpoint is whole and holds the tensors of its pair."""
    found = load.find_latest(checkpoints.parent)
    load.verify(found)
    pair = load.load_state(found).pair
    loaded = load.load_optimizer(found)
    for name, tensor in whole(pair).items():
        assert torch.equal(loaded["master"][name], tensor) and torch.equal(loaded["exp_avg"][name], tensor)
    return pair


def kill_at_many_points(folder: Path, points: int) -> tuple[list[int], int]:
    """The newest pair after each kill, always starting from a good pair 1; and how many kills fell between the rename and ``latest``."""
    try:
        return _kill_at_many_points(folder, points)
    except BaseException:
        raise AssertionError(traceback.format_exc()) from None


def _kill_at_many_points(folder: Path, points: int) -> tuple[list[int], int]:
    checkpoints = folder / "checkpoints"
    save_on_ranks(checkpoints, 1, folder / "meeting-first", {}, record=True)
    assert pair_of_newest(checkpoints) == 1
    events = [(folder / f"meeting-first.{rank}").read_text().splitlines() for rank in range(RANKS)]
    renamed = 1 + next(
        n for n, event in enumerate(events[0]) if event.startswith("os.rename") and event.endswith("pair_00000001")
    )
    generator, outcomes, between = random.Random(17), [], 0
    for point in range(points):
        victims = [[0], [1], [0, 1]][point % 3]
        kill_at = {rank: generator.randint(1, len(events[rank])) for rank in victims}
        if point % 10 == 0:
            kill_at = {0: renamed + 1}
            between += 1
        save_on_ranks(checkpoints, 2, folder / f"meeting-{point}", kill_at)
        outcomes.append(pair_of_newest(checkpoints))
        assert point % 10 or outcomes[-1] == 2, "renamed, though `latest` does not say so yet"
        remove_leftovers(checkpoints)
        assert not list(checkpoints.glob(".*"))
        if outcomes[-1] == 2:
            save_on_ranks(checkpoints, 3, folder / f"meeting-after-{point}", {})  # a run goes on from it
            assert pair_of_newest(checkpoints) == 3
            for pair in (2, 3):
                load.resolve(checkpoints / f"pair_{pair:08d}").rename(folder / f"away-{point}-{pair}")
            (checkpoints / "latest").write_text("pair_00000001\n")
    return outcomes, between


@pytest.mark.slow
def test_killed_at_random_points_of_a_save_ranks_leave_a_good_checkpoint(tmp_path):
    ((outcomes, between),) = worlds.run(1, kill_at_many_points, tmp_path, POINTS, timeout_s=1500)
    assert len(outcomes) == POINTS >= 50 and between >= 5
    assert {1, 2} == set(outcomes)
