"""Tiny corpora for the tests of the data rooms: documents of random ids with a known stream."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megarat.data.format import ShardWriter, TokenizerInfo, join_documents, token_dtype

EOS = 2


class Corpus(NamedTuple):
    folder: Path
    stream: np.ndarray  # every token in order
    documents: list[list[int]]


def make_corpus(
    folder: Path, *, documents: int = 40, vocab: int = 1000, block: int = 64, shard: int = 256, seed: int = 0
) -> Corpus:
    """Shards of documents of 0 to 90 ids, none of them EOS, given to the writer in pieces of 7 documents."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, vocab, size=random.integers(0, 91)).tolist() for _ in range(documents)]
    with ShardWriter(
        folder,
        vocab_size=vocab,
        eos_id=EOS,
        tokenizer=TokenizerInfo("test.model", "sentencepiece", "0" * 64),
        block_tokens=block,
        shard_tokens=shard,
    ) as writer:
        for first in range(0, documents, 7):
            writer.add(join_documents(texts[first : first + 7], EOS, token_dtype(vocab)))
        writer.finish(source={})
    stream = np.array([token for text in texts for token in [*text, EOS]])
    return Corpus(folder, stream, texts)
