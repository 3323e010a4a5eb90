"""Weight gradients that go straight to their fp32 sums: the operation, and the engine that uses it."""

from __future__ import annotations

import pytest
import tiny_run
import torch

from megarat.engine import Engine
from megarat.errors import UserError
from megarat.model.lm import local_model
from megarat.ops.summed_linear import apex_missing, summed_linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_a_linear_layer(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, 6, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    before = torch.randn(6, 8, dtype=sums)
    total, notes = before.clone(), []
    for times in (1, 2):  # the sum goes on over micro-batches
        y = summed_linear(x, weight, total_FC=total, note=lambda: notes.append(1))
        assert torch.equal(y, torch.nn.functional.linear(x, weight))
        dx, dweight = torch.autograd.grad(y, (x, weight), dy, allow_unused=True)
        assert dweight is None and len(notes) == times
        assert torch.equal(dx, (dy.reshape(-1, 6) @ weight).view(2, 5, 8))
        exact = dy.double().flatten(0, 1).T @ x.double().flatten(0, 1)
        torch.testing.assert_close(
            total.double(), before.double() + times * exact, rtol=1e-5, atol=1e-5
        )  # sums of ten products in fp32


def test_frozen_weights_add_nothing():
    x, weight, total = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4), torch.zeros(2, 4)
    summed_linear(x, weight, total_FC=total, note=pytest.fail).sum().backward()
    assert not total.any() and x.grad is not None


def test_a_sum_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="the sum is"):
        summed_linear(torch.randn(3, 4), torch.randn(2, 4), total_FC=torch.zeros(4, 2), note=pytest.fail)


def settings(weight_gradients: str, **changes):
    train = {"precision": "bf16", "weight_gradients": weight_gradients, "global_batch": 6, **changes.pop("train", {})}
    return tiny_run.config(train=train, **changes)


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_the_engine_has_the_same_gradients_without_their_rounding(mesh, recompute):
    """Over three micro-batches; `separate` rounds each one's gradients to bf16 (2^-9 of them) before it adds them."""
    batches = tiny_run.micro_batches(3)
    found = {}
    for how in ("separate", "product"):
        config = settings(how, parallel={"recompute": recompute})
        engine = Engine(local_model(config, mesh).initialise(0), config, mesh)
        found[how] = engine.gradients(batches, config.sparse_patterns)
    assert found["separate"].keys() == found["product"].keys()
    for name, separate in found["separate"].items():
        product = found["product"][name]
        assert product.norm() > 0, name
        assert (product - separate).norm() <= 2**-8 * separate.norm(), name


def test_updates_and_dropped_gradients_are_those_of_separate_sums(mesh):
    batches = tiny_run.micro_batches(3)
    courses = []
    for how in ("separate", "product"):
        config = settings(how)
        engine = Engine(tiny_run.model(config), config, mesh)
        engine.update(batches, config.patterns, 1e-2, accept=lambda loss, norm: False)  # nothing of this one may be left
        courses.append([engine.update(batches, patterns, 1e-2) for patterns in (config.sparse_patterns, config.patterns) * 3])
    for separate, product in zip(*courses, strict=True):
        assert product.made
        assert product.loss == pytest.approx(separate.loss, abs=0.02)  # bf16 weights differ in their last bit now and then
        assert product.grad_norm == pytest.approx(separate.grad_norm, rel=0.02)


def test_fp32_and_missing_apex_are_refused(mesh, monkeypatch):
    config = settings("product", train={"precision": "auto"})
    monkeypatch.setattr("megarat.engine.resolve_precision", lambda precision, device: "fp32")
    with pytest.raises(UserError, match="needs bf16"):
        Engine(tiny_run.model(config), config, mesh)
    monkeypatch.undo()
    if apex_missing() is not None:
        with pytest.raises(UserError, match=r"fused_weight_gradient_mlp_cuda.*set train.weight_gradients=product"):
            Engine(tiny_run.model(settings("apex")), settings("apex"), mesh)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("parallel", "zero", 2), ("parallel", "pipeline", 2), ("parallel", "tensor", 2), ("train", "fp8", True),
        ("train", "compile", True), ("train", "precision", "fp32"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(section, key, value):
    changes = {section: {key: value}}
    if section == "train":
        changes["train"] |= {"precision": "bf16"} if key != "precision" else {}
    with pytest.raises(UserError, match=f"train.weight_gradients = product with {section}.{key} = {value}"):
        settings("product", **changes)
