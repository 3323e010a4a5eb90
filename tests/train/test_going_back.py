"""Whole runs that meet spikes: what is left out, what they go back to, and that stops in between change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.data.loader import Loader
from megarat.engine import Engine
from megarat.errors import StoppedEarly, UserError
from megarat.parallel import worlds
from megarat.train import loop
from megarat.train.loop import pretrain
from megarat.train.schedule import learning_rate
from megarat.train.step import train_pair

PAIRS = 10
BAD = (7, 8)  # global batches with a loss three times as high
TIMINGS = ("tokens_per_s", "memory_gb", "data_wait_s", "seconds")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))


def config(run_dir: Path, shards: Path, **changes) -> Config:
    guard = {"deviations": 10, "window": 4, "rollback_after": 2, **changes.pop("guard", {})}
    sections = {"checkpoint": {"every": 3, "keep": 1}, "train": {"pairs": PAIRS}, **changes}
    return tiny_run.config(run={"dir": str(run_dir)}, data={"shards": str(shards)}, guard=guard, **sections)


class Spikes:
    """Makes the losses of the global batches ``bad`` three times as high, in whatever pair they come."""

    def __init__(self, bad: tuple[int, ...] = BAD) -> None:
        self.bad, self.met = bad, []
        self._numbers: dict[int, int] = {}
        self._pair, self._train_pair = Loader.pair, loop.train_pair

    def install(self, patch) -> None:
        patch(Loader, "pair", lambda loader, n: self._remember(n, self._pair(loader, n)))
        patch(loop, "train_pair", self.train_pair)

    def _remember(self, n: int, batch):
        self._numbers[batch.micro_batches[0][0].data_ptr()] = n
        return batch

    def train_pair(self, engine, micro_batches, *rest):
        number = self._numbers[micro_batches[0][0].data_ptr()]
        self.met.append(number)
        forward = engine.model.forward
        if number in self.bad:
            engine.model.forward = lambda *args, **kwargs: 3 * forward(*args, **kwargs)
        try:
            return self._train_pair(engine, micro_batches, *rest)
        finally:
            engine.model.forward = forward


@pytest.fixture
def spikes(monkeypatch):
    made = Spikes()
    made.install(monkeypatch.setattr)
    return made


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def events(run_dir: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["pair"]) for line in map(json.loads, (run_dir / "guard.jsonl").read_text().splitlines())]


def assert_same_end(left: Path, right: Path) -> None:
    assert metrics(left) == metrics(right)
    ours, theirs = checkpoints.load_optimizer(left), checkpoints.load_optimizer(right)
    assert all(torch.equal(ours[kind][name], tensor) for kind, named in theirs.items() for name, tensor in named.items())
    states = [checkpoints.load_state(folder) for folder in (left, right)]
    for field in ("pair", "tokens", "stream_hash", "optimizer_steps", "skipped", "skipped_in_row", "guard"):
        assert getattr(states[0], field) == getattr(states[1], field), field


def trained_by_hand(mesh, settings: Config, batches: list[int]) -> dict[str, torch.Tensor]:
    """The masters after one pair on each of these global batches."""
    from megarat.train.run import build

    run = build(settings, "pretrain", mesh, None, None)
    for pair, number in enumerate(batches):
        lr = learning_rate(pair, settings.train.pairs, settings.optim)
        train_pair(run.engine, run.loader.pair(number).micro_batches, settings.sparse_patterns, settings.patterns, lr)
    return run.engine.named_state()[0]["master"]


def test_a_single_spike_is_left_out_before_any_update(mesh, shards, tmp_path, monkeypatch):
    made = Spikes(bad=(7,))
    made.install(monkeypatch.setattr)
    pretrain(config(tmp_path, shards))
    state = checkpoints.load_state(tmp_path)
    assert state.skipped == [7] and state.passed_over == 0 and state.optimizer_steps == 2 * (PAIRS - 1)
    line = metrics(tmp_path)[7]
    assert line["skipped"] and line["skipped_total"] == 1 and line["loss_sparse"] > 10 and line["loss_dense"] is None
    assert events(tmp_path) == [("skipped", 8)]


def test_spikes_in_a_row_send_the_run_back_and_past_the_samples_that_led_there(mesh, shards, tmp_path, spikes):
    settings = config(tmp_path / "run", shards, log={"tensorboard": True})
    pretrain(settings)
    assert spikes.met == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # then back to pair 6, which takes batch 9
    state = checkpoints.load_state(tmp_path / "run")
    assert (state.pair, state.passed_over, state.guard["rollbacks"], state.skipped) == (PAIRS, 3, [[9, 6]], [])
    assert [line["pair"] for line in metrics(tmp_path / "run")] == list(range(1, PAIRS + 1))
    assert [line["rollbacks"] for line in metrics(tmp_path / "run")] == [0] * 6 + [1] * 4
    assert events(tmp_path / "run") == [("skipped", 8), ("skipped", 9), ("went back", 6)]
    expected = trained_by_hand(mesh, settings, [0, 1, 2, 3, 4, 5, 9, 10, 11, 12])
    found = checkpoints.load_optimizer(tmp_path / "run")["master"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensorboard_counts_what_the_guards_did(mesh, shards, tmp_path, spikes):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(config(tmp_path, shards, log={"tensorboard": True}))
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {
        tag: [(event.step, event.value) for event in written.Scalars(f"guard/{tag}")] for tag in ("rollbacks", "skipped_total")
    }
    assert points["rollbacks"] == [(pair, float(pair > 6)) for pair in range(1, PAIRS + 1)]
    assert points["skipped_total"] == [(pair, 0.0) for pair in range(1, PAIRS + 1)]


@pytest.fixture(scope="module")
def uninterrupted(mesh, shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Spikes().install(patch.setattr)
        pretrain(config(run_dir, shards))
    return run_dir


@pytest.mark.parametrize(
    "calls", [8, 9, 10, 11]
)  # in the first bad pair, in the second, in the first and second after going back
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_stops_and_crashes_around_the_spikes_change_nothing(mesh, shards, tmp_path, monkeypatch, uninterrupted, calls, how):
    """Also not through the checkpoint of the stop, which takes a place among those that are kept."""
    settings = config(tmp_path / "run", shards)
    with monkeypatch.context() as patch:
        made = Spikes()
        made.install(patch.setattr)

        def interrupt(*arguments):
            if len(made.met) == calls - 1:
                if how == "killed":
                    raise MemoryError
                stop.append("a test")
            return made.train_pair(*arguments)

        stop: list[str] = []
        patch.setattr(loop, "train_pair", interrupt)
        patch.setattr(loop.StopRequest, "reason", property(lambda _: stop[0] if stop else None))
        with pytest.raises(MemoryError if how == "killed" else StoppedEarly):
            pretrain(settings)
    with monkeypatch.context() as patch:
        Spikes().install(patch.setattr)
        pretrain(settings)
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_run_that_spikes_whatever_it_reads_ends_with_an_error(mesh, shards, tmp_path, monkeypatch):
    made = Spikes(bad=tuple(range(6, 100)))
    made.install(monkeypatch.setattr)
    with pytest.raises(UserError, match=r"3 pairs in a row had a loss or gradient that is not finite or far above"):
        pretrain(config(tmp_path, shards, guard={"max_rollbacks": 2}))
    assert checkpoints.load_state(tmp_path).guard.get("rollbacks") is None
    assert [event for event, _ in events(tmp_path)].count("went back") == 2
    assert checkpoints.find_latest(tmp_path).name == "pair_00000006"


def run_with_spikes(settings: Config) -> None:
    Spikes().install(setattr)
    pretrain(settings)


def test_ranks_decide_alike_and_as_one_rank_does(shards, tmp_path, uninterrupted):
    settings = config(tmp_path / "run", shards, parallel={"zero": 1})
    worlds.run(2, run_with_spikes, settings)
    ours, theirs = metrics(tmp_path / "run"), metrics(uninterrupted)
    for key in ("pair", "tokens", "stream_hash", "skipped", "rollbacks", "lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key


def test_a_spike_of_the_dense_pass_is_no_update_either(mesh):
    settings = tiny_run.config()
    engine, batches = Engine(tiny_run.model(settings), settings, mesh), tiny_run.micro_batches(2)
    result = train_pair(engine, batches, settings.sparse_patterns, settings.patterns, 1e-2, lambda which, *_: which == "sparse")
    assert result.finite and not result.made and result.sparse.made and result.dense.refused
    assert engine.named_state()[1] == 1
    alone = Engine(tiny_run.model(settings), settings, mesh)
    alone.update(batches, settings.sparse_patterns, 1e-2)
    ours, theirs = (one.named_state()[0] for one in (engine, alone))
    assert all(torch.equal(ours[kind][name], tensor) for kind, named in theirs.items() for name, tensor in named.items())
