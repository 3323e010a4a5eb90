"""Pairs with bad numbers: which they are, what follows, and that all of it is a function of the run's state."""

from __future__ import annotations

import json
import math
import random

import pytest
import tiny_run

from megarat.checkpoint.manifest import CheckpointState
from megarat.engine import Update
from megarat.errors import UserError
from megarat.train.pair_guard import Decision, PairGuard, gone_back, mark_safe
from megarat.train.step import PairResult

GOOD = PairResult(Update(3.1, 1.0, True), Update(3.0, 1.0, True))
NOT_FINITE = PairResult(Update(math.nan, 1.0, False), None)


def config(**guard):
    return tiny_run.config(guard={"deviations": 10, "window": 16, **guard}, train={"max_skipped": 5})


def state_of(settings, pair: int = 0) -> CheckpointState:
    return CheckpointState("pretrain", pair, 0, settings, "dense", "fp32")


def after_good_pairs(settings, count: int, noise: float = 0.02) -> tuple[PairGuard, CheckpointState]:
    """A guard that has seen so many pairs of a slowly falling, noisy loss."""
    generator, guard, state = random.Random(0), PairGuard(settings), state_of(settings)
    for number in range(count):
        loss = 3.0 - 0.001 * number + generator.gauss(0, noise)
        norm = math.exp(generator.gauss(0, 0.1))
        update = Update(loss, norm, True)
        accept = guard.judge(state)
        assert accept("sparse", loss, norm) and accept("dense", loss, norm)
        assert guard.record(state, PairResult(update, update)) is Decision.TRAINED
        state.pair += 1
    return guard, state


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_a_spike_is_measured_in_deviations_from_the_running_median(which):
    guard, state = after_good_pairs(config(), 40)
    accept = guard.judge(state)
    # gauss(0, 0.02) over 16 pairs: the estimate of the deviation is within a factor of 2; at least 1 % of the loss is taken
    assert accept(which, 3.1, 1.0) and not accept(which, 2.96 + 10 * 0.06, 1.0)
    assert f"the {which} loss is 3.56" in guard.why
    assert accept(which, 2.9, 1.5) and not accept(which, 2.9, 30.0)
    assert f"the {which} gradient norm is 30" in guard.why
    assert accept(which, 0.1, 1e-6)  # far below is no spike


def test_there_is_no_spike_without_a_limit_or_before_half_a_window_of_pairs():
    guard, state = after_good_pairs(config(), 7)
    assert guard.judge(state)("dense", 1e6, 1e6)
    guard, state = after_good_pairs(config(), 8)
    assert not guard.judge(state)("dense", 1e6, 1e6)


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_windows_compare_with_the_pair_before(window):
    guard, state = after_good_pairs(config(window=window), 0)
    assert guard.judge(state)("dense", 1e6, 1e6)  # nothing has been before
    guard.record(state, GOOD)
    assert guard.judge(state)("dense", 3.0, 1.0) and not guard.judge(state)("dense", 30.0, 1.0)
    guard, state = after_good_pairs(config(deviations=0), 40)
    assert guard.judge(state)("dense", 1e6, 1e6) and state.guard == {}


def test_a_loss_that_hardly_varied_may_still_rise_a_little():
    guard, state = after_good_pairs(config(), 40, noise=0.0)
    assert guard.judge(state)("dense", 2.98 * 1.05, 1.0) and not guard.judge(state)("dense", 2.98 * 1.12, 1.0)


def test_the_memory_is_the_window_of_good_pairs_and_survives_json():
    guard, state = after_good_pairs(config(), 40)
    for figures in state.guard["figures"].values():
        assert len(figures) == 16
    before = json.dumps(state.guard)
    guard.record(state, NOT_FINITE)
    guard.record(state, PairResult(Update(50.0, 1.0, True, refused=True), None))
    assert json.dumps(state.guard) == before and state.skipped == [40, 40]
    again = state_of(config(), 40)
    again.guard = json.loads(before)
    for loss in (3.0, 3.2, 3.4, 3.6, 4.0):
        assert PairGuard(config()).judge(again)("dense", loss, 1.0) == guard.judge(state)("dense", loss, 1.0)


def test_bad_pairs_are_counted_and_too_many_in_a_row_end_the_run():
    settings = tiny_run.config(train={"max_skipped": 3})
    guard, state = PairGuard(settings), state_of(settings)
    for pair, result in enumerate([GOOD, NOT_FINITE, NOT_FINITE, GOOD, NOT_FINITE, NOT_FINITE]):
        state.pair = pair
        assert guard.record(state, result) is (Decision.TRAINED if result is GOOD else Decision.SKIPPED)
    assert state.skipped == [1, 2, 4, 5] and state.skipped_in_row == 2
    state.pair = 6
    with pytest.raises(UserError, match=r"3 pairs in a row .*train.max_skipped = 3; the last is pair 7"):
        guard.record(state, NOT_FINITE)


def bad_row(guard: PairGuard, state: CheckpointState, count: int) -> list[Decision]:
    decisions = []
    for _ in range(count):
        decisions.append(guard.record(state, NOT_FINITE))
        state.pair += 1
    return decisions


def test_a_row_of_bad_pairs_goes_back_to_the_last_regular_checkpoint_from_before_it():
    settings = config()
    guard, state = after_good_pairs(settings, 40)
    mark_safe(state)
    assert bad_row(guard, state, 2) == [Decision.SKIPPED] * 2
    mark_safe(state)  # a checkpoint in the middle of the row is none to go back to
    assert state.guard["safe"] == 40
    assert bad_row(guard, state, 1) == [Decision.ROLL_BACK]
    saved = state_of(settings, 40)
    went = gone_back(state, saved)
    assert (went.pair, went.passed_over, went.skipped_in_row) == (40, 3, 0)
    went.pair = 42  # pair 42 is trained on global batch 45: none twice, none of the bad ones
    assert json.loads(went.to_json())["data"]["next_sample"] == 45 * settings.train.global_batch


def test_going_back_to_one_checkpoint_again_and_again_ends():
    settings = config(max_rollbacks=2)
    guard, state = after_good_pairs(settings, 40)
    mark_safe(state)
    for times in (1, 2):
        assert bad_row(guard, state, 3) == [Decision.SKIPPED, Decision.SKIPPED, Decision.ROLL_BACK]
        fresh = state_of(settings, 40)
        fresh.guard["safe"] = 40
        state = gone_back(state, fresh)
        assert state.passed_over == 3 * times
    assert bad_row(guard, state, 4) == [Decision.SKIPPED] * 4
    with pytest.raises(UserError, match="5 pairs in a row"):
        guard.record(state, NOT_FINITE)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to():
    guard, state = after_good_pairs(config(), 10)
    assert bad_row(guard, state, 4) == [Decision.SKIPPED] * 4
