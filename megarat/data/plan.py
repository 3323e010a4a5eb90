"""Where each sample of a training starts, as a pure function of (seed, position).

A *sample* is T input tokens and the one after them, for the labels. A *position* counts samples over the whole training, across
epochs and ranks; it is the only state of the data order. Plans turn positions into offsets of the token stream, in O(1) each and
without a table, so that a resume may seek anywhere in a corpus of any size, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarat.data.format import IntArray
from megarat.errors import UserError

UIntArray = npt.NDArray[np.uint64]

_ROUNDS = 8
_SHARE_UNIT = 1 << 31  # shares of a blend are whole numbers of this, so that a product with a position fits 64 bits

DEFAULT_RUN = 16  # 64 k tokens at the recipe's length: as much as a block of the shards holds
DEFAULT_WINDOW = 2048  # runs: 268 MB of uint16 tokens at the recipe's length


class Plan(Protocol):
    """Order of the samples of one corpus."""

    sequence_length: int

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""


class ShuffledPlan:
    """Every sequence once an epoch, in a new random order each epoch, with reads that stay together.

    Sequence r covers tokens r*T … r*T + T (its labels reach one token into the next sequence); the tail that does not fill a
    sequence is not used. An epoch is made in two levels:

    1. The n sequences, counted around the corpus from a random one, are cut into n // `run` runs of neighbours, and the runs are
       permuted over the whole corpus.
    2. `window` of these runs at a time (about; windows of an epoch are equally long) are mixed: their sequences are permuted.

    A window reads its runs once and whole, from anywhere in the corpus, so that a reader needs the blocks of one window and no
    more; two samples in a row come from the same run with a chance of 1 / `window`. A corpus of a single window is permuted
    sequence by sequence, and so is any corpus with `run` = 1. What does not fill a run (fewer than `run` sequences, others each
    epoch) is mixed into the last window.

    Raises:
        UserError: the corpus is shorter than one sequence and its last label.
    """

    def __init__(self, num_tokens: int, sequence_length: int, seed: int, *, run: int = DEFAULT_RUN, window: int = DEFAULT_WINDOW):
        if run < 1 or window < 1:
            raise UserError(f"data.shuffle_run is {run} and data.shuffle_window {window}; both must be at least 1")
        self.sequence_length = sequence_length
        self.samples_per_epoch = count_samples(num_tokens, sequence_length)
        self._seed = seed
        self._run = min(run, self.samples_per_epoch)
        self._runs = self.samples_per_epoch // self._run
        self._windows = max(1, round(self._runs / window))

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""
        epochs, ranks = np.divmod(np.asarray(positions, np.int64), self.samples_per_epoch)
        sequences = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            sequences[inside] = self._sequences(int(epoch), ranks[inside])
        return sequences * self.sequence_length

    def _sequences(self, epoch: int, ranks: IntArray) -> IntArray:
        """The sequence at each rank of an epoch, (n,) -> (n,)."""
        slots = np.empty_like(ranks)
        windows = ((np.minimum(ranks // self._run, self._runs - 1) + 1) * self._windows - 1) // self._runs
        for window in np.unique(windows):
            first, last = self._window_slots(int(window))
            inside = windows == window
            key = _key(self._seed, "window", epoch, int(window))
            slots[inside] = first + permute(ranks[inside] - first, last - first, key)
        runs, steps = np.divmod(slots, self._run)
        whole = runs < self._runs  # the slots behind the last whole run keep their place
        runs[whole] = permute(runs[whole], self._runs, _key(self._seed, "runs", epoch))
        turn = _key(self._seed, "turn", epoch) % self.samples_per_epoch
        return (runs * self._run + steps + turn) % self.samples_per_epoch

    def _window_slots(self, window: int) -> tuple[int, int]:
        """First slot of a window and the one after its last. Window w holds the runs w*R // W … (w + 1)*R // W - 1 of R."""
        first, last = (w * self._runs // self._windows * self._run for w in (window, window + 1))
        return first, self.samples_per_epoch if window == self._windows - 1 else last


class RandomOffsetPlan:
    """Uniform start offsets over the whole stream, with replacement: the data of the resolution adaptation.

    The published recipe draws from one generator a rank, seeded with seed + rank. Here a start depends on the seed and the
    sample's position alone: the same distribution, but the same samples on any number of ranks.

    Raises:
        UserError: the corpus is shorter than one sequence and its last label.
    """

    def __init__(self, num_tokens: int, sequence_length: int, seed: int):
        count_samples(num_tokens, sequence_length)
        self.sequence_length = sequence_length
        self._choices = num_tokens - sequence_length
        self._key = _key(seed, "random offsets", 0)

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""
        noise = _mix(np.asarray(positions).astype(np.uint64), self._key)
        return (noise % np.uint64(self._choices)).astype(np.int64)  # 2**64 is so large that the bias is below 1e-7


class BlendPlan:
    """Several corpora mixed by tokens: position p belongs to one of them, and each goes through its own plan without gaps.

    With the shares a_0, a_1, … of the corpora, corpus 0 takes position p when floor((p + 1) a_0) > floor(p a_0), that is, as
    evenly as integers can; the positions it leaves are counted from 0 and shared out among the others in the same way. After any
    number of positions each of N corpora is less than N samples off its share. Nothing is stored: which corpus, and how many of its
    samples came before, is arithmetic on p. Corpora may be of any size; each has its own epochs.

    The corpora lie one behind the other in one address space, in which `starts` gives offsets (`reader.BlendReader` reads it).

    Raises:
        UserError: no corpus, or a weight that is not positive.
    """

    def __init__(self, plans: Sequence[Plan], sizes: Sequence[int], weights: Sequence[float]):
        if not plans or not len(plans) == len(sizes) == len(weights):
            raise ValueError(f"{len(plans)} plans, {len(sizes)} sizes and {len(weights)} weights")
        if any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
            raise UserError(f"data.shards: weights {list(weights)}; each must be a positive number")
        self.sequence_length = plans[0].sequence_length
        self._plans = plans
        self._bases = np.cumsum([0, *sizes[:-1]])
        rest = [math.fsum(weights[i:]) for i in range(len(weights))]
        self._shares = [round(weight / whole * _SHARE_UNIT) for weight, whole in zip(weights, rest, strict=True)]
        if 0 in self._shares:
            raise UserError(
                f"data.shards: weights {list(weights)}; each must be at least {1 / _SHARE_UNIT} of the later ones' sum"
            )

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""
        corpora, own = self.split(positions)
        starts = np.empty_like(own)
        for number, plan in enumerate(self._plans):
            inside = corpora == number
            if inside.any():
                starts[inside] = self._bases[number] + plan.starts(own[inside])
        return starts

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` positions each corpus takes."""
        counts, left = [], samples
        for share in self._shares:
            counts.append(left * share // _SHARE_UNIT)
            left -= counts[-1]
        return counts

    def split(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """The corpus of each position, and the position in that corpus' own order: (n,) -> (n,), (n,)."""
        left = np.array(positions, np.int64)  # counted among the positions that no corpus has taken yet
        if len(left) and int(left.max()) >= 1 << 31:
            raise ValueError(f"position {left.max()}: a blend has {1 << 31} positions")
        corpora, own = np.full_like(left, -1), np.zeros_like(left)
        for number, share in enumerate(self._shares):
            taken_before, taken_after = left * share // _SHARE_UNIT, (left + 1) * share // _SHARE_UNIT
            free = corpora < 0
            takes = free & (taken_after > taken_before)
            corpora[takes], own[takes] = number, taken_before[takes]
            left = np.where(free, left - taken_before, left)
        return corpora, own


class SequentialPlan:
    """Sequences in the order of the stream, once: evaluation.

    Raises:
        UserError: the corpus is shorter than one sequence and its last label.
    """

    def __init__(self, num_tokens: int, sequence_length: int):
        self.sequence_length = sequence_length
        self.samples_per_epoch = count_samples(num_tokens, sequence_length)

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""
        if len(positions) and int(np.max(positions)) >= self.samples_per_epoch:
            raise IndexError(f"sample {np.max(positions)} of {self.samples_per_epoch}")
        return np.asarray(positions, np.int64) * self.sequence_length


def count_samples(num_tokens: int, sequence_length: int) -> int:
    """Whole sequences of a stream, each followed by at least one token (the last label).

    Raises:
        UserError: there is none.
    """
    if sequence_length < 1:
        raise UserError(f"data.sequence_length is {sequence_length}, expected at least 1")
    samples = (num_tokens - 1) // sequence_length
    if samples < 1:
        raise UserError(
            f"corpus of {num_tokens} tokens is shorter than one sequence: data.sequence_length {sequence_length} needs"
            f" {sequence_length + 1} tokens; give more text or shorter sequences"
        )
    return samples


def permute(values: IntArray, size: int, key: int) -> IntArray:
    """A pseudo-random permutation of 0 … size - 1, applied to some of its arguments, (n,) -> (n,).

    A Feistel network over mixed radix: v = left * b + right with a*b >= size and a, b near sqrt(size). A round adds a keyed hash
    of one half to the other, modulo its radix, which is invertible whatever the hash. a*b exceeds size by less than a, so that
    walking the cycle until the value is inside (which keeps it a permutation) rarely takes a second step.
    """
    left_radix = math.isqrt(size - 1) + 1 if size > 1 else 1
    right_radix = -(-size // left_radix)
    result = np.asarray(values).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        result[walking] = _feistel(result[walking], left_radix, right_radix, key)
        walking = walking[result[walking] >= np.uint64(size)]
    return result.astype(np.int64)


def _feistel(values: UIntArray, left_radix: int, right_radix: int, key: int) -> UIntArray:
    left, right = np.divmod(values, np.uint64(right_radix))
    for round_number in range(_ROUNDS):
        round_key = (key + round_number) % (1 << 64)
        if round_number % 2 == 0:
            left = (left + _mix(right, round_key) % np.uint64(left_radix)) % np.uint64(left_radix)
        else:
            right = (right + _mix(left, round_key) % np.uint64(right_radix)) % np.uint64(right_radix)
    return left * np.uint64(right_radix) + right


def _mix(values: UIntArray, key: int) -> UIntArray:
    """Keyed hash of 64-bit integers: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), before and after the key goes in."""
    return _avalanche(_avalanche(values + np.uint64(0x9E3779B97F4A7C15)) ^ _avalanche(np.array([key], np.uint64)))


def _avalanche(values: UIntArray) -> UIntArray:
    z: UIntArray = values
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(seed: int, purpose: str, *numbers: int) -> int:
    """64 bits that share nothing visible between seeds, purposes and numbers."""
    name = ":".join(map(str, (purpose, seed, *numbers)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
