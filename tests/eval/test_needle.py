"""The needle tasks: what a prompt hides, asks and costs, read back with regular expressions; metrics by hand; scores through a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from megarat import cli
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.eval import retrieval
from megarat.eval.answers import Answerer
from megarat.eval.longbench import LONGBENCH_AVERAGE
from megarat.eval.needle import ANSWER_TOKENS, NEEDLE_TASKS, NeedleMaker, read_essay, ruler_score, set_score
from megarat.eval.retrieval import NeedleRun
from megarat.eval.tasks import parse_tasks
from megarat.infer.generate import generate
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

HIDDEN = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s|$)")
ASKED = re.compile(
    r"What (?:is|are all) the special magic (\w+) for (.+) mentioned in the provided text\? (The special magic .*)$"
)
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
NUMBER, WORDS = re.compile(r"[1-9]\d{6}"), re.compile(r"[a-z]+-[a-z]+")

# RULER's table of tasks: filler, form of keys and of values, keys hidden, values a key, keys asked
RULER = {
    "single_1": ("noise", WORDS, NUMBER, 1, 1, 1),
    "single_2": ("essay", WORDS, NUMBER, 1, 1, 1),
    "single_3": ("essay", WORDS, UUID, 1, 1, 1),
    "multikey_1": ("essay", WORDS, NUMBER, 4, 1, 1),
    "multikey_2": ("needles", WORDS, NUMBER, None, 1, 1),
    "multikey_3": ("needles", UUID, UUID, None, 1, 1),
    "multivalue": ("essay", WORDS, NUMBER, 1, 4, 1),
    "multiquery": ("essay", WORDS, NUMBER, 4, 1, 4),
}


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8, 0 being EOS."""

    eos_id, vocab_size, file, sha256 = 0, 256, Path("bytes"), "0" * 64

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def maker(budget: int = 3000, seed: int = 0, essay=None) -> NeedleMaker:
    return NeedleMaker(Bytes(), budget, seed=seed, essay=essay)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_prompt_hides_and_asks_what_rulers_table_says(task, index):
    assert set(NEEDLE_TASKS) == set(RULER)
    filler, key_form, value_form, hidden, values_a_key, asked = RULER[task]
    sample = maker().sample(task, "validation", index)
    found = HIDDEN.findall(sample.prompt)
    kind = "uuids" if value_form is UUID else "numbers"
    assert all(k == kind and key_form.fullmatch(key) and value_form.fullmatch(value) for k, key, value in found)
    by_key: dict[str, list[str]] = {}
    for _, key, value in found:
        by_key.setdefault(key, []).append(value)
    if hidden is None:
        assert len(found) > 15  # the haystack is made of needles
        counts = Counter(key for _, key, _ in found)
    else:
        assert len(by_key) == hidden and all(len(values) == values_a_key for values in by_key.values())
        counts = dict.fromkeys(by_key, 1)
    question = ASKED.search(sample.prompt)
    single = asked * values_a_key == 1
    assert question[1] == (kind[:-1] if single else kind)
    keys = re.split(r", and |, ", question[2])
    assert len(keys) == asked == len(set(keys)) and all(counts[key] == 1 for key in keys)
    assert Counter(sample.answers) == Counter(value for key in keys for value in by_key[key])
    assert (
        question[3]
        == f"The special magic {question[1]} for {question[2]} mentioned in the provided text {'is' if single else 'are'}"
    )
    assert ("The grass is green. The sky is blue." in sample.prompt) == (filler == "noise")


@pytest.mark.parametrize("task", NEEDLE_TASKS)
@pytest.mark.parametrize("budget", [1200, 5000])
def test_prompts_fill_their_budget_and_never_exceed_it(task, budget):
    unit = 120  # bytes of the longest unit of filler: the five noise sentences have 90, a needle of two UUIDs 113
    for index in range(3):
        size = len(maker(budget).sample(task, "train", index).prompt.encode())
        assert budget - 3 * unit < size <= budget


def test_needles_lie_at_all_depths():
    depths = []
    for index in range(60):
        text = maker().sample("single_2", "validation", index).prompt
        depths.append(HIDDEN.search(text).start() / len(text))
    assert min(depths) < 0.2 and max(depths) > 0.75 and 0.35 < sum(depths) / len(depths) < 0.6


def test_a_sample_is_a_function_of_seed_split_task_and_index_alone():
    samples = maker()
    forward = [samples.sample("multikey_2", "train", index) for index in range(4)]
    backward = [maker().sample("multikey_2", "train", index) for index in reversed(range(4))]
    assert forward == backward[::-1]
    others = [maker(seed=1).sample("multikey_2", "train", 0), samples.sample("multikey_2", "validation", 0)]
    assert len({sample.prompt for sample in [*forward, *others]}) == 6


def test_a_given_text_is_the_haystack(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("It was a dark night. Was it?\n\nYes!  It was so dark\nthat nobody saw. ")
    essay = read_essay(path)
    assert essay == ["It was a dark night.", "Was it?", "Yes!", "It was so dark that nobody saw."]
    context = maker(essay=essay).sample("multivalue", "train", 3).prompt.split("\n")[1]
    rest = HIDDEN.sub("", context).split()
    assert set(rest) == set(" ".join(essay).split())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b" \n", "holds no text"), (b"\xff\xfe\xff", "cannot read")]
)
def test_a_text_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "essay.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_essay(path)


def test_a_budget_too_small_for_the_question_is_refused():
    with pytest.raises(UserError, match=r"multiquery: the bare question has \d+ tokens, more than the 100"):
        maker(100).sample("multiquery", "train", 0)


@pytest.mark.parametrize(
    ("prediction", "ruler", "exact"),
    [
        ("ab1,CD2", 1.0, 1.0),
        ("ab1,cd2", 1.0, 0.5),
        (" CD2 , ab1 ", 1.0, 1.0),
        ("the first is ab1 and the second is cd2.", 1.0, 0.0),
        ("ab1,ab1,ab1", 0.5, 0.5),
        ("ab1. CD2", 1.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_metrics_by_hand(prediction, ruler, exact):
    assert (ruler_score(prediction, ["ab1", "CD2"]), set_score(prediction, ["ab1", "CD2"])) == (ruler, exact)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("ppl", {"ppl": ()}),
        ("needle", {"needle": tuple(RULER)}),
        ("needle:single_1,multikey_2,ppl", {"needle": ("single_1", "multikey_2"), "ppl": ()}),
        (" ppl , needle:multivalue", {"ppl": (), "needle": ("multivalue",)}),
        ("longbench:trec,qasper", {"longbench": ("trec", "qasper")}),
        ("longbench", {"longbench": LONGBENCH_AVERAGE}),
    ],
)
def test_tasks_and_their_parts_are_read(text, tasks):
    assert parse_tasks(text.split(",")) == tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown task ''"),
        ("arc", "unknown task 'arc'"),
        ("ppl,arc", "unknown task 'arc'"),
        ("needle:single_9", "needle:single_9 is unknown; it has single_1, "),
        ("needle,single_1", "unknown task 'single_1'"),
        ("ppl:x", "ppl:x is unknown and has no parts"),
    ],
)
def test_what_is_no_task_is_refused(text, message):
    with pytest.raises(UserError) as error:
        parse_tasks(text.split(","))
    assert message in str(error.value)


# ---- through a model --------------------------------------------------------------------------------------------------------


def needle_run(model, budget: int, samples: int, batch: int = 8, piece: int = 25) -> NeedleRun:
    answerer = Answerer(model, Bytes(), batch=batch, capacity=budget + ANSWER_TOKENS)
    return NeedleRun(answerer, maker(budget), samples=samples, piece=piece)


def test_answers_are_those_of_each_prompt_alone_under_every_reading(published, monkeypatch):
    """One answerer for all, so that an engine meets new requests, and another reading in between."""
    monkeypatch.setattr(retrieval, "ANSWER_TOKENS", 12)
    readings = [Reading(resolve(spec, 2, 2)) for spec in ("D=8,W=4,I=2", "D=64", "D=8,W=4,I=2")]
    run = needle_run(published, 600, samples=3, batch=2, piece=2)
    prompts = run.prompts("single_2", 0, 3)
    for reading in readings:
        found = [answer for item in run.items("single_2", reading) for answer in item.run()["answers"]]
        for prompt, text in zip(prompts, found, strict=True):
            ids = generate(published, torch.tensor([list(prompt.ids)]), 12, reading, stop_id=Bytes.eos_id, vocabulary=256)
            said = ids[0].tolist()
            said = said[: said.index(Bytes.eos_id)] if Bytes.eos_id in said else said
            assert text == Bytes().decode([*prompt.ids, *said]).removeprefix(Bytes().decode(list(prompt.ids)))


def test_scores_are_means_over_the_samples_of_all_items(published, monkeypatch):
    """The model's part is played by a script: it gives every answer but those to each fourth prompt of an item."""
    run = needle_run(published, 700, samples=13, piece=5)
    targets = {tuple(prompt.ids): prompt.target for prompt in run.prompts("multivalue", 0, 13)}

    def answers(self, reading, requests):
        return ["" if index % 4 == 0 else targets[tuple(request.ids)] for index, request in enumerate(requests)]

    monkeypatch.setattr(Answerer, "answers", answers)
    reading = Reading(resolve("D=4", 2, 2))
    items = run.items("multivalue", reading)
    assert [item.size for item in items] == [5, 5, 3] and len({item.name for item in items}) == 3
    row = run.combine("multivalue", reading, [item.run() for item in items])
    assert (row.ruler, row.exact, row.samples) == (pytest.approx(8 / 13), pytest.approx(8 / 13), 13)  # 2 + 2 + 1 are wrong
    assert row.prompt_tokens == max(len(prompt.ids) for prompt in run.prompts("multivalue", 0, 13))


def test_a_tokenizer_of_another_vocabulary_is_refused():
    small = RATPlusLM(ModelConfig(layers=1, hidden=16, heads=2, vocab=128))
    with pytest.raises(UserError, match="bytes: has 256 entries, but the model's vocabulary has 128"):
        needle_run(small, 600, 1)


def test_the_command_writes_one_row_a_pattern_and_task(golden_pth, tmp_path, capsys, monkeypatch):
    from megarat.eval import runner

    assert cli.main(["checkpoint", "import", str(golden_pth), str(tmp_path / "tiny")]) == 0
    monkeypatch.setattr(runner, "find_tokenizer", lambda *_: Bytes())
    monkeypatch.setattr(retrieval, "ANSWER_TOKENS", 4)
    arguments = (
        "--tasks needle:single_1,multivalue --samples 2 --sequence-length 700 --pattern dense --pattern D=16 --device cpu".split()
    )
    with monkeypatch.context() as patch:  # single_1 would fit, but nothing is computed for a table that cannot be finished
        patch.setattr(Answerer, "answers", None)
        assert cli.main(["eval", str(tmp_path / "tiny"), *arguments, "--sequence-length", "560"]) == 2
        assert "needle task multivalue: the bare question has" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "tiny"), *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["tasks"]["needle"]
    assert [(row["task"], row["pattern"]) for row in rows] == [
        (task, pattern) for task in ("single_1", "multivalue") for pattern in ("dense", "D=16,W=0,I=0")
    ]
    assert all(row["samples"] == 2 and row["prompt_tokens"] <= 700 - ANSWER_TOKENS for row in rows)
    out = capsys.readouterr().out
    assert "| D=16,W=0,I=0 | 0.0 / 0.0 | 0.0 / 0.0 |" in out
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in rows[0])
