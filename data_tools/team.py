"""The processes of one build: alone, or several under `mpirun` or `srun` through mpi4py. And the wish to stop, of any of them."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from megarat.errors import UserError

T = TypeVar("T")

# What tells a process that it was started with others: its number, and (their number, launcher).
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LAUNCHERS = (("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun"))


class Interrupted(Exception):
    """The build was asked to stop (Ctrl-C, SIGTERM, SIGUSR1); what is finished stays."""


class _StoppedByAnother(Exception):
    """Another rank failed or was interrupted; it has the reason."""


class Team:
    """This process among the `size` of a build; rank 0 talks and owns what is written once."""

    def __init__(self, communicator: Any = None):
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1
        self._stop_file: Path | None = None
        self._signalled = False

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        return self._communicator.allgather(value) if self._communicator else [value]  # type: ignore[no-any-return]

    def cores(self) -> int:
        """Cores for this process: those it may run on, shared out when all ranks of the host may run on the same."""
        own = os.sched_getaffinity(0)
        if self._communicator is None:
            return len(own)
        with_hosts = self.gather((os.uname().nodename, sorted(own)))
        return max(1, len(own) // with_hosts.count((os.uname().nodename, sorted(own))))

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; if it fails on one, all ranks end with the same error.

        Raises:
            UserError, Interrupted: of the first rank that has one.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            self.check()
            result = action()
        except (UserError, Interrupted, _StoppedByAnother) as caught:
            error = caught
            if self._stop_file is not None:
                with suppress(OSError):  # the error may be a full disk; without the file the others come to the end of their work
                    self._stop_file.touch()
        errors = [e for e in self.gather(error) if e is not None and not isinstance(e, _StoppedByAnother)]
        for kind in (UserError, Interrupted):
            if found := next((e for e in errors if isinstance(e, kind)), None):
                raise found
        if error is not None:
            raise Interrupted("stopped")
        return result  # type: ignore[return-value]

    def abort(self) -> None:
        """After an error that is nobody's input: ends the other ranks, which would wait for this one for ever."""
        if self.size > 1:
            traceback.print_exc()
            self._communicator.Abort(1)

    def watch(self, stop_file: Path) -> None:
        """From now on `check` also looks for a file, on the file system the ranks share, that stops all of them."""
        self._stop_file = stop_file

    def check(self) -> None:
        """Raises if this process was signalled or another rank has stopped. Called between pieces of work."""
        if self._signalled:
            raise Interrupted("interrupted")
        if self.size > 1 and self._stop_file is not None and self._stop_file.exists():
            raise _StoppedByAnother

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turns SIGINT, SIGTERM and SIGUSR1 (of Slurm, before a time limit) into a wish that `check` sees; a second has its usual effect."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

        def note(number: int, frame: object) -> None:
            self._signalled = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank the launcher gave this process, known before MPI is: the first is the one to print."""
    return next((int(environment[name]) for name in _RANKS if name in environment), 0)


def find_team(environment: Mapping[str, str] = os.environ) -> Team:
    """The team that the launcher made, or this process alone.

    Raises:
        UserError: several processes were started, but mpi4py is missing or does not find the others.
    """
    launcher, size = next(((launcher, int(environment[name])) for name, launcher in _LAUNCHERS if name in environment), ("", 1))
    if size == 1:
        return Team()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{launcher} started {size} processes, but MPI is not usable here ({error}): pip install mpi4py mpich"
        ) from None
    if MPI.COMM_WORLD.Get_size() != size:
        raise UserError(
            f"{launcher} started {size} processes, but MPI sees {MPI.COMM_WORLD.Get_size()}: the launcher and mpi4py's MPI library"
            " do not fit together (with srun, try --mpi=pmix or --mpi=pmi2)"
        )
    return Team(MPI.COMM_WORLD)
