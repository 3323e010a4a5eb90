"""Folders that can be made or are refused in a line, and files that survive a crash: on the disk, replaced as a whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

from megarat.errors import UserError


def make_folder(folder: Path, setting: str) -> None:
    """Make a folder and those above it, unless it is there. Raises ``UserError`` with the setting that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting} {folder}: cannot make this folder: {error.strerror}") from None


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old text or the new one, of whichever process was the last to write it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write_synced(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(file: io.FileIO, content: bytes) -> None:
    """Write to a file without a buffer, which takes as much as the disk has room for and raises only when that is nothing."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
