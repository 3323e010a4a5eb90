"""One training step: the sparse + dense pair of active recurrence learning (RAT+, arXiv 2602.18196).

    for each global batch:
        accumulate the loss with sparse attention   (D=64, W=0, I=0);   clip;  AdamW
        accumulate the loss with dense attention on the same tokens;    clip;  AdamW

Two updates with one learning rate; the second sees the weights of the first. The sparse pass forces the recurrence to carry what
attention cannot see, the dense pass keeps attention good. Adaptation and plain training make the second update only.

Two variants change the recipe, and are off unless a config asks for them: ``train.recipe: summed`` makes one update by the sum of both
losses, ``train.sparse_every: n`` makes the sparse update for every n-th batch only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megarat.config import Config
from megarat.engine import Engine, MicroBatch, Update
from megarat.model.pattern import Patterns

SPARSE, DENSE = "sparse", "dense"  # the passes of a pair


class PairResult(NamedTuple):
    """The updates of one pair. ``dense`` is the update with the run's main pattern; None when a bad sparse update ended the pair."""

    sparse: Update | None
    dense: Update | None

    @property
    def finite(self) -> bool:
        """Whether all losses and gradients of the pair were finite."""
        return all(update.finite for update in (self.sparse, self.dense) if update is not None)

    @property
    def made(self) -> bool:
        """Whether every update of the pair was made."""
        return self.dense is not None and self.dense.made


def train_pair(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    sparse: Patterns | None,
    dense: Patterns,
    lr: float,
    accept: Callable[[str, float, float], bool] | None = None,
    summed: bool = False,
) -> PairResult:
    """Train on one global batch: sparse update, then dense update; the dense one alone when ``sparse`` is None.

    ``accept(pass, loss, norm)`` may refuse an update before it is made; one that is not finite is never made. A bad sparse update ends the
    pair, weights untouched. After a bad dense update the (good) sparse one stands. ``summed`` makes both in one update, or none.
    """
    of_sparse, of_dense = (None if accept is None else functools.partial(accept, which) for which in (SPARSE, DENSE))
    if summed and sparse is not None:
        return PairResult(*engine.summed_update(micro_batches, (sparse, dense), lr, (of_sparse, of_dense)))
    sparse_update = None
    if sparse is not None:
        sparse_update = engine.update(micro_batches, sparse, lr, of_sparse)
        if not sparse_update.made:
            return PairResult(sparse_update, None)
    return PairResult(sparse_update, engine.update(micro_batches, dense, lr, of_dense))


def sparse_patterns(config: Config, pair: int) -> Patterns | None:
    """What the sparse pass of pair number ``pair`` (from 0) sees; None where the recipe leaves it out."""
    return config.sparse_patterns if pair % config.train.sparse_every == 0 else None
