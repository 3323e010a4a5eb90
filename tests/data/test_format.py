"""The shards against Python's own tarfile and numpy, and against webdataset; damage against the messages."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpora import EOS, Corpus, make_corpus

from megarat.data import format as shard_format
from megarat.data.format import Index, ShardWriter, TokenizerInfo, join_documents, token_dtype, verify
from megarat.data.reader import stream
from megarat.errors import UserError


def read_tar(path: Path) -> dict[str, np.ndarray]:
    with tarfile.open(path) as tar:
        return {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar.getmembers()}


def change_index(corpus: Corpus, **changes: object) -> None:
    path = corpus.folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tarfile_and_numpy_read_the_stream_and_the_document_ends(corpus: Corpus) -> None:
    tokens, ends, start = [], [], 0
    for tar in sorted(corpus.folder.glob("*.tar")):
        members = read_tar(tar)
        for key in sorted({name.split(".")[0] for name in members}):
            block = members[f"{key}.tokens.npy"]
            tokens.append(block)
            ends += (members[f"{key}.ends.npy"].astype(np.int64) + start).tolist()
            start += len(block)
    assert np.array_equal(np.concatenate(tokens), corpus.stream)
    assert ends == np.cumsum([len(d) + 1 for d in corpus.documents]).tolist()


def test_offsets_in_the_index_point_at_the_tokens(corpus: Corpus) -> None:
    index = Index.read(corpus.folder)
    assert len(index.shards) > 2
    for shard in index.shards:
        raw, members = (corpus.folder / shard.file).read_bytes(), read_tar(corpus.folder / shard.file)
        for block, offset in enumerate(shard.offsets.tolist()):
            expected = members[f"{block:08d}.tokens.npy"]
            assert np.array_equal(np.frombuffer(raw, "<u2", len(expected), offset), expected)


def test_an_index_of_version_1_with_plain_offsets_is_read_the_same(corpus: Corpus) -> None:
    new = Index.read(corpus.folder)
    shards = json.loads((corpus.folder / "index.json").read_text())["shards"]
    for entry, shard in zip(shards, new.shards, strict=True):
        entry["offsets"] = shard.offsets.tolist()
    change_index(corpus, version=1, shards=shards)
    old = Index.read(corpus.folder)
    for one, other in zip(new.shards, old.shards, strict=True):
        assert np.array_equal(one.offsets, other.offsets) and np.array_equal(one.crc32, other.crc32)


def test_webdataset_itself_reads_the_shards(corpus: Corpus) -> None:
    blocks = list(stream(corpus.folder))
    assert np.array_equal(np.concatenate([tokens for tokens, _ in blocks]), corpus.stream)
    assert sum(len(ends) for _, ends in blocks) == len(corpus.documents)


def test_totals_and_shard_sizes_are_recorded(corpus: Corpus) -> None:
    index = Index.read(corpus.folder)
    assert (index.total_tokens, index.total_documents) == (len(corpus.stream), len(corpus.documents))
    assert [shard.tokens for shard in index.shards[:-1]] == [256] * (len(index.shards) - 1)


def test_equal_input_gives_equal_bytes_however_it_is_cut_into_pieces(tmp_path: Path, corpus: Corpus) -> None:
    again = tmp_path / "again"
    with ShardWriter(
        again,
        vocab_size=1000,
        eos_id=EOS,
        tokenizer=TokenizerInfo("test.model", "sentencepiece", "0" * 64),
        block_tokens=64,
        shard_tokens=256,
    ) as writer:
        writer.add(join_documents(corpus.documents, EOS, token_dtype(1000)))
        writer.finish(source={})
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in corpus.folder.iterdir()}


@pytest.mark.parametrize(("vocab", "name"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path, vocab: int, name: str) -> None:
    corpus = make_corpus(tmp_path / "corpus", vocab=vocab)
    index = Index.read(corpus.folder)
    assert index.dtype == np.dtype(name)
    assert np.array_equal(np.concatenate([tokens for tokens, _ in stream(corpus.folder)]), corpus.stream)


def test_verify_accepts_a_whole_corpus_and_reports_its_bytes(corpus: Corpus) -> None:
    done: list[int] = []
    verify(corpus.folder, done.append)
    assert sum(done) == sum(p.stat().st_size for p in corpus.folder.glob("*.tar"))


def test_verify_names_every_missing_truncated_and_flipped_shard(corpus: Corpus) -> None:
    missing, short, flipped = (corpus.folder / f"00000{i}.tar" for i in range(3))
    missing.unlink()
    os.truncate(short, short.stat().st_size - 1)
    content = bytearray(flipped.read_bytes())
    content[700] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(UserError) as error:
        verify(corpus.folder)
    lines = str(error.value).splitlines()
    assert [(line.split(": ")[0], line) for line in lines] == [
        (str(p), line) for p, line in zip((missing, short, flipped), lines, strict=True)
    ]
    assert "missing" in lines[0] and "truncated" in lines[1] and "SHA-256" in lines[2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 3}, "`version` is 3; this megarat reads versions 1 and 2"),
        ({"format": "other"}, "`format`"),
        ({"dtype": "int8"}, "`dtype`"),
        ({"eos_id": 1000}, "`eos_id`"),
        ({"eos_id": "2"}, "`eos_id` is '2', expected int"),
        ({"block_tokens": 0}, "`block_tokens`"),
        ({"block_tokens": 32}, r"`shards\[0\]\.offsets`"),
        ({"total_tokens": 1}, "`total_tokens` is 1, but"),
        ({"total_documents": 1}, "`total_documents`"),
        ({"shards": []}, "`shards` is empty"),
        ({"shards": [3]}, r"`shards\[0\]` is 3"),
        ({"tokenizer": {"name": "x", "kind": "y"}}, "`tokenizer.sha256` is missing"),
        (
            {"tokenizer": {"name": "../../x", "kind": "y", "sha256": "z"}},
            r"`tokenizer\.name` is '\.\./\.\./x', expected the name",
        ),
    ],
)
def test_an_inconsistent_index_is_refused_by_the_key_at_fault(corpus: Corpus, changes: dict[str, object], named: str) -> None:
    change_index(corpus, **changes)
    with pytest.raises(UserError, match=rf"index\.json: key {named}"):
        Index.read(corpus.folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../000000.tar"),
        ("tokens", 0),
        ("offsets", [0] * 4),
        ("offsets", ["x"]),
        ("bytes", 100),
        ("crc32", "zz"),
        ("crc32", "00"),
    ],
)
def test_an_inconsistent_shard_entry_is_refused(corpus: Corpus, key: str, value: object) -> None:
    shards = json.loads((corpus.folder / "index.json").read_text())["shards"]
    shards[0][key] = value
    change_index(corpus, shards=shards)
    with pytest.raises(UserError, match=r"index\.json: key `shards\[0\]\."):
        Index.read(corpus.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_or_missing_index_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"index\.json: no such file"):
        Index.read(tmp_path)
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        Index.read(tmp_path)


def test_a_full_disk_is_a_clear_message_and_leaves_no_staging_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_format.os, "fsync", full)
    with pytest.raises(UserError, match=r"000000\.tar: cannot be written: No space left on device"):
        make_corpus(tmp_path / "corpus")
    assert list((tmp_path / "corpus").iterdir()) == []


def test_an_interrupted_writer_leaves_nothing_that_looks_like_a_corpus(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(
            tmp_path,
            vocab_size=10,
            eos_id=EOS,
            tokenizer=TokenizerInfo("t", "sentencepiece", ""),
            block_tokens=4,
            shard_tokens=8,
        ) as writer,
    ):
        writer.add(join_documents([[3] * 12], EOS, token_dtype(10)))
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["000000.tar"]
    with pytest.raises(UserError, match="no such file"):
        Index.read(tmp_path)


def test_ids_outside_the_vocabulary_and_uneven_shards_are_refused(tmp_path: Path) -> None:
    made_by = TokenizerInfo("t", "sentencepiece", "")
    writer = ShardWriter(tmp_path, vocab_size=10, eos_id=EOS, tokenizer=made_by)
    with pytest.raises(UserError, match="id 10, outside its vocabulary of 10"):
        writer.add(join_documents([[10]], EOS, token_dtype(10)))
    with pytest.raises(UserError, match="empty corpus"):
        writer.finish(source={})
    with pytest.raises(UserError, match="multiple of block tokens"):
        ShardWriter(tmp_path, vocab_size=10, eos_id=EOS, tokenizer=made_by, block_tokens=4, shard_tokens=6)
