"""Continuous batching: requests of any length share a batch of decoding rows; one that ends makes room for the next at once.

Each prompt is read alone (in chunks), then decoded with the others; what a request gets depends on its own seed only, never on who shares the
batch with it, but for the last bits of matrix products of another size.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.cache import SparseCache
from megarat.infer.forward import decode_step, prefill
from megarat.infer.generate import GREEDY, Sampling, draw
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM

Finish = Literal["stop", "length", "cancelled"]
_PREFILL_CHUNK = 16384  # tokens of a prompt read at a time
_CONTEXT = 8  # last tokens of a prompt that are decoded with the answer, so that spaces and split characters come out right


@dataclass(frozen=True)
class Request:
    """A prompt, and when its continuation ends: after ``max_new_tokens``, at one of ``stop_ids`` or where one of ``stops`` appears."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


@dataclass(eq=False)
class Generation:
    """A request on its way. ``text`` is what will not change any more: neither half a character nor what may begin a stop string."""

    request: Request
    context: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None

    def add(self, token: int, tokenizer: Tokenizer) -> None:
        """Take the next token: it ends the generation, or its text is added."""
        request = self.request
        if token in request.stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) == request.max_new_tokens:
                self.finish = "length"
        text = self._decoded(tokenizer)
        found = [at for stop in request.stops if (at := text.find(stop)) >= 0]
        if found:
            self.text, self.finish = text[: min(found)], "stop"
        elif self.finish:
            self.text = text
        elif not text.endswith("�"):
            self.text = text[: len(text) - _held_back(text, request.stops)]

    def _decoded(self, tokenizer: Tokenizer) -> str:
        before = tokenizer.decode(self.context).rstrip("�")
        return tokenizer.decode([*self.context, *self.ids]).removeprefix(before)


class Engine:
    """One model read in one way, ``rows`` sequences of at most ``capacity`` tokens at a time.

    Raises ``UserError`` where that many do not fit into memory, or the tokenizer is not the model's.
    """

    def __init__(self, model: RATPlusLM, reading: Reading, tokenizer: Tokenizer, *, rows: int, capacity: int) -> None:
        if tokenizer.vocab_size > model.config.vocab:
            raise UserError(
                f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {model.config.vocab}; name the right one"
            )
        self.capacity = capacity
        self._model, self._reading, self._tokenizer = model, reading, tokenizer
        self._cache = self._new_cache(rows)
        self._rows: list[Generation | None] = [None] * rows
        self._generators: list[torch.Generator] = [torch.Generator(model.embedding.weight.device) for _ in range(rows)]
        self._seen_BV = torch.zeros(rows, tokenizer.vocab_size, dtype=torch.bool, device=model.embedding.weight.device)
        self._waiting: deque[Generation] = deque()

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or decoding."""
        return any(generation.finish is None for generation in [*self._waiting, *self._rows] if generation is not None)

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises ``UserError`` for one that is empty, too long, or has ids the model lacks."""
        if not request.ids:
            raise UserError("prompt: it is empty; give at least one token")
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
        if len(request.ids) + request.max_new_tokens > self.capacity:
            raise UserError(
                f"prompt: {len(request.ids)} tokens and {request.max_new_tokens} new ones are more than the {self.capacity} allowed together"
            )
        if not 0 <= min(request.ids) <= max(request.ids) < self._model.config.vocab:
            raise UserError(f"prompt: has token ids outside the model's vocabulary of {self._model.config.vocab}")
        generation = Generation(request, list(request.ids[-_CONTEXT:]))
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop working on a request; its row is free at the next step."""
        generation.finish = generation.finish or "cancelled"

    @torch.no_grad()
    def step(self) -> list[Generation]:
        """Admit what fits, decode one token of every row; returns the generations that went on or ended in this step."""
        self._release()
        moved = self._admit()
        active = [row for row, generation in enumerate(self._rows) if generation is not None and generation.finish is None]
        if active:
            ids_B = torch.zeros(len(self._rows), dtype=torch.int64)
            for row in active:
                ids_B[row] = self._generation(row).ids[-1]
            logits_BV = decode_step(self._model, ids_B.to(self._seen_BV.device), self._cache)
            self._take(active, logits_BV[active])
        return [*moved, *(self._generation(row) for row in active if self._generation(row) not in moved)]

    def run(self, requests: Sequence[Request], on_done: Callable[[int], object] = lambda _: None) -> list[Generation]:
        """All requests to their ends, in their order; ``on_done`` hears how many have just ended."""
        generations = [self.submit(request) for request in requests]
        while self.busy:
            on_done(sum(generation.finish is not None for generation in self.step()))
        return generations

    def _admit(self) -> list[Generation]:
        """Read waiting prompts into free rows, each with its first token."""
        admitted = []
        for row in [row for row, generation in enumerate(self._rows) if generation is None]:
            while self._waiting and self._waiting[0].finish is not None:
                self._waiting.popleft()  # cancelled before its turn
            if self._waiting:
                admitted.append(self._waiting.popleft())
                self._rows[row] = admitted[-1]
                self._read(row, admitted[-1])
        return admitted

    def _read(self, row: int, generation: Generation) -> None:
        ids_BT = torch.tensor([generation.request.ids], device=self._seen_BV.device)
        alone = self._new_cache(1)
        lengths_B = torch.tensor([ids_BT.shape[1]], device=ids_BT.device)
        logits_BV = prefill(self._model, ids_BT, lengths_B, alone, chunk=_PREFILL_CHUNK)
        self._cache.copy_row(row, alone, 0)
        self._seen_BV[row] = False
        self._generators[row].manual_seed(generation.request.sampling.seed)
        self._take([row], logits_BV)

    def _take(self, rows: list[int], logits_BV: Tensor) -> None:
        """Draw the next token of each row and hand it to its generation."""
        logits_BV = logits_BV[:, : self._tokenizer.vocab_size]
        greedy = logits_BV.argmax(dim=-1).tolist()
        for index, row in enumerate(rows):
            generation = self._generation(row)
            if generation.request.sampling == GREEDY:
                token = greedy[index]
            else:
                one = slice(index, index + 1)
                token = int(
                    draw(logits_BV[one], self._seen_BV[row : row + 1], generation.request.sampling, self._generators[row])
                )
                self._seen_BV[row, token] = True
            generation.add(token, self._tokenizer)

    def _release(self) -> None:
        """Free the rows of what has ended; a free row decodes along, from its start, and nobody looks."""
        for row, generation in enumerate(self._rows):
            if generation is None or generation.finish is not None:
                self._rows[row] = None
                self._cache.lengths_B[row] = 0

    def _generation(self, row: int) -> Generation:
        generation = self._rows[row]
        assert generation is not None
        return generation

    def _new_cache(self, rows: int) -> SparseCache:
        weight = self._model.embedding.weight
        return SparseCache(self._model.config, self._reading, rows, self.capacity, weight.dtype, weight.device)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
