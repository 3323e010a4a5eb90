"""The whole life through the command line, small: the same code as `megarat demo`, with a text and a tokenizer made here."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from megarat.checkpoint import load as checkpoints
from megarat.checkpoint.export import export_checkpoint
from megarat.data.reader import TokenReader
from megarat.demo import life
from megarat.errors import UserError
from megarat.eval.perplexity import HeldOut
from megarat.infer.load import load

WORDS = "the of and to in is was for on as with by at from city river he she wrote book music first year".split()
TINY = dataclasses.replace(
    life.CPU_SCALE,
    model={"layers": 2, "hidden": 32, "heads": 2},
    sequence_length=128,
    global_batch=4,
    micro_batch=2,
    lr=1e-2,
    eval_tokens=1024,
)
PAIRS = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """1000 documents of words in a fixed order of preference, so that there is something to learn."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(1000):
            words = draw.choices(WORDS, weights=range(len(WORDS), 0, -1), k=80)
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(text, tmp_path_factory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "words"
    plain = text.with_suffix(".txt")
    plain.write_text("\n".join(json.loads(line)["text"] for line in text.read_text().splitlines()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(plain), model_prefix=str(prefix), vocab_size=340, minloglevel=2, byte_fallback=True, hard_vocab_limit=False
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def demo_folder(text, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life, "CPU_SCALE", TINY)
        patch.setattr(life, "RELEASE", folder / "none")
        patch.setattr(life.torch.cuda, "is_available", lambda: False)
        patch.setenv("OMP_NUM_THREADS", "1")
        life.demo(str(folder), [str(text)], str(tokenizer), PAIRS)
    return folder


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_run_was_stopped_and_resumed_without_a_gap_or_a_repeat(demo_folder):
    starts = json.loads((demo_folder / "pretrain" / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2
    assert [row["pair"] for row in metrics(demo_folder / "pretrain")] == list(range(1, PAIRS + 1))
    assert "exit code 75" in (demo_folder / "report.md").read_text(encoding="utf-8")


def test_training_learns_the_frequency_of_words(demo_folder):
    rows = metrics(demo_folder / "pretrain")
    uniform = math.log(checkpoints.load_state(demo_folder / "pretrain").config.model.vocab)
    assert abs(rows[0]["loss_sparse"] - uniform) < 0.1
    assert rows[-1]["loss_dense"] < uniform - 1.0
    assert rows[-1]["loss_sparse"] < uniform - 1.0


def test_results_hold_every_pattern_before_and_after(demo_folder):
    for folder, run in (("eval-before", "pretrain"), ("eval-after", "adapt")):
        results = json.loads((demo_folder / folder / "results.json").read_text(encoding="utf-8"))
        assert Path(results["checkpoint"]["path"]) == checkpoints.resolve(demo_folder / run)
        rows = results["tasks"]["ppl"]
        assert [row["pattern"] for row in rows] == ["dense", "D=4,W=0,I=0", "D=16,W=0,I=0", "D=64,W=0,I=0", "D=16,W=32,I=4"]
        assert all(math.isclose(row["perplexity"], math.exp(row["loss"])) for row in rows)
        caches = [row["cache_bytes_per_sequence"] for row in rows[:4]]
        assert caches == sorted(caches, reverse=True)


def test_the_adaptation_names_its_parent(demo_folder):
    parent = checkpoints.resolve(demo_folder / "pretrain")
    state = checkpoints.load_state(demo_folder / "adapt")
    assert state.parent is not None
    assert state.parent["content"] == checkpoints.identity(parent)
    assert state.pattern == "D=16,W=32,I=4"
    assert checkpoints.verify(demo_folder / "adapt").endswith(
        checkpoints.identity(checkpoints.resolve(demo_folder / "adapt"))[:16]
    )


def test_the_report_has_its_plots(demo_folder):
    report = (demo_folder / "report.md").read_text(encoding="utf-8")
    for plot in ("loss.png", "perplexity.png"):
        assert f"({plot})" in report
        assert (demo_folder / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_demo_goes_through_again_without_training(again, demo_folder):
    assert (demo_folder / "pretrain" / "metrics.jsonl").read_bytes() == again


@pytest.fixture(scope="module")
def again(demo_folder, text, tokenizer, tmp_path_factory) -> bytes:
    """The metrics before the demo went through once more, with a model to show: its own, exported."""
    before = (demo_folder / "pretrain" / "metrics.jsonl").read_bytes()
    release = tmp_path_factory.mktemp("release") / "model"
    export_checkpoint(demo_folder / "adapt", release, dtype="fp32", compare=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life, "CPU_SCALE", TINY)
        patch.setattr(life.torch.cuda, "is_available", lambda: False)
        life.demo(str(demo_folder), [str(text)], str(tokenizer), released=str(release))
    return before


def test_a_released_model_is_shown_on_documents_that_were_held_out_of_its_training(again, demo_folder):
    results = json.loads((demo_folder / "eval-released" / "results.json").read_text(encoding="utf-8"))
    rows = {row["pattern"]: row["loss"] for row in results["tasks"]["ppl"]}
    documents = TokenReader(demo_folder / "released-shards" / "validation").index.total_documents
    assert 0 < documents < TokenReader(demo_folder / "shards" / "validation").index.total_documents
    model = load(demo_folder / "adapt", "dense")
    corpus = HeldOut(TokenReader(demo_folder / "released-shards" / "validation"), results["sequence_length"], TINY.eval_tokens)
    inputs_BT, labels_BT = corpus.batch(range(corpus.sequences))
    assert math.isclose(rows["dense"], float(model.lm(inputs_BT, None, labels_BT)), rel_tol=1e-5)
    report = (demo_folder / "report.md").read_text(encoding="utf-8")
    assert "## The released model" in report and f"{rows['dense']:.4f}" in report
    assert report.count(f"> **{life.PROMPTS[0]}**") == 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a \.pth file"):
        life._show_release(tmp_path, tmp_path, [], TINY)
