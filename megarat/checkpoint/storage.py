"""Torch's writer and reader of checkpoint folders, as a save that must not lie and a load from strangers need them.

The writer hashes what it writes, so that a file need not be read again for the manifest, and fails when any of its threads fails (torch's
own drops the exceptions of all but one). The reader uses several threads and runs nothing that a pickled ``.metadata`` names.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import hashlib
import io
import os
import pickle
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megarat.checkpoint.manifest import FileEntry
from megarat.errors import UserError

_FILE_BYTES = 1 << 28  # about this much per file, so that several threads can write, hash and read a checkpoint
_MAX_THREADS = 8
_CHUNK, _SENT_BYTES = 1 << 24, 1 << 26

_SYNC_FILE_RANGE_WRITE = 2  # start to write dirty pages, wait for nothing
_sync_file_range = ctypes.CDLL(None).sync_file_range  # Linux; Python has no name for it
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Writer(FileSystemWriter):
    """Writes this rank's files of one part of a checkpoint and knows their hashes; they are still to be synced.

    Whoever writes several parts syncs them all at the end: while the disk takes the last of one, the next is made.
    """

    def __init__(self, folder: Path, bytes_held: int) -> None:
        super().__init__(folder, thread_count=min(_MAX_THREADS, 1 + bytes_held // _FILE_BYTES), sync_files=False)
        self._files = _HashingFiles()
        self.fs = self._files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all items of the plan. Raises what any of the threads met."""
        with _without_checksums():
            results = super().write_data(plan, planner)
        self._files.raise_first_error()
        return results

    def entries(self) -> dict[str, FileEntry]:
        """Size and SHA-256 of each file written here, by its name in the folder."""
        return {path.name: FileEntry(size, digest) for path, (size, digest) in self._files.written.items()}


@contextlib.contextmanager
def _without_checksums() -> Generator[None, None, None]:
    """Let ``torch.save`` leave out its CRC-32, which cost half as much time as the SHA-256 and proved less; ``torch.load`` asks for none."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(computed)


class _HashingFiles(FileSystem):
    """Hashes what goes into each file; keeps an error for whoever asks, for torch's threads would let it fall."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[Path, tuple[int, str]] = {}
        self._errors: list[BaseException] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """A file that is hashed while it is written."""
        with self._open(path, mode) as file:
            stream = _HashingFile(file)
            try:
                yield cast(io.IOBase, stream)
                file.flush()
                self.written[Path(path)] = (stream.size, stream.sha256.hexdigest())
            except BaseException as error:
                self._errors.append(error)
                with contextlib.suppress(OSError):  # a full disk fails once more when the buffer is flushed
                    file.close()

    def _open(self, path: str | os.PathLike[str], mode: str) -> io.BufferedWriter:
        """A quota may have room for bytes but not for one more file: without this the checkpoint would lack a file that nothing misses."""
        try:
            return cast(io.BufferedWriter, Path(path).open(mode))
        except OSError as error:
            self._errors.append(error)
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """The hash goes with the file; a file that could not be written is not given its name."""
        self.raise_first_error()
        super().rename(path, new_path)
        self.written[Path(new_path)] = self.written.pop(Path(path))

    def raise_first_error(self) -> None:
        """Raise what went wrong in a file, if anything did: the system's own error, for its context would not travel to other ranks."""
        if self._errors:
            raise os_error(self._errors[0]) or self._errors[0]


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one of torch's: it arrives wrapped, or only as the context of another."""
    seen: list[BaseException | None] = [error]
    if isinstance(error, CheckpointException):
        seen += [failure for failure, _ in error.failures.values()]
    while seen:
        current = seen.pop()
        if isinstance(current, OSError):
            return current
        if current is not None:
            seen += [current.__cause__, current.__context__]
    return None


class _HashingFile:
    """As much of a file as torch writes to."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = self._sent = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self.sha256.update(chunk)
            self._file.write(chunk)
            self.size += len(chunk)
            self._start_writeback()
        return len(view)

    def _start_writeback(self) -> None:
        """Let the disk begin, instead of leaving all of its work to the sync at the end. Advice: whether it is taken does not matter."""
        waiting = self.size - self._sent
        if waiting >= _SENT_BYTES:
            self._file.flush()
            _sync_file_range(self._file.fileno(), self._sent, waiting, _SYNC_FILE_RANGE_WRITE)
            self._sent = self.size

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file is closed by whoever opened it."""


class Reader(FileSystemReader):
    """Torch's reader, except that its pickled ``.metadata`` may name nothing but the plain classes a checkpoint consists of.

    A checkpoint from elsewhere must not be able to run code; the tensors themselves are read with ``weights_only`` by torch.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and places of all tensors of the folder."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata: Metadata = _MetadataUnpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{path}: cannot read: {error}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for, several files at a time."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        read = super().read_data
        with ThreadPoolExecutor(_MAX_THREADS) as pool:
            for done in [pool.submit(read, LoadPlan(items), planner) for items in by_file.values()]:
                done.result()
        finished: Future[None] = Future()
        finished.set_result(None)
        return finished


class _MetadataUnpickler(pickle.Unpickler):
    _METADATA_CLASSES = frozenset(
        "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING".split()
    )

    def find_class(self, module: str, name: str) -> Any:
        """Called by the pickle machinery for each class the stream names."""
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        allowed = (
            (module == "torch.distributed.checkpoint.metadata" and name in self._METADATA_CLASSES)
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
            or (module in ("pathlib", "pathlib._local") and name == "PosixPath")
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not allowed:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> enum.Enum:
    """What Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle a member of an enum as: ``getattr`` of the class; and nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError("names builtins.getattr, which no checkpoint needs but for an enum")
    return kind[name]
