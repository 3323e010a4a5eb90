"""The part of a logical tensor that one rank holds, as boxes of the whole: what checkpoints are written from and read into.

ZeRO cuts a rank's flattened parameter anywhere, in the middle of a row if need be. Such a run of elements is at most three boxes of the
matrix: the end of a row, whole rows, the start of a row. All boxes are views, so that filling them fills the optimizer's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarat import comm

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """Consecutive rows of a rank's run-time parameter as a box of a logical tensor."""

    name: str
    whole: Shape  # of the logical tensor
    offset: Shape  # of this rank's box in it
    shape: Shape  # of the box

    def of(self, tensor: Tensor) -> Tensor:
        """This box of the whole logical tensor, as a view."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


class Box(NamedTuple):
    """A dense block of a logical tensor."""

    offset: Shape
    tensor: Tensor


@dataclass(frozen=True)
class Fragments:
    """What this rank holds of a logical tensor of shape ``whole``; perhaps nothing."""

    whole: Shape
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    written_here: bool = True  # False where another rank holds the same and writes it

    def map(self, function: Callable[[Tensor], Tensor]) -> Fragments:
        """The same boxes of other values."""
        boxes = tuple(Box(offset, function(tensor)) for offset, tensor in self.boxes)
        dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return Fragments(self.whole, dtype, boxes, self.written_here)

    def fill(self, tensor: Tensor) -> None:
        """Copy this rank's boxes out of the whole tensor."""
        for offset, box in self.boxes:
            box.copy_(Piece("", self.whole, offset, tuple(box.shape)).of(tensor))


def cut(flat: Tensor, first: int, pieces: Sequence[Piece], written_here: bool = True) -> dict[str, Fragments]:
    """The fragments of a flattened parameter's elements ``first``, ``first + 1``, … (``flat``), by logical name.

    ``pieces`` are the parameter's rows in order; ``flat`` may be padded.
    """
    found, start = {}, 0
    for piece in pieces:
        elements = torch.Size(piece.shape).numel()
        low, high = max(first, start), min(first + flat.numel(), start + elements)
        boxes = tuple(_boxes(flat[low - first : high - first], low - start, piece)) if low < high else ()
        found[piece.name] = Fragments(piece.whole, flat.dtype, boxes, written_here)
        start += elements
    return found


def _boxes(run: Tensor, first: int, piece: Piece) -> Iterable[Box]:
    """A run of elements from number ``first`` of a piece on."""
    if len(piece.shape) == 1:
        yield Box((piece.offset[0] + first,), run)
        return
    columns = piece.shape[1]
    while run.numel():
        row, column = divmod(first, columns)
        rows = run.numel() // columns if column == 0 else 0
        length = rows * columns or min(columns - column, run.numel())
        block = run[:length].view(max(rows, 1), -1)
        yield Box((piece.offset[0] + row, piece.offset[1] + column), block)
        run, first = run[length:], first + length


def gather(fragments: Mapping[str, Fragments], group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """The whole tensors, on the host of every rank: for tests and small models. Raises ``ValueError`` when an element has no holder."""
    parts: dict[str, list[Fragments]] = {}
    for held in comm.gather_objects({name: part.map(Tensor.cpu) for name, part in fragments.items()}, group):
        for name, part in held.items():
            parts.setdefault(name, []).append(part)
    return {name: _assemble(name, held) for name, held in parts.items()}


def _assemble(name: str, parts: Sequence[Fragments]) -> Tensor:
    shape = parts[0].whole
    whole = torch.empty(shape, dtype=parts[0].dtype)
    covered = torch.zeros(shape, dtype=torch.bool)
    for offset, tensor in (box for part in parts for box in part.boxes):
        piece = Piece(name, shape, offset, tuple(tensor.shape))
        piece.of(whole).copy_(tensor)
        piece.of(covered).fill_(True)
    if not covered.all():
        raise ValueError(f"{name}: no rank holds {int((~covered).sum())} of its {whole.numel()} elements")
    return whole
