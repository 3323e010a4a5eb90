"""Greedy answers to prompts, by an engine that is kept for the next ones: a cache is taken, and steps are captured, once a pattern."""

from __future__ import annotations

from collections.abc import Sequence

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.heartbeat import beat
from megarat.infer.engine import Engine, Request
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM


class Answerer:
    """``batch`` requests at a time, each of at most ``capacity`` tokens with its answer.

    Raises ``UserError`` where the tokenizer has ids that the model lacks, or so many do not fit into memory.
    """

    def __init__(self, model: RATPlusLM, tokenizer: Tokenizer, *, batch: int, capacity: int) -> None:
        if tokenizer.vocab_size > model.config.vocab:
            raise UserError(
                f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {model.config.vocab}; name the right one"
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch, self._capacity = batch, capacity
        self._engine: Engine | None = None

    def answers(self, reading: Reading, requests: Sequence[Request]) -> list[str]:
        """The text of each answer; every step of the engine is a sign of life."""
        return [generation.text for generation in self.engine(reading).run(requests, lambda _: beat())]

    def engine(self, reading: Reading) -> Engine:
        """The engine of a reading; that of the one before is given back first."""
        if self._engine is None or self._engine.reading != reading:
            self._engine = None
            self._engine = Engine(self.model, reading, self.tokenizer, rows=self.batch, capacity=self._capacity)
        return self._engine
