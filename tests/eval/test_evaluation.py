"""``megarat eval`` on a published checkpoint and a small corpus, against a loop over the stream written here."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

import megarat
from megarat.checkpoint.convert import import_upstream
from megarat.data.format import Piece, ShardWriter, TokenizerInfo, file_sha256, token_dtype
from megarat.errors import UserError
from megarat.eval.perplexity import PatternScore
from megarat.eval.runner import EvalSettings, evaluate, human_bytes, table, write_results

VOCAB, EOS, LENGTH = 512, 2, 32
PATTERNS = ["dense", "D=16,W=8,I=4", ["D=4", "D=-1,W=3"]]


def write_corpus(folder: Path, stream: np.ndarray, vocab: int = VOCAB, sha256: str = "0" * 64) -> None:
    ends = np.flatnonzero(stream == EOS) + 1
    tokenizer = TokenizerInfo("none", "sentencepiece", sha256)
    with ShardWriter(folder, vocab_size=vocab, eos_id=EOS, tokenizer=tokenizer) as writer:
        writer.add(Piece(stream.astype(token_dtype(vocab)), ends))
        writer.finish({})


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """403 tokens, with a document end every 29: 12 sequences of 32 (and their last labels), 19 tokens too many."""
    tokens = np.random.default_rng(0).integers(3, VOCAB, 403)
    tokens[28::29] = EOS
    tokens[-1] = EOS
    return tokens


@pytest.fixture(scope="module")
def shards(stream, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_corpus(folder / "validation", stream)
    write_corpus(folder / "train", np.append(stream[:200], EOS))
    return folder


@pytest.fixture(scope="module")
def checkpoint(golden_pth, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "tiny"
    import_upstream(golden_pth, folder)
    return folder


def settings(corpus: Path, **changes) -> EvalSettings:
    base = {"patterns": PATTERNS, "shards": str(corpus), "sequence_length": LENGTH, "device": "cpu", "progress": False}
    return EvalSettings(**{**base, "micro_batch": 5, **changes})


def mean_loss(checkpoint: Path, stream: np.ndarray, pattern, sequences: int) -> tuple[float, int]:
    """Cross entropy in float64, token by token, of the sequences of the stream one after another."""
    model = megarat.load(checkpoint, pattern=pattern, device="cpu", dtype=torch.float64)
    losses = []
    for first in range(0, sequences * LENGTH, LENGTH):
        logits = model(torch.from_numpy(stream[None, first : first + LENGTH]))[0].numpy()
        for position in range(LENGTH):
            if stream[first + position] != EOS:  # what follows the end of a document is not scored
                row, target = logits[position], stream[first + position + 1]
                losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
    return float(np.mean(losses)), len(losses)


@pytest.fixture(scope="module")
def results(checkpoint, shards) -> dict:
    return evaluate(checkpoint, settings(shards))


def test_documents_that_were_trained_apart_are_scored_apart(checkpoint, shards, stream, monkeypatch):
    """Against each document of a sequence alone: dense attention and rotary only know distances, so its place does not matter."""
    from megarat.eval import runner

    state = runner.checkpoints.load_state(checkpoint)
    state.config.data.documents = "separate"
    monkeypatch.setattr(runner.checkpoints, "load_state", lambda folder: state)
    [row] = evaluate(checkpoint, settings(shards, patterns=["dense"]))["tasks"]["ppl"]
    model = megarat.load(checkpoint, pattern="dense", device="cpu", dtype=torch.float64)
    losses = []
    for first in range(0, 12 * LENGTH, LENGTH):
        ends = [n for n in range(first, first + LENGTH) if stream[n] == EOS]
        for start, end in zip([first, *(n + 1 for n in ends)], [*(n + 1 for n in ends), first + LENGTH], strict=True):
            if start == end:
                continue
            logits = model(torch.from_numpy(stream[None, start:end]))[0].log_softmax(dim=-1)
            losses += [-float(logits[n - start, stream[n + 1]]) for n in range(start, end) if stream[n] != EOS]
    assert row["tokens"] == len(losses) and row["loss"] == pytest.approx(float(np.mean(losses)), abs=2e-6)  # fp32, as below
    with pytest.raises(UserError, match="kept documents apart"):
        evaluate(checkpoint, settings(shards, patterns=["dense + topk blocks=2,size=4"]))


def test_the_runs_config_says_what_is_scored_and_how_much_of_it(results, checkpoint, shards, monkeypatch):
    from megarat.eval import runner

    state = runner.checkpoints.load_state(megarat.load(checkpoint, device="cpu").checkpoint)
    state.config.data.validation, state.config.data.validation_tokens = str(shards), 3 * LENGTH
    monkeypatch.setattr(runner.checkpoints, "load_state", lambda folder: state)
    by_config = evaluate(checkpoint, settings(shards, shards=None))
    by_command = evaluate(checkpoint, settings(shards, limit_tokens=3 * LENGTH))
    scores = [[(row["loss"], row["tokens"]) for row in r["tasks"]["ppl"]] for r in (by_config, by_command, results)]
    assert scores[0] == scores[1] != scores[2]


def test_losses_equal_a_loop_over_the_stream(results, checkpoint, stream):
    for row, pattern in zip(results["tasks"]["ppl"], PATTERNS, strict=True):
        loss, tokens = mean_loss(checkpoint, stream, pattern, sequences=12)
        # ours is fp32: each token's loss is a log-sum-exp of 512 numbers near 0, good to a few units of 6e-8
        assert row["loss"] == pytest.approx(loss, abs=2e-6)
        assert row["tokens"] == tokens
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-12)


def test_the_rows_name_their_pattern_and_its_cache(results, checkpoint):
    rows = results["tasks"]["ppl"]
    assert [row["pattern"] for row in rows] == ["dense", "D=16,W=8,I=4", "D=4,W=0,I=0 | D=-1,W=3,I=0"]
    model = megarat.load(checkpoint, device="cpu", dtype=torch.bfloat16)
    assert [row["cache_bytes_per_sequence"] for row in rows] == [model.cache_bytes(LENGTH, pattern) for pattern in PATTERNS]


def test_top_k_blocks_lose_nothing_where_they_cover_the_sequence_and_something_where_not(results, checkpoint, shards):
    rows = evaluate(checkpoint, settings(shards, patterns=[f"D=-1 + topk blocks={n},size=4" for n in (8, 3)]))["tasks"]["ppl"]
    dense = results["tasks"]["ppl"][0]
    assert rows[0]["loss"] == pytest.approx(dense["loss"], abs=1e-6) and rows[1]["loss"] != pytest.approx(dense["loss"], abs=1e-4)
    assert rows[1]["pattern"] == "D=-1,W=0,I=0 + topk blocks=3,size=4,score=max"
    assert rows[1]["cache_bytes_per_sequence"] == dense["cache_bytes_per_sequence"]


def test_the_batch_size_changes_no_result(results, checkpoint, shards):
    again = evaluate(checkpoint, settings(shards, patterns=PATTERNS[1:2], micro_batch=1))["tasks"]["ppl"][0]
    assert again["loss"] == pytest.approx(results["tasks"]["ppl"][1]["loss"], abs=1e-6)
    assert again["tokens"] == results["tasks"]["ppl"][1]["tokens"]


@pytest.mark.parametrize(("limit", "sequences"), [(1, 1), (95, 2), (96, 3), (10**9, 12)])
def test_a_limit_scores_whole_sequences_and_at_least_one(checkpoint, shards, stream, limit, sequences):
    row = evaluate(checkpoint, settings(shards, patterns=["D=4"], limit_tokens=limit))["tasks"]["ppl"][0]
    loss, tokens = mean_loss(checkpoint, stream, "D=4", sequences)
    assert (row["loss"], row["tokens"]) == (pytest.approx(loss, abs=2e-6), tokens)


def test_another_split_is_another_corpus(checkpoint, shards):
    row = evaluate(checkpoint, settings(shards, patterns=[], split="train"))["tasks"]["ppl"][0]
    assert row["pattern"] == "dense" and row["tokens"] == 6 * LENGTH - 6  # documents end at 28, 57, ... 173 of 192


def test_results_are_the_documented_schema(results, checkpoint, tmp_path):
    assert list(results) == ["schema", "megarat", "checkpoint", "model", "device", "dtype", "sequence_length", "tasks", "speed"]
    assert results["schema"] == 1 and results["megarat"] == megarat.__version__
    content = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
    assert results["checkpoint"] == {"path": str(checkpoint), "pair": 12, "tokens": 0, "content": content}
    assert results["model"] == {"layers": 2, "hidden": 256, "heads": 2}
    assert (results["device"], results["dtype"], results["sequence_length"]) == ("cpu", "float32", LENGTH)
    assert all(list(row) == [field.name for field in dataclasses.fields(PatternScore)] for row in results["tasks"]["ppl"])
    path = write_results(results, tmp_path / "deep" / "er")
    assert path.name == "results.json" and {**json.loads(path.read_text()), "speed": results["speed"]} == results
    assert json.loads(path.with_name("speed.json").read_text()) == results["speed"]


def test_the_documentation_names_every_field(results):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = results["tasks"]["ppl"][0]
    for name in [*results, *results["checkpoint"], *results["model"], *row]:
        assert f"`{name}`" in page or f'"{name}"' in page, name


def test_the_table_shows_every_row(results):
    lines = table(results).splitlines()
    scores, speeds = lines[2 : 2 + len(PATTERNS)], lines[-len(PATTERNS) :]
    assert len(lines) == 2 * (2 + len(PATTERNS)) + 1
    for line, row in zip(scores, results["tasks"]["ppl"], strict=True):
        cells = [cell.strip() for cell in line.split(" | ")]
        assert f"{row['loss']:.4f}" in cells and f"{row['perplexity']:.2f}" in cells
    for line, row, scored in zip(speeds, results["speed"], results["tasks"]["ppl"], strict=True):
        cell = row["pattern"].replace("|", r"\|")  # a sign that else begins another cell
        assert row["pattern"] == scored["pattern"] and line.startswith(f"| {cell} | {row['prefill_tokens_per_s']:,.0f} | ")
        assert row["sequences"] == 5 and row["prompt_tokens"] == LENGTH - 16 and row["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")]
)
def test_bytes_are_written_with_their_unit(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("ppl", "arc")}, "--tasks: unknown task 'arc'; this version has ppl, needle, longbench, harness"),
        ({"split": "test"}, "--split: 'test'; expected train or validation"),
        ({"patterns": ["dense", "D=0"]}, "the dilation D must be 1"),
        ({"patterns": [["dense"] * 5]}, "5 entries for 2 layers"),
        ({"shards": "absent"}, "absent/validation"),
        ({"sequence_length": 403}, "403"),
    ],
)
def test_bad_settings_are_refused(checkpoint, shards, changes, message):
    with pytest.raises(UserError) as error:
        evaluate(checkpoint, settings(shards, **changes))
    assert message in str(error.value)


def test_a_corpus_of_a_larger_vocabulary_is_refused(checkpoint, stream, tmp_path):
    write_corpus(tmp_path / "validation", stream, vocab=600)
    with pytest.raises(UserError, match="600"):
        evaluate(checkpoint, settings(tmp_path))


def test_a_corpus_of_another_tokenizer_is_refused(golden_pth, stream, tmp_path):
    """Of the same size: its ids are all in the vocabulary, and mean something else."""
    own, other = (tiny_run.write_tokenizer(tmp_path / word, ["<unk>", word, "</s>"]) for word in ("own", "other"))
    import_upstream(golden_pth, tmp_path / "tiny", own)
    for folder in (own, other):
        write_corpus(tmp_path / "of" / folder.name / "validation", stream, sha256=file_sha256(folder / "tokenizer.json"))
    assert evaluate(tmp_path / "tiny", settings(tmp_path / "of" / "own", patterns=["D=4"]))
    another = settings(tmp_path / "of" / "other", patterns=["D=4"])
    with pytest.raises(UserError, match=r"--shards: .*of/other/validation was made with .* not with .*tokenizer\.json"):
        evaluate(tmp_path / "tiny", another)
    assert evaluate(tmp_path / "tiny", dataclasses.replace(another, tokenizer=str(other)))  # said to give the same ids


def test_a_corpus_with_nothing_to_score_is_refused(checkpoint, tmp_path):
    write_corpus(tmp_path / "validation", np.full(40, EOS))
    with pytest.raises(UserError, match="no token to score"):
        evaluate(checkpoint, settings(tmp_path))


def test_an_imported_checkpoint_needs_shards_to_be_named(checkpoint):
    with pytest.raises(UserError, match="name the data"):
        evaluate(checkpoint, EvalSettings(patterns=["dense"], device="cpu"))


def test_results_that_cannot_be_written_are_reported(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: cannot write .*file/results.json"):
        write_results(results, tmp_path / "file")


def test_a_disk_that_is_full_leaves_the_results_of_before(results, tmp_path):
    path = write_results(results, tmp_path)
    before, limits = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="--out: cannot write"):
            write_results(results, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "speed.json"]
