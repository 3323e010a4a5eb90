"""Read a checkpoint of the published RAT+ code (``.pth``) without running anything pickled in it.

Such a file is a zip that ``torch.save`` wrote: ``data.pkl`` describes a nested dict, ``data/<key>`` hold raw tensor bytes. The pickle is
walked by an unpickler that knows tensors and plain containers; every other class it names becomes an inert dict, so
neither the training code nor easydict need be installed and no foreign function is ever called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.model.pattern import Pattern

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# Published module -> logical name; the mixer's fused projection is handled apart.
_BLOCK_NAMES = {
    "seq_layer.input_norm.weight": "mixer.norm.weight",
    "seq_layer.out_proj.weight": "mixer.out.weight",
    "hidden_layer.fc1.weight": "ffn.up.weight",
    "hidden_layer.fc2.weight": "ffn.down.weight",
    "hidden_layer.ln.weight": "ffn.norm.weight",
}


def read_upstream(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """The model's shape, its weights by logical name (as stored, usually fp32) and what the file says of its pattern and step.

    Both published layouts are read: one fused ``in_proj`` (rows o|q|k|v|g, or o|q|k|v without recurrence), and the older one whose forget
    gate is a separate ``fgate_proj``. Raises ``UserError`` when the file is no such checkpoint.
    """
    saved = _unpickle(Path(path))
    if not isinstance(saved, Mapping) or not isinstance(saved.get("task"), Mapping):
        raise UserError(f"{path}: no 'task' entry with the weights; expected a checkpoint of the published RAT+ code")
    published = _read_weights(saved["task"], path)
    settings: Mapping[str, Any] = saved["config"] if isinstance(saved.get("config"), Mapping) else {}
    weights, recurrence = _rename(published, path)
    config = _infer_shape(weights, recurrence, settings, path)
    return config, weights, {"step": saved.get("step"), "pattern": _published_pattern(settings, config.layers)}


def _read_weights(task: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights by published name, without the prefix that torch.compile adds."""
    try:
        return {name.replace("_orig_mod.", ""): lazy.read() for name, lazy in task.items() if isinstance(lazy, _LazyTensor)}
    except (zipfile.BadZipFile, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: damaged weights: {error}") from None


def _rename(published: dict[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], bool]:
    """Logical names and separate o, q, k, v, g; and whether the model has the recurrence."""
    remaining = dict(published)

    def take(name: str) -> Tensor:
        if name not in remaining:
            raise UserError(f"{path}: the weight {name} is missing; the file is not a complete RAT+ checkpoint")
        return remaining.pop(name)

    weights = {"embedding.weight": take("embedding.wte.weight"), "norm.weight": take("backbone.ln.weight")}
    head = remaining.pop("head.lm_head.weight", weights["embedding.weight"])
    if not torch.equal(head, weights["embedding.weight"]):
        raise UserError(f"{path}: head.lm_head.weight differs from embedding.wte.weight; megarat's models tie them")
    width = weights["embedding.weight"].shape[1]
    layers = _count_layers(remaining)
    if layers == 0:
        raise UserError(f"{path}: no backbone.layers.N weights; the file is not a RAT+ checkpoint")
    recurrence = False
    for layer in range(layers):
        old, new = f"backbone.layers.{layer}.", f"layers.{layer}."
        fused = take(f"{old}seq_layer.in_proj.weight")
        gate = remaining.pop(f"{old}seq_layer.fgate_proj.weight", None)
        rows = fused if gate is None else torch.cat([fused, gate])
        if rows.shape not in ((4 * width, width), (5 * width, width)):
            raise UserError(
                f"{path}: {old}seq_layer.in_proj.weight is {tuple(rows.shape)}; expected ({5 * width}, {width}) or ({4 * width}, {width})"
            )
        recurrence = rows.shape[0] == 5 * width
        for letter, piece in zip("oqkvg", rows.split(width), strict=False):
            weights[f"{new}mixer.{letter}.weight"] = piece
        for published_name, name in _BLOCK_NAMES.items():
            weights[new + name] = take(old + published_name)
    if remaining:
        raise UserError(f"{path}: weights that no RAT+ model has: {', '.join(sorted(remaining)[:5])}")
    return weights, recurrence


def _count_layers(names: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in names if name.startswith("backbone.layers.")})


def _infer_shape(weights: Mapping[str, Tensor], recurrence: bool, settings: Mapping[str, Any], path: str | Path) -> ModelConfig:
    vocab, width = weights["embedding.weight"].shape
    cell = _lookup(settings, "model", "backbone", "seq_cell") or {}
    heads = cell.get("num_head") or (width // 128 if width % 128 == 0 else None)
    if not heads or width % heads:
        raise UserError(f"{path}: cannot tell the number of heads of width {width} (found num_head = {cell.get('num_head')!r})")
    rotary = _lookup(settings, "model", "embedding", "pe") or {}
    return ModelConfig(
        layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        hidden=width,
        heads=heads,
        vocab=vocab,
        ffn_multiple=weights["layers.0.ffn.up.weight"].shape[0] // width,
        recurrence=recurrence,
        rope_base=float(rotary.get("base", 10000)),
    )


def _published_pattern(settings: Mapping[str, Any], layers: int) -> str | list[str]:
    """The pattern the weights were last trained for: dense after joint training, else the (D, W, I) of the file, perhaps a list a layer."""
    cell = _lookup(settings, "model", "backbone", "seq_cell") or {}
    sizes = [cell.get(key, default) for key, default in (("dilation_size", 1), ("local_size", 0), ("initial_size", 0))]
    if cell.get("joint_train", True):
        return "dense"
    if not any(isinstance(size, (list, tuple)) for size in sizes):
        return str(Pattern(*sizes))
    return [
        str(Pattern(*(size[layer] if isinstance(size, (list, tuple)) else size for size in sizes))) for layer in range(layers)
    ]


def _lookup(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


class _Inert(dict):  # type: ignore[type-arg]
    """Stands for any pickled class: takes items and state as plain data, runs nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class _LazyTensor(NamedTuple):
    """Where a tensor lies in the file; optimizer moments beside the weights are never read."""

    path: Path
    member: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor itself, contiguous, on the CPU."""
        with zipfile.ZipFile(self.path) as archive:
            flat = torch.frombuffer(bytearray(archive.read(self.member)), dtype=self.dtype)
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        if min(self.offset, *self.size, *self.stride, 0) < 0 or last >= max(flat.numel(), 1):
            raise UserError(
                f"{self.path}: {self.member} holds {flat.numel()} elements, too few for shape {self.size}; the file is damaged"
            )
        return flat.as_strided(self.size, self.stride, self.offset).clone()


class _Storage(NamedTuple):
    path: Path
    member: str
    dtype: torch.dtype


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _LazyTensor:
    return _LazyTensor(*storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor: _LazyTensor, *_: Any) -> _LazyTensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Builds tensors and containers; any other global becomes ``_Inert``."""

    def __init__(self, path: Path, root: str, description: IO[bytes]) -> None:
        super().__init__(description)
        self.path, self.root = path, root

    def find_class(self, module: str, name: str) -> Any:
        """The few harmless globals a weights file needs (called by the pickle machinery)."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _Inert

    def persistent_load(self, reference: Any) -> _Storage:
        """``('storage', type, key, location, elements)`` -> the storage of that key, whatever device it was saved from."""
        kind, dtype, key = reference[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or "/" in str(key):
            raise pickle.UnpicklingError(f"unknown reference {reference!r}")
        return _Storage(self.path, f"{self.root}/data/{key}", dtype)


def _unpickle(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise UserError(f"{path}: no data.pkl inside; expected a file written by torch.save")
            _check_byteorder(archive, roots[0], path)
            return _Unpickler(path, roots[0], archive.open(f"{roots[0]}/data.pkl")).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, OSError, EOFError, KeyError) as error:
        raise UserError(f"{path}: not a whole torch.save file: {error}") from None
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: cannot read its description of the weights: {error}") from None


def _check_byteorder(archive: zipfile.ZipFile, root: str, path: Path) -> None:
    name = f"{root}/byteorder"
    if name in archive.namelist() and archive.read(name) != b"little":
        raise UserError(f"{path}: was written on a big-endian machine; re-save it on a little-endian one")
