"""Stages of even cost."""

from __future__ import annotations

import itertools
import random

import pytest
import tiny_run

from megarat.model.flops import forward_flops_per_token
from megarat.parallel.pipeline import balance, head_cost, layer_costs


def worst(stages: list[range], layers: list[float], head: float) -> float:
    costs = [sum(layers[layer] for layer in stage) for stage in stages]
    return max([*costs[:-1], costs[-1] + head])


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_other_cut_has_a_cheaper_worst_stage(stages):
    draw = random.Random(stages)
    for _ in range(20):
        layers, head = [draw.uniform(1, 4) for _ in range(7)], draw.uniform(0, 10)
        found = balance(layers, head, stages)
        assert [layer for stage in found for layer in stage] == list(range(7))
        assert len(found) == stages and all(len(stage) >= 1 for stage in found)
        cuts = itertools.combinations(range(1, 7), stages - 1)
        every = [[range(*pair) for pair in itertools.pairwise((0, *cut, 7))] for cut in cuts]
        assert worst(found, layers, head) == min(worst(other, layers, head) for other in every)


def test_a_head_worth_two_layers_takes_their_place_on_the_last_stage():
    assert balance([1.0] * 10, 2.0, 4) == [range(3), range(3, 6), range(6, 9), range(9, 10)]


def test_costs_are_those_of_both_passes_and_add_up_to_the_whole_model():
    config = tiny_run.config(model={"layers": 3, "hidden": 16, "heads": 2}, attention={"pattern": ["dense", "D=4", "D=2,W=3"]})
    passes = (config.sparse_patterns, config.patterns)
    whole = sum(forward_flops_per_token(config.model, patterns, config.data.sequence_length) for patterns in passes)
    assert sum(layer_costs(config)) + head_cost(config) == pytest.approx(whole, rel=1e-12)
    dense, dilated, _ = layer_costs(config)
    assert dense > dilated
