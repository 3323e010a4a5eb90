"""Documents out of text files: `.txt`, `.jsonl` (each also as `.gz` or `.zst`) and `.parquet`.

Reading is split in two, so that it scales over processes: `read_chunks` cuts a file into records without looking into them (one
process, in order), `to_text` turns one record into text or says what is wrong with it (any process).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from megarat.errors import UserError

TXT_SPLITS = ("file", "paragraph")
SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DAMAGE = (OSError, EOFError, zlib.error)  # gzip's own error is an OSError
_DAMAGE_LIBRARIES = ("zstandard", "pyarrow")  # imported only when needed, so their errors go by where they come from


class Source(NamedTuple):
    """One input file, and its name relative to the input that led to it (provenance without machine paths)."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """The suffix that says how to read it, without a compression: one of SUFFIXES."""
        return _kind(self.path)

    @property
    def unit(self) -> str:
        """What `Record.number` counts."""
        return "row" if self.kind == ".parquet" else "line"


class Record(NamedTuple):
    """One document before parsing: its line or row in the file, from 1, and its bytes (None: a null in a table)."""

    number: int
    content: bytes | None


class Chunk(NamedTuple):
    """Some records of one file, and how many bytes of the file as stored they used up."""

    source: Source
    records: list[Record]
    consumed: int


class BadRecord(Exception):
    """A record that is no document. `lines` is how many lines into the record the fault lies."""

    def __init__(self, fault: str, lines: int = 0):
        super().__init__(fault)
        self.lines = lines


def find_sources(inputs: Iterable[str | Path]) -> list[Source]:
    """The files of a list of files and folders; folders are searched through, in the order of their names.

    Raises:
        UserError: an input is missing, a file is of no known type, or a folder holds none that is.
    """
    sources: list[Source] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.is_file() and _kind(p) in SUFFIXES and not _hidden(p.relative_to(path))
            )
            if not found:
                raise UserError(f"{path}: no {_known_types()} file in this folder")
            sources += [Source(p, p.relative_to(path.parent).as_posix()) for p in found]
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        elif _kind(path) not in SUFFIXES:
            raise UserError(f"{path}: unknown type of file, expected {_known_types()}")
        else:
            sources.append(Source(path, path.name))
    return sources


def read_chunks(source: Source, *, text_field: str, txt_split: str) -> Iterator[Chunk]:
    """Cuts a file into chunks of about a megabyte of whole records.

    Raises:
        UserError: the file is damaged (compression, table) or has no column `text_field`.
    """
    size, done = source.path.stat().st_size, 0
    batch: list[Record] = []
    batch_bytes = 0
    with _damage_named(source.path):
        for record, position in _records(source, text_field, txt_split):
            batch.append(record)
            batch_bytes += len(record.content or b"")
            if batch_bytes >= _CHUNK_BYTES:
                yield Chunk(source, batch, position - done)
                batch, batch_bytes, done = [], 0, position
    yield Chunk(source, batch, size - done)


def to_text(source: Source, record: Record, text_field: str) -> str:
    """The text of one record.

    Raises:
        BadRecord: not UTF-8, not a JSON object, no text under `text_field`.
    """
    if record.content is None:
        raise BadRecord(f"null in column {text_field!r}")
    try:
        text = record.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 ({error.reason})", record.content[: error.start].count(b"\n")) from None
    return _field_of_line(text, text_field) if source.kind == ".jsonl" else text


def _field_of_line(line: str, text_field: str) -> str:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise BadRecord(f"a JSON {type(values).__name__} where an object is expected")
    if text_field not in values:
        raise BadRecord(f"no field {text_field!r} (there are: {', '.join(map(repr, values)) or 'none'})")
    text = values[text_field]
    if not isinstance(text, str):
        raise BadRecord(f"field {text_field!r} is {text!r:.60}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON's escapes can spell it
        raise BadRecord(f"field {text_field!r} holds half a surrogate pair, which is no text") from None
    return text


def _records(source: Source, text_field: str, txt_split: str) -> Iterator[tuple[Record, int]]:
    """Records of a file, each with the position in the stored file after it."""
    if source.kind == ".parquet":
        yield from _parquet_records(source.path, text_field)
        return
    with open(source.path, "rb") as stored, _decompressed(source.path, stored) as file:
        if source.kind == ".jsonl":
            found = _line_records(file)
        elif txt_split == "paragraph":
            found = _paragraph_records(file)
        else:
            found = iter([Record(1, file.read().removeprefix(_BYTE_ORDER_MARK))])
        for record in found:
            yield record, stored.tell()


def _line_records(file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield Record(number, content)


def _paragraph_records(file: IO[bytes]) -> Iterator[Record]:
    """Runs of lines between blank ones."""
    lines: list[bytes] = []
    number = 0
    for number, line in enumerate(file, 1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            lines.append(content)
        elif lines:
            yield Record(number - len(lines), b"".join(lines).rstrip())
            lines = []
    if lines:
        yield Record(number + 1 - len(lines), b"".join(lines).rstrip())


def _parquet_records(path: Path, text_field: str) -> Iterator[tuple[Record, int]]:
    with _library_named(path):
        import pyarrow as pa
        import pyarrow.parquet as pq

    size = path.stat().st_size
    with pq.ParquetFile(path) as table:
        if text_field not in table.schema_arrow.names:
            raise UserError(
                f"{path}: no column {text_field!r} (there are: {', '.join(table.schema_arrow.names)}); see --text-field"
            )
        kind = table.schema_arrow.field(text_field).type
        if kind not in (pa.string(), pa.large_string()):
            raise UserError(f"{path}: column {text_field!r} is of type {kind}, expected string")
        number = 0
        for group in range(table.num_row_groups):
            with _damage_named(path, f"row group {group}: "):
                for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_field]):
                    for value in batch.column(0).cast(pa.large_binary()).to_pylist():  # bytes: we look at the UTF-8 ourselves
                        number += 1
                        yield Record(number, value), size * number // table.metadata.num_rows


@contextmanager
def _decompressed(path: Path, stored: IO[bytes]) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(stored) as file:
            yield file  # type: ignore[misc]
    elif path.suffix == ".zst":
        with io.BufferedReader(_ZstdFile(path, stored), _CHUNK_BYTES) as file:
            yield file
    else:
        yield stored


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one after the other. Unlike the library's own reader it notices a file that ends inside a frame."""

    def __init__(self, path: Path, stored: IO[bytes]):
        with _library_named(path):
            import zstandard

        self._stored = stored
        self._make_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # the frame being read
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (data := self._stored.read(_CHUNK_BYTES)):
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle of a frame")
                return 0
            self._decompress(self._input or data)
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, data: bytes) -> None:
        if self._frame is None:
            self._frame = self._make_frame()
        self._output = memoryview(self._frame.decompress(data))
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None


@contextmanager
def _library_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the package {error.name}: pip install 'megarat[data]'") from None


@contextmanager
def _damage_named(path: Path, part: str = "") -> Iterator[None]:
    """Turns what the decompressors and the table reader raise on damage into a message that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGE) and type(error).__module__.split(".")[0] not in _DAMAGE_LIBRARIES:
            raise
        raise UserError(f"{path}: {part}damaged or unreadable ({error})") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _known_types() -> str:
    return ".txt, .jsonl (plain, .gz or .zst) or .parquet"
