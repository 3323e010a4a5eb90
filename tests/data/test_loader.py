"""Batches against the known stream; the same global sequence of samples on any number of ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import EOS, Corpus

from megarat.data.loader import Loader, PairBatch, chain
from megarat.data.plan import RandomOffsetPlan, SequentialPlan, ShuffledPlan
from megarat.data.reader import TokenReader
from megarat.errors import UserError
from megarat.eval.perplexity import HeldOut

T = 16
GLOBAL_BATCH = 24


def make_loader(folder: Path, micro_batch: int = 2, rank: int = 0, size: int = 1, plan: type = ShuffledPlan) -> Loader:
    reader = TokenReader(folder)
    order = plan(reader.num_tokens, T, 5)
    return Loader(
        reader, order, sequence_length=T, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, data_rank=rank, data_size=size
    )


def rows(batches: list[PairBatch]) -> list[tuple[int, ...]]:
    """Rows of one pair in global order: accumulation step, then rank, then row."""
    steps = zip(*(batch.micro_batches for batch in batches), strict=True)
    return [tuple(row.tolist()) for step in steps for inputs, _ in step for row in inputs]


@pytest.mark.parametrize("plan", [ShuffledPlan, RandomOffsetPlan])
def test_the_global_sequence_and_its_digest_do_not_depend_on_the_ranks(corpus: Corpus, plan: type) -> None:
    def pair(n: int, size: int, micro_batch: int) -> tuple[list[tuple[int, ...]], int]:
        batches = [make_loader(corpus.folder, micro_batch, rank, size, plan).pair(n) for rank in range(size)]
        return rows(batches), sum(batch.digest for batch in batches) % 2**64

    reference = [pair(n, 1, 1) for n in range(4)]
    assert len({digest for _, digest in reference}) == 4
    for size, micro_batch in ((1, 8), (2, 2), (2, 6), (3, 2), (3, 4), (4, 3), (4, 1)):
        assert [pair(n, size, micro_batch) for n in range(4)] == reference


def test_an_epoch_of_pairs_is_the_corpus_cut_into_sequences(corpus: Corpus) -> None:
    samples = (len(corpus.stream) - 1) // T
    loader = make_loader(corpus.folder)
    seen = [row for n in range(samples // GLOBAL_BATCH + 1) for row in rows([loader.pair(n)])][:samples]
    assert sorted(seen) == sorted(tuple(corpus.stream[r * T : r * T + T].tolist()) for r in range(samples))


def test_labels_are_the_next_tokens_and_ignored_after_an_eos_input(corpus: Corpus) -> None:
    reader = TokenReader(corpus.folder)
    loader = Loader(reader, SequentialPlan(reader.num_tokens, T), sequence_length=T, global_batch=8, micro_batch=4)
    ignored = 0
    for n in range(3):
        inputs, labels = (torch.cat(parts) for parts in zip(*loader.pair(n).micro_batches, strict=True))
        assert inputs.dtype == labels.dtype == torch.int64
        for row in range(8):
            for t in range(T):
                place = (n * 8 + row) * T + t
                assert inputs[row, t] == corpus.stream[place]
                expected = -100 if corpus.stream[place] == EOS else corpus.stream[place + 1]
                assert labels[row, t] == expected
                ignored += expected == -100
    assert ignored > 0 and bool((labels == EOS).any() | (inputs == EOS).any())


def test_pairs_count_the_tokens_of_all_ranks(corpus: Corpus) -> None:
    batch = make_loader(corpus.folder, micro_batch=3, rank=1, size=4).pair(0)
    assert batch.tokens == GLOBAL_BATCH * T
    assert [tuple(inputs.shape) for inputs, _ in batch.micro_batches] == [(3, T)] * 2


def test_iterating_from_a_later_pair_continues_the_same_sequence(corpus: Corpus) -> None:
    loader = make_loader(corpus.folder)
    from_zero, from_three = loader.iterate(0), loader.iterate(3)
    for _ in range(3):
        next(from_zero)
    for n in range(3, 8):
        one, other, alone = next(from_zero), next(from_three), loader.pair(n)
        assert one.digest == other.digest == alone.digest
        for (a, b), (c, d) in zip(one.micro_batches, other.micro_batches, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


def test_an_error_of_the_reader_reaches_the_consumer(corpus: Corpus) -> None:
    loader = make_loader(corpus.folder)
    shard = TokenReader(corpus.folder).index.shards[2]
    content = bytearray((corpus.folder / shard.file).read_bytes())
    content[int(shard.offsets[0])] ^= 1
    (corpus.folder / shard.file).write_bytes(content)
    with pytest.raises(UserError, match=r"000002\.tar: shard is damaged"):
        for _, _ in zip(loader.iterate(0), range(20), strict=False):  # several epochs
            pass


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megarat-loader"]


def test_closing_the_iterator_ends_its_thread_even_when_the_queue_is_full(corpus: Corpus) -> None:
    pairs = make_loader(corpus.folder).iterate(0, prefetch=1)
    next(pairs)
    time.sleep(0.05)
    assert len(loader_threads()) == 1
    pairs.close()
    assert loader_threads() == []


def test_evaluation_reads_the_stream_in_order_up_to_its_limit(corpus: Corpus) -> None:
    reader = TokenReader(corpus.folder)
    samples = (len(corpus.stream) - 1) // T
    batches = held_out_batches(HeldOut(reader, T, None), 5)
    inputs = torch.cat([inputs for inputs, _ in batches]).flatten()
    assert np.array_equal(inputs.numpy(), corpus.stream[: samples * T])
    assert all(len(inputs) == 5 for inputs, _ in batches[:-1])
    for limit, expected in ((7 * T, 7), (7 * T + T - 1, 7), (1, 1), (10**9, samples)):
        assert sum(len(inputs) for inputs, _ in held_out_batches(HeldOut(reader, T, limit), 5)) == expected


def held_out_batches(corpus: HeldOut, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All of it, in batches of ``size`` sequences."""
    return [corpus.batch(range(first, min(first + size, corpus.sequences))) for first in range(0, corpus.sequences, size)]


def test_evaluation_refuses_a_corpus_shorter_than_a_sequence(corpus: Corpus) -> None:
    with pytest.raises(UserError, match="shorter than one sequence"):
        HeldOut(TokenReader(corpus.folder), 10**6, None)


def test_a_global_batch_that_does_not_divide_is_refused(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch is 24, expected a multiple of .* = 5 x 2 = 10"):
        make_loader(corpus.folder, micro_batch=5, size=2)


def test_the_stream_hash_depends_on_every_digest_and_their_order() -> None:
    def hash_of(digests: list[int]) -> str:
        value = ""
        for digest in digests:
            value = chain(value, digest)
        return value

    assert len({hash_of(d) for d in ([], [1], [2], [1, 2], [2, 1], [1, 2, 2**64 - 1])}) == 6
    assert chain(hash_of([1, 2]), 3) == hash_of([1, 2, 3])
    assert len(hash_of([5])) == 16
