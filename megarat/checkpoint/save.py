"""Write a checkpoint: stage, sync, manifest, rename, ``latest``.

A crash at any point leaves either the previous checkpoints alone or the new one whole: everything is built in a hidden sibling folder
and becomes a checkpoint by one rename.

On many ranks every rank writes, syncs and hashes its own part; the first makes the folder, and renames it once all have told it that they
are done. A rank that fails fails the save on all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

import megarat
from megarat import comm
from megarat.checkpoint.manifest import (
    DISCARDED_PREFIX,
    LATEST,
    MASTERS,
    OPTIMIZER,
    STAGING_PREFIX,
    STATE,
    TOKENIZER,
    WEIGHTS,
    CheckpointState,
    Manifest,
    check_sizes,
    folder_name,
    pair_of,
    write_manifest,
)
from megarat.checkpoint.shards import Held, SavePlanner, as_state_dict, bytes_held
from megarat.checkpoint.storage import Writer, os_error
from megarat.config import Config, ModelConfig
from megarat.errors import ToldByFirstRank, UserError
from megarat.files import replace_synced, sync, write_synced
from megarat.model.pattern import describe

_SYNCING_THREADS = 8


@dataclass
class Snapshot:
    """What one checkpoint holds: whole tensors, or on many ranks this rank's fragments of each."""

    state: CheckpointState
    weights: Mapping[str, Held]  # by logical name, in the model's dtype
    masters: Mapping[str, Held] = field(default_factory=dict)  # fp32; empty when the weights are
    moments: Mapping[str, Mapping[str, Held]] = field(
        default_factory=dict
    )  # kind -> logical name -> fp32; empty for weights only
    tokenizer: Path | None = None  # file or folder to copy


def save(checkpoints: Path, snapshot: Snapshot, group: ProcessGroup | None = None) -> Path:
    """Write ``checkpoints/pair_…``, point ``latest`` at it, and return the folder. All ranks of ``group`` call it, each with its part.

    Raises ``UserError`` when the disk refuses (full, quota, permissions); earlier checkpoints and ``latest`` are then untouched.
    """
    target = checkpoints / folder_name(snapshot.state.pair)
    with _commit(target, group) as (staging, written):
        written |= _write(staging, target, snapshot, group)

    def point() -> None:
        with _disk_errors(checkpoints / LATEST):
            replace_synced(checkpoints / LATEST, target.name + "\n")

    comm.first_decides(point, group)
    return target


def save_imported(
    out: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    source: Path,
    told: Mapping[str, Any],
    tokenizer: Path | None = None,
) -> Path:
    """Write foreign weights, as fp32, into the new checkpoint folder ``out``; ``told`` is the source's own ``pattern`` and ``step``
    and perhaps ``sequence_length``.

    Raises ``UserError`` when ``out`` exists, the tokenizer does not, or the disk refuses.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a new folder for the imported checkpoint")
    if tokenizer is not None and not tokenizer.exists():
        raise UserError(f"--tokenizer {tokenizer}: no such file or folder")
    config = Config(model=model)
    config.attention.pattern = told["pattern"]
    config.data.sequence_length = told.get("sequence_length") or config.data.sequence_length
    config.run.dir, config.data.shards = str(out), "(imported weights: name the data)"
    parent = {"kind": "import", "path": str(source.resolve()), **told}
    state = CheckpointState("import", int(told.get("step") or 0), 0, config, describe(config.patterns), "fp32", parent=parent)
    snapshot = Snapshot(state, {name: tensor.float() for name, tensor in weights.items()}, tokenizer=tokenizer)
    with _commit(out, None) as (staging, written):
        written |= _write(staging, out, snapshot, None)
    return out


def prune(checkpoints: Path, keep: int, keep_every: int, protected: int | None = None) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints, those whose pair is a multiple of ``keep_every`` (0: none) and that of pair ``protected``.

    Returns the removed. Raises ``UserError`` for one that the system does not let go.
    """
    found = {pair: folder for folder in checkpoints.iterdir() if (pair := pair_of(folder)) is not None}
    removed = [found[pair] for pair in sorted(found)[:-keep] if not (keep_every and pair % keep_every == 0) and pair != protected]
    for folder in removed:
        try:
            _discard(folder)
        except OSError as error:
            raise UserError(
                f"cannot remove {folder}: {error.strerror}. All checkpoints are whole; remove this one, or set checkpoint.keep or "
                "checkpoint.keep_every so that it stays, then start the same command again"
            ) from None
    return removed


def discard_newer(checkpoints: Path, kept: Path) -> None:
    """Make ``kept`` the newest checkpoint: point ``latest`` at it and remove those of later pairs."""
    with _disk_errors(checkpoints / LATEST):
        replace_synced(checkpoints / LATEST, kept.name + "\n")
        for folder in checkpoints.iterdir():
            if (pair_of(folder) or 0) > (pair_of(kept) or 0):
                _discard(folder)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what interrupted saves and removals left behind. The caller holds the run's lock."""
    for prefix in (STAGING_PREFIX, DISCARDED_PREFIX):
        for folder in checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)
    for file in checkpoints.glob(f".{LATEST}.*"):  # what was to replace ``latest``
        file.unlink(missing_ok=True)


def _write(folder: Path, target: Path, snapshot: Snapshot, group: ProcessGroup | None) -> Manifest:
    """Fill ``folder``, which is to become ``target``; returns what this rank wrote of the tensors, and synced."""
    comm.first_decides(lambda: _write_description(folder, target, snapshot), group)
    moments = {f"{kind}.{name}": tensor for kind, named in snapshot.moments.items() for name, tensor in named.items()}
    written: Manifest = {}
    for part, tensors in {WEIGHTS: snapshot.weights, MASTERS: snapshot.masters, OPTIMIZER: moments}.items():
        if tensors:
            written |= {f"{part}/{name}": entry for name, entry in _write_tensors(folder / part, tensors, group).items()}
    with ThreadPoolExecutor(_SYNCING_THREADS) as pool:
        list(pool.map(sync, [folder / name for name in written]))
    return written


def _write_description(folder: Path, target: Path, snapshot: Snapshot) -> None:
    """All that is no tensor."""
    state = snapshot.state
    state.versions = {"megarat": megarat.__version__, "torch": str(torch.__version__)}
    state.saved_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with _disk_errors(target):
        write_synced(folder / STATE, state.to_json())
        if snapshot.tokenizer is not None:
            _copy_tokenizer(snapshot.tokenizer, folder / TOKENIZER)


def _write_tensors(folder: Path, tensors: Mapping[str, Held], group: ProcessGroup | None) -> Manifest:
    """This rank's files of one part, not synced yet; torch fails on every rank when it fails on one."""
    writer = Writer(folder, bytes_held(tensors))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(
            as_state_dict(tensors),
            storage_writer=writer,
            planner=SavePlanner(),
            process_group=group,
            no_dist=comm.size(group) == 1,
        )
    return writer.entries()


def _copy_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer's file, or the files of its folder; not what lies below it, which may be this very checkpoint."""
    target.mkdir()
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        if file.is_file():
            shutil.copy(file, target)


@contextlib.contextmanager
def _commit(target: Path, group: ProcessGroup | None) -> Iterator[tuple[Path, Manifest]]:
    """A hidden folder to fill, which becomes ``target`` at the end of the block, whole, or vanishes; every rank fills its part.

    What a rank adds to the manifest that comes with the folder need not be hashed again.
    """
    written: Manifest = {}
    staging = comm.first_decides(lambda: _stage(target), group)
    try:
        with _failing_together(target, group):
            yield staging, written
            check_sizes(staging, written)  # before the ranks talk again: one that raises here would leave the others in that
        with _failing_together(target, group):
            write_manifest(staging, written, group)
        comm.first_decides(lambda: _publish(staging, target), group)
    finally:
        if comm.rank(group) == 0:
            shutil.rmtree(staging, ignore_errors=True)  # after the rename there is nothing to remove


def _stage(target: Path) -> Path:
    staging = target.with_name(f"{STAGING_PREFIX}{target.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process that had this number: in a container all have the same
    with _disk_errors(target):
        staging.mkdir(parents=True)
    return staging


def _publish(staging: Path, target: Path) -> None:
    with _disk_errors(target):
        sync(staging)
        staging.rename(target)  # refused by the system if there is a checkpoint of this name
        sync(target.parent)


@contextlib.contextmanager
def _failing_together(target: Path, group: ProcessGroup | None) -> Iterator[None]:
    """Let every rank leave the block in the same way: what one raises ends it on all, and where it is raised it is told."""
    failure: BaseException | None = None
    try:
        with _disk_errors(target):
            yield
    except (Exception, CheckpointException) as error:
        failure = error
    told = None if failure is None else (isinstance(failure, UserError), str(failure))
    failures = [other for other in comm.gather_objects(told, group) if other is not None]
    if failure is not None and not (isinstance(failure, UserError) and comm.rank(group) > 0):
        raise failure
    if failures:
        for_users, message = failures[0]
        if not for_users:
            raise RuntimeError(f"the save of {target} failed on another rank: {message}")
        raise UserError(message) if comm.rank(group) == 0 else ToldByFirstRank(message)


def _discard(folder: Path) -> None:
    """Remove a checkpoint without a moment at which half of it looks like one."""
    discarded = folder.with_name(DISCARDED_PREFIX + folder.name)
    shutil.rmtree(discarded, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # somebody clears up old checkpoints by hand, and was faster
        folder.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a disk that refuses into one clear message; anything else is a bug and passes through."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = os_error(error)
        if cause is None:
            raise
        raise UserError(
            f"cannot write {target}: {cause.strerror or cause}. Earlier checkpoints are untouched; make room ({_free(target)} free) "
            "or change run.dir, then start the same command again"
        ) from None


def _free(path: Path) -> str:
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e9:.1f} GB"
