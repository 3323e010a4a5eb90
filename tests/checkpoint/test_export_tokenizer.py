"""The tokenizer of an exported folder, as transformers loads it, against the one that made the training data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from data_tools import train_tokenizer
from megarat.checkpoint import tokenizer_export
from megarat.checkpoint.tokenizer_export import export_tokenizer
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8") + "Ein Bär saß über Löwen; 日本語. " * 20
LLAMA = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "as Llama's": LLAMA,
    "no prefix": {**LLAMA, "add_dummy_prefix": False},
    "SentencePiece's defaults": {},  # Unigram, NFKC, extra spaces removed
    "Unigram with bytes": {"byte_fallback": True, "normalization_rule_name": "identity"},
}


def train_sentencepiece(folder: Path, **options) -> Path:
    (folder / "text").write_text(TEXT, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tok"), vocab_size=600, minloglevel=2, num_threads=1, **options
    )
    return folder / "tok.model"


@pytest.fixture(scope="module", params=[*MODELS, "byte-level"])
def original(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    if request.param in MODELS:
        return train_sentencepiece(folder, **MODELS[request.param])
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    file = train_tokenizer.train([folder / "a.txt"], folder / "tok", vocab_size=400, progress=False)
    tree = json.loads(file.read_text())
    tree["post_processor"] = {  # as published ones have it: <s> before every text
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(tree))
    return folder / "tok"


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    _, probes = export_tokenizer(original, folder, 128)
    assert probes.texts > 2000 and probes.differing <= 20
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_training_and_the_text_comes_back(original, exported):
    ours = load_tokenizer(original)
    texts = [*TEXT.split("\n"), "</s>", "<s> a </s> b", "  two  spaces ", "x" * 50, "12 345,67 €"]
    assert [exported(text)["input_ids"] for text in texts] == ours.encode(texts)
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert exported.decode(ids, skip_special_tokens=True).replace("<unk>", "") == ours.decode(ids).replace(" ⁇ ", ""), text


def test_batches_are_padded_on_the_left_and_nothing_else_is_added(original, exported):
    ours = load_tokenizer(original)
    batch = exported(["a", "some longer text"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    short, long = ours.encode(["a", "some longer text"])
    padding = len(long) - len(short)
    assert batch["input_ids"] == [[ours.eos_id] * padding + short, long]
    assert batch["attention_mask"][0] == [0] * padding + [1] * len(short)
    assert (exported.bos_token_id, exported.eos_token_id, exported.model_max_length) == (None, ours.eos_id, 128)


def test_what_cannot_be_kept_is_refused(tmp_path):
    file = train_sentencepiece(tmp_path, **LLAMA, user_defined_symbols=["<mask>"])
    with pytest.raises(UserError, match=r"tok.model: cannot be written as a tokenizer.json: .* user-defined symbols"):
        export_tokenizer(file, tmp_path, 128)


def test_a_conversion_that_changes_ids_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_export, "_merges", lambda pieces, vocabulary: iter(()))
    file = train_sentencepiece(tmp_path, **LLAMA)
    with pytest.raises(UserError, match=r"cannot be written as a tokenizer.json: '.*' has ids \[.*\], but would have \["):
        export_tokenizer(file, tmp_path, 128)
