"""The safetensors format, written tensor by tensor and read without a copy.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and byte range), and the tensors behind
it. A model is one ``model.safetensors``, or several files and ``model.safetensors.index.json``, which says where each tensor lies. Only one
tensor is on the host at a time while a model is written, and none before it is used while one is read: files are mapped.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarat.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 4 * 10**9  # of tensors in one file of a large model

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LARGEST_HEADER = 100 * 10**6  # what the format allows

Shapes = Mapping[str, tuple[int, ...]]


# ---- writing ---------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, shapes: Shapes, dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    """Write all tensors of ``shapes`` in ``dtype``, each asked for once by ``read(name)``; files of about ``FILE_BYTES``, synced."""
    files = _share_out(shapes, dtype)
    names = [SINGLE] if len(files) == 1 else [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        _write_file(folder / name, {tensor: shapes[tensor] for tensor in tensors}, dtype, read)
    if len(files) > 1:
        size = sum(_bytes(shape, dtype) for shape in shapes.values())
        places = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _share_out(shapes: Shapes, dtype: torch.dtype) -> list[list[str]]:
    """Names by file, in order; a file is full before the tensor that would make it larger than ``FILE_BYTES``."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if files[-1] and held + size > FILE_BYTES:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def _write_file(path: Path, shapes: Shapes, dtype: torch.dtype, read: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name).to(dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shape), name
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


# ---- reading ---------------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, as read-only views of its mapped files. Raises ``UserError`` as ``locate`` and ``read_file`` do."""
    places = locate(folder)
    return {name: tensor for path in sorted(set(places.values())) for name, tensor in read_file(path).items()}


def locate(folder: Path) -> dict[str, Path]:
    """Where each tensor of a folder lies.

    Raises ``UserError`` that names the file which is missing, cut, of another model, or says of itself what cannot be.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(read_file(folder / SINGLE), folder / SINGLE)
    try:
        places = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {type(error).__name__}: {error}") from None
    for name in sorted(set(places.values())):
        if "/" in name or not (folder / name).is_file():
            raise UserError(f"{index} names {name!r}, which is not there")
        odd = read_file(folder / name).keys() ^ {tensor for tensor, file in places.items() if file == name}
        if odd:
            raise UserError(
                f"{folder / name}: {INDEX} and the file disagree about the tensor {min(odd)}; files of two models are mixed up"
            )
    return {name: folder / file for name, file in places.items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file as views of it; it stays mapped while one of them is there. Raises ``UserError`` for a damaged file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path}: {size} bytes do not hold the header of a safetensors file; the file is cut or no such file")
        header = _parse_header(path, file.read(length))
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)[8 + length :]
    tensors = {name: _tensor(path, name, entry, content) for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if end != len(content):
        raise UserError(f"{path}: has {len(content)} bytes of tensors, its header tells of {end}")
    return tensors


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is damaged: no mapping of tensors")
    return header


def _tensor(path: Path, name: str, entry: Any, content: np.ndarray) -> Tensor:
    try:
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(length, int) and length > 0 for length in shape) and end - start == _bytes(shape, dtype)
        if not whole or not 0 <= start <= end <= len(content):
            raise ValueError(f"shape {shape} in bytes {start} to {end} of {len(content)}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the tensor {name} is damaged or cut: {type(error).__name__}: {error}") from None
    return _from_numpy(content[start:end]).view(dtype).view(shape)


def _from_numpy(content: np.ndarray) -> Tensor:
    """torch warns of memory that must not be written; nothing here writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(content)
