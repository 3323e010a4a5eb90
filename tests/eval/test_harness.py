"""Tasks of lm-evaluation-harness through its own code, where it is installed; and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest

from data_tools.prepare_eval import SOURCES, override
from megarat import heartbeat
from megarat.errors import UserError
from megarat.eval import harness, runner
from megarat.eval.answers import Answerer
from megarat.eval.harness import HarnessScore, check_tasks, run_harness
from megarat.eval.likelihood import Scorer
from megarat.eval.queue import Work
from megarat.eval.runner import EvalSettings, table
from megarat.eval.tasks import parse_tasks
from megarat.eval.together import Together
from megarat.infer.engine import Request
from megarat.infer.load import LoadedModel
from megarat.infer.reading import Reading
from megarat.model.pattern import resolve

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")

PIQA = [{"goal": f"Do {n}", "sol1": f"use {n * 7} of it", "sol2": f"take all {n}, then", "label": n % 2} for n in range(9)]
LAMBADA = [{"text": f"It was {n} times as much as he had {word}"} for n, word in enumerate(["seen", "had", "known"])]
ROWS = {"piqa": PIQA, "lambada_openai": LAMBADA}


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8, 0 being EOS."""

    eos_id, vocab_size, file = 0, 256, Path("bytes")

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture
def prepared(tmp_path) -> Path:
    for folder in ("data", "tasks"):
        (tmp_path / folder).mkdir()
    for task, rows in ROWS.items():
        (tmp_path / "data" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "tasks" / f"{task}.yaml").write_text(override(task, SOURCES[task]))
    return tmp_path


@needs_harness
def test_scores_are_those_of_a_loop_over_the_items(published, prepared, tmp_path):
    scorer = Scorer(published, Reading(resolve("D=8,W=4", 2, 2)), Bytes(), batch=4, max_length=256)
    piqa, lambada = run_harness(scorer, "D=8,W=4,I=0", ["piqa", "lambada_openai"], prepared)
    right = right_by_length = 0
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        totals = [
            score.total for score in scorer.continuations([(f"Question: {row['goal']}\nAnswer:", f" {text}") for text in choices])
        ]
        right += max((0, 1), key=totals.__getitem__) == row["label"]
        right_by_length += max((0, 1), key=lambda i: totals[i] / len(choices[i])) == row["label"]
    assert piqa.metrics == pytest.approx({"acc": right / 9, "acc_norm": right_by_length / 9})
    assert piqa.stderr["acc"] == pytest.approx(math.sqrt(right / 9 * (1 - right / 9) / 8))
    assert (piqa.samples, lambada.samples) == (9, 3) and lambada.task == "lambada_openai"
    cut = [row["text"].rpartition(" ") for row in LAMBADA]
    scores = scorer.continuations([(context, f" {word}") for context, _, word in cut])
    assert math.log(lambada.metrics["perplexity"]) == pytest.approx(-sum(score.total for score in scores) / 3)
    assert lambada.metrics["acc"] == sum(score.greedy for score in scores) / 3


@needs_harness
def test_a_limit_takes_the_first_items(published, prepared):
    scorer = Scorer(published, Reading(resolve("dense", 2, 2)), Bytes(), batch=4, max_length=256)
    [piqa] = run_harness(scorer, "dense", ["piqa"], prepared, limit=4)
    assert piqa.samples == 4


@needs_harness
def test_every_process_of_a_launcher_gets_its_own_results(published, prepared, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    scorer = Scorer(published, Reading(resolve("dense", 2, 2)), Bytes(), batch=4, max_length=256)
    [piqa] = run_harness(scorer, "dense", ["piqa"], prepared)
    assert piqa.samples == 9 and os.environ["LOCAL_RANK"] == "1"


def test_missing_data_are_named_with_their_place(prepared):
    with pytest.raises(UserError, match=r"needs local data; write it with: python -m data_tools.prepare_eval"):
        check_tasks(None, ["piqa"])
    with pytest.raises(UserError) as error:
        check_tasks(prepared, ["piqa", "boolq"])
    assert f"{prepared}/tasks/boolq.yaml is missing (found in {prepared}: lambada_openai, piqa)" in str(error.value)
    (prepared / "data" / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/piqa.jsonl is missing"):
        check_tasks(prepared, ["piqa"])


def test_without_the_harness_it_is_asked_for(prepared, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm-evaluation-harness is not installed; pip install"):
        check_tasks(prepared, ["piqa"])


def test_harness_tasks_are_named_one_by_one():
    assert parse_tasks("ppl,harness:piqa,sciq,needle:single_1".split(",")) == {
        "ppl": (),
        "harness": ("piqa", "sciq"),
        "needle": ("single_1",),
    }
    with pytest.raises(UserError, match="name its tasks, for example harness:piqa,arc_easy"):
        parse_tasks(["harness"])


def test_generation_requests_are_read_and_sampling_is_refused():
    assert harness._generation("p", {"until": "\n", "do_sample": False, "temperature": 0.0}) == ("p", ["\n"], 256)
    assert harness._generation("p", {"until": ["a", "b"], "max_gen_toks": 7}) == ("p", ["a", "b"], 7)
    with pytest.raises(UserError, match="a task asks for sampling"):
        harness._generation("p", {"temperature": 0.7})


def scored(model: LoadedModel, prepared: Path, work: Path | None = None) -> list[HarnessScore]:
    """A row of `piqa`, as ``megarat eval`` has it made."""
    settings = EvalSettings([], eval_data=str(prepared), progress=False)
    return runner._harness(model, [Reading(model.patterns)], ["piqa"], 64, settings, Together(Work(work), None))


@pytest.mark.parametrize("file", ["data/piqa.jsonl", "tasks/piqa.yaml"])
def test_other_items_or_another_definition_at_the_same_place_are_scored_anew(published, prepared, monkeypatch, tmp_path, file):
    def task(scorer, pattern, tasks, folder, limit):
        lines = (folder / "data/piqa.jsonl").read_text().count("\n") + (folder / "tasks/piqa.yaml").read_text().count("\n")
        return [HarnessScore(pattern, tasks[0], {}, {}, lines, 1.0, 1.0)]

    model = LoadedModel(published, resolve("dense", 2, 2), tmp_path)
    monkeypatch.setattr(runner, "run_harness", task)
    monkeypatch.setattr(runner, "check_tasks", lambda folder, tasks: Path(folder))
    monkeypatch.setattr(runner, "find_tokenizer", lambda model, named: Bytes())
    [first] = scored(model, prepared, tmp_path / "work")
    assert scored(model, prepared, tmp_path / "work") == [first]
    with (prepared / file).open("a") as opened:
        opened.write("\n")
    assert scored(model, prepared, tmp_path / "work")[0].samples == first.samples + 1


def test_a_piece_of_work_gives_signs_of_life_on_its_way(published, prepared, monkeypatch, tmp_path):
    """A task of the harness, or prompts of a long answer, may take hours on one process; a job without a sign of life is killed."""
    file = tmp_path / "heartbeat"
    file.write_text("7.0")
    monkeypatch.setenv("MEGARAT_HEARTBEAT", str(file))
    monkeypatch.setenv("MEGARAT_START", "7.0")
    monkeypatch.setattr(heartbeat, "_EVERY_S", 0.0)
    seen = []

    def ages(work) -> bool:
        monkeypatch.setattr(heartbeat, "_next", 0.0)
        os.utime(file, (1, 1))
        work()
        return file.stat().st_mtime == 1

    def task(scorer, pattern, tasks, folder, limit):
        seen.append(ages(lambda: scorer.continuations([("one", " two")])))
        seen.append(ages(lambda: scorer.until([("one", [], 3)])))
        return [HarnessScore(pattern, tasks[0], {}, {}, 1, 1.0, 1.0)]

    model = LoadedModel(published, resolve("dense", 2, 2), tmp_path)
    monkeypatch.setattr(runner, "run_harness", task)
    monkeypatch.setattr(runner, "check_tasks", lambda folder, tasks: Path(folder))
    monkeypatch.setattr(runner, "find_tokenizer", lambda model, named: Bytes())
    scored(model, prepared)
    answerer = Answerer(published, Bytes(), batch=1, capacity=16)
    seen.append(ages(lambda: answerer.answers(Reading(model.patterns), [Request([1, 2], 3)])))
    assert seen == [False, False, False]


def test_every_filter_of_a_metric_has_its_number():
    results = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.01,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": "N/A",
        "acc,none": 1,
        "acc_stderr,none": 0.02,
    }
    found = {"results": {"gsm8k": results}, "n-samples": {"gsm8k": {"effective": 4}}, "versions": {"gsm8k": 3.0}}
    row = harness._row("dense", "gsm8k", found, 1.0)
    assert row.metrics == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5, "acc": 1.0}
    assert row.stderr == {"exact_match,strict-match": 0.01, "acc": 0.02}


def test_the_table_and_the_documentation_show_every_field():
    row = HarnessScore("dense", "piqa", {"acc": 0.5, "bits": 2.0}, {"acc": 0.125}, 4, 1.0, 0.1).to_dict()
    assert "| dense | acc 0.5 ± 0.12, bits 2 |" in table({"tasks": {"harness": [row]}})
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in row)
