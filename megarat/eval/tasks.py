"""The names behind ``--tasks``: ``ppl,needle:single_1,multikey_2,harness:piqa,sciq`` is three tasks, two of them with a choice of parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megarat.errors import UserError
from megarat.eval.longbench import LONGBENCH_AVERAGE, LONGBENCH_TASKS
from megarat.eval.needle import NEEDLE_TASKS

TASKS = ("ppl", "needle", "longbench", "harness")


def parse_tasks(pieces: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Comma-separated pieces to {task: chosen parts}; a piece that names no task is one more part of the task before it.

    ``needle`` alone means all eight, ``longbench`` the eleven that are averaged; ``harness`` needs names, which its folder of data must hold.
    Raises ``UserError`` for what is no task and no part of one.
    """
    chosen: dict[str, list[str]] = {}
    current = ""
    for piece in pieces:
        name, colon, part = piece.strip().partition(":")
        if name in TASKS:
            current = name
            chosen.setdefault(name, [])
            if colon:
                chosen[name].append(part.strip())
        elif chosen.get(current) and not colon:
            chosen[current].append(name)
        else:
            raise UserError(f"--tasks: unknown task {piece.strip()!r}; this version has {', '.join(TASKS)}")
    if not chosen:
        raise UserError(f"--tasks: names no task; this version has {', '.join(TASKS)}")
    return {task: _check_parts(task, parts) for task, parts in chosen.items()}


_PARTS: Mapping[str, tuple[str, ...]] = {"ppl": (), "needle": tuple(NEEDLE_TASKS), "longbench": tuple(LONGBENCH_TASKS)}
_ALL: Mapping[str, tuple[str, ...]] = {**_PARTS, "longbench": LONGBENCH_AVERAGE}  # what a bare name means


def _check_parts(task: str, parts: list[str]) -> tuple[str, ...]:
    if task == "harness":
        if not parts:
            raise UserError("--tasks harness: name its tasks, for example harness:piqa,arc_easy")
        return tuple(dict.fromkeys(parts))
    known = _PARTS[task]
    for part in parts:
        if part not in known:
            choice = f"; it has {', '.join(known)}" if known else " and has no parts"
            raise UserError(f"--tasks: {task}:{part} is unknown{choice}")
    return tuple(dict.fromkeys(parts)) or _ALL[task]
