"""Random access against the known stream, damage against the messages."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from corpora import Corpus, make_corpus

from megarat.data.format import Index
from megarat.data.reader import TokenReader, check_vocabulary
from megarat.errors import UserError


@pytest.mark.parametrize("vocab", [1000, 100_000])
def test_every_stretch_equals_the_stream_across_blocks_and_shards(tmp_path: Path, vocab: int) -> None:
    corpus = make_corpus(tmp_path / "corpus", vocab=vocab)
    reader = TokenReader(corpus.folder)
    assert reader.num_tokens == len(corpus.stream)
    random = np.random.default_rng(1)
    cuts = [sorted(random.integers(0, len(corpus.stream) + 1, size=2).tolist()) for _ in range(200)]
    for start, stop in [*cuts, (0, len(corpus.stream)), (63, 65), (255, 257), (256, 256), (64, 128)]:
        assert np.array_equal(reader.read(start, stop - start), corpus.stream[start:stop])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 10**6), (10**6, 0)])
def test_reading_outside_the_stream_is_an_index_error(corpus: Corpus, start: int, count: int) -> None:
    with pytest.raises(IndexError):
        TokenReader(corpus.folder).read(start, count)


def test_missing_truncated_and_overlong_shards_are_named_when_the_corpus_is_opened(corpus: Corpus) -> None:
    shard = corpus.folder / "000001.tar"
    size = shard.stat().st_size
    for new_size, fault in ((size - 512, "truncated"), (size + 1, "too long")):
        os.truncate(shard, new_size)
        with pytest.raises(UserError, match=rf"000001\.tar: shard is {fault}: {new_size} bytes, index\.json says {size}"):
            TokenReader(corpus.folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"000001\.tar: .* missing"):
        TokenReader(corpus.folder)


def test_a_flipped_bit_is_found_when_its_block_is_first_read(corpus: Corpus) -> None:
    shard = Index.read(corpus.folder).shards[1]
    path = corpus.folder / shard.file
    content = bytearray(path.read_bytes())
    content[int(shard.offsets[2]) + 5] ^= 0x10
    path.write_bytes(content)
    reader = TokenReader(corpus.folder)
    reader.read(256, 2 * 64)  # the blocks before the damaged one
    for _ in range(2):  # and it stays an error
        with pytest.raises(UserError, match=r"000001\.tar: shard is damaged: block 2 "):
            reader.read(256 + 2 * 64 + 1, 1)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(corpus: Corpus) -> None:
    index = Index.read(corpus.folder)
    shard = index.shards[1]
    path = corpus.folder / shard.file
    content = bytearray(path.read_bytes())
    start = int(shard.offsets[1])
    content[start + 6 : start + 8] = (1000).to_bytes(2, "little")  # token 3 of block 1; the vocabulary is 0 … 999
    path.write_bytes(content)
    text = (corpus.folder / "index.json").read_text()
    old, new = int(shard.crc32[1]), zlib.crc32(bytes(content[start : start + 128]))
    (corpus.folder / "index.json").write_text(text.replace(f"{old:08x}", f"{new:08x}"))
    with pytest.raises(UserError, match=r"000001\.tar: token 67 is id 1000, outside the vocabulary of 1000"):
        TokenReader(corpus.folder).read(256 + 64, 1)


def test_a_model_vocabulary_smaller_than_the_tokenizers_is_refused(corpus: Corpus) -> None:
    index = Index.read(corpus.folder)
    check_vocabulary(index, 1000)
    with pytest.raises(UserError, match=r"test\.model.*1000 entries, but model\.vocab is 999"):
        check_vocabulary(index, 999)
