"""Cutting flattened parameters into boxes of logical tensors, and putting them together again."""

from __future__ import annotations

import itertools

import pytest
import torch

from megarat.config import ModelConfig
from megarat.model import names
from megarat.model.lm import RATPlusLM
from megarat.parallel.fragments import Piece, cut, gather

MODEL = ModelConfig(layers=1, hidden=8, heads=4, vocab=12, ffn_multiple=3)


@pytest.mark.parametrize(("ranks", "cuts"), list(itertools.product((1, 2, 4), (1, 3, 7))))
def test_any_cut_of_any_rank_covers_every_element_once_with_its_own_value(ranks, cuts):
    """Tensor ranks hold slices, ZeRO cuts each anywhere: all boxes together are the whole tensors."""
    logical = {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        for name, shape in names.logical_shapes(MODEL).items()
    }
    rebuilt = {name: torch.full_like(tensor, -1) for name, tensor in logical.items()}
    writers = {name: torch.zeros_like(tensor) for name, tensor in logical.items()}
    whole_model = RATPlusLM(MODEL)
    for rank, (name, parameter) in itertools.product(range(ranks), whole_model.named_parameters()):
        shape = local_shape(name, tuple(parameter.shape), ranks)
        pieces = names.pieces(name, shape, rank, ranks)
        flat = torch.cat([piece.of(logical[piece.name]).flatten() for piece in pieces])
        bounds = [round(flat.numel() * step / cuts) for step in range(cuts + 1)]
        for low, high in itertools.pairwise(bounds):
            for logical_name, fragments in cut(flat[low:high], low, pieces, rank == 0 or len(shape) == 2).items():
                for offset, tensor in fragments.boxes:
                    box = Piece("", fragments.whole, offset, tuple(tensor.shape))
                    box.of(rebuilt[logical_name]).copy_(tensor)
                    box.of(writers[logical_name]).add_(float(fragments.written_here))
    for name, tensor in logical.items():
        assert torch.equal(rebuilt[name], tensor), name
        assert (writers[name] == 1).all(), name


def local_shape(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    if len(shape) == 1:
        return shape
    by_columns = name.endswith(("out_proj.weight", "down.weight"))
    return (shape[0], shape[1] // ranks) if by_columns else (shape[0] // ranks, shape[1])


def test_boxes_are_views_and_padding_belongs_to_no_tensor():
    flat = torch.zeros(20)
    (fragments,) = cut(flat, 5, [Piece("w", (4, 5), (0, 0), (4, 5))]).values()  # 15 of its 20 elements, then 5 of padding
    fragments.fill(torch.arange(20.0).view(4, 5))
    assert torch.equal(flat, torch.cat([torch.arange(5.0, 20.0), torch.zeros(5)]))


def test_an_element_that_nobody_holds_is_an_error():
    with pytest.raises(ValueError, match="w: no rank holds 8 of its 20 elements"):
        gather(cut(torch.zeros(12), 8, [Piece("w", (4, 5), (0, 0), (4, 5))]))
