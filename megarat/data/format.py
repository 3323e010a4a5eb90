"""The shard format: WebDataset tars of token blocks beside an `index.json`.

The token stream is every document in order, each followed by one EOS; there is no BOS. The stream is cut into blocks of
`block_tokens` tokens and the blocks into shards; a document may run across both. A shard is an ordinary tar (mtime 0, so equal
input gives equal bytes) whose sample `%08d` holds

    tokens.npy   uint16 (uint32 when the vocabulary needs it), little-endian, shape (block tokens,)
    ends.npy     uint32, shape (documents that end in the block,): offsets within the block just after each EOS

Every block of a shard but its last holds exactly `block_tokens` tokens, so that a position in the stream turns into shard, block
and byte by arithmetic, and an index of 200 billion tokens stays a few tens of megabytes. Keys of `index.json`:

    format, version            "megarat-shards", 2
    dtype, vocab_size, eos_id  how to read the tokens
    block_tokens               tokens of a full block
    tokenizer                  {name, kind, sha256} of the tokenizer's file
    total_tokens, total_documents
    shards                     [{file, bytes, sha256, tokens, documents, offsets, crc32}, …] in stream order:
                               `offsets` are the byte positions of each block's tokens in the tar, each as its distance from
                               the one before (from 0 the first), `crc32` their checksums, so that a reader can prove each block
                               it touches; both 8 hexadecimal digits a block in one string
    source                     provenance: input files with sizes and hashes, options

Version 1, which listed the offsets as plain numbers, is read too.

A folder without `index.json` is not a corpus: the writer puts the index in place last, by one rename.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megarat.data.store import Gone, LocalStore, Store
from megarat.errors import UserError
from megarat.files import sync

FORMAT = "megarat-shards"
VERSION = 2
READABLE_VERSIONS = (1, 2)
INDEX_NAME = "index.json"
DEFAULT_BLOCK_TOKENS = 1 << 16
DEFAULT_SHARD_TOKENS = 1 << 26  # 128 MiB of uint16: few files for the file system, small enough to move around

_HASH_CHUNK = 1 << 22

TokenArray = npt.NDArray[Any]  # uint16 or uint32
IntArray = npt.NDArray[np.int64]
Progress = Callable[[int], object]  # called with the bytes just done


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest little-endian dtype that holds every id of a vocabulary."""
    if vocab_size > 1 << 32:
        raise UserError(f"vocabulary of {vocab_size} entries: at most {1 << 32} fit the shard format")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def file_sha256(path: Path, progress: Progress = lambda done: None) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_HASH_CHUNK):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


class TokenizerInfo(NamedTuple):
    """Which tokenizer made the shards: file name, kind ("sentencepiece" or "huggingface") and SHA-256 of the file."""

    name: str
    kind: str
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One tar: its size and hash, what it holds, and where the tokens of each block start."""

    file: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    offsets: IntArray  # (blocks,) byte position of each block's tokens in the tar
    crc32: npt.NDArray[np.uint32]  # (blocks,) checksum of those bytes


def block_sizes(tokens: int, block_tokens: int) -> IntArray:
    """Tokens of each block of a shard, (blocks,): all full but the last."""
    starts = np.arange(0, tokens, block_tokens, dtype=np.int64)
    return np.minimum(block_tokens, tokens - starts)


@dataclass(frozen=True)
class Index:
    """What `index.json` says, validated. `location` is the folder or URL it came from."""

    location: str
    dtype: np.dtype[Any]
    vocab_size: int
    eos_id: int
    block_tokens: int
    tokenizer: TokenizerInfo
    shards: tuple[Shard, ...]
    source: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The location of a corpus on this machine's file system."""
        return Path(self.location)

    @property
    def total_tokens(self) -> int:
        """Tokens of the stream, EOS included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def total_documents(self) -> int:
        """Documents of the stream: the number of EOS that close one."""
        return sum(shard.documents for shard in self.shards)

    @classmethod
    def read(cls, folder: str | Path) -> Index:
        """Reads and validates `folder/index.json`. Raises what `parse` does."""
        store = LocalStore(Path(folder))
        return cls.parse(load_index(store), store.location)

    @classmethod
    def parse(cls, content: bytes, location: str) -> Index:
        """Validates the contents of an `index.json`.

        Raises:
            UserError: it is not JSON, has another version, or contradicts itself (the key is named).
        """
        name = f"{location}/{INDEX_NAME}"
        fields = _Fields(name, "", _parse_json(content, name))
        if (found := fields.get("format", str)) != FORMAT:
            raise fields.error("format", f"is {found!r}, expected {FORMAT!r}: this is not an index of token shards")
        if (version := fields.get("version", int)) not in READABLE_VERSIONS:
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise fields.error("version", f"is {version}; this megarat reads versions {known}: build the shards again")
        index = _parse_index(fields, location)
        for key, counted in (("total_tokens", index.total_tokens), ("total_documents", index.total_documents)):
            if (claimed := fields.get(key, int)) != counted:
                raise fields.error(key, f"is {claimed}, but the shards listed add up to {counted}")
        return index

    def write(self) -> Path:
        """Puts `index.json` in place by one rename. Call it after every shard it lists is on disk."""
        path = self.folder / INDEX_NAME
        with named_errors(path), _staged(path) as file:
            file.write((json.dumps(self._to_json(), sort_keys=True) + "\n").encode())
        return path

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "block_tokens": self.block_tokens,
            "tokenizer": self.tokenizer._asdict(),
            "total_tokens": self.total_tokens,
            "total_documents": self.total_documents,
            "shards": [shard_to_json(shard) for shard in self.shards],
            "source": self.source,
        }

    def check_file(self, shard: Shard) -> Path:
        """The shard's path, if a file of the right size is there.

        Raises:
            UserError: the file is missing or has another size than the index says.
        """
        path = self.folder / shard.file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: shard listed in {INDEX_NAME} is missing ({error.strerror})") from None
        if found != shard.bytes:
            fault = "truncated" if found < shard.bytes else "too long"
            raise UserError(f"{path}: shard is {fault}: {found} bytes, {INDEX_NAME} says {shard.bytes}")
        return path


def verify(folder: str | Path, progress: Progress = lambda done: None, workers: int = 1) -> Index:
    """Hashes every shard of a corpus again, and the tokenizer's file where the corpus carries it.

    Args:
        folder: where `index.json` and its shards lie.
        progress: called with the number of bytes just hashed.
        workers: shards hashed at a time, by threads: hashing and reading both run outside the interpreter's lock.

    Raises:
        UserError: lists every shard that is missing, has another size or other contents.
    """
    index = Index.read(folder)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: _find_fault(index, shard, progress), index.shards)
        faults = [fault for fault in (*found, _find_tokenizer_fault(index)) if fault]
    if faults:
        raise UserError("\n".join(faults))
    return index


def _find_fault(index: Index, shard: Shard, progress: Progress) -> str | None:
    try:
        path = index.check_file(shard)
        with named_errors(path, "read"):
            found = file_sha256(path, progress)
    except UserError as error:
        return str(error)
    if found != shard.sha256:
        return f"{path}: shard is damaged: SHA-256 {found}, {INDEX_NAME} says {shard.sha256}"
    return None


def _find_tokenizer_fault(index: Index) -> str | None:
    try:
        check_tokenizer_file(index)
    except UserError as error:
        return str(error)
    return None


def check_tokenizer_file(index: Index) -> None:
    """Refuses a corpus beside which lies another tokenizer than the one its shards were made with.

    Raises:
        UserError: the tokenizer's file in `folder/../tokenizer` has another hash than the index says.
    """
    file = index.folder.parent / "tokenizer" / index.tokenizer.name
    if file.is_file():
        check_tokenizer(index, str(file), file_sha256(file))


def check_tokenizer(index: Index, name: str, sha256: str) -> None:
    """Refuses a tokenizer's file (`name`, in messages) whose hash is not that of the one the shards were made with."""
    if sha256 != index.tokenizer.sha256:
        raise UserError(
            f"{name}: SHA-256 {sha256} is not that of the tokenizer the shards in {index.location} were made with"
            f" (SHA-256 {index.tokenizer.sha256}); restore the file"
        )


class Piece(NamedTuple):
    """A stretch of the stream: whole documents, each closed by EOS."""

    tokens: TokenArray  # (n,)
    ends: IntArray  # (documents,) offsets just after each EOS


def join_documents(documents: Iterable[list[int]], eos_id: int, dtype: np.dtype[Any]) -> Piece:
    """Documents as ids, without special ids -> one stretch of the stream."""
    # by way of int64: numpy turns a list into a narrow type half as fast
    arrays = [np.array([*ids, eos_id], dtype=np.int64).astype(dtype) for ids in documents]
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return Piece(np.concatenate(arrays) if arrays else np.empty(0, dtype), np.cumsum(lengths))


class ShardWriter:
    """Writes a corpus into a folder: `add` pieces in order, then `finish`.

    Use it as a context manager: leaving it by an exception removes the shard that was being written. Shards are staged beside
    their final name, synced and renamed; the index comes last.

    Raises:
        UserError: the disk is full or cannot be written, or `finish` finds that nothing was added.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        eos_id: int,
        tokenizer: TokenizerInfo,
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
    ):
        if block_tokens < 1 or shard_tokens < 1 or shard_tokens % block_tokens:
            raise UserError(f"shard tokens ({shard_tokens}) must be a positive multiple of block tokens ({block_tokens})")
        self._folder = Path(folder)
        self._head: dict[str, Any] = {"vocab_size": vocab_size, "eos_id": eos_id, "tokenizer": tokenizer}
        self._dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._block_tokens, self._shard_tokens = block_tokens, shard_tokens
        self._waiting = Piece(np.empty(0, self._dtype), np.empty(0, np.int64))  # less than one block
        self._open: _OpenShard | None = None
        self._shards: list[Shard] = []
        with named_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open is not None:
            self._open.abandon()

    def add(self, piece: Piece) -> None:
        """Appends whole documents to the stream."""
        if len(piece.tokens) and int(piece.tokens.max()) >= self._vocab_size:
            raise UserError(f"tokenizer gave id {piece.tokens.max()}, outside its vocabulary of {self._vocab_size}")
        self._waiting = Piece(
            np.concatenate([self._waiting.tokens, piece.tokens]),
            np.concatenate([self._waiting.ends, piece.ends + len(self._waiting.tokens)]),
        )
        self._write_blocks(smallest=self._block_tokens)

    def finish(self, source: dict[str, Any]) -> Index:
        """Writes what is left and then the index, with the given provenance, which makes the folder a corpus."""
        self._write_blocks(smallest=1)
        self._close_shard()
        if not self._shards:
            raise UserError(f"{self._folder}: empty corpus: no document was added")
        index = Index(
            location=str(self._folder),
            dtype=self._dtype,
            block_tokens=self._block_tokens,
            shards=tuple(self._shards),
            source=source,
            **self._head,
        )
        index.write()
        return index

    def _write_blocks(self, smallest: int) -> None:
        """Writes blocks from the waiting tokens while at least `smallest` of them are left."""
        tokens, ends = self._waiting
        start = 0
        while len(tokens) - start >= smallest:
            stop = min(start + self._block_tokens, len(tokens))
            first, last = np.searchsorted(ends, [start, stop], side="right")  # an end e is inside when start < e <= stop
            self._write_block(tokens[start:stop], ends[first:last] - start)
            start = stop
        self._waiting = Piece(tokens[start:], ends[ends > start] - start)

    def _write_block(self, tokens: TokenArray, ends: IntArray) -> None:
        if self._open is None:
            self._open = _OpenShard(self._folder / f"{len(self._shards):06d}.tar")
        self._open.write_block(tokens, ends)
        if self._open.tokens >= self._shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None


def write_shard(path: Path, piece: Piece, block_tokens: int) -> Shard:
    """Writes one shard, whole: under another name until it is on disk.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    shard = _OpenShard(path)
    try:
        for start in range(0, len(piece.tokens), block_tokens):
            stop = min(start + block_tokens, len(piece.tokens))
            first, last = np.searchsorted(piece.ends, [start, stop], side="right")  # an end e is inside when start < e <= stop
            shard.write_block(piece.tokens[start:stop], piece.ends[first:last] - start)
        return shard.close()
    except BaseException:
        shard.abandon()
        raise


class _OpenShard:
    """A tar being written under its staging name."""

    def __init__(self, path: Path):
        self._path = path
        self._stack = ExitStack()
        with named_errors(path):
            self._file = _HashingFile(self._stack.enter_context(_staged(path)))
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        self.tokens = self._documents = 0
        self._offsets: list[int] = []
        self._crc32: list[int] = []

    def write_block(self, tokens: TokenArray, ends: IntArray) -> None:
        key = f"{len(self._offsets):08d}"
        with named_errors(self._path):
            payload_end = self._add_array(f"{key}.tokens.npy", tokens)
            self._add_array(f"{key}.ends.npy", ends.astype("<u4"))
        self._offsets.append(payload_end - tokens.nbytes)
        self._crc32.append(zlib.crc32(tokens.tobytes()))
        self.tokens += len(tokens)
        self._documents += len(ends)

    def _add_array(self, name: str, array: npt.NDArray[Any]) -> int:
        """Appends one member; returns the byte position just after its contents (before the tar's padding)."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        member = tarfile.TarInfo(name)  # owner 0, mtime 0 as an integer: a float would add a pax header of 1 KiB
        member.size = buffer.tell()
        buffer.seek(0)
        self._tar.addfile(member, buffer)
        return self._file.tell() - -member.size % tarfile.BLOCKSIZE

    def close(self) -> Shard:
        with named_errors(self._path):
            self._tar.close()
            size = self._file.tell()
            self._stack.close()
        return Shard(
            file=self._path.name,
            bytes=size,
            sha256=self._file.sha256.hexdigest(),
            tokens=self.tokens,
            documents=self._documents,
            offsets=np.array(self._offsets, dtype=np.int64),
            crc32=np.array(self._crc32, dtype=np.uint32),
        )

    def abandon(self) -> None:
        """Removes the staging file."""
        self._stack.__exit__(_Abandoned, _Abandoned(), None)


class _Abandoned(Exception):
    """Unwinds a staged file that will not be finished."""


class _HashingFile:
    """The part of a file object that `tarfile` writes through, with a running SHA-256."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _staged(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name only when it is complete and on disk; on any error nothing is left of it."""
    staging = path.with_name(path.name + ".partial")
    file = open(staging, "wb", buffering=1 << 20)  # noqa: SIM115 (closed below, also when flushing fails)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(staging, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):  # a full disk fails once more when the buffer is flushed
            file.close()
        staging.unlink(missing_ok=True)
        raise


@contextmanager
def named_errors(path: Path, action: str = "written") -> Iterator[None]:
    """Turns an operating system error (disk full, no permission) into a message that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be {action}: {error.strerror}") from error


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """An entry of the index."""
    return {
        "file": shard.file,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "tokens": shard.tokens,
        "documents": shard.documents,
        "offsets": _to_hex(np.diff(shard.offsets, prepend=0)),
        "crc32": _to_hex(shard.crc32),
    }


def shard_from_json(values: dict[str, Any], name: str, block_tokens: int, dtype: np.dtype[Any]) -> Shard:
    """A shard from its entry of an index; `name` is the file it was found in. Raises UserError if it contradicts itself."""
    return _parse_shard(_Fields(name, "shard.", values), block_tokens, dtype.itemsize)


def _to_hex(values: npt.NDArray[Any]) -> str:
    """Numbers below 2**32 as 8 hexadecimal digits each: parsing a list of millions of decimal ones would take a second."""
    return values.astype(">u4").tobytes().hex()


def _from_hex(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(bytes.fromhex(text), dtype=">u4").astype(np.uint32)


def load_index(store: Store) -> bytes:
    """The contents of the `index.json` of a corpus.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return store.load(INDEX_NAME)
    except Gone as error:
        raise UserError(
            f"{store.name(INDEX_NAME)}: {error}; expected a folder of finished shards, as data_tools/build_shards.py makes"
        ) from None


def _parse_json(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name}: damaged, not JSON ({error}): restore it or build the shards again") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: damaged, holds a {type(found).__name__} where an object is expected")
    return found


class _Fields:
    """A JSON object whose keys are read with their types checked; errors name the file and the key."""

    def __init__(self, name: str, prefix: str, values: dict[str, Any]):
        self._name, self._prefix, self._values = name, prefix, values

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a key, which must have the given type, or one of them; integers must not be negative."""
        if key not in self._values:
            raise self.error(key, "is missing")
        value = self._values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            names = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))]
            raise self.error(key, f"is {value!r:.80}, expected {' or '.join(names)}")
        if isinstance(value, int) and value < 0:
            raise self.error(key, f"is {value}, expected 0 or more")
        return value

    def inside(self, key: str, values: Any) -> _Fields:
        """The object found under a key."""
        if not isinstance(values, dict):
            raise self.error(key, f"is {values!r:.80}, expected an object")
        return _Fields(self._name, f"{self._prefix}{key}.", values)

    def error(self, key: str, fault: str) -> UserError:
        return UserError(f"{self._name}: key `{self._prefix}{key}` {fault}")


def _parse_index(fields: _Fields, location: str) -> Index:
    name = fields.get("dtype", str)
    if name not in ("uint16", "uint32"):
        raise fields.error("dtype", f"is {name!r}, expected 'uint16' or 'uint32'")
    dtype = np.dtype(name).newbyteorder("<")
    vocab_size, eos_id, block_tokens = (fields.get(key, int) for key in ("vocab_size", "eos_id", "block_tokens"))
    if eos_id >= vocab_size:
        raise fields.error("eos_id", f"is {eos_id}, outside the vocabulary of {vocab_size}")
    if block_tokens == 0:
        raise fields.error("block_tokens", "is 0, expected at least 1")
    shards = fields.get("shards", list)
    if not shards:
        raise fields.error("shards", "is empty: the corpus holds no tokens")
    made_by = fields.inside("tokenizer", fields.get("tokenizer", dict))
    if (file := made_by.get("name", str)) != Path(file).name:  # a run writes a remote corpus' tokenizer under it
        raise made_by.error("name", f"is {file!r}, expected the name of a file")
    return Index(
        location=location,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_id=eos_id,
        block_tokens=block_tokens,
        tokenizer=TokenizerInfo(*(made_by.get(key, str) for key in TokenizerInfo._fields)),
        shards=tuple(_parse_shard(fields.inside(f"shards[{i}]", s), block_tokens, dtype.itemsize) for i, s in enumerate(shards)),
        source=fields.get("source", dict),
    )


def _parse_shard(fields: _Fields, block_tokens: int, itemsize: int) -> Shard:
    try:
        offsets = _parse_offsets(fields)
        crc32 = _from_hex(fields.get("crc32", str))
    except (TypeError, ValueError, OverflowError) as error:
        raise fields.error("offsets", f"or `crc32` is not a list of numbers: {error}") from None
    shard = Shard(
        file=fields.get("file", str),
        bytes=fields.get("bytes", int),
        sha256=fields.get("sha256", str),
        tokens=fields.get("tokens", int),
        documents=fields.get("documents", int),
        offsets=offsets,
        crc32=crc32,
    )
    if Path(shard.file).name != shard.file:
        raise fields.error("file", f"is {shard.file!r}, expected the name of a file in this folder")
    if shard.tokens == 0:
        raise fields.error("tokens", "is 0, expected at least 1")
    sizes = block_sizes(shard.tokens, block_tokens)
    if not offsets.shape == crc32.shape == sizes.shape:
        raise fields.error("offsets", f"and `crc32` must list the {len(sizes)} blocks that {shard.tokens} tokens make")
    stops = offsets + sizes * itemsize
    if offsets[0] < tarfile.BLOCKSIZE or (offsets[1:] < stops[:-1]).any() or stops[-1] > shard.bytes:
        raise fields.error("offsets", f"does not describe blocks inside a file of {shard.bytes} bytes")
    return shard


def _parse_offsets(fields: _Fields) -> IntArray:
    """Byte positions, stored as distances in hexadecimal digits (version 2) or as a list of numbers (version 1)."""
    if isinstance(found := fields.get("offsets", (str, list)), list):
        return np.array(found, dtype=np.int64)
    return np.cumsum(_from_hex(found), dtype=np.int64)
