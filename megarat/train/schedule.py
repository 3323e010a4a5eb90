"""Learning rate of pair n: a pure function, counted in pairs (the published recipe steps its schedule once a batch)."""

from __future__ import annotations

import math

from megarat.config import OptimConfig


def warmup_pairs(optim: OptimConfig, pairs: int) -> int:
    """Pairs of linear warm-up: ``optim.warmup`` is a fraction of all pairs when below 1, else their number."""
    return int(optim.warmup * pairs) if optim.warmup < 1 else int(optim.warmup)


def learning_rate(pair: int, pairs: int, optim: OptimConfig) -> float:
    """Rate of pair number ``pair`` (from 0) of ``pairs``.

    Linear up: lr(n) = (n + 1) / n_warm * peak for n < n_warm. Then, with x = (n - n_warm) / (pairs - n_warm) in [0, 1),
    lr(n) = min + (peak - min) * (1 + cos(pi x)) / 2; or the peak throughout when the schedule is constant.
    """
    warm = warmup_pairs(optim, pairs)
    if pair < warm:
        return optim.lr * (pair + 1) / warm
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (pair - warm) / max(1, pairs - warm))
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
