"""The order of samples: permutations by counting, uniformity by chi-squared."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from megarat.data.plan import BlendPlan, RandomOffsetPlan, SequentialPlan, ShuffledPlan, permute
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
    keys = np.random.default_rng(0).integers(0, 2**63, size=1200).tolist()
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


@pytest.mark.parametrize(
    ("samples", "run", "window"), [(1, 16, 4), (5, 16, 4), (97, 4, 3), (1000, 16, 8), (1003, 16, 7), (1024, 16, 4), (1000, 1, 10)]
)
def test_every_epoch_of_a_two_level_shuffle_holds_every_sequence_once(samples: int, run: int, window: int) -> None:
    plan = ShuffledPlan(samples * 8 + 1, 8, seed=3, run=run, window=window)
    for epoch in range(3):
        starts = plan.starts(np.arange(samples * epoch, samples * (epoch + 1)))
        assert sorted(starts.tolist()) == list(range(0, samples * 8, 8))


def order_of(samples: int, run: int, window: int, seed: int = 0) -> np.ndarray:
    return ShuffledPlan(samples + 1, 1, seed, run=run, window=window).starts(np.arange(samples))


def test_samples_in_a_row_come_from_places_as_far_apart_as_independent_ones() -> None:
    samples = 200_000
    order = order_of(samples, run=16, window=512)
    distances = np.abs(np.diff(order)) / samples
    # Two independent uniform places are 1/3 apart, standard deviation sqrt(1/18). A 1/512 of the neighbours here share a run and
    # are about 0 apart: 1/3/512 less. The 12,500 runs are the independent draws, not the samples in them.
    assert abs(distances.mean() - 1 / 3 * (1 - 1 / 512)) < 4 * np.sqrt(1 / 18 / (samples / 16))
    near = np.mean(np.abs(np.diff(order)) < 16)
    assert abs(near - 15 / (16 * 512)) < 4 * np.sqrt(1 / 512 / samples)  # and no more of them than the window says
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(samples / 16)


def test_a_window_reads_few_places_each_of_them_whole_and_from_all_over_the_corpus() -> None:
    samples, run, window = 131_072, 16, 512
    order = order_of(samples, run, window)
    for first in range(0, samples, run * window):
        places = np.sort(order[first : first + run * window])
        stretches = places[np.flatnonzero(np.diff(places, prepend=-2) != 1)]
        assert len(stretches) <= window + 1  # + 1: a run may go around the end of the corpus
        assert abs(chi_squared(np.bincount(stretches * 16 // samples, minlength=16))) < 4


def test_a_corpus_of_one_window_or_runs_of_one_is_shuffled_without_any_locality() -> None:
    for order in (order_of(20_000, run=16, window=2048), order_of(20_000, run=1, window=100)):
        near = np.mean(np.abs(np.diff(order)) <= 8)
        assert abs(near - 16 / 20_000) < 4 * np.sqrt(16 / 20_000 / 20_000)


def test_runs_and_windows_below_one_are_refused() -> None:
    for run, window in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match=r"data\.shuffle_run is . and data\.shuffle_window .; both must be at least 1"):
            ShuffledPlan(1000, 8, 0, run=run, window=window)


def blend_of(weights: list[float], sizes: tuple[int, ...] = (1000, 301, 77, 50, 60)) -> BlendPlan:
    plans = [ShuffledPlan(size, 5, seed) for seed, size in enumerate(sizes)]
    return BlendPlan(plans[: len(weights)], sizes[: len(weights)], weights)


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [1, 1000, 3], [0.1, 0.1, 0.8], [5.0], [2.0, 0.1161, 0.24063, 0.11656, 2.0]]
)
def test_every_corpus_of_a_blend_keeps_near_its_share_at_any_time(weights: list[float]) -> None:
    corpora, own = blend_of(weights).split(np.arange(20_000))
    for number, weight in enumerate(weights):
        taken = np.cumsum(corpora == number)
        share = weight / sum(weights) * np.arange(1, 20_001)
        assert np.abs(taken - share).max() < len(weights)
        assert np.array_equal(own[corpora == number], np.arange(taken[-1]))  # its own order, without gaps
    for samples in (0, 1, 17, 20_000):
        assert blend_of(weights).counts(samples) == [int((corpora[:samples] == n).sum()) for n in range(len(weights))]


def test_a_blend_is_the_corpora_s_own_orders_at_their_places_in_one_address_space() -> None:
    blend = blend_of([0.6, 0.3, 0.1])
    positions = np.arange(3000)
    corpora, own = blend.split(positions)
    starts = blend.starts(positions)
    for number, (size, base) in enumerate(((1000, 0), (301, 1000), (77, 1301))):
        inside = corpora == number
        assert np.array_equal(starts[inside], base + ShuffledPlan(size, 5, number).starts(own[inside]))
    assert np.array_equal(blend.starts(positions[1234:1250]), starts[1234:1250])  # a function of the position alone


def test_a_blend_is_exact_far_into_a_training() -> None:
    blend = blend_of([0.7, 0.2, 0.1])
    far = 1 << 30
    corpora, own = blend.split(np.arange(far, far + 10_000))
    assert np.array_equal(np.bincount(corpora, minlength=3) // 100, [70, 20, 10]) or abs(int((corpora == 0).sum()) - 7000) <= 2
    assert abs(int(own[corpora == 1][0]) - 0.2 * far) < 3
    with pytest.raises(ValueError, match="position 2147483648"):
        blend.split(np.array([1 << 31]))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.shards: weights .*; each must be a positive number"):
        blend_of(weights)


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
