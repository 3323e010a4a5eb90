"""The thread that steps the engines of a server, and ranks that step theirs along with it.

Requests and cancellations are taken between two steps only. Where ranks share the model, each of them has the same engines; the first, which
alone has clients, hands on what it takes before it steps. So all of them do the same work in the same order.

    first rank                                others
    thread = EngineThread(engines, group)     follow(engines, group)     returns when the first has stopped
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import distributed
from torch.distributed import ProcessGroup

from megarat import comm
from megarat.errors import UserError
from megarat.infer.engine import Engine, Generation, Request

_ROLL_CALL_S = 60.0  # an idle first rank says so: those who wait for its word would take silence for its end


class Update(NamedTuple):
    """How far one generation of a request has come. ``text`` is all of it."""

    choice: int
    text: str
    finish: str | None


Updates = queue.Queue["Update | Exception"]


class Change(NamedTuple):
    """What happens between two steps: a request for one of the engines, or (None) the end of an earlier one."""

    number: int  # of the generation
    engine: int
    request: Request | None


class EngineThread(threading.Thread):
    """Steps the engines as long as there is something to do. ``on_failure`` is called where it cannot go on."""

    def __init__(
        self, engines: Sequence[Engine], group: ProcessGroup | None = None, on_failure: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(name="megarat-engine", daemon=True)
        self.error: Exception | None = None  # why it cannot go on
        self._engines, self._group, self._on_failure = engines, group, on_failure
        self._numbers: dict[Generation, int] = {}  # of those on their way
        self._made = 0
        self._changes: list[tuple[Change, Generation]] = []  # to be taken before the next step
        self._listeners: dict[Generation, tuple[int, Updates]] = {}
        self._lock = threading.Lock()  # over taking and telling, not over computing
        self._work = threading.Event()
        self._stopping = False

    def stop(self) -> None:
        """End after the step in progress: an interpreter must not leave while a thread computes. Those who still wait hear of it."""
        self._stopping = True
        self._work.set()
        self.join()
        self._fail(RuntimeError("the server is stopping"))

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or decoding."""
        with self._lock:
            return bool(self._changes) or any(engine.busy for engine in self._engines)

    def submit(self, engine: Engine, requests: list[Request]) -> tuple[list[Generation], Updates]:
        """Queue requests at an engine; their updates come through one queue. Raises ``UserError``, with none of them queued, where one is impossible."""
        generations = [engine.prepare(request) for request in requests]
        updates: Updates = queue.Queue()
        with self._lock:
            if self._stopping:
                updates.put(RuntimeError("the server is stopping"))
                return generations, updates
            for choice, generation in enumerate(generations):
                self._made += 1
                self._numbers[generation] = self._made
                change = Change(self._made, self._engines.index(engine), generation.request)
                self._changes.append((change, generation))
                self._listeners[generation] = (choice, updates)
        self._work.set()
        return generations, updates

    def cancel(self, generations: list[Generation]) -> None:
        """Nobody waits for these any more."""
        with self._lock:
            for generation in generations:
                self._listeners.pop(generation, None)
                if generation in self._numbers:
                    self._changes.append((Change(self._numbers[generation], 0, None), generation))
        self._work.set()

    def run(self) -> None:
        """Step, tell, and wait where there is nothing to do."""
        try:
            while not self._stopping:
                self._take()
                for engine in self._engines:  # even if asked to stop by now: the others have heard what was taken, and step
                    if engine.busy:
                        self._step(engine)
                if not self.busy:
                    self._work.wait(_ROLL_CALL_S)
                    self._work.clear()
            _tell(None, self._group)
        except Exception as error:  # ranks that share a model have lost each other: nobody can be served any more
            self.error, self._stopping = error, True
            self._fail(error)
            self._on_failure()

    def _take(self) -> None:
        """What has come since the last step, here and on the ranks that step along."""
        with self._lock:
            changes, self._changes = self._changes, []
            _tell([change for change, _ in changes], self._group)
            for change, generation in changes:
                if change.request is None:
                    generation.cancel()
                    self._numbers.pop(generation, None)
                else:
                    self._engines[change.engine].queue(generation)

    def _step(self, engine: Engine) -> None:
        try:
            moved = engine.step()
        except Exception as error:
            if comm.size(self._group) > 1:
                raise
            self._fail(error)  # a fault of the machine, such as memory: those who wait hear of it, those who come are served
            return
        with self._lock:
            for generation in moved:
                self._tell_listener(generation)

    def _tell_listener(self, generation: Generation) -> None:
        listener = self._listeners.get(generation)
        if listener is not None:
            listener[1].put(Update(listener[0], generation.text, generation.finish))
        if generation.finish is not None:
            self._listeners.pop(generation, None)
            self._numbers.pop(generation, None)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            for generation, (_, updates) in self._listeners.items():
                generation.cancel()
                updates.put(error)
            self._listeners.clear()
            self._numbers.clear()


def follow(engines: Sequence[Engine], group: ProcessGroup) -> None:
    """On a rank without clients: do what the first rank does until it says that it stops. Raises ``UserError`` where it is gone without a word."""
    generations: dict[int, Generation] = {}
    while (changes := _hear(group)) is not None:
        for number, place, request in changes:
            if request is not None:
                generations[number] = engines[place].submit(request)
            elif number in generations:  # else it ended by itself meanwhile
                generations[number].cancel()
        for engine in engines:
            if engine.busy:
                engine.step()
        generations = {number: generation for number, generation in generations.items() if generation.finish is None}


def _tell(what: list[Change] | None, group: ProcessGroup | None) -> None:
    """The first rank's word to all."""
    if comm.size(group) > 1:
        distributed.broadcast_object_list([what], group=group, group_src=0)


def _hear(group: ProcessGroup) -> list[Change] | None:
    said: list[list[Change] | None] = [None]
    try:
        distributed.broadcast_object_list(said, group=group, group_src=0)
    except RuntimeError as error:
        raise UserError(f"serve: the rank that serves has gone ({error})") from None
    return said[0]
