"""The mesh: which ranks there are, who talks to whom, and how the processes of a run find each other.

Ranks lie in a (pipeline, data, context, tensor) grid, the tensor coordinate fastest, so that the ranks which talk most are neighbours on
one host. Everything about coordinates is arithmetic on ``Shape``; ``check`` holds every rule about which grids are legal.

The launcher is recognised by the variables it sets: torchrun, Slurm's srun (one task a GPU), Open MPI, MPICH; without any of them this
is a single process. The five variables of ``torch.distributed`` are then set for everybody who reads them later. torch is imported only
where processes are joined: reading a config needs the rules, not torch.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import math
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from megarat.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megarat.config import Config

# ---- coordinates ----------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Ranks along each axis of the grid; as ``Coordinates``, a rank's place along each."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Ranks of the whole grid."""
        return math.prod(self)

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands; the last axis counts fastest."""
        places = []
        for length in reversed(self):
            rank, place = divmod(rank, length)
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, place: Coordinates) -> int:
        """The rank at ``place``."""
        rank = 0
        for length, coordinate in zip(self, place, strict=True):
            rank = rank * length + coordinate
        return rank

    def groups(self, axes: tuple[str, ...]) -> list[list[int]]:
        """Ranks that differ along ``axes`` only, in rank order: a partition of all ranks."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            place = self.coordinates(rank)
            key = tuple(coordinate for axis, coordinate in place._asdict().items() if axis not in axes)
            members.setdefault(key, []).append(rank)
        return list(members.values())

    def __str__(self) -> str:
        return ", ".join(f"{axis} {length}" for axis, length in reversed(self._asdict().items()))


class Coordinates(NamedTuple):
    """A rank's place along each axis."""

    pipeline: int = 0
    data: int = 0
    context: int = 0
    tensor: int = 0


# Replicas average gradients: ranks that hold the same weights and see other tokens. Model ranks hold parts of one set of weights.
TENSOR, PIPELINE, DATA, CONTEXT = ("tensor",), ("pipeline",), ("data",), ("context",)
REPLICAS, MODEL = ("data", "context"), ("pipeline", "tensor")
_WORLD = Shape._fields
ENDS = ("ends of the pipeline",)  # the first and the last stage, which both hold the embedding
_AXES = (TENSOR, PIPELINE, DATA, CONTEXT, REPLICAS, MODEL, _WORLD)


@dataclass(frozen=True)
class Mesh:
    """This process among all processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    shape: Shape = Shape()
    _groups: Mapping[tuple[str, ...], ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes logs and prints."""
        return self.rank == 0

    @property
    def place(self) -> Coordinates:
        """This rank's coordinates."""
        return self.shape.coordinates(self.rank)

    def group(self, axes: tuple[str, ...]) -> ProcessGroup:
        """The process group of the ranks that differ from this one along ``axes`` only (one of the named tuples of this module)."""
        return self._groups[axes]

    @property
    def world(self) -> ProcessGroup:
        """All ranks."""
        return self._groups[_WORLD]

    def describe(self) -> dict[str, int]:
        """What a checkpoint records about the mesh that wrote it."""
        return {"world_size": self.world_size, **dict(reversed(self.shape._asdict().items()))}


# ---- rules ----------------------------------------------------------------------------------------------------------------------


def check(config: Config, world_size: int | None = None, source: str = "config") -> Shape:
    """The shape of the grid that ``config`` asks for. Raises ``UserError`` with every reason against it and the nearest legal one.

    ``world_size`` is the number of processes; without it (a config is being read) any number of data ranks is taken for possible.
    """
    parallel = config.parallel
    fixed = parallel.tensor * parallel.pipeline * parallel.context
    shape = Shape(parallel.pipeline, 1, parallel.context, parallel.tensor)
    reasons = []
    if world_size is not None and world_size % fixed:
        reasons.append(
            f"{world_size} processes were started, not a multiple of tensor x pipeline x context = {parallel.tensor} x "
            f"{parallel.pipeline} x {parallel.context} = {fixed}"
        )
    elif world_size is not None:
        shape = shape._replace(data=world_size // fixed)
    reasons += _reasons_against(config, shape, parallel.zero)
    if reasons:
        raise UserError(f"{source}: {'; '.join(reasons)}. {_advice(config, shape, world_size)}")
    return shape


def _reasons_against(config: Config, shape: Shape, zero: int) -> list[str]:
    """Why this grid cannot train this model: one sentence each, empty when it can."""
    model, train, length = config.model, config.train, config.data.sequence_length
    step = train.micro_batch * shape.data
    local_length = length // shape.context
    rules = [
        (
            zero == 0,
            "parallel.zero is 0; use 1, 2 or 3 (stage 0 takes another optimizer in bf16 and clips with a wrong norm under pipelines)",
        ),
        (zero not in (0, 1, 2, 3), f"parallel.zero is {zero}; use 1, 2 or 3 (DeepSpeed has stages 1, 2 and 3)"),
        (
            model.heads % shape.tensor,
            f"parallel.tensor is {shape.tensor}, but model.heads = {model.heads} is not a multiple: ranks share whole heads",
        ),
        (
            model.ffn_multiple * model.hidden % shape.tensor,
            f"parallel.tensor is {shape.tensor}, but the FFN width {model.ffn_multiple * model.hidden} is not a multiple",
        ),
        (
            model.vocab % shape.tensor,
            f"parallel.tensor is {shape.tensor}, but model.vocab = {model.vocab} is not a multiple: ranks share the vocabulary evenly",
        ),
        (
            shape.pipeline > model.layers,
            f"parallel.pipeline is {shape.pipeline}, but model.layers is {model.layers}: every stage needs a layer",
        ),
        (
            shape.pipeline > 1 and zero in (2, 3),
            f"parallel.pipeline is {shape.pipeline} with parallel.zero {zero}: pipelines accumulate gradients over micro-batches, so they "
            "take ZeRO 1",
        ),
        (
            shape.pipeline > 1 and shape.context > 1,
            f"parallel.pipeline is {shape.pipeline} with parallel.context {shape.context}: context parallelism works without pipelines",
        ),
        (
            length % shape.context,
            f"parallel.context is {shape.context}, but data.sequence_length = {length} is not a multiple",
        ),
        (
            model.heads % (shape.context * shape.tensor),
            f"parallel.context x parallel.tensor is {shape.context} x {shape.tensor}, but model.heads = {model.heads} is not a multiple: "
            "attention over a shared sequence is split by heads",
        ),
        (
            shape.context > 1 and config.data.documents == "separate",
            f"parallel.context is {shape.context} with data.documents: separate; documents are kept apart on whole sequences only",
        ),
        (
            config.parallel.sequence and local_length % shape.tensor,
            f"parallel.sequence splits {local_length} tokens over parallel.tensor = {shape.tensor} ranks, which is not even",
        ),
        (
            train.global_batch % step,
            f"train.global_batch is {train.global_batch}, not a multiple of train.micro_batch x data ranks = {train.micro_batch} x "
            f"{shape.data} = {step}",
        ),
    ]
    return [reason for broken, reason in rules if broken]


def _advice(config: Config, wanted: Shape, world_size: int | None) -> str:
    """The nearest legal mesh, in words."""
    candidates = [
        (_distance(shape, wanted) + 0.1 * abs(zero - config.parallel.zero), shape, zero)
        for shape in _shapes(config, wanted, world_size)
        for zero in (1, 2, 3)
        if not _reasons_against(config, shape, zero)
    ]
    if not candidates:
        return f"No mesh of {world_size} processes fits this config; change train.global_batch or train.micro_batch"
    _, shape, zero = min(candidates)
    data = "" if world_size is None else f" (data {shape.data})"
    keys = " ".join(f"parallel.{axis}={getattr(shape, axis)}" for axis in ("tensor", "pipeline", "context"))
    return f"The nearest legal mesh: {keys} parallel.zero={zero}{data}"


def _shapes(config: Config, wanted: Shape, world_size: int | None) -> Iterator[Shape]:
    """Grids to consider: all of ``world_size`` ranks, or all up to twice the wanted size along each axis."""
    if world_size is not None:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        for pipeline, context, tensor in itertools.product(divisors, repeat=3):
            if world_size % (pipeline * context * tensor) == 0:
                yield Shape(pipeline, world_size // (pipeline * context * tensor), context, tensor)
        return
    axes = (_near(wanted.pipeline, config.model.layers), _near(wanted.context, 64), _near(wanted.tensor, config.model.heads))
    for pipeline, context, tensor in itertools.product(*axes):
        yield Shape(pipeline, 1, context, tensor)


def _near(length: int, most: int) -> range:
    return range(1, min(2 * length, most) + 1)


def _distance(shape: Shape, wanted: Shape) -> float:
    """How much larger or smaller, as factors, the axes that a user sets have become."""
    return sum(abs(math.log2(getattr(shape, axis) / getattr(wanted, axis))) for axis in ("tensor", "pipeline", "context"))


# ---- start-up -------------------------------------------------------------------------------------------------------------------

# Variables that hold (rank, number of processes, rank on this host), the innermost launcher first: mpirun starts its daemons through srun,
# which therefore leaves its own variables behind. A Slurm batch script itself has SLURM_PROCID but is no step; SLURM_STEP_NUM_TASKS exists
# in processes started by srun only.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
_FIRST_PORT, _PORTS = 20000, 12000  # below the ports that Linux gives to outgoing connections (32768 and up)
_TIMEOUT = timedelta(minutes=30)  # of a collective: the first step compiles kernels on every rank, at its own pace


class Process(NamedTuple):
    """This process as its launcher sees it."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def start(device: str = "auto", config: Config | None = None, tensor: int = 1) -> Mesh:
    """Join the processes of the run: this rank, its device (``auto``, ``cpu`` or ``cuda``) and its process groups.

    Without a config (inference) ``tensor`` ranks share a model and all others are data ranks. Raises ``UserError`` when the mesh is not
    legal, the launcher's variables contradict each other or there is no GPU to take: all before anything is started.
    """
    import torch

    if config is not None and config.train.deterministic:
        _allow_only_repeatable_kernels()
    process = identify(os.environ)
    shape = _replicas(process.world_size, tensor) if config is None else check(config, process.world_size)
    own_device = _device(device, process.local_rank)
    if not torch.distributed.is_initialized():
        os.environ.update(rendezvous(process, os.environ))
        torch.distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        atexit.register(_leave)
    return Mesh(process.rank, process.world_size, process.local_rank, own_device, shape, _process_groups(shape, process.rank))


def _allow_only_repeatable_kernels() -> None:
    """Those of torch; megarat's own have no atomics. cuBLAS reads its variable when CUDA starts."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a help for debugging that costs memory traffic


def _replicas(world_size: int, tensor: int) -> Shape:
    if world_size % tensor:
        raise UserError(
            f"--tensor {tensor}: {world_size} process{'es were' if world_size > 1 else ' was'} started, not a multiple; start with "
            f"torchrun --nproc_per_node {tensor} (or srun, mpirun)"
        )
    return Shape(data=world_size // tensor, tensor=tensor)


def identify(environment: Mapping[str, str]) -> Process:
    """Launcher, rank, number of processes and local rank, from environment variables. Raises ``UserError`` when they contradict."""
    found = [
        Process(launcher, *(int(environment[name]) for name in variables))
        for launcher, variables in _LAUNCHERS.items()
        if all(name in environment for name in variables)
    ]
    if not found:
        return Process("no launcher", 0, 1, 0)
    by_hand = found[0].launcher == "torchrun" and _TORCHRUN_ID not in environment
    if by_hand and len(found) > 1 and found[0][1:3] != found[1][1:3]:
        ours, theirs = found[0], found[1]
        raise UserError(
            f"RANK={ours.rank} and WORLD_SIZE={ours.world_size} are set, but {theirs.launcher} started this process as rank {theirs.rank} of "
            f"{theirs.world_size}; unset RANK, WORLD_SIZE and LOCAL_RANK (megarat finds them), or start with torchrun alone"
        )
    return found[1] if by_hand and len(found) > 1 else found[0]


def rendezvous(process: Process, environment: Mapping[str, str]) -> dict[str, str]:
    """The five variables of ``torch.distributed``: where rank 0 listens, as the launcher lets every rank know it."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if (
        process.world_size == 1 and _TORCHRUN_ID not in environment
    ):  # what is set may come from a parent process that still listens
        address, port = "127.0.0.1", str(_free_port())
    elif process.launcher in ("Open MPI", "MPICH"):
        address, port = _agree_through_mpi(process)
    elif process.launcher == "Slurm" and not (address and port):
        address, port = _first_host(environment), str(_port_of_job(environment))
    if not address or not port:
        raise UserError(
            f"WORLD_SIZE is {process.world_size}, but MASTER_ADDR and MASTER_PORT are not both set; start with torchrun, srun or mpirun"
        )
    names = {"RANK": process.rank, "WORLD_SIZE": process.world_size, "LOCAL_RANK": process.local_rank}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": address, "MASTER_PORT": port}


def _first_host(environment: Mapping[str, str]) -> str:
    """The first host of a Slurm list such as ``gpu[003-007,012],login1``: rank 0 runs there."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if hosts := environment.get(name):
            return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", hosts)[0])
    raise UserError("Slurm started this process, but SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set; export MASTER_ADDR")


def _port_of_job(environment: Mapping[str, str]) -> int:
    """A port that the ranks of a Slurm step agree on and other steps on the same host do not get."""
    job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST_PORT + (job * 101 + step) % _PORTS


def _agree_through_mpi(process: Process) -> tuple[str, str]:
    """Rank 0's address and a free port there, broadcast to all."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{process.launcher} started {process.world_size} processes, but mpi4py cannot be imported: {error}"
        ) from None
    world = MPI.COMM_WORLD
    if world.size != process.world_size:
        raise UserError(
            f"{process.launcher} started {process.world_size} processes, but mpi4py belongs to another MPI and sees {world.size}; install "
            "mpi4py for the MPI that mpirun comes from"
        )
    own = (socket.gethostname(), str(_free_port())) if world.rank == 0 else None
    hosts = set(world.allgather(socket.gethostname()))
    address, port = world.bcast(own)
    return ("127.0.0.1" if len(hosts) == 1 else address), port


def _device(device: str, local_rank: int) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU here; use run.device=auto or run.device=cpu")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank  # Slurm may show each task only its own GPU
    if index >= visible:
        raise UserError(f"local rank {local_rank} has no GPU: {visible} are visible; start one process a GPU")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def abandon() -> None:
    """This rank ends with an error, which its caller catches and tells: as it leaves, it does not wait for the others.

    They may be in a collective that it will never join. An error that nobody catches needs no such word.
    """
    global _abandoned
    _abandoned = True


_abandoned = False


def _leave() -> None:
    """Leave all groups before the interpreter ends.

    A Gloo group stops its threads when its last reference goes. One that is still held when the interpreter's own objects are taken apart
    now and then ends the process by SIGABRT ("terminate called without an active exception"), after all work has been done. NCCL closes a
    communicator once all its ranks do: one that failed would wait for those who wait for it in a collective, and the job would stand still.
    """
    import torch

    for groups in _known_groups.values():
        groups.clear()  # what every Mesh holds as well
    _known_groups.clear()
    gc.collect()
    if not torch.distributed.is_initialized():
        return
    failed = _abandoned or getattr(sys, "last_value", None) is not None  # Python's own note of an error that it has shown
    if failed and torch.distributed.get_backend() == "nccl":
        torch.distributed.distributed_c10d._abort_process_group()
    else:
        torch.distributed.destroy_process_group()


_known_groups: dict[Shape, dict[tuple[str, ...], Any]] = {}


def _process_groups(shape: Shape, rank: int) -> Mapping[tuple[str, ...], ProcessGroup]:
    """This rank's group along each set of axes; made once a shape, by all ranks in the same order."""
    if shape not in _known_groups:
        own: dict[tuple[str, ...], Any] = {}
        for axes in _AXES:
            for members in shape.groups(axes):
                group = _new_group(members, axes, len(members) == shape.size)
                if rank in members:
                    own[axes] = group
        own[ENDS] = _ends(shape, rank)
        _known_groups[shape] = own
    return _known_groups[shape]


def _new_group(members: list[int], axes: tuple[str, ...], is_world: bool) -> Any:
    """A process group of ``members``. The messages of tensor ranks travel beside matrix products: on GPUs they are scheduled first."""
    from torch import distributed

    options = None
    if axes == TENSOR and distributed.get_backend() == "nccl":
        options = distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = _TIMEOUT
    elif is_world:
        return distributed.group.WORLD
    return distributed.new_group(members, timeout=_TIMEOUT, pg_options=options)


def _ends(shape: Shape, rank: int) -> Any:
    """The group of the first and the last stage at this rank's other coordinates; None on the stages between."""
    own = None
    for stages in shape.groups(PIPELINE):
        group = _new_group([stages[0], stages[-1]], ENDS, False) if shape.pipeline > 1 else None
        if rank in (stages[0], stages[-1]):
            own = group
    return own


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
