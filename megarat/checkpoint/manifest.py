"""What lies in a checkpoint folder, and the proof that it is all there.

    RUN/checkpoints/
      latest                 one line: the name of the newest checkpoint
      pair_00000500/
        manifest.json        size and SHA-256 of every other file, and of itself; written last
        state.json           ``CheckpointState``: where the run stood, how it was configured, what it started from
        weights/             logical tensors in the model's dtype             (torch.distributed.checkpoint)
        masters/             the same in fp32, when the model's dtype is bf16
        optimizer/           Adam's moments, "exp_avg.NAME", "exp_avg_sq.NAME"  (absent in imported checkpoints)
        tokenizer/           copy of the shards' tokenizer                    (if they have one)

A folder without a whole manifest is not a checkpoint: a save builds a hidden sibling and renames it into place.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megarat import comm
from megarat.config import Config, from_dict
from megarat.errors import UserError
from megarat.files import sync, write_synced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
WEIGHTS, MASTERS, OPTIMIZER, TOKENIZER = "weights", "masters", "optimizer", "tokenizer"
STAGING_PREFIX, DISCARDED_PREFIX = ".staging-", ".discarded-"
SCHEMA_VERSION = 1

_FOLDER_NAME = re.compile(r"pair_(\d{8,})")
_CHUNK = 1 << 22
_HASH_THREADS = 8  # hashlib lets go of the interpreter; eight threads outrun most disks


def folder_name(pair: int) -> str:
    """The folder of the checkpoint after ``pair`` pairs."""
    return f"pair_{pair:08d}"


def pair_of(folder: Path) -> int | None:
    """The number of pairs in a checkpoint folder's name; None for any other name."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


# ---- state.json -----------------------------------------------------------------------------------------------------------


@dataclass
class CheckpointState:
    """Everything of a run that is no tensor. ``pair`` pairs are done; the next one to train is pair number ``pair`` (from 0)."""

    kind: str  # "pretrain", "adapt" or "import"
    pair: int
    tokens: int  # input tokens of those pairs
    config: Config
    pattern: str  # the main pattern, in words
    precision: str  # dtype of weights/: "bf16" or "fp32"
    stream_hash: str = ""  # of all token ids consumed
    data_identity: str = ""  # SHA-256 of the index of the training shards
    optimizer_steps: int = 0
    skipped: list[int] = field(default_factory=list)  # pairs (from 0) left out for bad numbers
    skipped_in_row: int = 0
    guard: dict[str, Any] = field(default_factory=dict)  # what ``megarat.train.pair_guard`` remembers of earlier pairs
    random_state: dict[str, str] = field(default_factory=dict)  # device type -> generator state, base64
    parent: dict[str, Any] | None = None  # where the weights came from
    mesh: dict[str, int] = field(default_factory=dict)  # that wrote it; nothing in weights/ or optimizer/ depends on it
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: str = ""  # UTC

    @property
    def passed_over(self) -> int:
        """Global batches left out by going back to earlier checkpoints: pair n is trained on global batch n + ``passed_over``."""
        return sum(at - to for at, to in self.guard.get("rollbacks", []))

    def to_json(self) -> str:
        """The text of ``state.json``; ``data`` and ``schedule`` repeat for readers what pair and config imply."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["config"] = self.config.to_dict()
        next_batch = self.pair + self.passed_over
        values["data"] = {"next_sample": next_batch * self.config.train.global_batch, "seed": self.config.train.seed}
        values["schedule"] = {"next_pair": self.pair, "pairs": self.config.train.pairs}
        return json.dumps({"schema": SCHEMA_VERSION} | values, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> CheckpointState:
        """Read ``state.json``. Raises ``UserError`` when it is unreadable or of another schema."""
        path = folder / STATE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree.get("schema") != SCHEMA_VERSION:
                raise UserError(f"{path}: schema {tree.get('schema')!r}; this megarat reads schema {SCHEMA_VERSION}")
            tree.setdefault("guard", {})  # older ones have none
            values = {item.name: tree[item.name] for item in dataclasses.fields(cls)}
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {folder} is not a whole checkpoint") from None
        except (OSError, UnicodeDecodeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        values["config"] = from_dict(values["config"], str(path))
        return cls(**values)


# ---- manifest.json --------------------------------------------------------------------------------------------------------


class FileEntry(NamedTuple):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


Manifest = dict[str, FileEntry]  # by path relative to the checkpoint folder


def write_manifest(folder: Path, written: Manifest, group: ProcessGroup | None = None) -> None:
    """Write the manifest; everything in ``folder`` is then synced to the disk. All ranks call it.

    ``written`` are the files that this rank has synced and hashed while it wrote them. The first rank does both for all others.
    """
    entries = {name: entry for part in comm.gather_objects(written, group) for name, entry in part.items()}
    if comm.rank(group) == 0:
        others = [name for name in _files(folder) if name not in entries]
        _write_manifest(folder, dict(sorted((entries | _hash_synced(folder, others)).items())))


def check_sizes(folder: Path, written: Manifest) -> None:
    """Raises ``OSError`` when a file has another size than was written to it."""
    for name, entry in written.items():
        found = (folder / name).stat().st_size
        if found != entry.bytes:
            raise OSError(errno.EIO, f"{entry.bytes} bytes were written, but the file has {found}", str(folder / name))


def _hash_synced(folder: Path, names: list[str]) -> Manifest:
    for name in names:
        sync(folder / name)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name), names))
    return {name: FileEntry((folder / name).stat().st_size, digest) for name, digest in zip(names, hashes, strict=True)}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    tree = {"schema": SCHEMA_VERSION, "files": {name: entry._asdict() for name, entry in manifest.items()}}
    write_synced(folder / MANIFEST, json.dumps(tree | {"sha256": fingerprint(manifest)}, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ``UserError`` when it is missing, damaged or of another schema."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["schema"] != SCHEMA_VERSION:
            raise UserError(f"{path}: schema {tree['schema']!r}; this megarat reads schema {SCHEMA_VERSION}")
        manifest = {str(name): FileEntry(**entry) for name, entry in tree["files"].items()}
        intact = fingerprint(manifest) == tree["sha256"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a whole checkpoint (a save writes the manifest last)") from None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}; restore the checkpoint from a copy") from None
    if not intact:
        raise UserError(f"{path} is damaged: its own hash does not match its content; restore the checkpoint from a copy")
    return manifest


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 over names, sizes and hashes of all files: one number that names the content of a checkpoint."""
    lines = "".join(f"{name}\t{entry.bytes}\t{entry.sha256}\n" for name, entry in sorted(manifest.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with the named files: one line each, empty when all match. Sizes first; only files of the right size are hashed."""
    damage, to_hash = [], []
    for name in names:
        path, expected = folder / name, manifest[name]
        if not path.is_file():
            damage.append(f"{name} is missing (expected {expected.bytes} bytes)")
        elif (size := path.stat().st_size) != expected.bytes:
            damage.append(f"{name} has {size} bytes, expected {expected.bytes}")
        else:
            to_hash.append(name)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for name, digest in zip(to_hash, pool.map(lambda name: _sha256_or_error(folder / name), to_hash), strict=True):
            if isinstance(digest, OSError):
                damage.append(f"{name} cannot be read: {digest.strerror or digest}")
            elif digest != manifest[name].sha256:
                damage.append(
                    f"{name} has SHA-256 {digest[:16]}…, expected {manifest[name].sha256[:16]}…: its content has changed"
                )
    return damage


def _sha256_or_error(path: Path) -> str | OSError:
    """An error is a finding: of a sector that is gone the system says no more."""
    try:
        return _sha256(path)
    except OSError as error:
        return error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
