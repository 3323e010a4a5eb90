"""LongBench: metrics by hand, truncation, prompts, files that are missing or broken, and scores through a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_run

from megarat import cli
from megarat.checkpoint.convert import import_upstream
from megarat.errors import UserError
from megarat.eval import longbench
from megarat.eval.answers import Answerer
from megarat.eval.longbench import (
    LONGBENCH_AVERAGE,
    LONGBENCH_TASKS,
    LongBenchRun,
    check_files,
    class_named,
    edit_similarity,
    f1,
    read_samples,
    rouge_l,
    score,
    shortened,
    without_middle,
)
from megarat.eval.runner import EvalSettings, evaluate
from megarat.infer.reading import Reading
from megarat.model.pattern import resolve


class Bytes:
    """Ids are the bytes of ASCII; 1 is EOS."""

    eos_id, vocab_size, file, sha256 = 1, 256, Path("bytes"), "bytes"

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("The cat sat.", "a cat, sat", 1.0),  # articles, case and punctuation do not count
        ("cat cat dog", "cat bird", 2 / 5),  # one in common of 3 said and 2 expected
        ("bird the", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_f1_by_hand(answer, reference, value):
    assert f1(answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a x b y c", "a b c", 2 * 3 / 8),  # a b c within 5 said and 3 expected
        ("c b a", "a b c", 2 * 1 / 6),  # order counts
        ("a a a b", "b a", 2 * 1 / 4),  # words count once; of "a" and "b" the answer's last is taken
        ("b c. a b", "a b c", 1.0),  # "b c" of one sentence, "a b" of the other
        ("a b c", "b c. a b", 1.0),
        ("a b. ", "a b", 2 * 2 / 5),  # behind the last full stop there is a sentence of one empty word
        ("a b.", "a b", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, value):
    assert rouge_l(answer, reference) == pytest.approx(value)


def test_edit_similarity_takes_the_first_line_that_is_code():
    assert edit_similarity("\n# note\n```python\nx = 1\ny = 2", "x = 1") == 1.0
    assert edit_similarity("abcd", "bcde") == 0.75
    assert edit_similarity("abx", "ab") == 0.8 and edit_similarity("abcdef", "abcxyzw") == 0.46  # 6/13, in whole percent
    assert edit_similarity("// nothing else", "x") == 0.0
    assert edit_similarity("zzz" + "ab" * 150, "ab" * 150 + "zzz") == 0.01  # what is frequent in a long line is no anchor


def test_a_class_counts_once_and_less_beside_others():
    sample = {"all_classes": ["Number", "Date", "Number of something", "City"]}
    assert class_named("It is a Date", "Date", sample) == 1.0
    assert class_named("Date or City", "Date", sample) == 0.5
    assert class_named("Number of something", "Number of something", sample) == 1.0  # "Number" is part of it
    assert class_named("City", "Date", sample) == 0.0
    classes = {"all_classes": ["Number", "Number of", "Number of something"]}
    assert class_named("Number of something", "Number of something", classes) == 0.5  # of two parts in a row one is taken out


def test_the_best_reference_answer_counts():
    assert score("f1", "blue sky", {"answers": ["red", "blue sky", "blue"]}) == 1.0


@pytest.mark.parametrize(("length", "budget", "kept"), [(9, 10, 9), (10, 10, 9), (25, 10, 9), (25, 11, 10), (4, 4, 3)])
def test_a_long_prompt_loses_its_middle(length, budget, kept):
    ids = list(range(length))
    cut = without_middle(ids, budget)
    assert len(cut) == kept
    if length >= budget:
        first = (budget - 1) // 2
        assert cut[:first] == ids[:first] and cut[first:] == ids[-(budget - 1 - first) :]


def test_answers_end_where_another_question_begins():
    assert shortened("\n\nParis\nQuestion: and then?", ("\nQuestion",)) == "Paris"
    assert shortened("one\nQuery x\nQuestion", ("\nQuestion", "\nQuery")) == "one"
    assert shortened("\ncode\nmore", ()) == "\ncode\nmore"


def test_every_task_asks_with_its_context_and_can_be_scored():
    for task, spec in LONGBENCH_TASKS.items():
        assert spec.prompt.count("{context}") == 1 and spec.prompt.count("{input}") == (task not in ("gov_report", "multi_news"))
        assert spec.metric in longbench._METRICS
    assert len(LONGBENCH_AVERAGE) == 11 and set(LONGBENCH_AVERAGE) < set(LONGBENCH_TASKS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two tasks of a few samples: braces in a text, prompts from short to much too long."""
    for task, count in (("hotpotqa", 5), ("gov_report", 3)):
        samples = [
            {"context": f"Passage {n} {{input}} " * 10 * n, "input": f"What is {n}?", "answers": [str(n), "none"]}
            for n in range(count)
        ]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n\n")
    return tmp_path


def test_missing_files_are_named_and_what_there_is(folder):
    with pytest.raises(UserError) as error:
        check_files(folder, ("hotpotqa", "qasper", "lcc"))
    assert f"{folder} lacks qasper.jsonl, lcc.jsonl (it has gov_report.jsonl, hotpotqa.jsonl)" in str(error.value)
    with pytest.raises(UserError, match=r"needs local data; .* give --longbench-data DIR"):
        check_files(None, ("hotpotqa",))
    with pytest.raises(UserError, match="it has no jsonl file"):
        check_files(folder / "nowhere", ("hotpotqa",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"context": 1}', "line 2: expected an object"),
        ('{"context":"a","input":"b","answers":[]}', "line 2: `answers` is []"),
    ],
)
def test_broken_samples_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "lcc.jsonl"
    path.write_text('{"context":"a","input":"b","answers":["c"]}\n' + line)
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}, {message}")
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no sample"):
        read_samples(path)


def test_a_sample_may_hold_any_character(tmp_path):
    """U+2028, U+0085 and form feeds end a line for Python's text, but not for JSON's lines."""
    sample = {"context": "a\u2028b\x85c\x0cd", "input": "\u2029", "answers": ["\x1c"]}
    path = tmp_path / "qasper.jsonl"
    path.write_text(json.dumps(sample, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_samples(path) == [sample]


def run(model, folder, monkeypatch, length=600, limit=None, piece=2):
    """Scores and requests where the model's part is played by a script that says what it was asked."""
    asked = []

    def answers(self, reading, requests):
        asked.extend(requests)
        return [
            "\n" + Bytes().decode(request.ids).rpartition("What is ")[2].partition("?")[0] + "\nQuestion 2"
            for request in requests
        ]

    monkeypatch.setattr(Answerer, "answers", answers)
    made = LongBenchRun(Answerer(model, Bytes(), batch=2, capacity=length), folder, length=length, limit=limit, piece=piece)
    reading = Reading(resolve("D=4", 2, 2))
    items = {task: made.items(task, reading) for task in ("hotpotqa", "gov_report")}
    return asked, {task: made.combine(task, reading, [item.run() for item in own]) for task, own in items.items()}, items


def test_scores_prompts_and_penalties(published, folder, monkeypatch):
    asked, rows, items = run(published, folder, monkeypatch)
    assert [item.size for item in items["hotpotqa"]] == [2, 2, 1]
    row = rows["hotpotqa"]
    assert (row.metric, row.samples, row.score) == ("f1", 5, 1.0)  # each says its own number: the question survives the cut
    prompts = [Bytes().decode(request.ids) for request in asked[:5]]
    assert row.cut == sum(len(prompt) == 600 - 32 - 1 for prompt in prompts) and 0 < row.cut < 5
    assert prompts[1].startswith("Here are passages") and "Passage 1 {input} Passage 1" in prompts[1]  # a text is no template
    assert {request.sampling.repetition_penalty for request in asked[:5]} == {1.0} and {r.max_new_tokens for r in asked[:5]} == {
        32
    }
    assert {request.sampling.repetition_penalty for request in asked[5:]} == {1.2} and {r.max_new_tokens for r in asked[5:]} == {
        512
    }
    assert all(len(request.ids) + request.max_new_tokens <= 600 for request in asked)
    _, fewer, _ = run(published, folder, monkeypatch, limit=2)
    assert (fewer["hotpotqa"].samples, fewer["gov_report"].samples) == (2, 2)


def test_the_benchmarks_own_prompts_are_taken_where_they_are(published, folder, monkeypatch):
    names = [item.name for item in run(published, folder, monkeypatch)[2]["hotpotqa"]]
    (folder / "dataset2prompt.json").write_text(json.dumps({"hotpotqa": "own: {context} What is it? {input}"}))
    asked, _, items = run(published, folder, monkeypatch)
    assert Bytes().decode(asked[0].ids) == "own:  What is it? What is 0?"
    assert not {item.name for item in items["hotpotqa"]} & set(names)  # other prompts, other results
    (folder / "dataset2prompt.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset2prompt.json: not JSON"):
        run(published, folder, monkeypatch)


def test_another_tokenizer_at_the_same_place_answers_anew(golden_pth, folder, tmp_path, monkeypatch):
    import_upstream(golden_pth, tmp_path / "tiny")
    monkeypatch.setattr("megarat.eval.runner.speed_items", lambda *_: [])
    monkeypatch.setattr(Answerer, "answers", lambda self, _, requests: [self.tokenizer.decode([0])] * len(requests))
    settings = EvalSettings(
        ["dense"], ("longbench:hotpotqa",), longbench_data=str(folder), sequence_length=120, device="cpu", progress=False
    )
    settings = dataclasses.replace(settings, tokenizer=str(tmp_path / "tokenizer"))
    scores = []
    for first in ("none", "other"):  # what every answer is; "none" is right everywhere
        tiny_run.write_tokenizer(tmp_path / "tokenizer", [first, "</s>", "Passage"])
        [row] = evaluate(tmp_path / "tiny", settings, tmp_path / "out")["tasks"]["longbench"]
        scores.append(row["score"])
    assert scores == [1.0, 0.0]


def test_sequences_too_short_for_an_answer_are_refused(published, folder, monkeypatch):
    with pytest.raises(UserError, match="gov_report answers in 512 tokens; sequences of 513 leave no prompt"):
        run(published, folder, monkeypatch, length=513)


def test_the_command_writes_one_row_a_pattern_and_task(golden_pth, folder, tmp_path, capsys, monkeypatch):
    from megarat.eval import runner

    assert cli.main(["checkpoint", "import", str(golden_pth), str(tmp_path / "tiny")]) == 0
    monkeypatch.setattr(runner, "find_tokenizer", lambda *_: Bytes())
    command = [
        "eval",
        str(tmp_path / "tiny"),
        "--device",
        "cpu",
        "--sequence-length",
        "120",
        "--pattern",
        "dense",
        "--pattern",
        "D=16",
    ]
    command += ["--tasks", "longbench:hotpotqa", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--longbench-data", str(tmp_path / "none")]) == 2
    assert "lacks hotpotqa.jsonl" in capsys.readouterr().err
    assert cli.main([*command, "--longbench-data", str(folder), "--limit", "3"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["tasks"]["longbench"]
    assert [(row["task"], row["pattern"], row["samples"]) for row in rows] == [
        ("hotpotqa", "dense", 3),
        ("hotpotqa", "D=16,W=0,I=0", 3),
    ]
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["pattern"] for row in speed] == ["dense", "D=16,W=0,I=0"] and all(row["decode_tokens_per_s"] > 0 for row in speed)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| LongBench, % | hotpotqa | mean of 1 |" in report and "| pattern | prefill, tokens/s | decode, tokens/s |" in report
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for row in (rows[0], speed[0]) for name in row)
