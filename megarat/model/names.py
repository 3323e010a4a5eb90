"""Logical tensor names: what a checkpoint calls the parameters, whatever the run-time layout.

At run time the mixer has one fused matrix ``in_proj`` whose rows are o | q | k | v | g (o | q | k | v without recurrence). On disk
they are separate tensors, so that heads can be split over any number of ranks and a tool can look at one projection:

    run time                              on disk
    embedding.weight                      embedding.weight
    layers.{i}.mixer.in_proj.weight       layers.{i}.mixer.{o,q,k,v,g}.weight
    layers.{i}.mixer.out_proj.weight      layers.{i}.mixer.out.weight
    everything else                       the same name

Ranks that share the heads each hold a slice of most tensors: rows of what is multiplied from the left (o, q, k, v, g, up, embedding),
columns of what follows (out, down), all of the norms. ``pieces`` says which.

Pure functions. Letters: C hidden width, F FFN width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megarat.config import ModelConfig
from megarat.parallel.fragments import Piece, Shape

PIECES = ("o", "q", "k", "v", "g")

_IN_PROJ = re.compile(r"(layers\.\d+\.mixer)\.in_proj\.weight")
_OUT_PROJ = re.compile(r"(layers\.\d+\.mixer)\.out_proj\.weight")


_BY_COLUMNS = re.compile(r"layers\.\d+\.(mixer\.out_proj|ffn\.down)\.weight")


def pieces(name: str, shape: Shape, rank: int = 0, ranks: int = 1) -> list[Piece]:
    """The boxes that rank ``rank`` of ``ranks`` sharing the heads holds in its run-time parameter ``name`` of ``shape``, in row order."""
    found = logical_names(name, shape, ranks)
    box = (shape[0] // len(found), *shape[1:])
    if len(shape) == 1:
        return [Piece(name, box, (0,), box)]
    dim = 1 if _BY_COLUMNS.fullmatch(name) else 0
    whole = tuple(length * ranks if axis == dim else length for axis, length in enumerate(box))
    offset = tuple(length * rank if axis == dim else 0 for axis, length in enumerate(box))
    return [Piece(logical, whole, offset, box) for logical in found]


def logical_names(name: str, shape: Shape, ranks: int = 1) -> list[str]:
    """Names on disk of the run-time parameter ``name`` of ``shape`` on one of ``ranks``, in the order of its rows."""
    if fused := _IN_PROJ.fullmatch(name):
        return [f"{fused[1]}.{piece}.weight" for piece in PIECES[: shape[0] * ranks // shape[1]]]
    if out := _OUT_PROJ.fullmatch(name):
        return [f"{out[1]}.out.weight"]
    return [name]


def split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Views of a run-time parameter (or of its master or moment), by logical name."""
    names = logical_names(name, tuple(tensor.shape))
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def join(name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Tensor:
    """The run-time tensor ``name`` of ``shape``, put together from its logical pieces."""
    pieces = [tensors[piece] for piece in logical_names(name, shape)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def logical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every logical tensor of a model and its shape, in the order of the forward pass."""
    C, F, V = model.hidden, model.ffn_multiple * model.hidden, model.vocab
    projections = PIECES if model.recurrence else PIECES[:-1]
    shapes: dict[str, Shape] = {"embedding.weight": (V, C)}
    for layer in range(model.layers):
        mixer, ffn = f"layers.{layer}.mixer", f"layers.{layer}.ffn"
        shapes[f"{mixer}.norm.weight"] = (C,)
        shapes |= {f"{mixer}.{piece}.weight": (C, C) for piece in (*projections, "out")}
        shapes |= {f"{ffn}.norm.weight": (C,), f"{ffn}.up.weight": (F, C), f"{ffn}.down.weight": (C, F)}
    shapes["norm.weight"] = (C,)
    return shapes
