"""train.fp8: which products it changes, how far gradients move, what it refuses."""

from __future__ import annotations

import pytest
import tiny_run
import torch

from megarat.errors import UserError
from megarat.model.lm import local_model
from megarat.ops import fp8_linear


def gradients(mesh, fp8: bool) -> tuple[list[float], torch.Tensor]:
    settings = tiny_run.config(train={"fp8": fp8})
    model = local_model(settings, mesh).initialise(0)
    ids, labels = tiny_run.micro_batches(1)[0]
    losses = []
    for patterns in (settings.sparse_patterns, settings.patterns):
        loss = model(ids, patterns, labels)
        loss.backward()
        losses.append(loss.item())
    return losses, torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_the_products_of_the_layers_are_fp8_and_no_others(mesh):
    model = local_model(tiny_run.config(train={"fp8": True}), mesh)
    linears = [linear for b in model.blocks for linear in (b.mixer.in_proj, b.mixer.out_proj, b.ffn.up, b.ffn.down)]
    assert all(linear.product is fp8_linear for linear in linears)
    plain = local_model(tiny_run.config(), mesh)
    assert not any(getattr(module, "product", None) is fp8_linear for module in plain.modules())


def test_losses_and_gradients_stay_near(mesh):
    """A product's gradients are off by up to sqrt((2^-4)^2 + (2^-3)^2) / sqrt(3) = 0.08 of their norm (tests/ops/test_fp8_linear.py); errors of the 8
    products of two layers add in squares: 0.23. Below 0.005 nothing would have been rounded at all."""
    (exact_losses, exact), (losses, found) = gradients(mesh, False), gradients(mesh, True)
    error = float((found - exact).norm() / exact.norm())
    assert 0.005 < error < 0.23
    for ours, theirs in zip(losses, exact_losses, strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)  # near log 64 the loss of a fresh model hardly depends on its logits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"hidden": 24, "heads": 2}}, "multiples of 16"),
        ({"data": {"sequence_length": 20}, "train": {"micro_batch": 1}}, "multiples of 16"),
        ({"parallel": {"tensor": 2}}, r"parallel\.tensor = 2"),
        ({"parallel": {"recompute": "selective"}}, "keep no inputs"),
    ],
)
def test_what_fp8_cannot_do_is_refused(change, said):
    train = {"fp8": True, **change.pop("train", {})}
    with pytest.raises(UserError, match=said):
        tiny_run.config(train=train, **change)
