"""Small worlds of CPU processes on this host: each rank runs one function, over gloo. For tests and for the invariance gate.

Processes are forked from a server that has imported torch and DeepSpeed once, so that a world costs half a second rather than ten. A
world that hangs is ended by its own watchdog (a collective's time limit does not cover subgroups), one whose rank fails ends at once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_GRACE_S = 2.0  # for the other ranks to fail on their own, with their own trace, after one has


class WorldFailed(Exception):
    """A rank raised, died or did not end in time; the message has every rank's end."""


def run(size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 600.0) -> list[Any]:
    """Call ``function(*arguments)`` on each of ``size`` ranks, started as by torchrun; returns what the ranks returned, in rank order.

    Function and arguments are pickled: a function must be importable by name. Raises ``WorldFailed``.
    """
    context = _server()
    port = _free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, rank, size, port, function, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            _end(process)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    return context


def _rank(sender: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The life of one rank. Its result or its trace goes back as bytes: torch's own pickling would share memory that ends with it."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        answer = pickle.dumps((True, function(*arguments)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    """All ranks' results, or ``WorldFailed`` soon after the first failure and at the deadline at the latest."""
    answers: dict[int, tuple[bool, Any]] = {}
    while len(answers) < len(pipes) and (left := deadline - time.monotonic()) > 0:
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        for pipe in wait(waiting, left):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            answers[rank] = _receive(pipes[rank])
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if len(answers) < len(pipes) or not all(good for good, _ in answers.values()):
        ends = [f"rank {rank}: {_told(answers.get(rank))}" for rank in range(len(pipes))]
        raise WorldFailed("\n".join(ends))
    return [answers[rank][1] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "died without a word"
    return answer


def _told(answer: tuple[bool, Any] | None) -> str:
    if answer is None:
        return "did not end in time"
    return "ended well" if answer[0] else str(answer[1])


def _end(process: ForkServerProcess) -> None:
    process.join(timeout=1)
    if process.is_alive():
        process.kill()
        process.join()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
