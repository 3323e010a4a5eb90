"""Read a checkpoint of the published RAT+ code (``.pth``) without running anything pickled in it.

Such a file is a zip that ``torch.save`` wrote: ``data.pkl`` describes a nested dict, ``data/<key>`` hold raw tensor bytes. The pickle is
walked by an unpickler that knows tensors and plain containers; every other class it names becomes an inert dict, so
neither the training code nor easydict need be installed and no foreign function is ever called.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.model import names
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

_MIXER_SETTINGS = ("model", "backbone", "seq_cell")  # where the published config describes the mixer

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
    _check_shapes(weights, config, path)
    return config, weights, {"step": saved.get("step"), "pattern": _published_pattern(settings, config.layers, path)}


def _read_weights(task: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights by published name, without the prefix that torch.compile adds."""
    try:
        return {str(name).replace("_orig_mod.", ""): lazy.read() for name, lazy in task.items() if isinstance(lazy, _LazyTensor)}
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged weights: {error}") from None


def _rename(published: dict[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], bool]:
    """Logical names and separate o, q, k, v, g; and whether the model has the recurrence."""
    remaining = dict(published)

    def take(name: str) -> Tensor:
        if name not in remaining:
            raise UserError(f"{path}: the weight {name} is missing; the file is not a complete RAT+ checkpoint")
        return remaining.pop(name)

    weights = {"embedding.weight": take("embedding.wte.weight"), "norm.weight": take("backbone.ln.weight")}
    if weights["embedding.weight"].dim() != 2:
        raise UserError(
            f"{path}: embedding.wte.weight is {tuple(weights['embedding.weight'].shape)}; expected (vocabulary, width)"
        )
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
        if gate is not None and (gate.shape != (width, width) or fused.shape != (4 * width, width)):
            raise UserError(
                f"{path}: {old}seq_layer.fgate_proj.weight is {tuple(gate.shape)} beside an in_proj.weight of {tuple(fused.shape)};"
                f" expected ({width}, {width}) and ({4 * width}, {width})"
            )
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


def _count_layers(published: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[2] for name in published if name.startswith("backbone.layers.")})


def _check_shapes(weights: Mapping[str, Tensor], config: ModelConfig, path: str | Path) -> None:
    """The weights are those of one model: the tensors and shapes that its width and number of layers ask for."""
    shapes = names.logical_shapes(config)
    for name in {**shapes, **weights}:
        found, needed = (tuple(weights[name].shape) if name in weights else "missing"), shapes.get(name, "none")
        if found != needed:
            raise UserError(f"{path}: {name} is {found}; the model of the other weights needs {needed}")


def _infer_shape(weights: Mapping[str, Tensor], recurrence: bool, settings: Mapping[str, Any], path: str | Path) -> ModelConfig:
    vocab, width = weights["embedding.weight"].shape
    told = _lookup(settings, *_MIXER_SETTINGS, "num_head")
    heads = told or (width // 128 if width % 128 == 0 else None)
    if not isinstance(heads, int) or heads < 1 or width % (2 * heads):
        raise UserError(f"{path}: cannot tell the number of heads of width {width} (found num_head = {told!r})")
    base = _lookup(settings, "model", "embedding", "pe", "base") or 10000
    if not isinstance(base, (int, float)):
        raise UserError(f"{path}: the rotary base in its config is {base!r}; expected a number")
    return ModelConfig(
        layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        hidden=width,
        heads=heads,
        vocab=vocab,
        ffn_multiple=weights["layers.0.ffn.up.weight"].shape[0] // width,
        recurrence=recurrence,
        rope_base=float(base),
    )


def _published_pattern(settings: Mapping[str, Any], layers: int, path: str | Path) -> str | list[str]:
    """The pattern the weights were last trained for: dense after joint training, else the (D, W, I) of the file, perhaps a list a layer."""
    if _lookup(settings, *_MIXER_SETTINGS, "joint_train") in (None, True):
        return "dense"
    columns = []
    for key, default in (("dilation_size", 1), ("local_size", 0), ("initial_size", 0)):
        value = _lookup(settings, *_MIXER_SETTINGS, key)
        value = default if value is None else value
        column = list(value)[:layers] if isinstance(value, (list, tuple)) else [value] * layers
        if len(column) < layers or not all(isinstance(size, int) for size in column):
            raise UserError(f"{path}: {key} in its config is {value!r}; expected an integer or one for each of {layers} layers")
        columns.append(column)
    per_layer = [str(Pattern(*sizes).checked()) for sizes in zip(*columns, strict=True)]
    return per_layer[0] if len(set(per_layer)) == 1 else per_layer


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

    def append(self, item: Any) -> None:
        """Takes the items of pickled lists, sets and queues of foreign classes, and forgets them."""

    def extend(self, items: Any) -> None:
        """As ``append``."""


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
            content = bytearray(archive.read(self.member))
        elements = len(content) // self.dtype.itemsize
        last = self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride, strict=True))
        if min(self.offset, *self.stride, 0) < 0 or min(self.size, default=1) < 1 or last >= elements:
            raise UserError(
                f"{self.path}: {self.member} holds {elements} elements, which give no tensor of shape {self.size}; the file is damaged"
            )
        flat = torch.frombuffer(content, dtype=self.dtype, count=elements)
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
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole torch.save file: {error}") from None
    except Exception as error:  # damaged bytes can drive the unpickler into any of them, MemoryError and OverflowError too
        raise UserError(f"{path}: cannot read its description of the weights: {type(error).__name__}: {error}") from None


def _check_byteorder(archive: zipfile.ZipFile, root: str, path: Path) -> None:
    name = f"{root}/byteorder"
    if name in archive.namelist() and archive.read(name) != b"little":
        raise UserError(f"{path}: was written on a big-endian machine; re-save it on a little-endian one")
