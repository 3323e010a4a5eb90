"""Find, prove and read checkpoints.

Every file that is read is first compared with the manifest, size and hash: a truncated or flipped checkpoint is refused by name, never
half loaded. Weights alone touch only ``weights/`` (or the masters), on any device and without DeepSpeed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megarat import comm
from megarat.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    MASTERS,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    WEIGHTS,
    CheckpointState,
    find_damage,
    fingerprint,
    folder_name,
    pair_of,
    read_manifest,
)
from megarat.checkpoint.shards import LoadPlanner, as_state_dict
from megarat.checkpoint.storage import Reader
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.model import names
from megarat.parallel.fragments import Fragments

CHECKPOINTS = "checkpoints"

# ---- where -----------------------------------------------------------------------------------------------------------------


def resolve(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder, its ``checkpoints``, ``…/latest`` or a checkpoint folder itself.

    Raises ``UserError`` that says what was found instead.
    """
    path = Path(path)
    if path.name == LATEST and not path.is_dir():
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; expected a run folder or a checkpoint such as RUN/checkpoints/{folder_name(500)}"
        )
    if (path / MANIFEST).exists() or (path / STATE).exists() or (path / WEIGHTS).exists():
        return path
    checkpoints = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest = _newest(checkpoints)
    if newest is None:
        raise UserError(
            f"{path}: holds no checkpoint; expected a run folder with {CHECKPOINTS}/{folder_name(500)} or such, or a checkpoint folder "
            f"with {MANIFEST}"
        )
    return newest


def find_latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None when it has none yet. Raises ``UserError`` when one that should be there is gone."""
    checkpoints = Path(run_dir) / CHECKPOINTS
    return _newest(checkpoints) if checkpoints.is_dir() else None


def _newest(checkpoints: Path) -> Path | None:
    """By pair number: a crash may fall between a checkpoint's rename and the update of ``latest``, which then lags by one."""
    pointer = checkpoints / LATEST
    named, found = _named(pointer), _folders(checkpoints)
    while (
        now := _named(pointer)
    ) != named:  # a run writes here: what it has just named need not be among the folders found before
        named, found = now, _folders(checkpoints)
    newest = max(found.values(), key=lambda folder: pair_of(folder) or 0, default=None)
    if named is not None and named not in found:
        go_on = f"write {newest.name} into {pointer} to use that, the newest that is there, or " if newest else ""
        raise UserError(
            f"{pointer} names {named!r}, which is not there (found: {', '.join(sorted(found)) or 'no checkpoint'}); restore it, or "
            f"{go_on}delete {pointer} and the checkpoints to start again"
        )
    return newest


def _named(pointer: Path) -> str | None:
    """What ``latest`` says, None without one."""
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None


def _folders(checkpoints: Path) -> dict[str, Path]:
    return {folder.name: folder for folder in checkpoints.iterdir() if folder.is_dir() and pair_of(folder) is not None}


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """The tokenizer stored with a checkpoint, if there is one."""
    folder = checkpoint / TOKENIZER
    return folder if folder.is_dir() else None


# ---- what ------------------------------------------------------------------------------------------------------------------


def load_state(path: str | Path) -> CheckpointState:
    """Where the run stood and how it was configured, proved against the manifest.

    Raises ``UserError`` for a folder that bears the name of another pair: the newest checkpoint is found by name.
    """
    folder = resolve(path)
    _prove(folder, STATE)
    state = CheckpointState.read(folder)
    if renamed := _other_name(folder, state):
        raise UserError(f"{folder}: {renamed}")
    return state


def _other_name(folder: Path, state: CheckpointState) -> str:
    """What is wrong with the folder's name; empty when nothing is."""
    if pair_of(folder) in (None, state.pair):
        return ""
    return f"holds pair {state.pair}: the folder was renamed or copied; name it {folder_name(state.pair)}, or remove it"


def load_weights(path: str | Path, prefer_masters: bool = True) -> dict[str, Tensor]:
    """All weights by logical name, on the host.

    The fp32 masters where the checkpoint has them (they are more precise than bf16 weights), else, or with ``prefer_masters=False``, the
    weights in the dtype they were trained in. Only those bytes are read.
    """
    folder = resolve(path)
    return _read_tensors(folder, MASTERS if prefer_masters and _holds(folder, MASTERS) else WEIGHTS)


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint by logical name, each read when it is asked for: the whole model is never on the host.

    Files are proved first; only those bytes are read.

    Attributes:
        shapes: shape of each tensor, by logical name.
        dtype: of all tensors: fp32 masters where there are some and ``prefer_masters``, else as trained.
    """

    def __init__(self, path: str | Path, prefer_masters: bool = True) -> None:
        folder = resolve(path)
        part = MASTERS if prefer_masters and _holds(folder, MASTERS) else WEIGHTS
        _prove(folder, part)
        self._reader = _OneLookReader(folder / part)
        entries = self._reader.read_metadata().state_dict_metadata.items()
        stored = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in stored.items()}
        self.dtype = next(entry.properties.dtype for entry in stored.values())

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            state_dict_loader.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _OneLookReader(Reader):
    """Reads its metadata once, however often it is used: those of a large mesh take long."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and places of all tensors of the folder."""
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def load_optimizer(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """fp32 masters and Adam's moments, ``{"master": {...}, "exp_avg": {...}, "exp_avg_sq": {...}}`` by logical name, on the host.

    Raises ``UserError`` for a checkpoint without an optimizer (an imported one).
    """
    folder = _with_optimizer(path)
    state: dict[str, dict[str, Tensor]] = {"master": load_weights(folder)}
    for key, tensor in _read_tensors(folder, OPTIMIZER).items():
        kind, _, name = key.partition(".")
        state.setdefault(kind, {})[name] = tensor
    return state


def load_weights_into(path: str | Path, weights: Mapping[str, Fragments], group: ProcessGroup | None) -> None:
    """Fill this rank's part of the weights, from the fp32 masters where the checkpoint has them.

    Files are proved once, each rank its share of them; then a rank reads what its own boxes need, whatever mesh wrote them. All ranks of
    ``group`` call it.
    """
    folder = resolve(path)
    _read_into(folder, MASTERS if _holds(folder, MASTERS) else WEIGHTS, weights, group)


def load_optimizer_into(path: str | Path, state: Mapping[str, Mapping[str, Fragments]], group: ProcessGroup | None) -> None:
    """Fill this rank's part of the masters and of Adam's moments (``Engine.state``), likewise.

    Raises ``UserError`` for a checkpoint without an optimizer (an imported one).
    """
    folder = _with_optimizer(path)
    load_weights_into(folder, state["master"], group)
    moments = {f"{kind}.{name}": held for kind, named in state.items() if kind != "master" for name, held in named.items()}
    _read_into(folder, OPTIMIZER, moments, group)


def _with_optimizer(path: str | Path) -> Path:
    folder = resolve(path)
    if not _holds(folder, OPTIMIZER):
        raise UserError(
            f"{folder}: holds weights only, no optimizer to resume from; start a run from it with megarat adapt --from"
        )
    return folder


def check_model(folder: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    """Refuse weights of another shape than the config's, naming the first tensor and both shapes."""
    found, expected = names.logical_shapes(saved), names.logical_shapes(wanted)
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{folder}: {name} has shape {_shape(found.get(name))}, but the config's model needs {_shape(expected.get(name))} "
                f"(checkpoint: {_model(saved)}; config: {_model(wanted)})"
            )
    for key in ("heads", "rope_base", "norm_eps"):  # change what the same weights compute
        if getattr(saved, key) != getattr(wanted, key):
            raise UserError(
                f"{folder}: was trained with model.{key} = {getattr(saved, key)}, but the config has {getattr(wanted, key)}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (no such tensor)" if shape is None else str(shape)


def _model(model: ModelConfig) -> str:
    recurrence = "" if model.recurrence else ", no recurrence"
    return f"{model.layers} layers x {model.hidden}, {model.heads} heads, vocabulary {model.vocab}{recurrence}"


# ---- proof -----------------------------------------------------------------------------------------------------------------


def verify(path: str | Path) -> str:
    """Compare size and hash of every file with the manifest. Returns one line of praise, or raises ``UserError`` listing all damage."""
    folder = resolve(path)
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest, sorted(manifest))
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    damage += [f"{name} is not in the manifest" for name in sorted(present - set(manifest) - {MANIFEST})]
    if not damage and (renamed := _other_name(folder, CheckpointState.read(folder))):
        damage.append(renamed)
    if damage:
        raise UserError(f"{folder}: damaged checkpoint\n  " + "\n  ".join(damage))
    size = sum(entry.bytes for entry in manifest.values())
    return f"{folder}: good; {len(manifest)} files, {size} bytes, content {fingerprint(manifest)[:16]}"


def identity(folder: Path) -> str:
    """Hash that names the content of a checkpoint, for the provenance of what grows from it."""
    return fingerprint(read_manifest(folder))


def show(path: str | Path) -> str:
    """A checkpoint in words: where it stands, what it holds, where it came from."""
    folder = resolve(path)
    manifest, state = read_manifest(folder), load_state(folder)
    model, parent = state.config.model, state.parent
    shapes = _shapes(folder / WEIGHTS)
    lines = [
        f"checkpoint   {folder}",
        f"kind         {state.kind}, saved {state.saved_at}, megarat {state.versions.get('megarat')}",
        f"pair         {state.pair} of {state.config.train.pairs} ({state.optimizer_steps} optimizer steps, {len(state.skipped)} pairs skipped)",
        f"tokens       {state.tokens}",
        f"pattern      {state.pattern}",
        f"model        {_model(model)}, {sum(torch.Size(shape).numel() for shape, _ in shapes.values())} parameters",
        f"precision    {state.precision}" + ("" if _holds(folder, OPTIMIZER) else "; weights only"),
        f"mesh         {', '.join(f'{key} {value}' for key, value in state.mesh.items()) or 'none'}",
        f"parent       {', '.join(f'{key} {value}' for key, value in parent.items()) if parent else 'none'}",
        f"files        {len(manifest)}, {sum(entry.bytes for entry in manifest.values())} bytes",
        "tensors",
    ]
    width = max(map(len, shapes))
    lines += [f"  {name:{width}}  {'x'.join(map(str, shape)):>12}  {dtype}" for name, (shape, dtype) in shapes.items()]
    return "\n".join(lines)


def _holds(folder: Path, part: str) -> bool:
    """Whether the manifest promises this part (a part lost from the folder is damage, not absence)."""
    return any(name.startswith(part + "/") for name in read_manifest(folder))


def _prove(folder: Path, part: str, group: ProcessGroup | None = None) -> None:
    """Check the files of one part (a file or a subfolder) against the manifest, each rank of ``group`` its share."""
    _refuse_damaged(folder, _damage_in_own_share(folder, part, group), group)


def _damage_in_own_share(folder: Path, part: str, group: ProcessGroup | None) -> list[str]:
    manifest = read_manifest(folder)
    files = [name for name in manifest if name == part or name.startswith(part + "/")]
    if not files:
        return [f"{part} is not in {MANIFEST}"]
    size = comm.size(group)
    return find_damage(folder, manifest, [name for name in files if _writer(name) % size == comm.rank(group)])


def _writer(file: str) -> int:
    """The rank that wrote a file of tensors, which most likely reads it, too; 0 for any other file."""
    match = re.search(r"__(\d+)_\d+\.distcp$", file)
    return int(match[1]) if match else 0


def _refuse_damaged(folder: Path, damage: list[str], group: ProcessGroup | None) -> None:
    """Raises ``UserError`` on all ranks for damage that one of them has found."""
    damage = [line for lines in comm.gather_objects(damage, group) for line in lines]
    if damage:
        raise UserError(
            f"{folder}: damaged checkpoint: {'; '.join(damage)}. Restore it from a copy, or move it away to use an older checkpoint"
        )


# ---- tensors ---------------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """All tensors of one part of a checkpoint, after its files are proved."""
    _prove(folder, part)
    reader = Reader(folder / part)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _read_into(folder: Path, part: str, tensors: Mapping[str, Fragments], group: ProcessGroup | None) -> None:
    """Fill this rank's boxes from one part of a checkpoint; the reading itself needs no other rank.

    The files are proved meanwhile, so that they come from the disk once; where one is damaged nothing that was read is used.
    """
    _prove(folder, f"{part}/.metadata", group)
    failure: BaseException | None = None
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        damage = pool.submit(_damage_in_own_share, folder, part, group)
        try:
            state_dict_loader.load(
                as_state_dict(tensors),
                storage_reader=Reader(folder / part),
                planner=LoadPlanner(),
                no_dist=True,
            )
        except (Exception, CheckpointException) as error:  # of a damaged file, most likely
            failure = error
    _refuse_damaged(folder, damage.result(), group)
    if failure is not None:
        raise failure


def _shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    entries: Mapping[str, Any] = Reader(folder).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch.")) for name, entry in entries.items()}
