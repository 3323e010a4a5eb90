"""Where the files of a corpus lie: a folder, a web server, any file system that fsspec knows, or behind a command.

    /data/corpus                          a folder
    https://host/corpus                   fetched by ranges; a server without ranges gives whole shards
    s3://bucket/corpus                    any URL fsspec has a package for, fetched by ranges
    pipe:ssh host cat /data/corpus/{}     a command that prints the file put in the place of {}; whole shards

What comes from afar is kept in a bounded cache on the local disk, the least recently used goes first. Transfers that fail are
repeated with growing pauses; a file that is gone ends the run at once with its name.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from megarat.errors import UserError

DEFAULT_CACHE_BYTES = 20 * 10**9
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each repetition of a failed transfer
TIMEOUT = 60.0  # seconds without a byte after which a transfer has failed

_OPEN_FILES = 128  # far below the usual limit of 1024 a process
_PIECE_BYTES = 1 << 20
_PREFIX_DIGITS = 16  # of the hash of its location, in hexadecimal: the folder of a store's files in the cache
_EVICTION_SHARE = 0.05  # of the cache: how much is freed at a time, so that listing the folder is rare
_RESERVE_SHARE = 0.1  # of the cache: kept free for what other processes have written since this one listed the folder
_LISTING_SHARE = _RESERVE_SHARE / 10  # of the cache: what a process writes before it lists the folder again

T = TypeVar("T")


class Extent(NamedTuple):
    """One block of one shard: which bytes of which file."""

    file: str
    file_bytes: int
    block: int
    offset: int
    length: int


class Gone(Exception):
    """The file is not there (any more), or may not be read: trying again would not help."""


class Store(ABC):
    """Read access to the files of one corpus.

    Attributes:
        location: names it in messages.
        fetches_again: whether the same bytes may come from afar a second time, so that one proof of them is not enough.
    """

    location: str
    fetches_again = False

    @abstractmethod
    def load(self, file: str) -> bytes:
        """The whole of a small file. Raises `Gone`."""

    @abstractmethod
    def read(self, extent: Extent, skip: int, count: int) -> bytes:
        """`count` bytes of a block from its byte `skip` on; fewer when the file is shorter than it should be."""

    def forget(self, extent: Extent) -> bool:
        """Drops what is kept of a block that proved damaged; whether reading it again may give something else."""
        return False

    def name(self, file: str) -> str:
        """How messages call a file."""
        return f"{self.location}/{file}"


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL or a command and not a folder."""
    return isinstance(location, str) and (location.startswith("pipe:") or "://" in location)


def join(location: str | Path, part: str) -> str:
    """The location of a folder inside a location."""
    if isinstance(location, str) and location.startswith("pipe:"):
        return location.replace("{}", f"{part}/{{}}")
    return f"{str(location).rstrip('/')}/{part}"


def open_store(location: str | Path, cache: Cache | None = None) -> Store:
    """The store of a location; `cache` holds what is fetched (20 GB in the folder of `default_cache_folder` if not given).

    Raises:
        UserError: a pipe without {}, or a URL of a scheme that fsspec cannot read here.
    """
    if not is_remote(location):
        return LocalStore(Path(location))
    return RemoteStore(str(location), _open_transport(str(location)), cache or Cache(default_cache_folder(), DEFAULT_CACHE_BYTES))


class LocalStore(Store):
    """A folder. Files are read, not mapped: a file that shrinks under the reader is a message and not a crash by SIGBUS."""

    def __init__(self, folder: Path):
        self.location = str(folder)
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def load(self, file: str) -> bytes:
        """The whole of a small file. Raises `Gone`."""
        try:
            return (self._folder / file).read_bytes()
        except FileNotFoundError:
            raise Gone("no such file") from None
        except OSError as error:
            raise UserError(f"{self.name(file)}: cannot be read: {error.strerror}") from None

    def read(self, extent: Extent, skip: int, count: int) -> bytes:
        """`count` bytes of a block from its byte `skip` on; fewer when the file is shorter than it should be."""
        try:
            return os.pread(self._descriptor(extent.file), count, extent.offset + skip)
        except OSError as error:
            raise UserError(f"{self.name(extent.file)}: cannot be read: {error.strerror}") from None

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self._folder / file, os.O_RDONLY)
        return self._open[file]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class RemoteStore(Store):
    """Blocks, or whole shards where the transport has no ranges, fetched into the cache when they are read and not in it."""

    fetches_again = True  # by any process of the host that shares the cache

    def __init__(self, location: str, transport: Transport, cache: Cache):
        self.location = location
        self._transport, self._cache = transport, cache
        self._prefix = hashlib.sha256(location.encode()).hexdigest()[:_PREFIX_DIGITS]

    def name(self, file: str) -> str:
        """How messages call a file."""
        return self._transport.name(file)

    def load(self, file: str) -> bytes:
        """The whole of a small file. Raises `Gone`."""
        return self._retried(file, lambda: b"".join(self._transport.pieces(file)))

    def read(self, extent: Extent, skip: int, count: int) -> bytes:
        """`count` bytes of a block from its byte `skip` on."""
        if self._transport.ranges:
            try:
                return self._cached_block(extent).read(skip, count)
            except NoRanges:
                self._transport.ranges = False
        return self._cached_shard(extent).read(extent.offset + skip, count)

    def forget(self, extent: Extent) -> bool:
        """Drops the cached block, or shard: the transfer may have damaged it."""
        self._cache.remove(self._key(extent))
        return True

    def _key(self, extent: Extent) -> str:
        return f"{self._prefix}/{extent.file}" + (f".{extent.block}" if self._transport.ranges else "")

    def _cached_block(self, extent: Extent) -> CachedFile:
        def fetch() -> Iterator[bytes]:
            yield self._transport.fetch_range(extent.file, extent.offset, extent.length)

        return self._fetched(extent, extent.length, fetch)

    def _cached_shard(self, extent: Extent) -> CachedFile:
        return self._fetched(extent, extent.file_bytes, lambda: self._transport.pieces(extent.file))

    def _fetched(self, extent: Extent, size: int, fetch: Callable[[], Iterator[bytes]]) -> CachedFile:
        key = self._key(extent)
        found = self._cache.find(key, size)
        if found is None:
            self._cache.make_room(size, self.name(extent.file))
            try:
                found = self._retried(extent.file, lambda: self._cache.write(key, size, fetch()))
            except Gone as error:
                raise UserError(f"{self.name(extent.file)}: shard is gone: {error}; restore it and start again") from None
        return found

    def _retried(self, file: str, transfer: Callable[[], T]) -> T:
        for pause in (*PAUSES, None):
            try:
                return transfer()
            except (UserError, Gone, NoRanges):
                raise
            except Exception as error:  # each transport fails in its own ways: sockets, HTTP, botocore, …
                if pause is None:
                    raise UserError(
                        f"{self.name(file)}: cannot be fetched, tried {len(PAUSES) + 1} times; the last error: {_describe(error)}"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


# --- transports ---------------------------------------------------------------------------------------------------------------


class NoRanges(Exception):
    """The server sends whole files only."""


class ShortTransfer(Exception):
    """Fewer or more bytes came than there should be."""


class Transport(ABC):
    """A way to fetch files. `ranges`: whether parts of a file can be had."""

    ranges = True

    @abstractmethod
    def name(self, file: str) -> str:
        """The address of a file."""

    @abstractmethod
    def pieces(self, file: str) -> Iterator[bytes]:
        """The contents of a file. Raises `Gone`, or anything else when a later try may succeed."""

    def fetch_range(self, file: str, offset: int, length: int) -> bytes:
        """Some bytes of a file. Raises `NoRanges`, `Gone`, or anything else when a later try may succeed."""
        raise NoRanges


class HttpTransport(Transport):
    """A web server."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")

    def name(self, file: str) -> str:
        """The address of a file."""
        return f"{self._url}/{file}"

    def pieces(self, file: str) -> Iterator[bytes]:
        """The contents of a file."""
        with self._request(file, {}) as response:
            while piece := response.read(_PIECE_BYTES):
                yield piece
            if response.length:  # what http.client still expects
                raise ShortTransfer(f"the connection ended {response.length} bytes early")

    def fetch_range(self, file: str, offset: int, length: int) -> bytes:
        """Some bytes of a file."""
        with self._request(file, {"Range": f"bytes={offset}-{offset + length - 1}"}) as response:
            if response.status != http.client.PARTIAL_CONTENT:
                raise NoRanges
            return bytes(response.read(length + 1))

    def _request(self, file: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.name(file), headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            error.close()
            answer = f"the server answers {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in (408, 425, 429):  # time-outs and "too many" pass
                raise Gone(answer) from None
            raise OSError(answer) from None


class FsspecTransport(Transport):
    """Any URL that fsspec knows: s3://, gs://, hf://, sftp://, memory://, …"""

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        scheme = url.split("://")[0]
        try:
            import fsspec

            self._files, self._path = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: reading {scheme}:// needs fsspec and its package for it ({error})") from None

    def name(self, file: str) -> str:
        """The address of a file."""
        return f"{self._url}/{file}"

    def pieces(self, file: str) -> Iterator[bytes]:
        """The contents of a file."""
        try:
            with self._files.open(f"{self._path}/{file}", "rb") as opened:
                while piece := opened.read(_PIECE_BYTES):
                    yield piece
        except (FileNotFoundError, PermissionError) as error:
            raise Gone(_describe(error)) from None

    def fetch_range(self, file: str, offset: int, length: int) -> bytes:
        """Some bytes of a file."""
        try:
            content: bytes = self._files.cat_file(f"{self._path}/{file}", start=offset, end=offset + length)
        except (FileNotFoundError, PermissionError) as error:
            raise Gone(_describe(error)) from None
        return content


class PipeTransport(Transport):
    """A command of the shell that prints a file."""

    ranges = False

    def __init__(self, location: str):
        self._command = location.removeprefix("pipe:")
        if "{}" not in self._command:
            raise UserError(f"{location}: a pipe needs {{}} where the name of the file goes, as in pipe:ssh host cat /data/{{}}")

    def name(self, file: str) -> str:
        """The command that prints a file."""
        return "pipe:" + self._command.replace("{}", file)

    def pieces(self, file: str) -> Iterator[bytes]:
        """The contents of a file."""
        command = self._command.replace("{}", shlex.quote(file))
        with tempfile.TemporaryFile() as said:  # a pipe that nobody empties would stop a command that says much
            process: Any = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
            try:
                while piece := process.stdout.read(_PIECE_BYTES):
                    yield piece
                if process.wait():
                    raise OSError(f"the command ended with exit code {process.returncode}: {_end_of(said)}")
            finally:
                process.kill()
                process.communicate()


def _end_of(file: IO[bytes]) -> str:
    """The last words of a text."""
    file.seek(-min(300, file.seek(0, os.SEEK_END)), os.SEEK_END)
    return file.read().decode(errors="replace").strip()


def _open_transport(location: str) -> Transport:
    if location.startswith("pipe:"):
        return PipeTransport(location)
    return HttpTransport(location) if location.startswith(("http://", "https://")) else FsspecTransport(location)


# --- the cache ----------------------------------------------------------------------------------------------------------------


class CachedFile(NamedTuple):
    """A file of the cache, opened anew for each read: it may be evicted, by another process too, at any time in between."""

    path: Path

    def read(self, offset: int, count: int) -> bytes:
        """Some bytes of the file; fewer, or none, when it has been cut or evicted."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), count, offset)
        except FileNotFoundError:
            return b""


class Cache:
    """Files in a folder, at most `limit` bytes of them together. Several processes of a host may share one folder.

    Each of them lists the folder, and evicts what is above `limit` less a reserve, whenever it has written a tenth of the reserve: what
    ten processes write without looking at each other fits the reserve.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._room = limit - int(_RESERVE_SHARE * limit)
        self._written = 0  # since the folder was last listed
        self._known = limit  # bytes found then; at first unknown, so that the first file lists the folder

    def find(self, key: str, size: int) -> CachedFile | None:
        """The file of a key if it is there and whole; it then counts as just used."""
        path = self._folder / key
        try:
            if path.stat().st_size != size:
                return None
            os.utime(path)
        except OSError:
            return None
        return CachedFile(path)

    def make_room(self, size: int, name: str) -> None:
        """Evicts the least recently used files until `size` bytes more fit.

        Raises:
            UserError: they never will; `name` is what they were for.
        """
        if size > self._limit:
            raise UserError(f"{name}: {size} bytes do not fit the cache of {self._limit} bytes; raise data.cache_gb")
        if self._known + self._written + size <= self._room and self._written + size <= _LISTING_SHARE * self._limit:
            return
        files = sorted(self._list())
        self._known, self._written = sum(file_size for _, file_size, _ in files), 0
        target = self._room - size
        if self._known > target:
            target = max(0, int(target - _EVICTION_SHARE * self._limit))
        for _, file_size, path in files:
            if self._known <= target:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._known -= file_size

    def write(self, key: str, size: int, pieces: Iterator[bytes]) -> CachedFile:
        """Puts a file in place by one rename. Raises `ShortTransfer` when the pieces are not `size` bytes together."""
        path = self._folder / key
        staging = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            written = _write_pieces(staging, pieces)
            if written != size:
                raise ShortTransfer(f"{written} bytes came where the index says {size}")
            os.replace(staging, path)
        except _DiskError as error:
            raise UserError(f"{path}: cannot be written into the cache: {error}; see data.cache and data.cache_gb") from None
        finally:
            with suppress(OSError):
                staging.unlink()
        self._written += size
        return CachedFile(path)

    def remove(self, key: str) -> None:
        """Drops one file."""
        (self._folder / key).unlink(missing_ok=True)

    def _list(self) -> Iterator[tuple[float, int, str]]:
        """(time of last use, size, path) of every file of a store. A user's own files in the folder are neither counted nor evicted."""
        for folder in glob.iglob(os.path.join(glob.escape(str(self._folder)), "[0-9a-f]" * _PREFIX_DIGITS)):
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        found = entry.stat()
                        yield found.st_mtime, found.st_size, entry.path


class _DiskError(Exception):
    """Writing failed, as opposed to fetching."""


def _write_pieces(path: Path, pieces: Iterator[bytes]) -> int:
    """Returns the bytes written. Errors of the disk are told from those of the transfer, which `pieces` raises."""
    written = 0
    with ExitStack() as stack:
        with _disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "wb", buffering=0))
        for piece in pieces:
            rest = memoryview(piece)
            while rest:  # a raw file may take less than it is given
                with _disk_errors():
                    rest = rest[file.write(rest) :]
            written += len(piece)
    return written


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(error.strerror) from None


def default_cache_folder() -> Path:
    """The cache of this user: $XDG_CACHE_HOME/megarat, or ~/.cache/megarat."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megarat"
