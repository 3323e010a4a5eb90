"""Coordinates, the rules of legal meshes, and finding the other processes under each launcher."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys

import launch
import pytest
import tiny_run
import torch

from megarat import mesh
from megarat.config import Config
from megarat.errors import UserError
from megarat.mesh import Coordinates, Process, Shape

# ---- coordinates ----------------------------------------------------------------------------------------------------------------


def test_ranks_count_the_tensor_coordinate_fastest_and_the_pipeline_slowest():
    shape = Shape(pipeline=2, data=3, context=2, tensor=4)
    places = itertools.product(range(2), range(3), range(2), range(4))
    assert [shape.coordinates(rank) for rank in range(shape.size)] == [Coordinates(*place) for place in places]
    assert [shape.rank(shape.coordinates(rank)) for rank in range(48)] == list(range(48))


def test_groups_hold_the_ranks_that_differ_along_their_axes_only():
    shape = Shape(pipeline=2, data=2, context=1, tensor=2)
    assert shape.groups(mesh.TENSOR) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shape.groups(mesh.DATA) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert shape.groups(mesh.PIPELINE) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert shape.groups(mesh.MODEL) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert shape.groups(mesh.CONTEXT) == [[rank] for rank in range(8)]


# ---- rules ----------------------------------------------------------------------------------------------------------------------


def config(**changes) -> Config:
    """The tiny run, not yet checked as ``from_dict`` would."""
    settings = tiny_run.config(model={"layers": 2, "hidden": 16, "heads": 4, "vocab": 64}, train={"global_batch": 12})
    for key, value in changes.items():
        section, _, name = key.partition("_")
        setattr(getattr(settings, section), name, value)
    return settings


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({}, 1, Shape()),
        ({}, 6, Shape(data=6)),
        ({"parallel_tensor": 2}, 4, Shape(data=2, tensor=2)),
        ({"parallel_tensor": 4, "parallel_sequence": True, "parallel_zero": 3}, 4, Shape(tensor=4)),
    ],
)
def test_legal_meshes_take_the_remaining_ranks_as_data_ranks(changes, world_size, expected):
    assert mesh.check(config(**changes), world_size) == expected


@pytest.mark.parametrize(
    ("changes", "world_size", "reason", "nearest"),
    [
        ({"parallel_tensor": 3}, 3, "model.heads = 4 is not a multiple", "parallel.tensor=1 .*zero=1 .data 3."),
        ({"parallel_tensor": 4, "model_vocab": 66}, 4, "model.vocab = 66 is not a multiple", "parallel.tensor=2 .*data 2"),
        ({"parallel_tensor": 2}, 3, "3 processes were started, not a multiple of tensor x pipeline x context = 2 x 1 x 1", "data 3"),
        ({"parallel_pipeline": 4}, None, "every stage needs a layer", "parallel.pipeline="),
        ({"parallel_pipeline": 2, "parallel_zero": 2}, 2, "they take ZeRO 1", "parallel.pipeline=2 .*parallel.zero=1"),
        ({"parallel_pipeline": 2, "parallel_context": 2}, 4, "context parallelism works without pipelines", "The nearest legal mesh"),
        ({"parallel_context": 3}, 3, "data.sequence_length = 16 is not a multiple", "parallel.context=1"),
        ({"train_global_batch": 6, "train_micro_batch": 2}, 4, "train.micro_batch x data ranks = 2 x 4 = 8", "parallel.tensor=4"),
        ({"parallel_zero": 0}, None, "stage 0 takes another optimizer in bf16 and clips with a wrong norm", "parallel.zero=1"),
        ({"parallel_zero": 4}, 1, "DeepSpeed has stages 1, 2 and 3", "parallel.zero=3"),
        ({"parallel_tensor": 4, "parallel_sequence": True, "data_sequence_length": 18}, 4, "which is not even", "parallel.tensor=2"),
        ({"train_global_batch": 7, "train_micro_batch": 7, "model_heads": 1}, 5, "not a multiple of", "No mesh of 5 processes fits"),
    ],
)  # fmt: skip
def test_illegal_meshes_are_refused_with_the_reason_and_the_nearest_legal_one(changes, world_size, reason, nearest):
    with pytest.raises(UserError, match=f"run.yaml: .*{reason}.*{nearest}"):
        mesh.check(config(**changes), world_size, "run.yaml")


def test_what_is_called_the_nearest_legal_mesh_is_legal():
    for tensor, world_size in itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 6, 8)):
        settings = config(parallel_tensor=tensor)
        try:
            mesh.check(settings, world_size)
        except UserError as error:
            advice = str(error).partition("The nearest legal mesh: ")[2]
            if not advice:
                assert "No mesh of" in str(error)
                continue
            for pair in advice.partition(" (")[0].split():
                key, _, value = pair.removeprefix("parallel.").partition("=")
                setattr(settings.parallel, key, int(value))
            mesh.check(settings, world_size)


# ---- start-up -------------------------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no launcher", 0, 1, 0)),
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (SLURM, ("Slurm", 5, 16, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, ("no launcher", 0, 1, 0)),  # a batch script, no srun
        (OPEN_MPI, ("Open MPI", 1, 2, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, ("MPICH", 1, 4, 1)),
        (SLURM | TORCHRUN, ("torchrun", 3, 8, 1)),  # srun starts one torchrun a node
        (SLURM | OPEN_MPI, ("Open MPI", 1, 2, 1)),  # mpirun starts its daemons through srun
        (SLURM | {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, ("Slurm", 5, 16, 1)),  # exported by the script, and right
    ],
)
def test_launchers_are_told_apart_by_their_variables(environment, expected):
    assert mesh.identify(environment) == expected


def test_variables_set_by_hand_that_contradict_the_launcher_are_explained():
    by_hand = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="RANK=0 and WORLD_SIZE=1 are set, but Slurm started this process as rank 5 of 16; unset"):
        mesh.identify(SLURM | by_hand)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("rack[1,4]-gpu[09-12]", "rack1-gpu09"),
        ("a-b[7]", "a-b7"),
    ],
)
def test_slurm_ranks_meet_at_the_first_host_at_a_port_of_their_step(hosts, first):
    environment = SLURM | {
        "SLURM_JOB_NODELIST": "elsewhere",
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
    }
    found = mesh.rendezvous(mesh.identify(environment), environment)
    assert (found["MASTER_ADDR"], found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (first, "5", "16", "1")
    port = int(found["MASTER_PORT"])
    assert 20000 <= port < 32000
    other_step = mesh.rendezvous(mesh.identify(environment), environment | {"SLURM_STEP_ID": "3"})
    assert other_step["MASTER_PORT"] != found["MASTER_PORT"]


def test_slurm_ranks_take_the_address_their_script_exported():
    environment = SLURM | {"MASTER_ADDR": "ib0.node1", "MASTER_PORT": "4000"}
    found = mesh.rendezvous(mesh.identify(environment), environment)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("ib0.node1", "4000")


def test_several_processes_without_an_address_are_refused():
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="WORLD_SIZE is 4, but MASTER_ADDR and MASTER_PORT are not both set"):
        mesh.rendezvous(mesh.identify(environment), environment)


def test_a_single_process_gets_a_free_port_even_where_a_parent_left_one_in_the_environment():
    with socket.socket() as in_use:
        in_use.bind(("127.0.0.1", 0))
        inherited = {"MASTER_ADDR": "elsewhere", "MASTER_PORT": str(in_use.getsockname()[1])}
        found = mesh.rendezvous(Process("no launcher", 0, 1, 0), inherited)
        assert found["MASTER_ADDR"] == "127.0.0.1"
        assert found["MASTER_PORT"] != inherited["MASTER_PORT"]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", int(found["MASTER_PORT"])))


def test_this_process_is_a_mesh_of_one(mesh):
    assert mesh == type(mesh)(0, 1, 0, torch.device("cpu"))
    assert mesh.place == Coordinates() and mesh.is_first
    assert mesh.describe() == {"world_size": 1, "tensor": 1, "context": 1, "data": 1, "pipeline": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take")
def test_a_missing_gpu_is_named():
    with pytest.raises(UserError, match=r"run.device is cuda, but torch sees no GPU"):
        mesh.start("cuda")


PROGRAM = (
    "import torch; from megarat import mesh; here = mesh.start('cpu'); total = torch.ones(()) * (here.rank + 1); "
    "torch.distributed.all_reduce(total); print(f'{here.shape.data}:{int(total)} ', end='', flush=True)"
)
TORCHRUN_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN_TWO, id="torchrun"),
        pytest.param(
            [launch.MPIRUN, "-np", "2"], id="mpirun", marks=pytest.mark.skipif(launch.MPIRUN is None, reason="no mpirun")
        ),
    ],
)
def test_two_processes_find_each_other(launcher):
    environment = {name: value for name, value in os.environ.items() if name not in mesh._LAUNCHERS["torchrun"]}
    done = subprocess.run(
        [*launcher, sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2:3", "2:3"]


# What is called as a process of a GPU run ends: no GPU is needed to see which, only to see that it comes back (tests/gpu/test_failing_rank.py).
LEAVING = (
    "import sys, torch; from megarat import cli, mesh; mesh.start('cpu'); d = torch.distributed; d.get_backend = lambda: 'nccl'; "
    "d.destroy_process_group = lambda: print('closed'); d.distributed_c10d._abort_process_group = lambda: print('aborted'); "
)


@pytest.mark.parametrize(
    ("end", "called", "code"),
    [
        ("pass", "closed", 0),
        ("sys.exit(75)", "closed", 75),  # a stop that all ranks agreed on
        ("raise RuntimeError('lost')", "aborted", 1),
        ("sys.exit(cli.main(['checkpoint', 'show', '/nowhere']))", "aborted", 2),
    ],
)
def test_a_rank_that_failed_does_not_wait_for_the_others_to_leave(end, called, code):
    done = subprocess.run([sys.executable, "-c", LEAVING + end], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.returncode) == ([called], code), done.stderr
