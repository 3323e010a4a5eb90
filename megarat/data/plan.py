"""Where each sample of a training starts, as a pure function of (seed, position).

A *sample* is T input tokens and the one after them, for the labels. A *position* counts samples over the whole training, across
epochs and ranks; it is the only state of the data order. Plans turn positions into offsets of the token stream, in O(1) each and
without a table, so that a resume may seek anywhere in a corpus of any size, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarat.data.format import IntArray
from megarat.errors import UserError

UIntArray = npt.NDArray[np.uint64]

_ROUNDS = 8


class Plan(Protocol):
    """Order of the samples of one corpus."""

    sequence_length: int

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""


class ShuffledPlan:
    """Every sequence once an epoch, in a new random order each epoch.

    Sequence r covers tokens r*T … r*T + T (its labels reach one token into the next sequence); the tail that does not fill a
    sequence is not used. Position p is the sequence `permutation(seed, p // n)(p % n)` of the n there are.

    Raises:
        UserError: the corpus is shorter than one sequence and its last label.
    """

    def __init__(self, num_tokens: int, sequence_length: int, seed: int):
        self.sequence_length = sequence_length
        self.samples_per_epoch = count_samples(num_tokens, sequence_length)
        self._seed = seed

    def starts(self, positions: IntArray) -> IntArray:
        """Offset of the first token of each sample, (n,) -> (n,)."""
        epochs, ranks = np.divmod(np.asarray(positions, np.int64), self.samples_per_epoch)
        sequences = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            sequences[inside] = permute(ranks[inside], self.samples_per_epoch, _key(self._seed, "shuffle", int(epoch)))
        return sequences * self.sequence_length


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


def _key(seed: int, purpose: str, epoch: int) -> int:
    """64 bits that share nothing visible between seeds, purposes and epochs."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}:{seed}:{epoch}".encode(), digest_size=8).digest(), "little")
