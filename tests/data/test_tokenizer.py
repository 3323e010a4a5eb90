"""Tokenizers trained here, against the libraries' own calls."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError

TEXTS = ["Hello world", "", "tabs\tand\nlines  twice", "naïve café 漢字 🙂", "</s> is text <s>", "a\x00b"]
TRAINING = ["the quick brown fox jumps over the lazy dog " * 3, "hello world of many words, some twice"] * 20


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model.v1"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def huggingface_file(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_sentencepiece_gives_the_librarys_ids_and_the_text_back(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert tokenizer.encode(TEXTS) == [library.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (300, 2, 1)
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.sha256 == hashlib.sha256(sentencepiece_file.read_bytes()).hexdigest()


def test_huggingface_gives_the_text_back_and_special_ids_never_come_from_text(huggingface_file: Path) -> None:
    tokenizer = load_tokenizer(huggingface_file)
    encoded = tokenizer.encode(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert not {0, 1, 2} & {token for ids in encoded for token in ids}
    assert encoded[0] == tokenizers.Tokenizer.from_file(str(huggingface_file)).encode(TEXTS[0], add_special_tokens=False).ids
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.kind) == (1, 0, "huggingface")
    assert tokenizer.decode([1, *encoded[0], 1]) == TEXTS[0]


def test_an_end_of_text_that_the_file_lists_as_an_ordinary_token_is_text_too(huggingface_file: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(huggingface_file))
    plain = library.encode("a<|im_end|>b").ids
    library.add_tokens([tokenizers.AddedToken("<|im_end|>", special=False)])
    library.save(str(huggingface_file))
    assert len(library.encode("a<|im_end|>b").ids) == 3  # the library finds it
    huggingface_file.with_name("tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = load_tokenizer(huggingface_file)
    assert tokenizer.eos_id == library.token_to_id("<|im_end|>")
    assert tokenizer.encode(["a<|im_end|>b"]) == [plain]
    assert tokenizer.decode([*plain, tokenizer.eos_id]) == "a<|im_end|>b"


def test_a_unigram_model_that_knows_its_special_words_does_not_give_them_for_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train_from_iterator([*TRAINING, "a < b / c > d"], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    texts = ["a </s> b</s>", "</s></s>", "<s>", "hello world", "a ＜/s＞ b"]
    assert library.encode(texts[0]).ids.count(1) == 2  # the library gives EOS for it
    tokenizer = load_tokenizer(tmp_path)
    encoded = tokenizer.encode(texts)
    assert not {0, 1} & {token for ids in encoded for token in ids}
    assert [library.decode(ids) for ids in encoded] == [*texts[:4], "a  b"]
    assert encoded[3] == library.encode(texts[3]).ids


def test_vocabulary_size_covers_the_highest_id_when_ids_have_holes(huggingface_file: Path) -> None:
    content = json.loads(huggingface_file.read_text())
    content["model"]["vocab"]["zzzz"] = 5000
    huggingface_file.write_text(json.dumps(content))
    assert load_tokenizer(huggingface_file).vocab_size == 5001


@pytest.mark.parametrize("value", ["<stop>", {"content": "<stop>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_configuration_beside_the_tokenizer_names_its_eos(huggingface_file: Path, name: str, value: object) -> None:
    config = huggingface_file.with_name(name)
    config.write_text(json.dumps({"eos_token": value}))
    tokenizer = load_tokenizer(huggingface_file.parent)
    assert tokenizer.eos_id == 2
    assert tokenizer.files == (huggingface_file, config)


def test_a_folder_may_hold_a_sentencepiece_model(sentencepiece_file: Path, tmp_path: Path) -> None:
    assert load_tokenizer(sentencepiece_file.parent).info == load_tokenizer(sentencepiece_file).info
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(sentencepiece_file.read_bytes())
    with pytest.raises(UserError, match=r"found a\.model, b\.model"):
        load_tokenizer(tmp_path)


def test_eos_that_is_nowhere_or_unknown_is_refused(huggingface_file: Path) -> None:
    config = huggingface_file.with_name("tokenizer_config.json")
    config.write_text('{"eos_token": "<gone>"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: key `eos_token` is '<gone>'"):
        load_tokenizer(huggingface_file)
    config.unlink()
    huggingface_file.write_text(huggingface_file.read_text().replace("</s>", "<z>"))
    with pytest.raises(UserError, match=r"tokenizer\.json: no end-of-text token: put its name under `eos_token`"):
        load_tokenizer(huggingface_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "neither a Hugging Face"),
        (b"", "neither a Hugging Face"),
        (b"{}", "not a tokenizer.json"),
        (b"{", "not a tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_a_path_with_nothing_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such tokenizer"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(UserError, match="found none"):
        load_tokenizer(tmp_path)
