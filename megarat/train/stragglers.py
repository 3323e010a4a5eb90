"""Which rank is slower than the others.

The ranks wait for each other all the time, so a pair takes all of them the same time. What a rank does alone differs: its first forward
through its own layers, and its wait for data. Both are timed once in a while, gathered, and compared with the median rank. Ranks that
share layers or sequences wait for each other within that forward: of these a slow one is named together with its neighbours.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from megarat import comm
from megarat.mesh import Mesh

SLOW = 1.5  # times the median rank
_NOTICEABLE = 0.1  # of a pair's time, below which waiting for data is nobody's concern


class OwnTime(NamedTuple):
    """What one rank took in one pair, in seconds."""

    rank: int
    host: str
    forward: float
    data_wait: float


class ForwardTimer:
    """Times the first forward through ``blocks`` after ``begin``."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._blocks, self._on_gpu = blocks, device.type == "cuda"
        self._marks: list[Any] = []

    @contextlib.contextmanager
    def timing(self) -> Iterator[ForwardTimer]:
        """For the length of the block the layers are watched."""
        self._marks = []
        hooks = [
            self._blocks[0].register_forward_pre_hook(lambda *_: self._mark(0)),
            self._blocks[-1].register_forward_hook(lambda *_: self._mark(1)),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def seconds(self) -> float:
        """The time of that forward; 0 when there was none."""
        if len(self._marks) < 2:
            return 0.0
        begin, end = self._marks
        if not self._on_gpu:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _mark(self, number: int) -> None:
        if len(self._marks) != number:  # a later micro-batch, or a layer that is computed once more for the backward
            return
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        if torch.cuda.is_current_stream_capturing():  # nothing runs yet, and nobody can wait for an event of a graph
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


class Stragglers:
    """Looks for slow ranks in every ``every``-th pair (0: never). All ranks call it for every pair."""

    def __init__(self, blocks: Sequence[nn.Module], mesh: Mesh, every: int) -> None:
        self._timer, self._mesh = ForwardTimer(blocks, mesh.device), mesh
        self._every = every if mesh.world_size > 1 else 0

    def watching(self, pair: int) -> contextlib.AbstractContextManager[object]:
        """To be held while pair number ``pair`` (from 1) is trained."""
        return self._timer.timing() if self._due(pair) else contextlib.nullcontext()

    def report(self, pair: int, data_wait: float, seconds: float, tell: Callable[[str], None]) -> None:
        """Let the first rank ``tell`` which ranks were slow in that pair, which took ``seconds``."""
        if not self._due(pair):
            return
        own = OwnTime(self._mesh.rank, socket.gethostname(), self._timer.seconds(), data_wait)
        times = comm.gather_objects(own, self._mesh.world)
        if self._mesh.is_first:
            for line in slow_ranks(times, seconds):
                tell(line)

    def _due(self, pair: int) -> bool:
        return self._every > 0 and pair % self._every == 0


def slow_ranks(times: Sequence[OwnTime], pair_seconds: float) -> list[str]:
    """One line for each rank that is slower than the median one by a factor of ``SLOW``."""
    lines = []
    forward, wait = (statistics.median_low(column) for column in zip(*(time[2:] for time in times), strict=True))
    for time_ in times:
        where = f"rank {time_.rank} on {time_.host}"
        if time_.forward > SLOW * forward:
            lines.append(f"{where}: {time_.forward:.3g} s for its layers, the median rank {forward:.3g} s")
        if time_.data_wait > max(SLOW * wait, _NOTICEABLE * pair_seconds):
            lines.append(f"{where}: {time_.data_wait:.3g} s of waiting for data, the median rank {wait:.3g} s")
    return lines
