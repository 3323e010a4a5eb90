"""The engine on two ranks: precision, numbers that are not finite, and agreement."""

from __future__ import annotations

import math

import pytest
import tiny_run
import torch

from megarat import mesh as meshes
from megarat.engine import Engine, Update
from megarat.model.lm import local_model
from megarat.parallel import worlds

LR = 1e-2
MESHES = {
    "data 2, ZeRO 1": {"zero": 1},
    "data 2, ZeRO 2": {"zero": 2},
    "data 2, ZeRO 3": {"zero": 3},
    "tensor 2, ZeRO 1": {"tensor": 2, "zero": 1},
    "tensor 2 with sequence, ZeRO 3": {"tensor": 2, "zero": 3, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "context 2, ZeRO 2": {"context": 2, "zero": 2},
}


def build(precision: str, parallel: dict) -> tuple[Engine, list]:
    """An engine on this world and this rank's micro-batches of eight rows."""
    settings = tiny_run.config(train={"precision": precision, "global_batch": 8, "micro_batch": 2}, parallel=parallel)
    mesh = meshes.start("cpu", settings)
    engine = Engine(local_model(settings, mesh).initialise(0), settings, mesh)
    return engine, tiny_run.micro_batches(4)[mesh.place.data :: mesh.shape.data]


def with_a_bad_batch_between(precision: str, parallel: dict) -> tuple[Update, bool, bool]:
    """How a bad update was reported, whether it left the state alone, and whether the next one was as if it had never been."""
    engine, own = build(precision, parallel)
    untouched, _ = build(precision, parallel)
    patterns = tiny_run.config().patterns
    engine.update(own, patterns, LR), untouched.update(own, patterns, LR)
    bad = None
    if engine.mesh.rank == engine.mesh.world_size - 1:  # one rank alone makes a number that is none
        bad = engine.model.blocks[-1].mixer.in_proj.weight.register_hook(lambda gradient: gradient * math.nan)
    update = engine.update(own, patterns, LR)
    if bad is not None:
        bad.remove()
    kept = same_state(engine, untouched)
    again = engine.update(own, patterns, LR) == untouched.update(own, patterns, LR)
    return update, kept, again and same_state(engine, untouched)


def same_state(left: Engine, right: Engine) -> bool:
    (ours, steps), (theirs, other_steps) = left.named_state(), right.named_state()
    equal = all(torch.equal(tensor, theirs[kind][name]) for kind, named in ours.items() for name, tensor in named.items())
    return equal and steps == other_steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_bad_number_on_one_rank_drops_the_update_on_all_and_is_forgotten(mesh, precision):
    for update, kept, forgotten in worlds.run(2, with_a_bad_batch_between, precision, MESHES[mesh]):
        assert not update.finite and math.isfinite(update.loss) and not math.isfinite(update.grad_norm)
        assert kept
        assert forgotten


def courses(precision: str, meshes_of_a_world: list[dict]) -> list[list[Update]]:
    """The updates of three pairs on each mesh."""
    settings = tiny_run.config()
    assert settings.sparse_patterns is not None
    passes = (settings.sparse_patterns, settings.patterns) * 3
    return [
        [engine.update(own, patterns, LR) for patterns in passes]
        for engine, own in (build(precision, parallel) for parallel in meshes_of_a_world)
    ]


def gradients(parallel: dict) -> dict[str, torch.Tensor]:
    engine, own = build("fp32", parallel)
    patterns = tiny_run.config().sparse_patterns
    assert patterns is not None
    return engine.gradients(own, patterns)


@pytest.mark.parametrize("mesh", ["data 2, ZeRO 3", "tensor 2 with sequence, ZeRO 3", "pipeline 2", "context 2, ZeRO 2"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(mesh):
    kept, _ = worlds.run(2, gradients, MESHES[mesh])
    for recompute in ("selective", "full"):
        recomputed, _ = worlds.run(2, gradients, MESHES[mesh] | {"recompute": recompute})
        for name, gradient in kept.items():
            assert torch.equal(recomputed[name], gradient), (name, recompute)


def test_recomputing_runs_each_layer_twice_a_pass():
    settings = tiny_run.config()
    calls = {}
    for recompute in (False, True):
        model = tiny_run.model(settings)
        model.recompute = recompute
        runs = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        ids, labels = tiny_run.micro_batches(1)[0]
        model(ids, None, labels).backward()
        calls[recompute] = len(runs)
    assert calls == {False: tiny_run.LAYERS, True: 2 * tiny_run.LAYERS}


@pytest.mark.slow
def test_bf16_losses_stay_near_those_of_one_fp32_process():
    ((expected,),) = worlds.run(1, courses, "fp32", [{}])
    first, second = worlds.run(2, courses, "bf16", list(MESHES.values()))
    assert first == second
    for mesh, course in zip(MESHES, first, strict=True):
        for found, wanted in zip(course, expected, strict=True):
            assert found.loss == pytest.approx(wanted.loss, abs=0.02), mesh  # bf16 keeps 8 bits
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=0.03), mesh
