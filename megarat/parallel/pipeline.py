"""Pipeline stages: which layers each holds, so that none waits for a slower one.

A stage's time is its FLOPs. The head is worth several layers at small widths, and it runs on the last stage; the lookup on the first one
costs nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cache

from megarat.config import Config
from megarat.model.flops import forward_flops_per_token


def layer_costs(config: Config) -> list[float]:
    """FLOPs a token of each layer, both passes of a pair together."""
    passes = [patterns for patterns in (config.sparse_patterns, config.patterns) if patterns is not None]
    one_layer = dataclasses.replace(config.model, layers=1, vocab=0)
    return [
        sum(forward_flops_per_token(one_layer, (patterns[layer],), config.data.sequence_length) for patterns in passes)
        for layer in range(config.model.layers)
    ]


def head_cost(config: Config) -> float:
    """FLOPs a token of the head, likewise."""
    passes = 1 if config.sparse_patterns is None else 2
    return passes * 2.0 * config.model.vocab * config.model.hidden


def balance(layers: Sequence[float], head: float, stages: int) -> list[range]:
    """Consecutive layers for each stage, at least one each, such that the most expensive stage is as cheap as can be.

    ``layers`` are the layers' costs, ``head`` is that of the head, on the last stage.
    """
    sums = [0.0, *itertools.accumulate(layers)]

    @cache
    def best(first: int, left: int) -> tuple[float, int]:
        """The cost of the worst of ``left`` stages that hold the layers from ``first`` on, and where the first of them ends."""
        if left == 1:
            return sums[-1] - sums[first] + head, len(layers)
        ends = range(first + 1, len(layers) - left + 2)
        return min(((max(sums[end] - sums[first], best(end, left - 1)[0]), end) for end in ends), default=(math.inf, first))

    bounds = [0]
    for left in range(stages, 0, -1):
        bounds.append(best(bounds[-1], left)[1])
    return [range(*pair) for pair in itertools.pairwise(bounds)]
