"""A trained tokenizer: its special ids, exact round trips, and shards made with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools import verify_shards
from data_tools.build_shards import build
from data_tools.tokenise import Options
from data_tools.train_tokenizer import main, train
from megarat.data.reader import TokenReader
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError

TEXTS = [f"the {i}th text, of words like naïve, 漢字 and 🙂,\n\tin lines {'again ' * (i % 5)}" for i in range(300)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{\n")
    return path


def test_special_ids_are_llamas_and_every_text_comes_back_exactly(tmp_path: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(train([text_file], tmp_path / "tokenizer", vocab_size=400, progress=False))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    others = ["never seen: Ærøskøbing \x00\x01 \u200b", " leading and trailing ", "</s> is text", "a" * 5000]
    for text, ids in zip([*TEXTS, *others], tokenizer.encode([*TEXTS, *others]), strict=True):
        assert tokenizer.decode(ids) == text
        assert min(ids) > 2
    assert np.mean([len(ids) for ids in tokenizer.encode(TEXTS)]) < np.mean([len(text.encode()) for text in TEXTS]) / 2


def test_the_same_text_gives_the_same_file(tmp_path: Path, text_file: Path) -> None:
    one, two = (train([text_file], tmp_path / name, vocab_size=350, progress=False).read_bytes() for name in "ab")
    assert one == two


def test_shards_are_built_with_it_and_another_one_beside_them_is_found(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(text_file), "--output", str(tmp_path / "tokenizer"), "--vocab-size", "400"]) == 0
    result = build(
        [text_file], tmp_path / "tokenizer", tmp_path / "out", Options(held_out=0, bad_lines="skip"), workers=1, progress=False
    )
    reader = TokenReader(result.train.folder)
    stream = reader.read(0, reader.num_tokens)
    first = stream[: int(np.argmax(stream == 2))]
    assert load_tokenizer(tmp_path / "out" / "tokenizer").decode(first.tolist()) == TEXTS[0]
    assert verify_shards.main([str(tmp_path / "out"), "--workers", "3"]) == 0
    copied = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    copied.write_text(copied.read_text() + " ")
    assert verify_shards.main([str(tmp_path / "out")]) == 2
    assert f"{copied}: SHA-256" in capsys.readouterr().err
    os.remove(copied)


def test_wrong_sizes_and_existing_outputs_are_refused(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--vocab-size", "258"], "--vocab-size is 258, expected at least 259"),
        (["--vocab-size", "100000"], "gives a vocabulary of"),
    ):
        assert main([str(text_file), "--output", str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    train([text_file], tmp_path / "out", vocab_size=300, progress=False)
    with pytest.raises(UserError, match=r"tokenizer\.json: exists already"):
        train([text_file], tmp_path / "out", vocab_size=300, progress=False)
