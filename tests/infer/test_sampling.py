from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.generate import Sampling, draw, generate
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

PROBABILITIES = [0.05, 0.4, 0.1, 0.25, 0.2]
NOTHING_SEEN = torch.zeros(1, 5, dtype=torch.bool)


def draws(count: int, sampling: Sampling, seen: torch.Tensor = NOTHING_SEEN) -> Counter[int]:
    logits_BV = torch.tensor([PROBABILITIES]).log().expand(count, 5)
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(draw(logits_BV, seen.expand(count, 5), sampling, generator).tolist())


def test_temperature_zero_takes_the_likeliest_token():
    assert draws(10, Sampling()) == {1: 10}


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
    logits = torch.tensor([[3.0, -1.0, 2.5, -1.2]])
    generator = torch.Generator().manual_seed(0)
    seen = torch.tensor([[True, False, False, False]])
    assert draw(logits, seen, Sampling(repetition_penalty=1.3), generator).item() == 2  # 3 / 1.3 < 2.5
    assert draw(logits, seen, Sampling(repetition_penalty=1.1), generator).item() == 0  # 3 / 1.1 > 2.5
    negative = torch.tensor([[-9.0, -1.0, -9.0, -1.2]])
    seen = torch.tensor([[False, True, False, False]])
    assert draw(negative, seen, Sampling(repetition_penalty=1.3), generator).item() == 3  # -1.3 < -1.2
    assert draw(negative, seen, Sampling(repetition_penalty=1.1), generator).item() == 1


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
    with pytest.raises(UserError, match="need temperature >= 0, 0 < top_p <= 1 and repetition_penalty > 0"):
        Sampling(**settings)
