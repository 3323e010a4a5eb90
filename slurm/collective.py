"""Can the ranks of this job reach each other? Started on all of them before training, one process a task; needs torch, nothing of megarat.

Each rank prints a line of JSON: its node, what is wrong with the memory of its GPU, and how an all-reduce over all ranks failed (NCCL on
GPUs, gloo without). With ``--find``, a line for each smaller all-reduce it takes part in: of its node's ranks alone, then of its node and
each of its two neighbours on the ring of nodes, in at most three rounds. A node that fails with both is the one to leave out.

An attempt is a process of its own, forked once torch is imported: a library that hangs is killed with it when its time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what a broken link makes libraries say is of no use, and long
import torch
from torch import distributed

_ELEMENTS = 16 << 20  # of the tensor that is summed, in fp32 on GPUs: 64 MiB, large enough for every link to be used
_PATTERNS = (0x00, 0xFF, 0x55, 0xAA)
_SHARE = 0.9  # of the free memory of a GPU, that is written and read back
_PORT, _PORTS = 20000, 10000


class Task(NamedTuple):
    """This process among those of its step, by Slurm's variables."""

    rank: int
    ranks: int
    node: int
    local: int

    @property
    def a_node(self) -> int:
        """Ranks of each node."""
        return max(1, self.ranks // int(os.environ["SLURM_NNODES"]))


def main() -> None:
    """Check, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", required=True, help="of the job, in Slurm's order, with commas")
    parser.add_argument("--seconds", type=float, default=120, help="that an attempt may take")
    parser.add_argument("--find", action="store_true", help="find the nodes that fail")
    arguments = parser.parse_args()
    hosts = arguments.hosts.split(",")
    task = Task(*(int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "NODEID", "LOCALID")))
    began = time.monotonic()
    report = {"node": hosts[task.node], "rank": task.rank}
    if not arguments.find:
        gpu = _attempt(began + arguments.seconds, partial(memory_fault, task.local)) if gpus_here() else ""
        failed = _attempt(began + arguments.seconds, partial(all_reduce_fault, task, hosts, range(len(hosts)), arguments.seconds))
        print(json.dumps({**report, "gpu": gpu, "failed": failed}), flush=True)
        return
    for number, nodes in enumerate(rounds(task.node, len(hosts)), 1):
        if nodes is not None:
            # What a rank loses by waiting for a partner that still waits for another, it has left: the end is that of the round.
            deadline = began + number * arguments.seconds
            left = max(1.0, deadline - time.monotonic())
            failed = _attempt(deadline, partial(all_reduce_fault, task, hosts, nodes, left))
            partner = next((hosts[node] for node in nodes if node != task.node), hosts[task.node])
            print(json.dumps({**report, "with": partner, "failed": failed}), flush=True)


def rounds(node: int, nodes: int) -> Iterator[Sequence[int] | None]:
    """The nodes that ``node`` tries with in each round, itself among them; None where it rests. Every neighbour on the ring comes once."""
    yield [node]
    edges = [(first, first + 1) for first in range(nodes - 1)] + ([(0, nodes - 1)] if nodes > 2 else [])
    closing = len(edges) - 1
    for color in range(3):
        # Edges alternate between two rounds; that which closes a ring of an odd number of nodes needs a third.
        chosen = [edge for i, edge in enumerate(edges) if (2 if i == closing and nodes % 2 and nodes > 2 else i % 2) == color]
        yield next((edge for edge in chosen if node in edge), None)


def gpus_here() -> int:
    """GPUs that this process sees, asked for without starting CUDA: a process that has done so cannot be forked."""
    return torch.cuda.device_count()


def all_reduce_fault(task: Task, hosts: Sequence[str], nodes: Sequence[int], seconds: float) -> str:
    """Sum a tensor over all ranks of ``nodes``; "" when the sum is right."""
    rank, ranks = nodes.index(task.node) * task.a_node + task.local, len(nodes) * task.a_node
    cuda = gpus_here() > 0
    device = torch.device("cuda", _index(task.local)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    job, step = (int(os.environ.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
    port = (
        _PORT + (job * 101 + step * 31 + nodes[0] + 7 * len(nodes)) % _PORTS
    )  # of each step and attempt its own, should hosts be shared
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{hosts[nodes[0]]}:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    x = torch.full((_ELEMENTS if cuda else _ELEMENTS >> 8,), rank + 1.0, device=device)
    distributed.all_reduce(x)
    wrong = int((x != ranks * (ranks + 1) / 2).sum())
    distributed.barrier()  # nobody leaves while another still needs what it offers
    return f"{wrong} of {x.numel()} sums over {ranks} ranks are wrong" if wrong else ""


def memory_fault(local: int) -> str:
    """Write patterns into the free memory of this task's GPU and read them back; "" when it keeps them."""
    device = torch.device("cuda", _index(local))
    free, _ = torch.cuda.mem_get_info(device)
    chunk = 1 << 30
    chunks = [torch.empty(chunk, dtype=torch.uint8, device=device) for _ in range(int(free * _SHARE) // chunk)]
    for pattern in _PATTERNS:
        for memory in chunks:
            memory.fill_(pattern)
        if any(
            bool((memory.view(torch.int64) != memory[:8].view(torch.int64)).any()) or int(memory[0]) != pattern
            for memory in chunks
        ):
            return f"GPU {local} does not keep the pattern 0x{pattern:02x}"
    return ""


def _index(local: int) -> int:
    return local if gpus_here() > 1 else 0  # Slurm may show each task its own GPU only


def _attempt(deadline: float, check: Callable[[], str]) -> str:
    """What ``check`` finds in a process of its own, or that it broke down, or that it had not ended by ``deadline``."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # Python 3.12 warns of the threads that torch has; the child uses none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            found = check()
        except Exception as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        with contextlib.suppress(OSError):
            os.write(writing, b"." + found.encode())
        os._exit(0)  # without waiting for threads of a library
    os.close(writing)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "it did not end in time"
        time.sleep(0.05)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    return told[1:] if told else "the process died"


if __name__ == "__main__":
    main()
