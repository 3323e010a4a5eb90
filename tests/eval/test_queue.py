"""Work shared through a folder by processes that are forked, killed and started again; results whoever did what."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megarat.checkpoint.convert import import_upstream
from megarat.data.format import Piece, ShardWriter, TokenizerInfo, token_dtype
from megarat.errors import StoppedEarly, UserError
from megarat.eval import perplexity, queue
from megarat.eval.queue import Item, Work
from megarat.eval.runner import EvalSettings, evaluate
from megarat.infer.load import LoadedModel
from megarat.train.guard import StopRequest


def items(log: Path, count: int, seconds: float = 0.0) -> list[Item]:
    """Items that note who does them."""

    def run(number: int) -> dict:
        with log.open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        time.sleep(seconds)
        return {"square": number * number}

    return [Item(f"item-{number}", 1, lambda number=number: run(number)) for number in range(count)]


def fork(work) -> int:
    """The id of a child process that does ``work`` and leaves."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(queue, "_POLL_S", 0.02)


def test_without_a_folder_every_item_is_done_here(tmp_path):
    heard = []
    assert Work(None).run(items(tmp_path / "log", 3), heard.append) == [{"square": 0}, {"square": 1}, {"square": 4}]
    assert heard == [1, 1, 1]


def test_asked_to_stop_a_process_ends_its_item_keeps_it_and_the_next_goes_on(tmp_path):
    def stop_after_the_third(number: int) -> dict:
        if number == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"square": number * number}

    folder = tmp_path / "work"
    stopping = [Item(f"item-{n}", 1, lambda n=n: stop_after_the_third(n)) for n in range(5)]
    with StopRequest().listening() as stop, pytest.raises(StoppedEarly, match=r"after 3 of 5 pieces of work .SIGUSR1."):
        Work(folder, stop).run(stopping)
    assert Work(folder).run(items(tmp_path / "log", 5)) == [{"square": n * n} for n in range(5)]
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["3", "4"]


def test_processes_share_the_items_and_each_gets_all_results(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "work"
    children = [fork(lambda: Work(folder).run(items(log, 12, 0.05))) for _ in range(2)]
    results = Work(folder).run(items(log, 12, 0.05))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert results == [{"square": number * number} for number in range(12)]
    done = [line.split() for line in log.read_text().splitlines()]
    assert Counter(number for number, _ in done) == {str(number): 1 for number in range(12)}  # each once
    assert len({process for _, process in done}) == 3  # and by all


def test_what_a_killed_process_had_claimed_is_done_by_another(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "work"
    child = fork(lambda: Work(folder).run(items(log, 3, 60)))
    while not log.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert Work(folder).run(items(log, 3)) == [{"square": 0}, {"square": 1}, {"square": 4}]
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["0", "0", "1", "2"]


def test_what_is_done_stays_done(tmp_path):
    folder = tmp_path / "work"
    first = Work(folder).run(items(tmp_path / "log", 3))
    assert Work(folder).run(items(tmp_path / "again", 4)) == [*first, {"square": 9}]
    assert [line.split()[0] for line in (tmp_path / "again").read_text().splitlines()] == ["3"]


def test_an_item_that_fails_leaves_nothing_behind(tmp_path):
    def fail() -> dict:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Work(tmp_path).run([Item("a", 1, fail)])
    assert Work(tmp_path).run([Item("a", 1, lambda: {"x": 1})]) == [{"x": 1}]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write"):
        Work(tmp_path / "file" / "work")


@pytest.fixture(scope="module")
def checkpoint(golden_pth, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "tiny"
    import_upstream(golden_pth, folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(3, 512, 900).astype(token_dtype(512))
    with ShardWriter(
        folder / "validation", vocab_size=512, eos_id=2, tokenizer=TokenizerInfo("none", "none", "0" * 64)
    ) as writer:
        writer.add(Piece(tokens, np.array([900])))
        writer.finish({})
    return folder


def settings(shards: Path, **changes) -> EvalSettings:
    base = {"patterns": ["dense", "D=4,W=2"], "shards": str(shards), "sequence_length": 16, "micro_batch": 4, "device": "cpu"}
    return EvalSettings(**{**base, "progress": False, **changes})


def comparable(results: dict) -> str:
    """Everything but the times, to the last digit."""
    for rows in results["tasks"].values():
        for row in rows:
            row.pop("seconds")
    return json.dumps({name: part for name, part in results.items() if name != "speed"})


def test_results_do_not_depend_on_the_number_of_processes(checkpoint, shards, tmp_path):
    alone = evaluate(checkpoint, settings(shards), tmp_path / "alone")
    child = fork(lambda: evaluate(checkpoint, settings(shards), tmp_path / "shared"))
    together = evaluate(checkpoint, settings(shards), tmp_path / "shared")
    assert os.waitpid(child, 0)[1] == 0
    in_memory = evaluate(checkpoint, settings(shards))
    assert comparable(alone) == comparable(together) == comparable(in_memory)


def test_an_interrupted_evaluation_goes_on_and_a_changed_one_starts_anew(checkpoint, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("megarat.eval.runner.speed_items", lambda *_: [])  # many evaluations, and none is timed
    scored = []
    original = perplexity.batch_loss
    monkeypatch.setattr(perplexity, "batch_loss", lambda *given: scored.append(1) or original(*given))
    first = evaluate(checkpoint, settings(shards), tmp_path)
    total = len(scored)
    assert total == 2 * 14  # 56 sequences, 4 at a time, two patterns
    next((tmp_path / "work").rglob("ppl-*-16-32.json")).unlink()  # one of four items: 16 sequences
    scored.clear()
    assert comparable(evaluate(checkpoint, settings(shards), tmp_path)) == comparable(first)
    assert len(scored) == 2 * 4
    for change in ({"sequence_length": 8}, {"patterns": ["D=8"]}, {"limit_tokens": 300}, {"micro_batch": 3}):
        scored.clear()
        evaluate(checkpoint, settings(shards, **change), tmp_path)
        assert scored


def test_what_another_kind_of_device_scored_is_scored_anew(checkpoint, shards, tmp_path, monkeypatch):
    """Its rows and its speed would be told as this one's."""
    evaluate(checkpoint, settings(shards), tmp_path)
    scored = []
    monkeypatch.setattr("megarat.eval.speed.measure", lambda *_: scored.append("speed") or {})
    monkeypatch.setattr(perplexity, "batch_loss", lambda *_: scored.append("loss") or 1.0)
    evaluate(checkpoint, settings(shards), tmp_path)
    assert not scored
    monkeypatch.setattr(LoadedModel, "device", torch.device("cuda"))
    evaluate(checkpoint, settings(shards), tmp_path)
    assert set(scored) == {"speed", "loss"}
