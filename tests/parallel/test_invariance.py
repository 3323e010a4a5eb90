"""The invariance gate holds on worlds of 1, 2 and 4 ranks, and catches planted bugs."""

from __future__ import annotations

import functools

import pytest
import torch

from megarat.engine import Engine
from megarat.mesh import Shape
from megarat.model.layers import RMSNorm
from megarat.parallel import far_keys, invariance, worlds
from megarat.parallel.context import ContextParallel
from megarat.parallel.invariance import Case

DATA, TENSOR, PIPELINE, CONTEXT = Shape(data=2), Shape(tensor=2), Shape(pipeline=2), Shape(context=2)


def selection(world_size: int) -> list[Case]:
    """Each mesh with and without sequence parallelism; ZeRO stages and micro-batch sizes in turn, all stages on up to two ranks.

    Two or four micro-batches each, on many ranks four under pipelines only: what more of them cost is waiting for messages.
    """
    grouped: dict[tuple, list[Case]] = {}
    for case in invariance.cases(world_size):
        if case.accumulation in ((2, 4) if world_size <= 2 or case.shape.pipeline > 1 else (2,)):
            grouped.setdefault(case[: 2 if world_size > 2 else 3], []).append(case)
    return [same[index % len(same)] for index, same in enumerate(grouped.values())]


def failures(verdicts, chosen) -> list[str]:
    return [f"{verdict} {case}" for verdict, case in zip(verdicts, chosen, strict=True) if not verdict.holds]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_mesh_computes_what_one_process_of_plain_pytorch_does(world_size):
    chosen = selection(world_size)
    verdicts = worlds.run(world_size, invariance.judge, chosen, 3)
    assert all(rank == verdicts[0] for rank in verdicts)  # every rank sees the same numbers
    assert not failures(verdicts[0], chosen)


def test_the_selection_covers_every_axis():
    for world_size in (2, 4):
        every, chosen = list(invariance.cases(world_size)), selection(world_size)
        for axis in (lambda case: case[:2], lambda case: case.zero, lambda case: case.micro_batch):
            assert {axis(case) for case in chosen} == {axis(case) for case in every}


def scale_a_layer_by_the_accumulation(engine: Engine) -> None:
    """Gradients of one stage (here the last layer's) divided once more by the number of micro-batches."""
    if engine.model.is_last:
        for parameter in engine.model.blocks[-1].parameters():
            parameter.register_hook(lambda gradient: gradient / engine.micro_batches)


def leave_the_copies_of_the_embedding_apart(engine: Engine) -> None:
    """The first stage trains its embedding by the lookup alone, the last one by the head alone."""
    engine._engine.module.get_tied_weights_and_groups = list


def count_the_embedding_on_both_stages(engine: Engine) -> None:
    engine.model.embedding.weight.ds_pipe_replicated = False


def run_the_last_stage_dense(engine: Engine) -> None:
    """The sparse pass does not reach the last stage."""
    if engine.model.is_last:
        stage = engine._engine.module.stage
        run_stage = stage.model.run_stage
        stage.model.run_stage = lambda x_BTC, patterns, documents: run_stage(x_BTC, None, documents)


def drop_the_last_micro_batch_of_other_ranks(engine: Engine) -> None:
    """The last micro-batch misses the average over data ranks (its loss is still reported)."""
    backward, calls = engine._engine.backward, [0]

    def without_the_last(loss, *args, **kwargs):
        calls[0] += 1
        kept = engine.mesh.place.data == 0 or calls[0] % engine.micro_batches
        return backward(loss if kept else loss * 0.0, *args, **kwargs)

    engine._engine.backward = without_the_last


def count_norms_on_every_tensor_rank(engine: Engine) -> None:
    """Replicated parameters taken for sharded ones in the norm."""
    for parameter in engine.model.parameters():
        parameter.tensor_model_parallel = True


def forget_to_sum_norm_weights_over_the_sequence(engine: Engine) -> None:
    """With sequence parallelism each rank keeps the gradient of its own tokens."""
    for module in engine.model.modules():
        if isinstance(module, RMSNorm):
            object.__setattr__(module, "ranks", type(module.ranks)(module.ranks.group, sequence=False))


def shift_the_labels_of_one_rank(engine: Engine) -> None:
    """One tensor rank believes its rows of the vocabulary begin one later."""
    if engine.mesh.place.tensor == 1:
        engine.model.embedding.first_row += 1


def begin_every_segment_with_an_empty_state(engine: Engine) -> None:
    """The recurrence starts anew on each rank that shares the sequence."""
    for block in engine.model.blocks:
        object.__setattr__(block.mixer, "context", WithoutState(block.mixer.context.group))


class WithoutState(ContextParallel):
    def state_before(self, *projections):
        return None


def send_the_far_keys_of_one_rank_too_few(engine: Engine) -> None:
    """The last far key in front of a segment does not arrive."""
    far_before = far_keys._far_before
    far_keys._far_before = lambda own, pattern, group: far_before(own, pattern, group)[:, :, :-1]


def weigh_segments_alike(engine: Engine) -> None:
    """Each rank takes the mean over its own labels, although one of them has fewer."""
    cross_entropy = engine.model.embedding.cross_entropy

    def loss_of_own_mean(hidden, labels, reduction="mean"):
        loss, _ = cross_entropy(hidden, labels, "mean")
        return loss, torch.ones((), dtype=torch.int64)

    engine.model.embedding.cross_entropy = loss_of_own_mean


def take_the_halo_one_token_too_early(engine: Engine) -> None:
    halo_before = far_keys._halo_before
    far_keys._halo_before = lambda own, pattern, group: halo_before(own, pattern, group).roll(1, 2)


def skip_the_label_at_the_end_of_a_segment(engine: Engine) -> None:
    """The label behind a segment's last token is that of the token before."""

    class Shifted(ContextParallel):
        def own(self, x_BT):
            part = super().own(x_BT)
            is_labels = (x_BT < 0).any()
            return torch.cat((part[:, :-1], part[:, -2:-1]), 1) if is_labels and self.rank == 0 else part

    engine.model.context = Shifted(engine.model.context.group)


def clip_each_stage_by_its_own_norm(engine: Engine) -> None:
    """The norm that is reported stays right."""
    optimizer = engine._optimizer
    clip = optimizer.unscale_and_clip_grads

    def clip_alone(gradients, total_norm):
        return clip(gradients, torch.stack([gradient.norm() for gradient in gradients]).norm())

    optimizer.unscale_and_clip_grads = clip_alone


def leave_the_last_element_of_each_slice_alone(engine: Engine) -> None:
    """A slice of ZeRO is taken for one element shorter than it is."""
    step = engine._step

    def step_on_all_but_one():
        kept = [master[-1].clone() for master in engine._flat_masters()]
        step()
        with torch.no_grad():
            for master, last in zip(engine._flat_masters(), kept, strict=True):
                master[-1] = last
        engine._refresh_weights()

    engine._step = step_on_all_but_one


def pair_labels_with_other_micro_batches(engine: Engine) -> None:
    stage = engine._engine.module.stage
    begin = stage.begin
    stage.begin = lambda patterns, labels: begin(patterns, [*labels[1:], labels[0]])


def evaluate_dense(engine: Engine) -> None:
    """Whatever pattern is asked for."""
    forward = engine._forward
    engine._forward = lambda batch, patterns: forward(batch, patterns if torch.is_grad_enabled() else engine.model.dense)


def recompute_from_rounded_inputs(engine: Engine) -> None:
    """What a layer keeps for its second run is kept in bf16. (Another pattern in that run is refused by torch: what it saves has other shapes.)"""
    for block in engine.model.blocks:
        block.forward = ForwardThenRounded(block.forward)


class ForwardThenRounded:
    def __init__(self, forward):
        self.forward, self.calls = forward, 0

    def __call__(self, x_BTC, *rest):
        self.calls += torch.is_grad_enabled()
        is_second = torch.is_grad_enabled() and self.calls % 2 == 0
        return self.forward(x_BTC.bfloat16().float() if is_second else x_BTC, *rest)


@pytest.mark.parametrize(
    ("case", "sabotage", "caught_by"),
    [
        (Case(DATA, False, 1, 2), scale_a_layer_by_the_accumulation, ("gradients", "norms", "weights")),
        (Case(TENSOR, False, 1, 4), scale_a_layer_by_the_accumulation, ("gradients", "norms", "weights")),
        (Case(PIPELINE, False, 1, 4), scale_a_layer_by_the_accumulation, ("gradients", "norms", "weights")),
        (Case(PIPELINE, False, 1, 4), leave_the_copies_of_the_embedding_apart, ("gradients", "norms", "weights")),
        (Case(PIPELINE, False, 1, 4), count_the_embedding_on_both_stages, ("norms", "weights")),
        (Case(PIPELINE, False, 1, 4), run_the_last_stage_dense, ("gradients", "losses", "weights")),
        (Case(CONTEXT, False, 1, 4), begin_every_segment_with_an_empty_state, ("gradients", "losses", "weights")),
        (Case(CONTEXT, False, 1, 4), send_the_far_keys_of_one_rank_too_few, ("gradients", "losses", "weights")),
        (Case(CONTEXT, False, 2, 4), weigh_segments_alike, ("gradients", "losses", "weights")),
        (Case(DATA, False, 1, 2), drop_the_last_micro_batch_of_other_ranks, ("gradients", "norms", "weights")),
        (Case(DATA, False, 2, 1), drop_the_last_micro_batch_of_other_ranks, ("gradients", "norms", "weights")),
        (Case(DATA, False, 3, 2), drop_the_last_micro_batch_of_other_ranks, ("gradients", "norms", "weights")),
        (Case(TENSOR, False, 1, 4), count_norms_on_every_tensor_rank, ("norms", "weights")),
        (Case(TENSOR, False, 3, 4), count_norms_on_every_tensor_rank, ("norms", "weights")),
        (Case(TENSOR, True, 1, 4), forget_to_sum_norm_weights_over_the_sequence, ("gradients", "norms", "weights")),
        (Case(TENSOR, False, 2, 4), shift_the_labels_of_one_rank, ("gradients", "losses", "weights")),
        (Case(CONTEXT, False, 1, 4), take_the_halo_one_token_too_early, ("gradients", "losses", "weights")),
        (Case(CONTEXT, False, 1, 4), skip_the_label_at_the_end_of_a_segment, ("gradients", "losses", "weights")),
        (Case(PIPELINE, False, 1, 4), clip_each_stage_by_its_own_norm, ("weights",)),
        (Case(PIPELINE, False, 1, 4), pair_labels_with_other_micro_batches, ("gradients", "losses", "weights")),
        (Case(DATA, False, 2, 2), leave_the_last_element_of_each_slice_alone, ("weights",)),
        (Case(DATA, False, 3, 2), leave_the_last_element_of_each_slice_alone, ("weights",)),
        (Case(DATA, False, 3, 2), recompute_from_rounded_inputs, ("gradients", "weights")),
        (Case(DATA, False, 1, 2), evaluate_dense, ("losses",)),
    ],
)
def test_the_gate_catches_a_planted_bug(case, sabotage, caught_by):
    verdict = worlds.run(2, invariance.judge, [case], 0, "cpu", sabotage)[0][0]
    assert not verdict.holds
    for kind in caught_by:
        assert getattr(verdict, kind) > 10 * invariance.TOLERANCE, kind


def leave_out_the_code_generation(engine: Engine) -> None:
    """torch.compile traces, makes the backward and partitions it, but runs PyTorch's own operations: a compiler's minutes are saved."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")


def test_compiled_layers_compute_the_same():
    chosen = [Case(CONTEXT, False, 2, 4, compile=True), Case(PIPELINE, False, 1, 4, compile=True)]
    assert {case.recompute for case in chosen} == {"off", "full"}
    verdicts = worlds.run(2, invariance.judge, chosen, 4, "cpu", leave_out_the_code_generation)
    assert not failures(verdicts[0], chosen)


def test_a_number_that_is_none_is_an_error():
    good = invariance.reference(Case(Shape(), False, 1, 4), 0)
    bad = good._replace(weights=good.weights | {"norm.weight": good.weights["norm.weight"] * torch.nan})
    assert invariance.compare(good, good).holds
    assert not invariance.compare(bad, good).holds
