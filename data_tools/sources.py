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
    """One document before parsing: its line in the stretch or row in the file, from 1, and its bytes (None: a null in a table)."""

    number: int
    content: bytes | None


class Stretch(NamedTuple):
    """A part of one file: the records that begin in its bytes start … stop - 1 as stored, or the row groups of a table.

    Attributes:
        row_groups: (first, last + 1) of a table, whose bytes are then those of these groups; None for other files.
    """

    source: Source
    start: int
    stop: int
    row_groups: tuple[int, int] | None = None


class Chunk(NamedTuple):
    """Some records of one stretch, and how many bytes of the file as stored they used up.

    Attributes:
        part, closes_part: which part of the build it belongs to, and whether it is the part's last chunk.
    """

    stretch: Stretch
    records: list[Record]
    consumed: int
    part: int = 0
    closes_part: bool = False


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


def find_stretches(source: Source, size: int) -> Iterator[Stretch]:
    """A file in stretches of about `size` bytes where it can be entered in its middle (lines, tables), else in one.

    Raises:
        UserError: a table whose end, which tells its row groups, is damaged.
    """
    total = source.path.stat().st_size
    if source.kind == ".parquet":
        yield from _table_stretches(source, size)
    elif source.path.suffix == ".jsonl":
        for start in range(0, max(1, total), size):
            yield Stretch(source, start, min(start + size, total))
    else:
        yield Stretch(source, 0, total)


def _table_stretches(source: Source, size: int) -> Iterator[Stretch]:
    with _damage_named(source.path), _open_table(source.path) as table:
        sizes = [
            sum(table.metadata.row_group(g).column(c).total_compressed_size for c in range(table.metadata.num_columns))
            for g in range(table.num_row_groups)
        ]
    first = start = position = 0
    for group, group_size in enumerate(sizes, 1):
        position += group_size
        if position - start >= size or group == len(sizes):
            yield Stretch(source, start, position, (first, group))
            first, start = group, position
    if not sizes:
        yield Stretch(source, 0, 0, (0, 0))


def read_chunks(stretch: Stretch, *, text_field: str, txt_split: str) -> Iterator[Chunk]:
    """Cuts a stretch into chunks of about a megabyte of whole records; at least one chunk.

    Raises:
        UserError: the file is damaged (compression, table) or has no column `text_field`.
    """
    source, size, done = stretch.source, stretch.stop - stretch.start, 0
    batch: list[Record] = []
    batch_bytes = 0
    with _damage_named(source.path):
        for record, position in _records(stretch, text_field, txt_split):
            batch.append(record)
            batch_bytes += len(record.content or b"")
            if batch_bytes >= _CHUNK_BYTES:
                yield Chunk(stretch, batch, position - done)
                batch, batch_bytes, done = [], 0, position
    yield Chunk(stretch, batch, size - done)


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


def record_name(chunk: Chunk, record: Record, lines: int) -> str:
    """Where a record lies, for messages: the file, and the line (`lines` further in) or row counted from the file's start."""
    source, start = chunk.stretch.source, chunk.stretch.start
    skipped = 0
    if source.kind == ".jsonl" and start:
        with open(source.path, "rb") as file:
            skipped = sum(1 for _ in _lines_from(file, 0, start))
    return f"{source.path}, {source.unit} {skipped + record.number + lines}"


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


def _records(stretch: Stretch, text_field: str, txt_split: str) -> Iterator[tuple[Record, int]]:
    """Records of a stretch, each with how much of it as stored is behind its end."""
    source = stretch.source
    if stretch.row_groups is not None:
        yield from _parquet_records(stretch, text_field)
        return
    with open(source.path, "rb") as stored, _decompressed(source.path, stored) as file:
        if source.path.suffix == ".jsonl":
            for record in _line_records(_lines_from(file, stretch.start, stretch.stop), stretch.start == 0):
                yield record, min(stored.tell(), stretch.stop) - stretch.start
            return
        if source.kind == ".jsonl":
            found = _line_records(file, True)
        elif txt_split == "paragraph":
            found = _paragraph_records(file)
        else:
            found = iter([Record(1, file.read().removeprefix(_BYTE_ORDER_MARK))])
        for record in found:
            yield record, stored.tell()


def _lines_from(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin at the positions start … stop - 1."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1  # the rest of a line that began before, or the end of the one just before
    while position < stop and (line := file.readline()):
        position += len(line)
        yield line


def _line_records(lines: Iterable[bytes], from_start: bool) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if from_start and number == 1 else line
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


def _open_table(path: Path) -> Any:
    with _library_named(path):
        import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _parquet_records(stretch: Stretch, text_field: str) -> Iterator[tuple[Record, int]]:
    path = stretch.source.path
    first, last = stretch.row_groups or (0, 0)
    with _open_table(path) as table:
        last = min(last, table.num_row_groups)
        _check_column(path, table.schema_arrow, text_field)
        rows = [table.metadata.row_group(group).num_rows for group in range(last)]
        number, wanted = sum(rows[:first]), max(1, sum(rows[first:]))
        for group in range(first, last):
            with _damage_named(path, f"row group {group}: "):
                for value in _group_values(table, group, text_field):
                    number += 1
                    yield Record(number, value), (stretch.stop - stretch.start) * (number - sum(rows[:first])) // wanted


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        raise UserError(f"{path}: no column {text_field!r} (there are: {', '.join(schema.names)}); see --text-field")
    kind = schema.field(text_field).type
    if kind not in (pa.string(), pa.large_string()):
        raise UserError(f"{path}: column {text_field!r} is of type {kind}, expected string")


def _group_values(table: Any, group: int, text_field: str) -> Iterator[bytes | None]:
    """The texts of a row group as bytes: we look at the UTF-8 ourselves."""
    import pyarrow as pa

    for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_field]):
        yield from batch.column(0).cast(pa.large_binary()).to_pylist()


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
