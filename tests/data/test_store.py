"""Corpora behind a web server, fsspec and a command: the same tokens as from the folder; gone, slow and damaged ones; the cache."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from corpora import Corpus

from megarat.data import store
from megarat.data.format import Index
from megarat.data.reader import TokenReader
from megarat.data.store import Cache, join
from megarat.errors import UserError


class Server(NamedTuple):
    """A web server on the loopback over a folder."""

    url: str
    asked: Counter[str]  # requests by path
    faults: dict[str, list[int]]  # path -> status codes to answer before the file itself


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own file server, with ranges and with faults on demand."""

    asked: Counter[str]
    faults: dict[str, list[int]]
    ranges = True

    def send_head(self) -> Any:
        self.asked[self.path] += 1
        if self.faults.get(self.path):
            self.send_error(self.faults[self.path].pop(0))
            return None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not self.ranges or wanted is None:
            return super().send_head()
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        part = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "whole files"])
def server(request: pytest.FixtureRequest, corpus: Corpus) -> Iterator[Server]:
    kind = type("BoundHandler", (Handler,), {"asked": Counter(), "faults": {}, "ranges": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(corpus.folder))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Server(f"http://127.0.0.1:{running.server_port}", kind.asked, kind.faults)
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**6)


def cached_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def assert_reads_the_stream(reader: TokenReader, corpus: Corpus) -> None:
    assert reader.num_tokens == len(corpus.stream)
    random = np.random.default_rng(2)
    cuts = [sorted(random.integers(0, len(corpus.stream) + 1, size=2).tolist()) for _ in range(60)]
    for start, stop in [*cuts, (0, len(corpus.stream))]:
        assert np.array_equal(reader.read(start, stop - start), corpus.stream[start:stop])


def test_a_web_server_gives_the_stream_and_each_part_is_fetched_once(server: Server, corpus: Corpus, cache: Cache) -> None:
    reader = TokenReader(server.url, cache)
    assert_reads_the_stream(reader, corpus)
    assert reader.identity == TokenReader(corpus.folder).identity
    index = Index.read(corpus.folder)
    files = [path for path in server.asked if path.endswith(".tar")]
    assert len(files) == len(index.shards)
    blocks = sum(len(shard.offsets) for shard in index.shards)
    # by ranges each block comes once; a server without them is asked for one range and then for each file whole
    assert sum(server.asked[file] for file in files) in (blocks, len(index.shards) + 1)


def test_a_second_reader_finds_everything_in_the_cache(server: Server, corpus: Corpus, cache: Cache) -> None:
    assert_reads_the_stream(TokenReader(server.url, cache), corpus)
    before = sum(server.asked.values())
    assert_reads_the_stream(TokenReader(server.url, cache), corpus)
    again = sum(server.asked.values()) - before
    assert again <= 2  # the index, and the probe for ranges


def test_the_cache_stays_within_its_bound_and_evicts_what_was_used_longest_ago(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    limit = 2 * max(shard.bytes for shard in Index.read(corpus.folder).shards)
    reader = TokenReader(server.url, Cache(tmp_path / "cache", limit))
    for start in range(0, len(corpus.stream) - 10, 50):
        assert np.array_equal(reader.read(start, 10), corpus.stream[start : start + 10])
        assert 0 < cached_bytes(tmp_path / "cache") <= limit
    assert_reads_the_stream(reader, corpus)


def test_processes_that_share_a_cache_stay_within_its_bound_together(tmp_path: Path) -> None:
    """A process knows what it wrote itself; here each `Cache` is one of eight."""
    limit, size = 100_000, 100
    ranks = [Cache(tmp_path / "cache", limit) for _ in range(8)]
    for block in range(3 * limit // size):
        cache = ranks[block % 8]
        cache.make_room(size, "block")
        cache.write(f"{'0' * 16}/000000.tar.{block}", size, iter([bytes(size)]))
        if block % 50 == 0:
            assert cached_bytes(tmp_path / "cache") <= limit
    assert cached_bytes(tmp_path / "cache") > 0.8 * limit


def test_a_users_own_files_in_the_folder_of_the_cache_stay(corpus: Corpus, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    own = [scratch / "results.bin", scratch / "thesis" / "chapter.tar", scratch / "run" / "checkpoints" / "0" / "weights"]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10**5))
        os.utime(path, (1, 1))  # used longest ago
    limit = 2 * max(shard.bytes for shard in Index.read(corpus.folder).shards)
    assert_reads_the_stream(TokenReader(f"pipe:cat {corpus.folder}/{{}}", Cache(scratch, limit)), corpus)
    assert [path.stat().st_size for path in own] == [10**5] * 3
    assert 0 < cached_bytes(scratch) - 3 * 10**5 <= limit


def test_failures_that_pass_are_repeated_and_lasting_ones_end_with_the_address(
    server: Server, corpus: Corpus, cache: Cache
) -> None:
    server.faults["/000000.tar"] = [503, 500]
    reader = TokenReader(server.url, cache)
    assert np.array_equal(reader.read(0, 20), corpus.stream[:20])
    server.faults["/000001.tar"] = [503] * 10
    with pytest.raises(UserError, match=rf"{server.url}/000001\.tar: cannot be fetched, tried 3 times; .* 503"):
        reader.read(256, 20)


def test_a_shard_that_is_gone_is_named_at_once(server: Server, corpus: Corpus, cache: Cache) -> None:
    reader = TokenReader(server.url, cache)
    (corpus.folder / "000002.tar").unlink()
    with pytest.raises(UserError, match=rf"{server.url}/000002\.tar: shard is gone: the server answers 404"):
        reader.read(512, 4)
    assert server.asked["/000002.tar"] <= 2  # not repeated; two when ranges were tried first
    with pytest.raises(UserError, match=rf"{server.url}/nowhere/index\.json: the server answers 404"):
        TokenReader(f"{server.url}/nowhere", cache)


def test_damage_in_the_cache_is_fetched_again_and_damage_at_the_source_is_refused(
    server: Server, corpus: Corpus, cache: Cache, tmp_path: Path
) -> None:
    TokenReader(server.url, cache).read(0, len(corpus.stream))
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            content = bytearray(path.read_bytes())
            content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xff"
            path.write_bytes(content)
    assert_reads_the_stream(TokenReader(server.url, cache), corpus)
    shard = Index.read(corpus.folder).shards[1]
    content = bytearray((corpus.folder / shard.file).read_bytes())
    content[int(shard.offsets[0])] ^= 1
    (corpus.folder / shard.file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{server.url}/000001\.tar: shard is damaged: block 0"):
        TokenReader(server.url, Cache(tmp_path / "empty", 10**6)).read(256, 4)


def test_what_is_fetched_again_is_proven_again(server: Server, corpus: Corpus, cache: Cache, tmp_path: Path) -> None:
    """A block was read and proven, then evicted; what comes in its place is other bytes of the same length."""
    reader = TokenReader(server.url, cache)
    assert np.array_equal(reader.read(0, 10), corpus.stream[:10])
    for path in (tmp_path / "cache").rglob("*.tar*"):
        path.unlink()
    shard = reader.index.shards[0]
    content = bytearray((corpus.folder / shard.file).read_bytes())
    content[int(shard.offsets[0])] ^= 1
    (corpus.folder / shard.file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{server.url}/000000\.tar: shard is damaged: block 0"):
        reader.read(0, 10)


def test_fsspec_urls_give_the_stream(corpus: Corpus, cache: Cache) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(corpus.folder), "/bucket/corpus", recursive=True)
    reader = TokenReader("memory://bucket/corpus", cache)
    assert_reads_the_stream(reader, corpus)
    memory.rm("/bucket/corpus/000003.tar")
    with pytest.raises(UserError, match=r"memory://bucket/corpus/000003\.tar: shard is gone"):
        TokenReader("memory://bucket/corpus", Cache(cache._folder / "other", 10**6)).read(3 * 256, 4)
    with pytest.raises(UserError, match=r"nosuch://x: reading nosuch:// needs fsspec"):
        TokenReader("nosuch://x")


def test_a_pipe_gives_the_stream_and_says_why_it_failed(corpus: Corpus, cache: Cache) -> None:
    reader = TokenReader(f"pipe:cat {corpus.folder}/{{}}", cache)
    assert_reads_the_stream(reader, corpus)
    with pytest.raises(UserError, match=r"pipe:echo lost >&2; false index\.json: cannot be fetched.*exit code 1: lost"):
        TokenReader("pipe:echo lost >&2; false {}", cache)
    with pytest.raises(UserError, match=r"pipe:cat x: a pipe needs \{\}"):
        TokenReader("pipe:cat x", cache)


def test_a_command_that_says_more_than_a_pipe_holds_does_not_stand_still(corpus: Corpus, cache: Cache) -> None:
    talk = "head -c 300000 /dev/zero | tr '\\0' x >&2"
    reader = TokenReader(f'pipe:timeout 5 sh -c "{talk}" && cat {corpus.folder}/{{}}', cache)
    assert np.array_equal(reader.read(0, 20), corpus.stream[:20])
    with pytest.raises(UserError, match=r"exit code 3: x{290}x+ lost$"):
        TokenReader(f"pipe:timeout 5 sh -c \"{talk}\"; echo ' lost' >&2; exit 3 {{}}", cache)


def test_a_shard_cut_on_its_way_is_not_taken_for_whole(corpus: Corpus, cache: Cache, tmp_path: Path) -> None:
    cut = f"pipe:case {{}} in *.tar) head -c 700 {corpus.folder}/{{}};; *) cat {corpus.folder}/{{}};; esac"
    with pytest.raises(UserError, match=r"tried 3 times; the last error: 700 bytes came where the index says"):
        TokenReader(cut, cache).read(0, 4)
    assert cached_bytes(tmp_path / "cache") == 0


def test_a_cache_too_small_for_one_block_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000000\.tar: \d+ bytes do not fit the cache of 100 bytes; raise data\.cache_gb"):
        TokenReader(f"pipe:cat {corpus.folder}/{{}}", Cache(tmp_path / "cache", 100)).read(0, 4)


def test_a_cache_that_cannot_be_written_is_named_at_once(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAUSES", (1000.0,))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.*000000\.tar: cannot be written into the cache: .*; see data\.cache"):
        TokenReader(f"pipe:cat {corpus.folder}/{{}}", Cache(tmp_path / "file", 10**6)).read(0, 4)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "open", full, raising=False)
    with pytest.raises(UserError, match="cannot be written into the cache: No space left on device"):
        TokenReader(f"pipe:cat {corpus.folder}/{{}}", Cache(tmp_path / "cache", 10**6)).read(0, 4)


def test_a_page_that_is_no_index_and_a_server_that_is_not_there_are_named(corpus: Corpus, server: Server, cache: Cache) -> None:
    (corpus.folder / "index.json").write_text("<html>log in first</html>")
    with pytest.raises(UserError, match=rf"{server.url}/index\.json: damaged, not JSON"):
        TokenReader(server.url, cache)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/index\.json: cannot be fetched, tried 3 times; .*refused"):
        TokenReader("http://127.0.0.1:9", cache)


def test_folders_inside_a_location(tmp_path: Path) -> None:
    assert join(tmp_path, "train") == f"{tmp_path}/train"
    assert join("https://host/corpus/", "train") == "https://host/corpus/train"
    assert join("pipe:ssh host cat /data/{}", "train") == "pipe:ssh host cat /data/train/{}"


def test_a_shard_cut_under_the_reader_is_a_message(corpus: Corpus) -> None:
    reader = TokenReader(corpus.folder)
    reader.read(256, 4)
    os.truncate(corpus.folder / "000001.tar", 900)
    with pytest.raises(UserError, match=r"000001\.tar: shard was truncated while it was read: block 1 lacks"):
        reader.read(256 + 64, 4)
