"""Built streams against the tokenizer library itself; bad input against the messages and what is left on disk."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import zstandard

from data_tools import inspect_shards, sources, verify_shards
from data_tools.build_shards import build, main
from data_tools.inspect_shards import documents
from data_tools.tokenise import Options
from megarat.data.format import Index
from megarat.data.reader import TokenReader
from megarat.errors import UserError

TEXTS = [f"document {i} of {'many words ' * (i % 7)}\nand a second line, naïve 漢字 🙂 {i * i}" for i in range(60)]
SMALL = {"block_tokens": 128, "shard_tokens": 512}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def expected_stream(texts: list[str], tokenizer_file: Path) -> list[int]:
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    return [token for text in texts for token in [*library.encode(text), library.eos_id()]]


def stream_of(index: Index) -> list[int]:
    reader = TokenReader(index.folder)
    return reader.read(0, reader.num_tokens).tolist()


def texts_of(index: Index | None, tokenizer_file: Path) -> list[str]:
    library = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    return [library.decode(ids.tolist()) for ids in documents(index)] if index else []


def write_each_type(folder: Path) -> list[Path]:
    """TEXTS once in every type of file with a text field."""
    files = {"a.jsonl": jsonl(TEXTS), "b.jsonl.gz": gzip.compress(jsonl(TEXTS))}
    frames = [zstandard.compress(jsonl(part)) for part in (TEXTS[:20], TEXTS[20:])]
    files["c.jsonl.zst"] = b"".join(frames)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.table({"id": list(range(60)), "text": TEXTS}), folder / "d.parquet", row_group_size=25)
    return [*(folder / name for name in files), folder / "d.parquet"]


def assert_nothing_left(folder: Path, *, beside: set[str]) -> None:
    assert {p.name for p in folder.iterdir()} == beside


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and chunks so small that every file makes several."""
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 600)
    return tmp_path


def test_every_type_of_file_gives_the_librarys_tokens_and_one_eos_a_document(work: Path, tokenizer_file: Path) -> None:
    expected = expected_stream(TEXTS, tokenizer_file)
    for file in write_each_type(work):
        result = build([file], tokenizer_file, work / f"out-{file.name}", Options(held_out=0, **SMALL), workers=1, progress=False)
        assert stream_of(result.train) == expected
        assert (result.train.total_documents, result.validation) == (60, None)


def test_a_folder_is_read_in_the_order_of_names_and_hidden_files_are_left_out(work: Path, tokenizer_file: Path) -> None:
    (work / "in" / "sub").mkdir(parents=True)
    for name, text in (("b.txt", "second"), ("a.jsonl", ""), ("sub/c.txt", "third"), (".hidden.txt", "no"), ("notes.md", "no")):
        (work / "in" / name).write_bytes(jsonl(["first"]) if name == "a.jsonl" else text.encode())
    result = build([work / "in"], tokenizer_file, work / "out", Options(held_out=0), workers=1, progress=False)
    assert texts_of(result.train, tokenizer_file) == ["first", "second", "third"]
    assert [entry["name"] for entry in result.train.source["inputs"]] == ["in/a.jsonl", "in/b.txt", "in/sub/c.txt"]


def test_a_text_file_is_one_document_or_its_paragraphs(work: Path, tokenizer_file: Path) -> None:
    text = "one\nstill one\n\n  \ntwo\r\n\r\nthree\n"
    (work / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = build([work / "a.txt"], tokenizer_file, work / "whole", Options(held_out=0), workers=1, progress=False)
    assert texts_of(whole.train, tokenizer_file) == [text]
    options = Options(held_out=0, txt_split="paragraph")
    parts = build([work / "a.txt"], tokenizer_file, work / "parts", options, workers=1, progress=False)
    assert texts_of(parts.train, tokenizer_file) == ["one\nstill one", "two", "three"]


def test_shards_are_the_same_bytes_for_one_and_three_workers(work: Path, tokenizer_file: Path) -> None:
    inputs = write_each_type(work)
    for workers in (1, 3):
        build(inputs, tokenizer_file, work / f"out{workers}", Options(held_out=0.2, **SMALL), workers=workers, progress=False)
    one, three = (
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in (work / "out1", work / "out3")
    )
    assert len(one) > 8
    assert one == three


def test_held_out_documents_never_lie_on_both_sides(work: Path, tokenizer_file: Path) -> None:
    texts = [f"text number {i}" for i in range(1000)]
    (work / "a.jsonl").write_bytes(jsonl(texts + texts[:300]))
    held_out = []
    for seed in (0, 1):
        options = Options(held_out=0.1, seed=seed)
        result = build([work / "a.jsonl"], tokenizer_file, work / f"out{seed}", options, workers=1, progress=False)
        train, validation = (texts_of(index, tokenizer_file) for index in (result.train, result.validation))
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(texts + texts[:300])
        assert abs(len(set(validation)) - 100) < 4 * 9.5  # binomial(1000, 0.1): standard deviation 9.5
        held_out.append(set(validation))
    assert held_out[0] != held_out[1]


def test_a_document_longer_than_a_shard_and_empty_ones_are_handled(work: Path, tokenizer_file: Path) -> None:
    long = "word " * 2000
    (work / "a.jsonl").write_bytes(jsonl(["", long, " \n", "end"]))
    result = build([work / "a.jsonl"], tokenizer_file, work / "out", Options(held_out=0, **SMALL), workers=1, progress=False)
    assert stream_of(result.train) == expected_stream([long, "end"], tokenizer_file)
    assert len(result.train.shards) > 3
    assert result.train.source["left_out"] == {"empty": 2}


GOOD = b'{"text": "fine"}\n'
BAD_FILES = [
    ("a.jsonl", GOOD * 2 + b'{"text": "\xff"}\n' + GOOD, r"a\.jsonl, line 3: not UTF-8"),
    ("a.jsonl", GOOD + b"\n" + b'{"text": \n' + GOOD, r"a\.jsonl, line 3: not JSON"),
    ("a.jsonl", GOOD + b'["text"]\n', r"a\.jsonl, line 2: a JSON list where an object is expected"),
    ("a.jsonl", GOOD + b'{"body": "x"}\n', r"a\.jsonl, line 2: no field 'text' \(there are: 'body'\)"),
    ("a.jsonl", GOOD + b'{"text": 7}\n', r"a\.jsonl, line 2: field 'text' is 7, expected a string"),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"a\.jsonl, line 2: field 'text' holds half a surrogate"),
    ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", r"a\.jsonl, line 2: not JSON"),
    ("a.jsonl.gz", gzip.compress(GOOD + b"{\n"), r"a\.jsonl\.gz, line 2: not JSON"),
    ("a.txt", b"one\n\ntwo\nbad \xff\n\nthree\n", r"a\.txt, line 4: not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[message for _, _, message in BAD_FILES])
@pytest.mark.parametrize("split", ["file", "paragraph"])
def test_a_malformed_line_is_named_by_file_and_number_and_can_be_skipped(
    work: Path, tokenizer_file: Path, name: str, content: bytes, message: str, split: str
) -> None:
    (work / name).write_bytes(content)
    (work / "good.txt").write_text("good")
    options = Options(held_out=0, txt_split=split)
    with pytest.raises(UserError, match=message):
        build([work], tokenizer_file, work / "out", options, workers=1, progress=False)
    assert_nothing_left(work, beside={name, "good.txt"})
    result = build(
        [work], tokenizer_file, work / "out", Options(held_out=0, txt_split=split, bad_lines="skip"), workers=1, progress=False
    )
    assert result.train.source["left_out"] == {"malformed": 1}
    assert "good" in texts_of(result.train, tokenizer_file)


def test_a_malformed_line_met_in_a_worker_process_is_named_too(
    work: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "a.jsonl").write_bytes(GOOD * 500 + b"{\n" + GOOD * 500)
    code = main([str(work / "a.jsonl"), "--tokenizer", str(tokenizer_file), "--output", str(work / "out"), "--workers", "2"])
    assert code == 2
    assert f"error: {work / 'a.jsonl'}, line 501: not JSON" in capsys.readouterr().err
    assert_nothing_left(work, beside={"a.jsonl"})


def cut(content: bytes) -> bytes:
    return content[: len(content) - 9]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", cut(gzip.compress(jsonl(TEXTS)))),
        ("a.jsonl.gz", jsonl(TEXTS)),
        ("a.jsonl.zst", cut(zstandard.compress(jsonl(TEXTS)))),
        ("a.jsonl.zst", jsonl(TEXTS)),
        ("a.parquet", jsonl(TEXTS)),
    ],
    ids=["gzip cut", "no gzip", "zstd cut", "no zstd", "no parquet"],
)
def test_a_damaged_file_is_named_even_when_bad_lines_are_skipped(
    work: Path, tokenizer_file: Path, name: str, content: bytes
) -> None:
    (work / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: damaged or unreadable"):
        build([work / name], tokenizer_file, work / "out", Options(bad_lines="skip"), workers=1, progress=False)
    assert_nothing_left(work, beside={name})


def test_damage_inside_a_table_is_named_by_its_row_group(work: Path, tokenizer_file: Path) -> None:
    path = work / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=30, compression="zstd")
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = second.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: row group 1: damaged or unreadable"):
        build([path], tokenizer_file, work / "out", Options(held_out=0), workers=1, progress=False)


def test_a_table_without_the_column_or_with_nulls_is_refused(work: Path, tokenizer_file: Path) -> None:
    path = work / "a.parquet"
    for table, message in (
        (pa.table({"body": ["x"]}), r"no column 'text' \(there are: body\)"),
        (pa.table({"text": [1]}), "of type int64, expected string"),
        (pa.table({"text": ["x", None]}), r"row 2: null in column 'text'"),
    ):
        pq.write_table(table, path)
        with pytest.raises(UserError, match=message):
            build([path], tokenizer_file, work / "out", Options(held_out=0), workers=1, progress=False)


@pytest.mark.parametrize(
    ("content", "held_out", "message"),
    [
        (b"", 0.0, r"empty corpus: no document to train on in .*a\.jsonl \(no records\)"),
        (b'{"text": ""}\n', 0.0, r"\(1 empty\)"),
        (b"{\n", 0.0, r"\(1 malformed\)"),
        (GOOD, 0.999999, r"\(1 held out for validation"),
    ],
)
def test_a_corpus_without_a_document_to_train_on_is_refused_with_the_reason(
    work: Path, tokenizer_file: Path, content: bytes, held_out: float, message: str
) -> None:
    (work / "a.jsonl").write_bytes(content)
    options = Options(held_out=held_out, bad_lines="skip")
    with pytest.raises(UserError, match=message):
        build([work / "a.jsonl"], tokenizer_file, work / "out", options, workers=1, progress=False)
    assert_nothing_left(work, beside={"a.jsonl"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.txt"], "gone.txt: no such file or folder"),
        (["a.csv"], "a.csv: unknown type of file, expected .txt, .jsonl"),
        (["folder"], "no .txt, .jsonl"),
        (["a.txt", "--tokenizer", "a.csv"], "a.csv: neither a Hugging Face"),
        (["a.txt", "--held-out", "1"], "--held-out is 1.0"),
        (["a.txt", "--workers", "0"], "--workers is 0"),
        (
            ["a.txt", "--shard-tokens", "100", "--block-tokens", "64"],
            "shard tokens (100) must be a positive multiple of block tokens (64)",
        ),
        (["a.txt", "--output", "a.csv"], "a.csv: exists and is not a finished corpus"),
        (["a.txt", "--output", "folder"], "folder: exists and is not a finished corpus"),
        (["a.txt", "--output", "a.csv/out"], "Not a directory"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2_and_one_message(
    tmp_path: Path,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.md").write_text("x")
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_text("some text")
    assert main(["--tokenizer", str(tokenizer_file), "--output", "out", "--workers", "1", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert_nothing_left(tmp_path, beside={"folder", "a.txt", "a.csv"})


def test_a_finished_output_is_never_written_again(work: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "a.jsonl").write_bytes(jsonl(TEXTS))
    command = [str(work / "a.jsonl"), "--tokenizer", str(tokenizer_file), "--output", str(work / "out"), "--workers", "1"]
    assert main(command) == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (work / "out").rglob("*") if p.is_file()}
    assert main(command) == 0
    assert "already built" in capsys.readouterr().out
    assert main([*command, "--held-out", "0.3", "--seed", "2"]) == 2
    assert "made with other held_out and other seed" in capsys.readouterr().err
    (work / "a.jsonl").write_bytes(jsonl(TEXTS[1:]))
    assert main(command) == 2
    assert "made with other inputs" in capsys.readouterr().err
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (work / "out").rglob("*") if p.is_file()} == before


def test_a_full_disk_is_one_message_and_leaves_nothing_behind(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 20))

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "data_tools.build_shards", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_file)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--workers", "1"],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 2
    assert "00000.train.tokens: cannot be written: File too large" in done.stderr and "Traceback" not in done.stderr
    assert_nothing_left(tmp_path, beside={"a.jsonl"})


def test_what_a_killed_build_left_is_replaced_and_a_running_one_is_left_alone(work: Path, tokenizer_file: Path) -> None:
    (work / "a.jsonl").write_bytes(jsonl(TEXTS))
    staging = work / ".out.partial"
    (staging / "train").mkdir(parents=True)
    (staging / "train" / "000000.tar").write_bytes(b"half")
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another build of the same output is running"):
        build([work / "a.jsonl"], tokenizer_file, work / "out", Options(), workers=1, progress=False)
    assert (staging / "train" / "000000.tar").read_bytes() == b"half"
    os.close(descriptor)
    result = build([work / "a.jsonl"], tokenizer_file, work / "out", Options(held_out=0), workers=1, progress=False)
    assert stream_of(result.train) == expected_stream(TEXTS, tokenizer_file)
    assert_nothing_left(work, beside={"a.jsonl", "out"})


def test_verify_and_inspect_tell_whole_from_damaged(work: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "a.jsonl").write_bytes(jsonl(TEXTS))
    result = build([work / "a.jsonl"], tokenizer_file, work / "out", Options(held_out=0.2, **SMALL), workers=1, progress=False)
    assert verify_shards.main([str(work / "out")]) == 0
    assert inspect_shards.main([str(work / "out"), "--documents", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{result.train.total_tokens:,} tokens" in shown and "document 0 of" in shown and "tiny.model" in shown
    shard = work / "out" / "validation" / "000000.tar"
    os.truncate(shard, 100)
    assert verify_shards.main([str(work / "out")]) == 2
    assert f"error: {shard}: shard is truncated" in capsys.readouterr().err
    assert verify_shards.main([str(work)]) == inspect_shards.main([str(work)]) == 2


def test_the_corpus_carries_its_tokenizer(work: Path, tokenizer_file: Path) -> None:
    (work / "a.jsonl").write_bytes(jsonl(TEXTS))
    result = build([work / "a.jsonl"], tokenizer_file, work / "out", workers=1, progress=False)
    copied = work / "out" / "tokenizer" / "tiny.model"
    assert copied.read_bytes() == tokenizer_file.read_bytes()
    assert result.train.tokenizer.name == "tiny.model" and result.train.vocab_size == 300
    assert np.dtype("uint16") == result.train.dtype
