"""Recognising the launcher from its variables."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from megarat import mesh
from megarat.errors import UserError


@pytest.fixture
def bare_environment(monkeypatch):
    """No launcher's variables; what ``start`` sets is undone after the test."""
    for variables in (*mesh._LAUNCHERS.values(), ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")):
        for name in variables:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no launcher", 0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, ("torchrun", 3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"}, ("Slurm", 5, 16, 5)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, ("no launcher", 0, 1, 0)),  # a batch script, no srun
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("Open MPI", 1, 2, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, ("MPICH", 1, 4, 1)),
    ],
)
def test_launchers_are_told_apart_by_their_variables(environment, expected):
    assert mesh.identify(environment) == expected


def test_a_single_process_gets_all_five_variables_and_a_free_port(bare_environment):
    assert mesh.start("cpu") == mesh.Mesh(0, 1, 0, torch.device("cpu"))
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == ["0", "1", "0", "127.0.0.1"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))


def test_a_child_process_takes_another_port_than_the_one_it_inherits(bare_environment):
    mesh.start("cpu")
    with socket.socket() as in_use:
        in_use.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        inherited = os.environ["MASTER_PORT"]
        mesh.start("cpu")
        assert os.environ["MASTER_PORT"] != inherited


def test_several_processes_are_refused_for_now(bare_environment, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 4 processes"):
        mesh.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take")
def test_a_missing_gpu_is_named(bare_environment):
    with pytest.raises(UserError, match=r"run.device is cuda, but torch sees no GPU"):
        mesh.start("cuda")
