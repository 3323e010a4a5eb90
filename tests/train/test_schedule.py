"""The learning rate against the published recipes and torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from megarat.config import OptimConfig
from megarat.train.schedule import learning_rate, warmup_pairs

RECIPES = {
    "1.5B": (52_452, 2_622, 8e-4),
    "2.6B": (41_961, 2_098, 7e-4),
    "2.6B 200B": (63_578, 3_178, 7e-4),
    "7.6B": (34_968, 1_748, 6e-4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_warmup_of_the_published_runs(name):
    pairs, warm, peak = RECIPES[name]
    optim = OptimConfig(lr=peak)
    assert warmup_pairs(optim, pairs) == warm
    assert learning_rate(0, pairs, optim) == pytest.approx(peak / warm)
    assert learning_rate(warm - 1, pairs, optim) == pytest.approx(peak)
    assert learning_rate(warm, pairs, optim) == pytest.approx(peak)
    middle = (warm + pairs) / 2
    assert learning_rate(int(middle), pairs, optim) == pytest.approx((peak + 1e-6) / 2, rel=2 / pairs * 3.2)
    assert 1e-6 < learning_rate(pairs - 1, pairs, optim) < 1e-6 + peak * 1e-8


def test_equals_torchs_linear_and_cosine_schedulers():
    pairs, optim = 50, OptimConfig(lr=1e-2, min_lr=1e-4, warmup=10)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=optim.lr)
    warm = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1 / 10, end_factor=1.0, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=40, eta_min=1e-4)
    expected = []
    for pair in range(pairs):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if pair < 9:
            warm.step()
        elif pair >= 10:
            cosine.step()
    assert [learning_rate(pair, pairs, optim) for pair in range(pairs)] == pytest.approx(expected, rel=1e-9)


def test_no_warmup_starts_at_the_peak_and_constant_stays_there():
    adaptation = OptimConfig(lr=8e-5, warmup=0)
    assert learning_rate(0, 476, adaptation) == pytest.approx(8e-5)
    constant = OptimConfig(lr=1e-3, warmup=0, schedule="constant")
    assert {learning_rate(pair, 6, constant) for pair in range(6)} == {1e-3}


def test_two_percent_of_the_short_run_is_six_pairs():
    assert warmup_pairs(OptimConfig(warmup=0.02), 317) == 6
