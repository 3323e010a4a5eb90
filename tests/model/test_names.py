"""Logical names of the parameters."""

from __future__ import annotations

import pytest
import torch

from megarat.config import ModelConfig
from megarat.model import names
from megarat.model.lm import RATPlusLM

MODEL = ModelConfig(layers=2, hidden=12, heads=2, vocab=20, ffn_multiple=3)
BASELINE = ModelConfig(layers=1, hidden=12, heads=2, vocab=20, recurrence=False)


@pytest.mark.parametrize("model", [MODEL, BASELINE])
def test_every_parameter_splits_into_the_logical_tensors_and_back(model):
    found = {}
    for name, parameter in RATPlusLM(model).initialise(0).named_parameters():
        pieces = names.split(name, parameter.detach())
        assert torch.equal(names.join(name, tuple(parameter.shape), pieces), parameter)
        found |= {logical: tuple(tensor.shape) for logical, tensor in pieces.items()}
    assert found == names.logical_shapes(model)


def test_the_fused_projection_is_o_q_k_v_g_in_this_order():
    fused = torch.arange(5 * 12)[:, None].expand(60, 12)
    pieces = names.split("layers.3.mixer.in_proj.weight", fused)
    assert [(name, int(rows[0, 0])) for name, rows in pieces.items()] == [
        (f"layers.3.mixer.{letter}.weight", 12 * index) for index, letter in enumerate("oqkvg")
    ]
    assert list(names.split("layers.3.mixer.in_proj.weight", fused[:48])) == [
        f"layers.3.mixer.{letter}.weight" for letter in "oqkv"
    ]


def test_the_output_projection_is_called_out_and_all_else_keeps_its_name():
    assert names.logical_names("layers.0.mixer.out_proj.weight", (12, 12)) == ["layers.0.mixer.out.weight"]
    for name in ("embedding.weight", "layers.1.ffn.up.weight", "layers.1.mixer.norm.weight", "norm.weight"):
        assert names.logical_names(name, (12, 12)) == [name]
