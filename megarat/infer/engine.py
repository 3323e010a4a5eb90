"""Continuous batching: requests of any length share a batch of decoding rows; one that ends makes room for the next at once.

The device is always one step ahead: a step is started before the host has seen what the one before drew. So a request that meets a stop
decodes one token too many, which nobody sees. What a request gets depends on its own seed only, never on who shares the batch with it, but
for the last bits of matrix products of another size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.decoder import Decoder
from megarat.infer.reading import Reading
from megarat.infer.sampling import GREEDY, Sampling
from megarat.model.lm import RATPlusLM

Finish = Literal["stop", "length", "cancelled"]
_READ_TOKENS = 16384  # of prompts read between two steps while others wait for theirs
_NO_CHARACTER = "\ufffd"  # what bytes that are no whole character are decoded to
_CONTEXT = 8  # last tokens of a prompt that are decoded with the answer, so that spaces and split characters come out right


@dataclass(frozen=True)
class Request:
    """A prompt, and when its continuation ends: after ``max_new_tokens``, at one of ``stop_ids`` or where one of ``stops`` appears."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


class Generation:
    """A request on its way: the tokens seen so far, and why it ended (None: it has not)."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._window = list(
            request.ids[-_CONTEXT:]
        )  # tokens whose text is still looked at, the first ``_settled`` of them as context
        self._settled = len(self._window)
        self._read = 0  # of ``ids``
        self._whole = ""  # all text of whole characters
        self._searched = 0  # up to here no stop string begins

    def add(self, token: int) -> None:
        """Take the next token: it ends the generation or goes on with it."""
        request = self.request
        if token in request.stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) == request.max_new_tokens:
                self.finish = "length"
        if request.stops:
            self._look_for_stops()

    def cancel(self) -> None:
        """Stop working on it; the step after the next has its row free."""
        self.finish = self.finish or "cancelled"

    @property
    def text(self) -> str:
        """What will not change any more: neither half a character nor what may begin a stop string."""
        self._decode()
        if self.finish is not None:
            return self._whole
        return self._whole[: len(self._whole) - _held_back(self._whole, self.request.stops)]

    def _look_for_stops(self) -> None:
        self._decode()
        found = [at for stop in self.request.stops if (at := self._whole.find(stop, self._searched)) >= 0]
        if found:
            self._whole, self.finish = self._whole[: min(found)], "stop"
            self._window = []
        self._searched = max(0, len(self._whole) - max(map(len, self.request.stops)) + 1)

    def _decode(self) -> None:
        """Add the text of new tokens; half a character waits for its rest, or for the end."""
        if self._read == len(self.ids) and (self.finish is None or not self._window):
            return
        self._window += self.ids[self._read :]
        self._read = len(self.ids)
        context, text = self._tokenizer.decode(self._window[: self._settled]), self._tokenizer.decode(self._window)
        if self.finish is None and text.endswith(_NO_CHARACTER):
            return
        before, new = context.rstrip(_NO_CHARACTER), self._window[self._settled :]
        # A byte that fits no character can spoil the characters in front of it, which were shown whole.
        piece = text.removeprefix(before) if text.startswith(before) else self._tokenizer.decode(new)
        self._whole += piece
        if self.finish is not None:
            self._window = []
        elif piece and before == context and _NO_CHARACTER not in piece:  # else the new tokens cannot be read on their own
            self._window = new
        self._settled = len(self._window)


@dataclass
class _Batch:
    """Who decodes, and how, for as long as nobody comes or ends: ten thousand rows are looked through once, not at every step.

    ``steps`` more ones of the device belong to it; the first of ``going`` has drawn all its tokens then.
    """

    running: list[tuple[int, Generation]]  # rows, ascending, whose newest token the host has not seen
    going: list[int]  # those of them that want another one
    greedy: bool
    steps: int


class Engine:
    """One model read in one way, ``rows`` sequences of at most ``capacity`` tokens at a time.

    ``buckets`` and ``graphs`` are those of the ``Decoder``. Raises ``UserError`` where that many do not fit into memory, or the tokenizer is
    not the model's.
    """

    def __init__(
        self,
        model: RATPlusLM,
        reading: Reading,
        tokenizer: Tokenizer,
        *,
        rows: int,
        capacity: int,
        buckets: Sequence[int] | None = None,
        graphs: bool = True,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab:
            raise UserError(
                f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {model.config.vocab}; name the right one"
            )
        self.config, self.reading, self.capacity = model.config, reading, capacity
        self.decoder = Decoder(model, reading, rows, capacity, tokenizer.vocab_size, buckets=buckets, graphs=graphs)
        self._tokenizer = tokenizer
        self._rows: list[Generation | None] = [None] * rows
        self._waiting: deque[Generation] = deque()
        self._batch: _Batch | None = None  # None: someone ended

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or decoding."""
        return any(generation.finish is None for generation in [*self._waiting, *self._rows] if generation is not None)

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises ``UserError`` for one that is empty, too long, or has ids the model lacks."""
        generation = self.prepare(request)
        self.queue(generation)
        return generation

    def prepare(self, request: Request) -> Generation:
        """A request that can be served, not queued yet; safe while another thread steps. Raises ``UserError`` as ``submit``."""
        if not request.ids:
            raise UserError("prompt: it is empty; give at least one token")
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
        if len(request.ids) + request.max_new_tokens > self.capacity:
            raise UserError(
                f"prompt: {len(request.ids)} tokens and {request.max_new_tokens} new ones are more than the {self.capacity} allowed together"
            )
        policy = self.reading.snapkv
        if policy is not None and min(len(request.ids), policy.size) + request.max_new_tokens > policy.slots(self.capacity):
            raise UserError(
                f"max_new_tokens: {request.max_new_tokens} new tokens do not fit behind a prompt of {len(request.ids)} under '{policy}'; "
                f"ask for a larger answer= there"
            )
        if not 0 <= min(request.ids) <= max(request.ids) < self.config.vocab:
            raise UserError(f"prompt: has token ids outside the model's vocabulary of {self.config.vocab}")
        return Generation(request, self._tokenizer)

    def queue(self, generation: Generation) -> None:
        """Let a prepared request wait for its row."""
        self._waiting.append(generation)

    def step(self) -> list[Generation]:
        """Read prompts into free rows, start a step of the device, and take the tokens drawn before it.

        Returns the generations that went on or ended.
        """
        if self._batch is None or (self._waiting and len(self._batch.running) < len(self._rows)):
            self._batch = self._next()
        batch = self._batch
        if not batch.running:
            return []
        snapshot = self.decoder.snapshot(batch.running[-1][0] + 1)
        if batch.going:
            self.decoder.step(batch.going, batch.greedy)
        batch.steps -= 1
        tokens = snapshot.tokens()
        ended = False
        for row, generation in batch.running:
            if generation.finish is None:  # it may have been cancelled meanwhile
                generation.add(tokens[row])
            ended = ended or generation.finish is not None
        if ended or batch.steps <= 0:
            self._batch = None
        return [generation for _, generation in batch.running]

    def run(self, requests: Sequence[Request], on_done: Callable[[int], object] = lambda _: None) -> list[Generation]:
        """All requests to their ends, in their order; ``on_done`` hears how many have just ended."""
        generations = [self.submit(request) for request in requests]
        while self.busy:
            on_done(sum(generation.finish is not None for generation in self.step()))
        return generations

    def _next(self) -> _Batch:
        """Who decodes now that someone has ended or is waiting."""
        self._rows = [None if row is None or row.finish is not None else row for row in self._rows]
        self._admit()
        self._close_ranks()
        running = [(row, generation) for row, generation in enumerate(self._rows) if generation is not None]
        # one token of each is still on its way to the host
        left = {row: generation.request.max_new_tokens - len(generation.ids) - 1 for row, generation in running}
        going = [(row, generation) for row, generation in running if left[row] > 0]
        greedy = all(generation.request.sampling.takes_the_likeliest for _, generation in going)
        steps = min((left[row] for row, _ in going), default=0)
        return _Batch(running, [row for row, _ in going], greedy, steps)

    def _admit(self) -> None:
        """Read waiting prompts into free rows, each with its first token; not too many tokens at once, or those who decode would stall."""
        budget = _READ_TOKENS
        while budget > 0 and (gap := self._gap()) and (batch := self._next_batch(len(gap), budget)):
            distinct = batch[:1] if _are_equal(batch) else batch  # one prompt is read once, whoever asks
            prompts = [generation.request.ids for generation in distinct]
            self.decoder.read(gap[0], prompts, [generation.request.sampling for generation in batch])
            for row, generation in zip(gap, batch, strict=False):
                self._rows[row] = generation
            budget -= len(distinct) * max(map(len, prompts))

    def _gap(self) -> range:
        """The first free rows that lie together."""
        first = next((row for row, generation in enumerate(self._rows) if generation is None), len(self._rows))
        end = next((row for row in range(first, len(self._rows)) if self._rows[row] is not None), len(self._rows))
        return range(first, end)

    def _next_batch(self, most: int, budget: int) -> list[Generation]:
        """Waiting requests that are read together: several of one prompt, or prompts that fill ``budget`` tokens without much padding."""
        batch: list[Generation] = []
        lengths: list[int] = []
        while len(batch) < most and (following := self._following()) is not None:
            lengths.append(len(following.request.ids))
            if len(batch) > 1 and _are_equal(batch[:2]):
                joins = _are_equal([batch[0], following])
            else:
                joins = max(lengths) <= 2 * min(lengths) and max(lengths) * len(lengths) <= budget
                joins = joins or not batch or (len(batch) == 1 and _are_equal([batch[0], following]))
            if not joins:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _following(self) -> Generation | None:
        """The first waiting request that still wants to be answered."""
        while self._waiting and self._waiting[0].finish is not None:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def _close_ranks(self) -> None:
        """Move the last rows into free ones where that lets a smaller bucket hold all; what waits will fill them otherwise."""
        taken = [row for row, generation in enumerate(self._rows) if generation is not None]
        if self._waiting or not taken:
            return
        size = self.decoder.bucket(len(taken))
        free = (row for row in range(size) if self._rows[row] is None)
        for row in taken:
            if row >= size:
                target = next(free)
                self.decoder.move(row, target)
                self._rows[target], self._rows[row] = self._rows[row], None


def _are_equal(generations: Sequence[Generation]) -> bool:
    """Whether all have the same prompt."""
    first = generations[0].request.ids
    return all(generation.request.ids is first or generation.request.ids == first for generation in generations)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
