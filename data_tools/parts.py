"""The work of a build cut into parts, and the tokens of each part on disk.

A part is some consecutive input: a range of lines or of row groups of a large file, or several small files. Parts are what ranks
share out and what an interrupted build keeps. They do not show in the shards: these are cut from all parts in order, afterwards.

    parts/00012.train.tokens         ids, one document after the other, each closed by EOS
    parts/00012.train.documents      a record a document: `length` with EOS, and `digest` of the text when duplicates are looked for
    parts/00012.json                 written last: the part is whole. What it was made from, and how much it holds
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.sources import Chunk, Source, Stretch, find_stretches, read_chunks
from data_tools.tokenise import SIDES, Documents, Options, Tokenised
from megarat.data.format import TokenArray, named_errors
from megarat.data.tokenizer import Tokenizer

PART_BYTES = 1 << 28  # of input as stored: a minute or so of one core's tokenising

_INDEPENDENT = ("block_tokens", "shard_tokens")  # options that only decide how the stream of tokens is cut


class Part(NamedTuple):
    """Some consecutive input. `fingerprint` is a hash of everything that decides its tokens."""

    number: int
    stretches: tuple[Stretch, ...]
    fingerprint: str

    @property
    def bytes(self) -> int:
        """Input bytes, as stored."""
        return sum(stretch.stop - stretch.start for stretch in self.stretches)


def plan_parts(sources: list[Source], hashes: list[str], tokenizer: Tokenizer, options: Options, part_bytes: int) -> list[Part]:
    """Cuts the input into parts of about `part_bytes`, in order. The same for any number of ranks."""
    # eos_id: a configuration beside the tokenizer's file may name it, and that is not in the hash
    made_by = [tokenizer.sha256, tokenizer.eos_id, {k: v for k, v in asdict(options).items() if k not in _INDEPENDENT}]
    groups: list[list[Stretch]] = []
    described: list[list[Any]] = []
    room = 0
    for source, sha256 in zip(sources, hashes, strict=True):
        for stretch in find_stretches(source, part_bytes):
            size = stretch.stop - stretch.start
            if not groups or size > room:
                groups.append([])
                described.append([])
                room = part_bytes
            groups[-1].append(stretch)
            described[-1].append([source.name, sha256, stretch.start, stretch.stop])
            room -= size
    return [
        Part(number, tuple(group), hashlib.sha256(json.dumps([made_by, content]).encode()).hexdigest())
        for number, (group, content) in enumerate(zip(groups, described, strict=True))
    ]


def chunks_of(parts: Iterable[Part], options: Options) -> Iterator[Chunk]:
    """The records of parts, a chunk at a time; the last chunk of a part says so."""
    for part in parts:
        waiting: Chunk | None = None
        for stretch in part.stretches:
            for chunk in read_chunks(stretch, text_field=options.text_field, txt_split=options.txt_split):
                if waiting is not None:
                    yield waiting
                waiting = chunk._replace(part=part.number)
        assert waiting is not None
        yield waiting._replace(closes_part=True)


class PartRecord(NamedTuple):
    """What the `.json` of a finished part says."""

    fingerprint: str
    tokens: dict[str, int]  # by side
    documents: dict[str, int]
    left_out: dict[str, int]


class PartFolder:
    """The parts of one build."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], *, with_digests: bool):
        self._folder, self.dtype = folder, dtype
        self._document = np.dtype([("length", "<i8")] + ([("digest", "<u8", 2)] if with_digests else []))

    def path(self, number: int, kind: str) -> Path:
        """The file of a part: kind is "json", "train.tokens", …"""
        return self._folder / f"{number:05d}.{kind}"

    def find(self, part: Part) -> PartRecord | None:
        """The record of a part, if it is finished, whole and made from the same input in the same way."""
        try:
            record = PartRecord(**json.loads(self.path(part.number, "json").read_bytes()))
            sizes = [
                self.path(part.number, f"{side}.tokens").stat().st_size == record.tokens[side] * self.dtype.itemsize
                and self.path(part.number, f"{side}.documents").stat().st_size == record.documents[side] * self._document.itemsize
                for side in SIDES
            ]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record if record.fingerprint == part.fingerprint and all(sizes) else None

    def write(self, parts: list[Part], tokenised: Iterable[Tokenised]) -> Generator[Tokenised]:
        """Writes the parts as their chunks come in; gives the chunks on. A part that is left unfinished leaves nothing."""
        fingerprints = {part.number: part.fingerprint for part in parts}
        writer: _PartWriter | None = None
        try:
            for done in tokenised:
                writer = writer or _PartWriter(self, done.part, self._document)
                writer.add(done)
                if done.closes_part:
                    writer.finish(fingerprints[done.part])
                    writer = None
                yield done
        finally:
            if writer is not None:
                writer.abandon()

    def read_tokens(self, part: int, side: str, start: int, stop: int) -> TokenArray:
        """Some tokens of a part."""
        return np.fromfile(self.path(part, f"{side}.tokens"), self.dtype, count=stop - start, offset=start * self.dtype.itemsize)

    def read_documents(self, part: int, side: str) -> npt.NDArray[Any]:
        """The records of the documents of a part."""
        return np.fromfile(self.path(part, f"{side}.documents"), self._document)


class _PartWriter:
    """The files of a part being written."""

    def __init__(self, folder: PartFolder, number: int, document: np.dtype[Any]):
        self._folder, self._number, self._document = folder, number, document
        self._stack = ExitStack()
        self._tokens = dict.fromkeys(SIDES, 0)
        self._documents = dict.fromkeys(SIDES, 0)
        self._left_out: Counter[str] = Counter()
        self._files: dict[str, IO[bytes]] = {}
        record = folder.path(number, "json")
        with named_errors(record):
            record.unlink(missing_ok=True)  # should we be killed below, an earlier build's would pass for this part's
        for kind in (f"{side}.{what}" for side in SIDES for what in ("tokens", "documents")):
            path = folder.path(number, kind)
            with named_errors(path):
                self._files[kind] = self._stack.enter_context(open(path, "wb"))  # noqa: SIM115 (closed by the stack)

    def add(self, done: Tokenised) -> None:
        self._left_out += done.left_out
        for side, documents in zip(SIDES, (done.train, done.validation), strict=True):
            self._write(f"{side}.tokens", documents.tokens.tobytes())
            self._write(f"{side}.documents", self._to_records(documents).tobytes())
            self._tokens[side] += len(documents.tokens)
            self._documents[side] += len(documents.lengths)

    def _to_records(self, documents: Documents) -> npt.NDArray[Any]:
        records = np.empty(len(documents.lengths), self._document)
        records["length"] = documents.lengths
        if "digest" in (self._document.names or ()):
            records["digest"] = documents.digests
        return records

    def _write(self, kind: str, content: bytes) -> None:
        with named_errors(self._folder.path(self._number, kind)):
            self._files[kind].write(content)

    def finish(self, fingerprint: str) -> None:
        for kind, file in self._files.items():
            with named_errors(self._folder.path(self._number, kind)):
                file.flush()
                os.fsync(file.fileno())
        self._stack.close()
        record = PartRecord(fingerprint, self._tokens, self._documents, dict(self._left_out))
        write_json(self._folder.path(self._number, "json"), record._asdict())

    def abandon(self) -> None:
        """Removes what was written of an unfinished part."""
        with suppress(OSError):  # a full disk fails once more when the buffers are flushed
            self._stack.close()
        for kind in self._files:
            self._folder.path(self._number, kind).unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Puts a small file in place by one rename."""
    staging = path.with_name(path.name + ".partial")
    with named_errors(path):
        staging.write_text(json.dumps(values, sort_keys=True))
        with open(staging, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
