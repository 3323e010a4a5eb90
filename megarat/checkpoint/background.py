"""Saving while training goes on: the state is copied to the host, and a thread writes the copy.

On a GPU the copy goes into pinned memory on the stream of training, so that the next update cannot overtake it; the host does not wait for
it. There is room for one copy: a second save waits for the first. The ranks' threads talk over a process group of their own, since those of
training are in use at the same time. What is written is the same, byte for byte, as without a thread.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarat import comm
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import Snapshot, prune, save
from megarat.checkpoint.shards import Cast
from megarat.config import CheckpointConfig
from megarat.errors import ToldByFirstRank, UserError
from megarat.parallel.fragments import Box, Fragments

State = Mapping[str, Mapping[str, Fragments]]  # kind -> logical name -> this rank's part

_TIMEOUT = timedelta(hours=2)  # for the slowest rank's disk
_PORTABLE = 1  # cudaHostRegister: pinned for every CUDA context of the process


@dataclass
class Moment:
    """What a run hands over to be saved: ``state`` of its engine, and all that is not a tensor."""

    description: CheckpointState
    state: State  # the masters as "master", the rest are moments
    dtype: torch.dtype  # of the model's weights
    tokenizer: Path | None = None
    protected: int | None = None  # a pair whose checkpoint is not to be removed

    def snapshot(self) -> Snapshot:
        """The content of the checkpoint."""
        moments = dict(self.state)
        masters = moments.pop("master")
        if self.dtype == torch.float32:
            return Snapshot(self.description, masters, moments=moments, tokenizer=self.tokenizer)
        weights = {name: Cast(held, self.dtype) for name, held in masters.items()}
        return Snapshot(self.description, weights, masters, moments, self.tokenizer)


class Saver:
    """Writes the checkpoints of one run, one at a time; all ranks call every method at the same pairs."""

    def __init__(self, folder: Path, settings: CheckpointConfig, device: torch.device) -> None:
        self._folder, self._settings, self._device = folder, settings, device
        self._group = _own_group()
        self._host: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._saved: Path | None = None
        self._error: BaseException | None = None

    def prepare(self, state: State) -> None:
        """Find room for the copies of ``state``, which takes seconds where memory is pinned, while the first pairs are trained."""
        if self._settings.asynchronous:
            self._start(lambda: self._find_room(state))

    def begin(self, moment: Moment) -> None:
        """Save ``moment``; with ``checkpoint.asynchronous`` it is free to change when this returns.

        Waits for the save before this one, and raises what that one raised.
        """
        self.wait()
        if not self._settings.asynchronous:
            self._write(moment)
            return
        self._find_room(moment.state)
        assert self._host is not None
        copied = Moment(
            copy.deepcopy(moment.description), self._host.take(moment.state), moment.dtype, moment.tokenizer, moment.protected
        )
        arrived = _event(self._device)

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            self._write(copied)

        self._start(write)

    def wait(self) -> Path | None:
        """The last checkpoint that was written, once it is, on all ranks.

        Raises what its writing raised, ``UserError`` when the disk refused; where only another rank failed, ``ToldByFirstRank``.
        """
        self.join()
        error, self._error = self._error, None
        errors = [told for told in comm.gather_objects(None if error is None else str(error), self._group) if told is not None]
        if error is not None:
            raise error
        if errors:
            raise ToldByFirstRank(errors[0])
        return self._saved

    def go_back_to(self, folder: Path) -> None:
        """``folder`` is the last checkpoint now; nothing is being written."""
        self._saved = folder

    def join(self) -> None:
        """Let the thread come to its end, whatever that is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that did not end well, which ``wait`` would raise."""
        return self._error is not None

    def _find_room(self, state: State) -> None:
        if self._host is None:
            self._host = HostCopy(state, self._device)

    def _write(self, moment: Moment) -> None:
        self._saved = save(self._folder, moment.snapshot(), self._group)
        keep, keep_every = self._settings.keep, self._settings.keep_every
        comm.first_decides(lambda: prune(self._folder, keep, keep_every, moment.protected), self._group)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # for ``wait``, on the thread of training
                self._error = error

        self._thread = threading.Thread(target=run, name="megarat-saver", daemon=True)
        self._thread.start()


class HostCopy:
    """Memory of the host for one copy of ``state``: allocated, and pinned for a GPU, once for all saves of a run."""

    def __init__(self, state: State, device: torch.device) -> None:
        """Raises ``UserError`` when the memory cannot be pinned."""
        total = sum(box.tensor.nbytes for held in _all(state) for box in held.boxes)
        self._buffer = torch.empty(total, dtype=torch.uint8)
        self._pinned = device.type == "cuda" and total > 0
        if self._pinned:
            torch.cuda.set_device(device)  # this may be a new thread, whose device would be the first one
            _register(self._buffer)
            weakref.finalize(self, _unregister, self._buffer)

    def take(self, state: State) -> State:
        """A copy of ``state``, good until the next one is taken. On a GPU it arrives when the current stream gets there."""
        memory, used = memoryview(self._buffer.numpy()), 0  # type: ignore[arg-type]
        taken: dict[str, dict[str, Fragments]] = {}
        for kind, named in state.items():
            taken[kind] = {}
            for name, held in named.items():
                boxes = []
                for offset, tensor in held.boxes:
                    place = _place(memory[used : used + tensor.nbytes], tensor)
                    place.copy_(tensor, non_blocking=self._pinned)
                    boxes.append(Box(offset, place))
                    used += tensor.nbytes
                taken[kind][name] = Fragments(held.whole, held.dtype, tuple(boxes), held.written_here)
        return taken


def _all(state: State) -> list[Fragments]:
    return [held for named in state.values() for held in named.values()]


def _place(memory: memoryview, like: Tensor) -> Tensor:
    """A tensor over exactly these bytes: of a view of a larger storage torch would make a copy before it writes it."""
    if like.numel() == 0:
        return torch.empty_like(like, device="cpu")
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def _register(buffer: Tensor) -> None:
    """Pin memory as it is; torch's own allocator would round it up to a power of two."""
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        raise UserError(
            f"checkpoint.asynchronous: {buffer.nbytes / 1e9:.1f} GB of host memory cannot be pinned ({error}); set it to false, which "
            "saves without a copy"
        )


def _unregister(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # type: ignore[no-untyped-call]


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Marks this point of the current stream; None where copies are done when they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@functools.cache
def _own_group() -> ProcessGroup | None:
    """All ranks, over gloo, for nobody but the savers' threads; None for a single process."""
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
