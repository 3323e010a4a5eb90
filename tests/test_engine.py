"""The engine against a training loop written in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import tiny_run
import torch

from megarat.config import Config
from megarat.engine import Engine, Update, resolve_precision
from megarat.model import names

ZERO_STAGES = (1, 2, 3)
LR = 1e-2


def build(mesh, zero: int = 1, precision: str = "fp32", seed: int = 0, **changes) -> tuple[Engine, Config]:
    train = {"precision": precision, **changes.pop("train", {})}
    settings = tiny_run.config(parallel={"zero": zero}, train=train, **changes)
    return Engine(tiny_run.model(settings, seed), settings, mesh), settings


def plain_updates(settings: Config, batches, patterns, updates: int):
    """AdamW, clipping and accumulation by torch alone: the trained model and (loss, norm before clipping) of each update."""
    model = tiny_run.model(settings)
    optim = settings.optim
    adamw = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    history = []
    for _ in range(updates):
        losses = [model(ids, patterns, labels) for ids, labels in batches]
        loss = torch.stack(losses).mean()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip or math.inf)
        adamw.step()
        history.append((loss.item(), norm.item()))
    return model, history


def logical_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= names.split(name, parameter.detach())
    return tensors


def assert_same_state(left, right) -> None:
    assert left[1] == right[1]
    for kind in left[0]:
        assert left[0][kind].keys() == right[0][kind].keys()
        for name, tensor in left[0][kind].items():
            assert torch.equal(tensor, right[0][kind][name]), (kind, name)


@pytest.mark.parametrize("zero", ZERO_STAGES)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_fp32_updates_equal_plain_pytorch(mesh, zero, clip):
    engine, settings = build(mesh, zero, optim={"clip": clip})
    batches = tiny_run.micro_batches(2)
    model, expected = plain_updates(settings, batches, settings.sparse_patterns, updates=3)
    updates = [engine.update(batches, settings.sparse_patterns, LR) for _ in range(3)]
    for update, (loss, norm) in zip(updates, expected, strict=True):
        assert update.finite
        # fp32 sums in another order: a few units of 2^-24, relative
        assert update.loss == pytest.approx(loss, rel=1e-6)
        assert update.grad_norm == pytest.approx(norm, rel=2e-6)
    state, steps = engine.named_state()
    assert steps == 3
    for name, weight in logical_weights(model).items():
        # Adam divides by sqrt(v): a relative error e of a gradient moves a weight by about lr * e, here 3 steps of 1e-2 * 1e-5
        torch.testing.assert_close(state["master"][name], weight, rtol=1e-5, atol=3e-7)


def test_accumulating_four_micro_batches_equals_one_of_all_rows(mesh):
    four, settings = build(mesh, train={"global_batch": 8, "micro_batch": 2})
    one, _ = build(mesh, train={"global_batch": 8, "micro_batch": 8})
    small = tiny_run.micro_batches(4)
    whole = [tuple(torch.cat(tensors) for tensors in zip(*small, strict=True))]
    for _ in range(2):
        accumulated, at_once = four.update(small, settings.patterns, LR), one.update(whole, settings.patterns, LR)
        assert accumulated.loss == pytest.approx(at_once.loss, rel=1e-6)
        assert accumulated.grad_norm == pytest.approx(at_once.grad_norm, rel=2e-6)


def test_the_loss_is_the_plain_mean_over_micro_batches(mesh):
    """Not weighted by how many labels count in each, as the published recipe has it."""
    engine, settings = build(mesh)
    (ids_a, labels_a), (ids_b, labels_b) = tiny_run.micro_batches(2)
    labels_b = labels_b.clone()
    labels_b[:, 3:] = -100
    model = tiny_run.model(settings)
    expected = (model(ids_a, None, labels_a) + model(ids_b, None, labels_b)).item() / 2
    update = engine.update([(ids_a, labels_a), (ids_b, labels_b)], settings.patterns, LR)
    assert update.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_bf16_weights_follow_fp32_masters_that_start_unrounded(mesh, zero):
    engine, settings = build(mesh, zero, "bf16")
    initial = logical_weights(tiny_run.model(settings))
    state, _ = engine.named_state()
    assert all(torch.equal(state["master"][name], weight) for name, weight in initial.items())
    batches = tiny_run.micro_batches(2)
    tiny_lr = 1e-5  # below half a unit of bf16 for most weights: only fp32 masters remember such steps
    for _ in range(2):
        assert engine.update(batches, settings.patterns, tiny_lr).finite
    state, _ = engine.named_state()
    moved = state["master"]["layers.0.mixer.q.weight"] - initial["layers.0.mixer.q.weight"]
    assert (moved.abs() > 1e-6).float().mean() > 0.9
    if zero < 3:  # stage 3 shows empty parameters between updates
        for name, weight in logical_weights(engine.model).items():
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, state["master"][name].bfloat16())


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_bf16_losses_stay_near_fp32(mesh, zero):
    engine, settings = build(mesh, zero, "bf16")
    batches = tiny_run.micro_batches(2)
    _, expected = plain_updates(settings, batches, settings.sparse_patterns, updates=3)
    for loss, norm in expected:
        update = engine.update(batches, settings.sparse_patterns, LR)
        assert update.loss == pytest.approx(loss, abs=0.02)  # bf16 keeps 8 bits
        assert update.grad_norm == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_state_moves_between_engines_bit_for_bit(mesh, zero, precision):
    source, settings = build(mesh, zero, precision)
    batches = tiny_run.micro_batches(2)
    for _ in range(2):
        source.update(batches, settings.sparse_patterns, LR)
    state, steps = source.named_state()
    target, _ = build(mesh, zero, precision, seed=1)
    target.load_named_state(state, steps)
    assert_same_state(target.named_state(), (state, steps))
    for patterns in (settings.sparse_patterns, settings.patterns):
        assert target.update(batches, patterns, LR) == source.update(batches, patterns, LR)
    assert_same_state(target.named_state(), source.named_state())


@pytest.mark.parametrize("target_zero", [2, 3])
def test_state_moves_between_zero_stages(mesh, target_zero):
    source, settings = build(mesh, 1)
    batches = tiny_run.micro_batches(2)
    source.update(batches, settings.sparse_patterns, LR)
    state, steps = source.named_state()
    target, _ = build(mesh, target_zero, seed=1)
    target.load_named_state(state, steps)
    ours, theirs = target.update(batches, settings.patterns, LR), source.update(batches, settings.patterns, LR)
    assert ours.loss == theirs.loss
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)  # the stages sum the norm in another order


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_weights_alone_start_a_fresh_optimizer(mesh, zero):
    weights = logical_weights(tiny_run.model(tiny_run.config(), seed=3))
    engine, settings = build(mesh, zero, "bf16")
    engine.load_weights(weights)
    state, steps = engine.named_state()
    assert steps == 0
    assert all(torch.equal(state["master"][name], weight) for name, weight in weights.items())
    assert not any(tensor.any() for tensor in state["exp_avg"].values())
    same, _ = build(mesh, zero, "bf16", seed=3)
    batches = tiny_run.micro_batches(2)
    assert engine.update(batches, settings.patterns, LR) == same.update(batches, settings.patterns, LR)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_a_non_finite_update_changes_nothing_and_is_forgotten(mesh, monkeypatch, zero, precision):
    engine, settings = build(mesh, zero, precision)
    untouched, _ = build(mesh, zero, precision)
    batches = tiny_run.micro_batches(2)
    assert engine.update(batches, settings.patterns, LR) == untouched.update(batches, settings.patterns, LR)
    with monkeypatch.context() as patch:
        forward = engine.model.forward
        patch.setattr(engine.model, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)
        assert engine.update(batches, settings.patterns, LR).finite is False
    assert_same_state(engine.named_state(), untouched.named_state())
    assert engine.update(batches, settings.patterns, LR) == untouched.update(batches, settings.patterns, LR)


def test_an_infinite_gradient_under_a_finite_loss_is_not_finite(mesh):
    engine, settings = build(mesh)
    weight = engine.model.norm.weight
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    update = engine.update(tiny_run.micro_batches(2), settings.patterns, LR)
    hook.remove()
    assert math.isfinite(update.loss) and update.grad_norm == math.inf and not update.finite


def test_weight_decay_groups(mesh):
    """With zero gradients AdamW only decays: what is exempt keeps its value, the rest shrinks by 1 - lr * decay."""
    for no_decay, kept in {
        "nothing": (),
        "norms": ("norm.weight",),
        "norms_and_embedding": ("norm.weight", "embedding.weight"),
    }.items():
        engine, settings = build(mesh, optim={"no_decay": no_decay, "weight_decay": 0.5})
        before, _ = engine.named_state()
        (ids, labels), second = tiny_run.micro_batches(2)
        hooks = [p.register_hook(torch.zeros_like) for p in engine.model.parameters()]
        update = engine.update([(ids, labels), second], settings.patterns, LR)
        for hook in hooks:
            hook.remove()
        assert update == Update(update.loss, 0.0, True)
        after, _ = engine.named_state()
        for name, weight in before["master"].items():
            expected = weight if name.endswith(kept) and kept else weight * (1 - LR * 0.5)
            torch.testing.assert_close(after["master"][name], expected, rtol=1e-6, atol=0)


def test_logical_shapes_are_those_of_the_config(mesh):
    for recurrence in (True, False):
        engine, settings = build(mesh, zero=3, model={"recurrence": recurrence})
        assert engine.logical_shapes() == names.logical_shapes(settings.model)


def test_a_wrong_number_of_micro_batches_is_refused(mesh):
    engine, settings = build(mesh)
    with pytest.raises(ValueError, match="3 micro-batches given; the engine was built for 2"):
        engine.update(tiny_run.micro_batches(3), settings.patterns, LR)


def test_precision_follows_the_device_unless_told():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", gpu) == "bf16"
    assert resolve_precision("fp32", gpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
