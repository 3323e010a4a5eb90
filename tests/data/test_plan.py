"""The order of samples: permutations by counting, uniformity by chi-squared."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from megarat.data.plan import RandomOffsetPlan, SequentialPlan, ShuffledPlan, permute
from megarat.errors import UserError


def chi_squared(counts: np.ndarray) -> float:
    """In standard deviations from its mean, for equally likely cells."""
    degrees, expected = len(counts) - 1, counts.sum() / len(counts)
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 10, 15, 16, 17, 97, 100, 255, 256, 257, 4095, 4099, 65537])
def test_permute_is_a_permutation_of_awkward_sizes(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_gives_the_same_whatever_it_is_asked_together_with() -> None:
    whole = permute(np.arange(1001), 1001, 5)
    some = np.array([7, 1000, 0, 500])
    assert np.array_equal(permute(some, 1001, 5), whole[some])


def test_every_permutation_of_four_is_equally_likely_over_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, size=4800).tolist()
    seen = [tuple(permute(np.arange(4), 4, key).tolist()) for key in keys]
    counts = np.array([seen.count(order) for order in permutations(range(4))])
    assert abs(chi_squared(counts)) < 4


def test_permute_works_at_the_size_of_a_200_billion_token_corpus() -> None:
    size = 200 * 10**9 // 4096
    image = permute(np.arange(100_000), size, 9)
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == len(image)
    assert abs(chi_squared(np.bincount(image * 50 // size, minlength=50))) < 4


def test_neighbours_in_the_order_come_from_unrelated_places() -> None:
    size = 100_000
    order = permute(np.arange(size), size, 3)
    distances = np.abs(np.diff(order)) / size
    # two independent uniform places are 1/3 apart on average, with standard deviation sqrt(1/18)
    assert abs(distances.mean() - 1 / 3) < 4 * np.sqrt(1 / 18 / size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(size)


def test_an_epoch_covers_every_sequence_once_and_the_next_in_another_order() -> None:
    plan = ShuffledPlan(num_tokens=1000, sequence_length=32, seed=1)  # 31 sequences of 32 and their last label
    first, second = plan.starts(np.arange(31)), plan.starts(np.arange(31, 62))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(0, 31 * 32, 32))
    assert first.tolist() != second.tolist()
    across = plan.starts(np.arange(20, 40))
    assert across.tolist() == [*first[20:], *second[:9]]


def test_the_last_sequence_leaves_room_for_its_label() -> None:
    assert ShuffledPlan(33, 32, 0).samples_per_epoch == 1
    assert ShuffledPlan(64, 32, 0).samples_per_epoch == 1
    assert ShuffledPlan(65, 32, 0).samples_per_epoch == 2


def test_seeds_give_different_orders() -> None:
    orders = {tuple(ShuffledPlan(1000, 8, seed).starts(np.arange(124)).tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_random_offsets_are_uniform_over_all_starts_and_fit_the_stream() -> None:
    plan = RandomOffsetPlan(num_tokens=150, sequence_length=50, seed=3)
    starts = plan.starts(np.arange(100_000))
    counts = np.bincount(starts)
    assert len(counts) == 100  # 0 … 99: token 99 + 50 is the last label
    assert abs(chi_squared(counts)) < 4


def test_random_offsets_depend_on_position_and_seed_alone() -> None:
    plan = RandomOffsetPlan(10**9, 128, seed=3)
    starts = plan.starts(np.arange(1000))
    assert np.array_equal(plan.starts(np.arange(990, 1000)), starts[990:])
    assert not np.array_equal(RandomOffsetPlan(10**9, 128, seed=4).starts(np.arange(1000)), starts)
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 4 / np.sqrt(1000)


def test_sequential_plan_goes_through_the_stream_once() -> None:
    plan = SequentialPlan(100, 30)
    assert plan.starts(np.arange(3)).tolist() == [0, 30, 60]
    with pytest.raises(IndexError):
        plan.starts(np.array([3]))


@pytest.mark.parametrize(
    "make", [lambda n: ShuffledPlan(n, 32, 0), lambda n: RandomOffsetPlan(n, 32, 0), lambda n: SequentialPlan(n, 32)]
)
def test_a_corpus_shorter_than_a_sequence_and_its_label_is_refused(make: object) -> None:
    make(33)
    with pytest.raises(UserError, match=r"corpus of 32 tokens is shorter than one sequence: data\.sequence_length 32 needs 33"):
        make(32)
