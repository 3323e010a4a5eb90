"""Recorded micro-batches without a GPU: a stand-in for the recorder runs the function again at each replay, and not when it is recorded."""

from __future__ import annotations

import pytest
import tiny_run
import torch

from megarat.cuda_graphs import RecordedMicroBatches
from megarat.engine import Engine
from megarat.errors import UserError


class Recorder:
    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, run):
        self.recordings += 1

        def replay():
            self.replays += 1
            run()

        return replay


def settings(**train):
    return tiny_run.config(train={"precision": "bf16", "global_batch": 6, **train})


def engine_of(mesh, recorder=None):
    engine = Engine(tiny_run.model(settings()), settings(), mesh)
    if recorder is not None:
        engine._recorded = RecordedMicroBatches(engine.model, engine.micro_batches, recorder)
    return engine


def test_updates_are_bit_for_bit_those_of_the_engine_alone(mesh):
    config, recorder = settings(), Recorder()
    plain, recorded = engine_of(mesh), engine_of(mesh, recorder)
    for pair in range(3):
        batches = tiny_run.micro_batches(3, seed=pair)
        for patterns in (config.sparse_patterns, config.patterns):
            assert plain.update(batches, patterns, 1e-2) == recorded.update(batches, patterns, 1e-2)
    # Each of the two patterns is met with one micro-batch; from then on all but the last of an update are replayed.
    assert recorder.recordings == 2
    assert recorder.replays == 2 * (1 + 2 + 2)


def test_a_summed_update_records_both_passes(mesh):
    config, recorder = settings(recipe="summed"), Recorder()
    plain, recorded = engine_of(mesh), engine_of(mesh, recorder)
    for pair in range(2):
        batches = tiny_run.micro_batches(3, seed=pair)
        both = (config.sparse_patterns, config.patterns), 1e-2, (None, None)
        assert plain.summed_update(batches, *both) == recorded.summed_update(batches, *both)
    assert recorder.recordings == 2 and recorder.replays > 0


def test_refused_updates_leave_nothing_behind(mesh):
    config = settings()
    plain, recorded = engine_of(mesh), engine_of(mesh, Recorder())
    batches = tiny_run.micro_batches(3)
    for accept in (None, lambda loss, norm: False, None, None):
        assert plain.update(batches, config.patterns, 1e-2, accept) == recorded.update(batches, config.patterns, 1e-2, accept)


def test_inputs_of_a_replay_are_its_own(mesh):
    """What is handed in may be freed or changed afterwards."""
    recorded = RecordedMicroBatches(engine_of(mesh).model, 1, Recorder())
    config = settings()
    (ids, labels), (other_ids, other_labels) = tiny_run.micro_batches(2)
    assert recorded.loss((ids, labels), config.patterns) is None
    recorded.met(config.patterns)
    first = recorded.loss((ids, labels), config.patterns)
    ids.zero_()
    second = recorded.loss((other_ids, other_labels), config.patterns)
    assert not torch.equal(first, second)
    assert torch.equal(recorded.loss((other_ids, other_labels), config.patterns), second)


def test_without_a_gpu_it_is_refused(mesh):
    config = settings(cuda_graphs=True)
    with pytest.raises(UserError, match=r"train\.cuda_graphs in bf16 on cpu: needs a GPU"):
        Engine(tiny_run.model(config), config, mesh)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"zero": 2}}, {"parallel": {"pipeline": 2}}, {"parallel": {"tensor": 2}}, {"parallel": {"context": 2}},
        {"data": {"documents": "separate"}},
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes):
    with pytest.raises(UserError, match=r"train\.cuda_graphs with .* set train.cuda_graphs=false"):
        tiny_run.config(train={"precision": "bf16", "cuda_graphs": True}, **changes)
