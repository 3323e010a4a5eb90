"""Ranks that hang, die or are slow: the others end, the stacks are there, and a name is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat import log
from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.engine import Engine
from megarat.errors import EXIT_HUNG
from megarat.parallel import worlds
from megarat.train.loop import pretrain
from megarat.train.stragglers import ForwardTimer, OwnTime, slow_ranks
from megarat.train.watchdog import Watchdog

SECONDS = 6.0  # that a watchdog waits in these tests, once the pair has come that goes wrong


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))


def config(run_dir: Path, shards: Path, **changes) -> Config:
    return tiny_run.config(
        run={"dir": str(run_dir)},
        data={"shards": str(shards)},
        train={"pairs": 6, "global_batch": 8},
        checkpoint={"every": 2},
        **changes,
    )


def in_pair_four(settings: Config, happens) -> None:
    """Train; in the optimizer of pair 4 rank 1 meets ``happens``. Watchdogs are patient until then."""
    step, beat, steps = Engine._step, Watchdog.beat, []

    def watched_step(engine: Engine) -> None:
        steps.append(None)
        if len(steps) == 7 and engine.mesh.rank == 1:
            happens()
        step(engine)

    def impatient_beat(watchdog: Watchdog, what: str) -> None:
        watchdog._limit_s = SECONDS if what == "pair 4" else 100.0
        beat(watchdog, what)

    Engine._step, Watchdog.beat = watched_step, impatient_beat
    pretrain(settings)


def stall_in_the_optimizer() -> None:
    time.sleep(1000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stalls(settings: Config) -> None:
    in_pair_four(settings, stall_in_the_optimizer)


def dies(settings: Config) -> None:
    in_pair_four(settings, die)


def test_a_rank_that_stalls_in_the_optimizer_ends_all_with_their_stacks(shards, tmp_path):
    settings = config(tmp_path / "run", shards)
    with pytest.raises(worlds.WorldFailed) as failed:
        worlds.run(2, stalls, settings, timeout_s=300)
    assert "rank 1: died without a word" in str(failed.value)  # rank 0 by its own watchdog, or for rank 1 is gone
    stacks = [(tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert "rank 1 on " in stacks[1] and "pair 4 has taken more than 0.1 minutes" in stacks[1]
    assert "stall_in_the_optimizer" in stacks[1] and "stall_in_the_optimizer" not in stacks[0]
    assert "train_pair" in stacks[0]  # where it waited
    assert_goes_on(settings)


def test_a_rank_that_dies_ends_the_others_and_costs_no_checkpoint(shards, tmp_path):
    settings = config(tmp_path / "run", shards)
    with pytest.raises(worlds.WorldFailed, match="rank 1: died without a word"):
        worlds.run(2, dies, settings, timeout_s=300)
    assert "pair 4" in (tmp_path / "run" / "stacks" / "rank0.txt").read_text()
    assert_goes_on(settings)


def assert_goes_on(settings: Config) -> None:
    """The run has its checkpoint of pair 2 and goes on from it; the stacks stay."""
    run_dir = Path(settings.run.dir)
    assert checkpoints.load_state(run_dir).pair == 2
    checkpoints.verify(run_dir)
    assert worlds.run(2, pretrain, settings) == [run_dir / "checkpoints" / "pair_00000006"] * 2
    assert (run_dir / "stacks" / "rank0.txt").read_text()


def test_a_validation_that_goes_on_is_no_hang_however_long_it_takes(mesh, shards, tmp_path, monkeypatch):
    """Between the evaluation of one batch and the next there is a sign of life, for the watchdog and for the job's supervisor."""
    shutil.copytree(shards / "train", shards / "validation", dirs_exist_ok=True)
    settings = config(tmp_path / "run", shards)
    settings.train.validate_every, settings.data.validation_tokens = 6, 24 * settings.data.sequence_length
    happened: list[str] = []
    evaluate, beat, sign = Engine.evaluate, Watchdog.beat, log.beat
    monkeypatch.setattr(Engine, "evaluate", lambda *given: happened.append("evaluates") or evaluate(*given))
    monkeypatch.setattr(Watchdog, "beat", lambda watchdog, what: happened.append(what) or beat(watchdog, what))
    monkeypatch.setattr(log, "beat", lambda: happened.append("heartbeat") or sign())
    pretrain(settings)
    begin, end = happened.index("validating after pair 6"), happened.index("saving after pair 6")
    a_batch = ["validating after pair 6", "heartbeat", "evaluates", "evaluates"]  # 8 of 24 sequences, dense and sparse
    assert happened[begin:end] == 3 * a_batch + ["heartbeat"]  # the last one of the pair itself


@pytest.mark.parametrize("how", ["time.sleep(100)", "hold_the_interpreter()"])
def test_a_hang_ends_the_process_even_if_no_python_can_run(tmp_path, how):
    program = f"""
        import sys, time
        from pathlib import Path
        from megarat.train import watchdog

        def hold_the_interpreter():
            import re
            re.match("(a+)+$", "a" * 60 + "b")  # one call into C that keeps the interpreter for ages

        watchdog._BACKUP_S = 1.0
        with watchdog.Watchdog(Path({str(tmp_path)!r}), 3, 1, 1 / 60).watching() as watching:
            watching.beat("a long thought")
            {how}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    stacks = (tmp_path / "stacks" / "rank3.txt").read_text()
    assert "line" in stacks and "<module>" in stacks
    if how.startswith("time"):
        assert done.returncode == EXIT_HUNG
        assert (
            "rank 3 on" in done.stderr
            and "a long thought has taken more than" in done.stderr
            and "stacks/rank3.txt" in done.stderr
        )
    else:
        assert done.returncode == 1 and "hold_the_interpreter" in stacks  # ended by the system's timer


def test_an_error_leaves_its_trace_and_a_good_end_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path, 0, 1, 1.0).watching() as watching:
        watching.beat("pair 7")
        _ = 1 / 0
    text = (tmp_path / "stacks" / "rank0.txt").read_text()
    assert "raised an error, while pair 7" in text and "ZeroDivisionError" in text
    with Watchdog(tmp_path, 0, 1, 1.0).watching():
        pass
    assert (tmp_path / "stacks" / "rank0.txt").read_text() == text
    with Watchdog(tmp_path / "stacks", 0, 1, 1.0).watching():
        pass
    assert not (tmp_path / "stacks" / "stacks").exists()


# ---- slow ranks ----------------------------------------------------------------------------------------------------------------------


def test_slow_ranks_are_those_far_above_the_median():
    times = [OwnTime(rank, f"node{rank // 2}", 1.0 + 0.1 * rank, 0.0) for rank in range(4)]
    assert slow_ranks(times, 10.0) == []
    times[2] = OwnTime(2, "node1", 1.7, 0.0)
    times[3] = OwnTime(3, "node1", 1.0, 2.0)
    slow, waiting = slow_ranks(times, 10.0)
    assert slow == "rank 2 on node1: 1.7 s for its layers, the median rank 1 s"
    assert waiting == "rank 3 on node1: 2 s of waiting for data, the median rank 0 s"
    assert slow_ranks([OwnTime(0, "a", 1.0, 0.0), OwnTime(1, "b", 2.0, 0.5)], 10.0) == [
        "rank 1 on b: 2 s for its layers, the median rank 1 s"  # of two ranks the faster is the measure
    ]


def test_the_first_forward_is_timed_and_no_other():
    blocks = [torch.nn.Linear(2, 2) for _ in range(2)]
    timer = ForwardTimer(blocks, torch.device("cpu"))
    with timer.timing():
        hidden = blocks[0](torch.zeros(1, 2))
        time.sleep(0.05)
        blocks[1](hidden)
        time.sleep(0.2)
        blocks[1](blocks[0](hidden))
    assert 0.05 <= timer.seconds() < 0.2
    assert not blocks[0]._forward_pre_hooks and not blocks[1]._forward_hooks


class Moment:
    """Stands for an event of a GPU."""

    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back here."""

    def elapsed_time(self, end: Moment) -> float:
        return 1e3 * (end.time - self.time)


def test_a_forward_that_is_recorded_as_a_graph_is_not_timed(monkeypatch):
    """It does not run, and to wait for an event of it is an error; the next one that runs is timed."""
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    block = torch.nn.Linear(2, 2)
    block.register_forward_hook(lambda *_: time.sleep(0.05))
    timer = ForwardTimer([block], torch.device("cuda"))
    with timer.timing():
        block(torch.zeros(1, 2))
        assert timer.seconds() == 0.0
        capturing[0] = False
        block(torch.zeros(1, 2))
    assert timer.seconds() >= 0.05


def slow_on_rank_one(settings: Config) -> None:
    from megarat.model.lm import Block

    forward = Block.forward

    def slow(block: Block, *arguments) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            time.sleep(0.2)
        return forward(block, *arguments)

    Block.forward = slow
    pretrain(settings)


def test_a_slow_rank_is_named_with_its_host(shards, tmp_path):
    worlds.run(2, slow_on_rank_one, config(tmp_path, shards, guard={"slow_every": 3}))
    told = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert [(line["event"], line["pair"]) for line in told] == [("slow", 3), ("slow", 6)]
    assert all(line["why"].startswith(f"rank 1 on {os.uname().nodename}: 0.") for line in told)
