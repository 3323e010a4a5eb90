"""Start-up: which process am I, and which device is mine.

The launcher is recognised by the variables it sets: torchrun, Slurm's srun, Open MPI, MPICH; without any of them this is a single
process. The five variables of ``torch.distributed`` are then set for everybody who reads them later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megarat.errors import UserError

# Variables that hold (rank, number of processes, rank on this host). A Slurm batch script itself has SLURM_PROCID but is no
# step; SLURM_STEP_NUM_TASKS exists in processes started by srun only.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class Mesh:
    """This process among all processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes logs and prints."""
        return self.rank == 0

    def describe(self) -> dict[str, int]:
        """What a checkpoint records about the mesh that wrote it."""
        return {"world_size": self.world_size, "tensor": 1, "pipeline": 1, "context": 1, "data": self.world_size}


def start(device: str = "auto") -> Mesh:
    """Find this process' rank and device (``auto``, ``cpu`` or ``cuda``) and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Raises ``UserError`` when several processes were launched (this version trains on one) or when there is no GPU to take.
    """
    launcher, rank, world_size, local_rank = identify(os.environ)
    if world_size > 1:
        raise UserError(
            f"{launcher} started {world_size} processes; this version of megarat trains on one. Start it with a single process"
        )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if (
        "TORCHELASTIC_RUN_ID" not in os.environ
    ):  # torchrun keeps a server at the address it gives; others may hand down a used one
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return Mesh(rank, world_size, local_rank, _device(device, local_rank))


def identify(environment: Mapping[str, str]) -> tuple[str, int, int, int]:
    """Launcher, rank, number of processes and local rank, from environment variables."""
    for launcher, variables in _LAUNCHERS.items():
        if all(name in environment for name in variables):
            rank, world_size, local_rank = (int(environment[name]) for name in variables)
            return launcher, rank, world_size, local_rank
    return "no launcher", 0, 1, 0


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no GPU here; use run.device=auto or run.device=cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
