"""Batches of a corpus: which samples a rank computes in pair n, and reading them ahead of the step.

Shapes: b sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megarat.data.format import TokenArray
from megarat.data.plan import Plan
from megarat.data.reader import Reader
from megarat.errors import UserError

IGNORED_LABEL = -100

# Inputs (b, T), labels (b, T) with -100 where the input token is EOS and, where documents are kept apart, the number of each
# token's document within its sequence (b, T); int64 each.
MicroBatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class PairBatch(NamedTuple):
    """One rank's share of the global batch that both updates of a pair use.

    Attributes:
        micro_batches: in the order of gradient accumulation.
        digest: sum modulo 2**64 of a hash of (position, tokens) of each of this rank's samples. The sum over the data ranks does
            not depend on how many there are.
        tokens: input tokens of the global batch, all ranks together.
    """

    micro_batches: list[MicroBatch]
    digest: int
    tokens: int


class PairSource(ABC):
    """Pair n -> this rank's share of it, a pure function of n."""

    @abstractmethod
    def pair(self, n: int) -> PairBatch:
        """This rank's micro-batches of pair n."""

    def iterate(self, first_pair: int, prefetch: int = 2) -> Iterator[PairBatch]:
        """Pairs first_pair, first_pair + 1, … without end, read by a thread up to `prefetch` pairs ahead.

        An error of the reader is raised here. The thread ends when the iterator is closed or collected.
        """
        ready: queue.Queue[PairBatch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(first_pair, ready, stop), name="megarat-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _produce(self, n: int, ready: queue.Queue[PairBatch | BaseException], stop: threading.Event) -> None:
        item: PairBatch | BaseException
        while not stop.is_set():
            try:
                item = self.pair(n)
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            _put(ready, item, stop)
            if isinstance(item, BaseException):
                return
            n += 1


class Loader(PairSource):
    """Pair n -> this rank's share of it, a pure function of n.

    Pair n holds the positions n*G … n*G + G - 1 of the plan, G = `global_batch` sequences. Accumulation step a of data rank r takes
    the `micro_batch` positions from n*G + (a * data_size + r) * micro_batch on: the ranks of one step lie side by side. With
    `separate_documents` a micro-batch tells the document of each token, so that the model can keep them apart.

    Raises:
        UserError: `global_batch` is not a multiple of micro_batch * data_size.
    """

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        *,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        separate_documents: bool = False,
    ):
        if plan.sequence_length != sequence_length:
            raise ValueError(f"plan of sequences of {plan.sequence_length} tokens in a loader of {sequence_length}")
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} of {data_size}")
        self._reader, self._plan, self._separate_documents = reader, plan, separate_documents
        self._sequence_length, self._global_batch, self._micro_batch = sequence_length, global_batch, micro_batch
        self._own = own_samples(global_batch, micro_batch, data_rank, data_size)

    def pair(self, n: int) -> PairBatch:
        """This rank's micro-batches of pair n."""
        positions = n * self._global_batch + self._own
        samples = read_samples(self._reader, self._plan, positions)
        micro_batches = [
            self._micro_batch_of(samples[i : i + self._micro_batch]) for i in range(0, len(samples), self._micro_batch)
        ]
        digest = sum(sample_digest(p, s) for p, s in zip(positions.tolist(), samples, strict=True)) % (1 << 64)
        return PairBatch(micro_batches, digest, self._global_batch * self._sequence_length)

    def _micro_batch_of(self, samples: TokenArray) -> MicroBatch:
        inputs, labels = to_micro_batch(samples, self._reader.eos_id)
        if not self._separate_documents:
            return inputs, labels
        return inputs, labels, number_documents(inputs, self._reader.eos_id)


def own_samples(global_batch: int, micro_batch: int, data_rank: int, data_size: int) -> np.ndarray:
    """Which samples of a global batch are a rank's, (steps * b,), in the order of its micro-batches.

    Raises:
        UserError: `global_batch` is not a multiple of micro_batch * data_size.
    """
    if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * data_size):
        raise UserError(
            f"train.global_batch is {global_batch}, expected a multiple of train.micro_batch x data-parallel ranks ="
            f" {micro_batch} x {data_size} = {micro_batch * data_size}"
        )
    steps = np.arange(global_batch // (micro_batch * data_size))
    return ((steps[:, None] * data_size + data_rank) * micro_batch + np.arange(micro_batch)).ravel()


def _put(ready: queue.Queue[PairBatch | BaseException], item: PairBatch | BaseException, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)  # wakes up to see `stop`: the consumer may have left a full queue
        except queue.Full:
            continue
    return None


def read_samples(reader: Reader, plan: Plan, positions: np.ndarray) -> TokenArray:
    """T + 1 tokens of each position, (n, T + 1) in the dtype of the shards."""
    starts = plan.starts(positions)
    samples = np.empty((len(starts), plan.sequence_length + 1), reader.dtype)
    for row, start in zip(samples, starts.tolist(), strict=True):
        row[:] = reader.read(start, len(row))
    return samples


def to_micro_batch(samples: TokenArray, eos_id: int) -> tuple[Tensor, Tensor]:
    """(b, T + 1) tokens -> inputs and labels: y_t = x_{t+1}, ignored where x_t is EOS, since what follows is another document."""
    tokens = torch.from_numpy(samples.astype(np.int64))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    return inputs, labels.masked_fill_(inputs == eos_id, IGNORED_LABEL)


def number_documents(inputs: Tensor, eos_id: int) -> Tensor:
    """The document of each token, counted from 0 in each sequence, (b, T) int64; an EOS belongs to the document it ends."""
    ends = (inputs == eos_id).long()
    return ends.cumsum(1) - ends


def sample_digest(position: int, tokens: TokenArray) -> int:
    """64-bit hash of one sample: its global position (8 bytes) and its T + 1 tokens (4 bytes each), little-endian."""
    hashed = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8)
    hashed.update(tokens.astype("<u4").tobytes())
    return int.from_bytes(hashed.digest(), "little")


def chain(previous_hex: str, digest: int) -> str:
    """Hash of the stream so far: the previous one ("" at the start) and the global digest of the next pair, 16 digits."""
    hashed = hashlib.blake2b(bytes.fromhex(previous_hex), digest_size=8)
    hashed.update(digest.to_bytes(8, "little"))
    return hashed.hexdigest()
