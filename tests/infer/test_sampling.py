from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.generate import generate
from megarat.infer.sampling import Draws, Sampling, draw, uniform
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]


def draws(count: int, sampling: Sampling, logits=None, seen: set[int] = frozenset()) -> Counter[int]:
    """What ``count`` rows draw, each with its own seed."""
    logits_V = torch.tensor(PROBABILITIES).log() if logits is None else torch.tensor(logits)
    state = Draws.of(count, 5 if logits is None else len(logits), "cpu")
    state.start([replace(sampling, seed=seed) for seed in range(count)])
    state.seen_BV[:, sorted(seen)] = True
    return Counter(draw(logits_V.expand(count, -1), state).tolist())


def test_temperature_zero_takes_the_likeliest_token():
    assert draws(10, Sampling()) == {1: 10}


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-39}, {"temperature": 1e-320}, {"temperature": 1.0, "top_p": 1e-50}], ids=str
)
def test_what_is_next_to_zero_takes_the_likeliest_token(extreme):
    """In fp32 a logit over such a temperature is infinite, and such a top_p is 0."""
    assert draws(10, Sampling(**extreme)) == {1: 10}


def test_the_hottest_temperature_draws_all_alike():
    assert set(draws(1000, Sampling(temperature=1e300))) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_tempered_probability(temperature):
    count = 40_000
    weights = [p ** (1 / temperature) for p in PROBABILITIES]
    found = draws(count, Sampling(temperature=temperature))
    for token, weight in enumerate(weights):
        p = weight / sum(weights)
        assert found[token] / count == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count))  # five standard deviations


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.64, {1, 3}), (0.66, {1, 3, 4}), (0.86, {1, 2, 3, 4}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    count = 20_000
    found = draws(count, Sampling(temperature=1.0, top_p=top_p))
    assert set(found) == kept
    total = sum(PROBABILITIES[token] for token in kept)
    for token in kept:
        p = PROBABILITIES[token] / total
        assert found[token] / count == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count))


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = [3.0, -1.0, 2.5, -1.2]
    assert draws(1, Sampling(repetition_penalty=1.3), logits, {0}) == {2: 1}  # 3 / 1.3 < 2.5
    assert draws(1, Sampling(repetition_penalty=1.1), logits, {0}) == {0: 1}  # 3 / 1.1 > 2.5
    negative = [-9.0, -1.0, -9.0, -1.2]
    assert draws(1, Sampling(repetition_penalty=1.3), negative, {1}) == {3: 1}  # -1.3 < -1.2
    assert draws(1, Sampling(repetition_penalty=1.1), negative, {1}) == {1: 1}


def test_rows_draw_each_by_its_own_rule_and_remember_it():
    """Greedy, tempered and penalised rows in one batch, against each alone."""
    samplings = [Sampling(), Sampling(1.0, seed=3), Sampling(0.7, 0.5, 1.4, seed=-9), Sampling(repetition_penalty=3.0)]
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    together = Draws.of(4, 50, "cpu")
    together.start(samplings)
    apart = [Draws.of(1, 50, "cpu") for _ in samplings]
    for state, sampling in zip(apart, samplings, strict=True):
        state.start([sampling])
    for _ in range(6):
        found = draw(logits_BV, together).tolist()
        assert found == [draw(logits_BV[row : row + 1], state).item() for row, state in enumerate(apart)]
        assert found[0] == int(logits_BV[0].argmax())
        assert all(together.seen_BV[row, token] for row, token in enumerate(found))
    assert together.count_B.tolist() == [6] * 4


def test_uniform_numbers_are_splitmix64_and_spread_evenly():
    """Against SplitMix64 in Python's unbounded integers; and mean, variance and serial correlation within five standard deviations."""
    bits = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & bits
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & bits
        return z ^ (z >> 31)

    def expected(seed: int, count: int) -> float:
        return (mix((mix((seed + 0x9E3779B97F4A7C15) & bits) + count * 0xD1B54A32D192ED03) & bits) >> 11) / 2**53

    pairs = [(0, 0), (1, 0), (0, 1), (-5, 7), (2**63 - 1, 1000), (-(2**63), 3)]
    seeds_B, counts_B = torch.tensor(pairs).unbind(1)
    assert uniform(seeds_B, counts_B).tolist() == [expected(*pair) for pair in pairs]
    grid = uniform(torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)).view(200, 200) - 0.5
    assert abs(float(grid.mean())) < 5 * math.sqrt(1 / 12 / 40_000)
    assert float(grid.square().mean()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / 40_000))
    for left, right in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        assert abs(float((left * right).mean())) < 5 / 12 / math.sqrt(left.numel())


def model() -> RATPlusLM:
    return RATPlusLM(ModelConfig(layers=1, hidden=16, heads=2, vocab=31, init_std=0.4)).initialise(3)


def test_one_seed_gives_one_text_and_another_seed_another():
    ids, patterns = torch.tensor([[5, 7, 9]]), resolve("D=4", 1, 2)
    texts = [generate(model(), ids, 20, patterns, sampling=Sampling(temperature=1.0, seed=seed)).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_penalty_falls_on_generated_tokens_only_and_on_all_of_them():
    """Against repeated full forwards with the rule written out. The prompt is not penalised."""
    lm, patterns, ids = model(), resolve("D=4", 1, 2), [5, 9, 5]
    generated: list[int] = []
    with torch.no_grad():
        for _ in range(20):
            logits = lm(torch.tensor([ids + generated]), patterns)[0, -1].tolist()
            for token in set(generated):
                logits[token] *= 0.5 if logits[token] > 0 else 2.0
            generated.append(max(range(31), key=logits.__getitem__))
    sampling = Sampling(repetition_penalty=2.0)
    assert generate(lm, torch.tensor([ids]), 20, patterns, sampling=sampling)[0].tolist() == generated
    assert generate(lm, torch.tensor([ids]), 20, patterns)[0].tolist() != generated


def test_a_row_that_met_the_stop_token_is_filled_with_it_and_all_stopped_ends():
    ids, patterns = torch.tensor([[5, 6], [9, 3]]), resolve("dense", 1, 2)
    free = generate(model(), ids, 12, patterns)
    stop = int(free[0, 3])
    stopped = generate(model(), ids, 12, patterns, stop_id=stop)
    for row, full in zip(stopped.tolist(), free.tolist(), strict=True):
        end = full.index(stop) if stop in full else len(full)
        assert row == full[:end] + [stop] * (stopped.shape[1] - end)
    ends = [row.index(stop) + 1 if stop in row else 12 for row in free.tolist()]
    assert stopped.shape[1] == max(ends)


def test_every_token_is_announced_as_it_is_drawn():
    heard: list[list[int]] = []
    ids = torch.tensor([[5, 6], [9, 3]])
    generated = generate(model(), ids, 4, resolve("dense", 1, 2), on_token=lambda next_B: heard.append(next_B.tolist()))
    assert heard == generated.T.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
    ],
)
def test_impossible_sampling_is_refused(settings):
    with pytest.raises(UserError, match=r"need temperature >= 0, 0 < top_p <= 1 and a repetition_penalty from 0.01 to 100"):
        Sampling(**settings)
