"""The loss on the held-out side of the corpus while a run trains, on any mesh: the same tokens each time, nothing is trained on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megarat.config import Config
from megarat.data.corpus import open_validation
from megarat.data.loader import MicroBatch, number_documents, own_samples, read_samples, to_micro_batch
from megarat.data.plan import SequentialPlan
from megarat.engine import Engine
from megarat.errors import UserError
from megarat.mesh import Mesh


class Validation:
    """Measures every ``train.validate_every`` pairs; a loss is the mean over scored tokens, as in ``megarat eval``.

    Data ranks take equal shares in micro-batches of the training's size. Held-out sequences that do not fill one more micro-batch of every
    rank are left out. Raises ``UserError`` where there are fewer than that in all.
    """

    def __init__(self, config: Config, mesh: Mesh, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._every = config.train.validate_every
        if not self._every:
            return
        self._reader = open_validation(config)
        length, step = config.data.sequence_length, config.train.micro_batch * mesh.shape.data
        self._plan = SequentialPlan(self._reader.num_tokens, length)
        tokens = config.data.validation_tokens or self._reader.num_tokens
        sequences = min(tokens // length, self._plan.samples_per_epoch) // step * step
        if sequences == 0:
            raise UserError(
                f"train.validate_every is {self._every}, but {self._reader.index.location} (or data.validation_tokens) holds less than one "
                f"micro-batch of every data rank, {step} sequences of {length} tokens; set train.validate_every=0 or name a larger "
                "data.validation"
            )
        self._own = own_samples(sequences, config.train.micro_batch, mesh.place.data, mesh.shape.data)

    def is_due(self, pair: int) -> bool:
        """Whether to measure after this pair: every so many, and the last one."""
        return self._every > 0 and (pair % self._every == 0 or pair == self._config.train.pairs)

    def measure(self, alive: Callable[[], None]) -> dict[str, float]:
        """``validation_dense``, and ``validation_sparse`` where there is a sparse pass; all ranks call it, and get the same.

        Calls ``alive`` before each batch: the whole held-out side may take far longer than anything else between two signs of life.
        """
        passes = {"validation_sparse": self._config.sparse_patterns, "validation_dense": self._config.patterns}
        totals = {name: [0.0, 0] for name, patterns in passes.items() if patterns is not None}
        at_a_time = self._engine.micro_batches * self._config.train.micro_batch
        for first in range(0, len(self._own), at_a_time):
            alive()
            micro_batches = self._read(self._own[first : first + at_a_time])
            for name, total in totals.items():
                patterns = passes[name]
                assert patterns is not None
                for index, part in enumerate(self._engine.evaluate(micro_batches, patterns)):
                    total[index] += part
        return {name: nats / max(1, tokens) for name, (nats, tokens) in totals.items()}

    def _read(self, positions: np.ndarray) -> list[MicroBatch]:
        size = self._config.train.micro_batch
        return [self._micro_batch(positions[first : first + size]) for first in range(0, len(positions), size)]

    def _micro_batch(self, positions: np.ndarray) -> MicroBatch:
        eos_id = self._reader.eos_id
        inputs, labels = to_micro_batch(read_samples(self._reader, self._plan, positions), eos_id)
        if self._config.data.documents == "packed":
            return inputs, labels
        return inputs, labels, number_documents(inputs, eos_id)
