"""Worlds of processes: they meet, they return, and whatever goes wrong in one ends them all with its trace."""

from __future__ import annotations

import os
import time

import pytest
import torch

from megarat import mesh
from megarat.parallel import worlds
from megarat.parallel.worlds import WorldFailed


def add_ranks() -> tuple[int, float]:
    here = mesh.start("cpu")
    total = torch.full((), float(here.rank + 1))
    torch.distributed.all_reduce(total)
    return here.rank, total.item()


def fail_on_rank_one() -> None:
    here = mesh.start("cpu")
    if here.rank == 1:
        raise ValueError("planted")
    torch.distributed.all_reduce(torch.zeros(()))


def die_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        os._exit(9)
    mesh.start("cpu")


def stall_on_rank_one() -> None:
    here = mesh.start("cpu", None)
    if here.rank == 1:
        time.sleep(600)
    torch.distributed.all_reduce(torch.zeros(()))


def test_ranks_find_each_other_and_return_in_order():
    assert worlds.run(3, add_ranks) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def test_a_rank_that_raises_ends_the_world_with_its_trace():
    with pytest.raises(WorldFailed, match=r"(?s)rank 1: .*ValueError: planted"):
        worlds.run(2, fail_on_rank_one)


def test_a_rank_that_dies_is_named():
    with pytest.raises(WorldFailed, match="rank 0: died without a word"):
        worlds.run(2, die_on_rank_zero)


def test_a_rank_that_hangs_is_ended_in_time():
    began = time.monotonic()
    with pytest.raises(WorldFailed, match="rank 1: did not end in time"):
        worlds.run(2, stall_on_rank_one, timeout_s=5.0)
    assert time.monotonic() - began < 60
