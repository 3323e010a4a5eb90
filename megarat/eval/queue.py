"""Items of work shared by any number of processes through a folder, without anything else between them.

An item is claimed by a lock on its file and done when its result is there, written as a whole. The lock is the system's (POSIX record
lock): it ends with the process that holds it however that dies, and another process then does the item. Who is fast does more. What is
done stays done, so the same command goes on after an interruption; a process that is asked to stop ends its item first. Results are
combined in the order of the items, whoever did them: they do not depend on the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megarat.errors import StoppedEarly, UserError
from megarat.files import replace_synced
from megarat.heartbeat import beat
from megarat.train.guard import StopRequest

PIECE = 25  # prompts of an item of work, at least
_POLL_S = 0.5  # between looks at items that others have claimed


class Item(NamedTuple):
    """A piece of work: its name (a file name that also says what it is made of), its share of the whole, and what does it, to plain values."""

    name: str
    size: int
    run: Callable[[], dict[str, Any]]


class Work:
    """Where results lie; without a folder they are kept nowhere and every item is done here. ``stop`` is looked at before each item."""

    def __init__(self, folder: Path | None, stop: StopRequest | None = None) -> None:
        self._folder = folder
        self._stop = stop
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out: cannot write {folder}: {error}") from None

    def run(self, items: Sequence[Item], on_done: Callable[[int], object] = lambda _: None) -> list[dict[str, Any]]:
        """The results of all items, in their order; ``on_done`` hears the size of each as it is there, from here or elsewhere.

        Raises ``StoppedEarly`` when ``stop`` was asked for before the last.
        """
        results: dict[int, dict[str, Any]] = {}
        while len(results) < len(items):
            before = len(results)
            for index, item in enumerate(items):
                if index in results:
                    continue
                self._go_on(len(results), len(items))
                if (result := self._result(item)) is not None:
                    results[index] = result
                    on_done(item.size)
            if len(results) == before:
                time.sleep(_POLL_S)
        return [results[index] for index in range(len(items))]

    def _go_on(self, done: int, of: int) -> None:
        beat()
        if self._stop is not None and self._stop.reason is not None:
            raise StoppedEarly(
                f"stopped after {done} of {of} pieces of work ({self._stop.reason}); {self._folder} keeps them, the same command goes on"
            )

    def _result(self, item: Item) -> dict[str, Any] | None:
        """The item's result, done now if nobody has; None while another process is at it."""
        if self._folder is None:
            return item.run()
        path = self._folder / f"{item.name}.json"
        if path.exists():
            return _read(path)
        with _claim(path.with_suffix(".lock")) as claimed:
            if not claimed:
                return None
            if path.exists():  # done between the look and the claim
                return _read(path)
            result = item.run()
            replace_synced(path, json.dumps(result) + "\n")
            return result


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock on ``path`` for the length of the block."""
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def short_hash(text: str) -> str:
    """16 hexadecimal digits that stand for a text in a file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
