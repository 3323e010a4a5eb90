"""A checkpoint's tokenizer as the files that transformers' ``AutoTokenizer`` reads, with the same ids for every text.

Whatever the tokenizer was, the folder gets a ``tokenizer.json``. A SentencePiece model is converted; the result is compared with the model on
its whole vocabulary and on awkward texts before it is believed. As in training nothing is put before or behind a text, there is no BOS, and a
text that spells a special token is a text.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megarat.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megarat.errors import UserError

SENTENCEPIECE_COPY = "tokenizer.model"  # the original, beside what was made of it

_SPACE, _UNKNOWN_TEXT = "▁", "⁇"  # how SentencePiece writes a space, and what it cannot write
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # its types of pieces
_UNIGRAM, _BPE = 1, 2  # its types of models
_ALL = 2**31  # more spaces than a text begins with
_FEW = 0.01  # texts of random ids; transformers applies the character tables of SentencePiece's NFKC rules by grapheme, not by character
_AWKWARD = (
    [
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "a ",
        "  two  spaces  ",
        "\ttab\n\n\nlines\r\n",
        "</s>",
        "<s> a </s>b",
        "<unk>",
        "[INST] x [/INST]",
    ]
    + [
        "1234567890",
        "3.14e-10",
        "aaaaaaaaaaaaaaaaa",
        "naïve café Ångström",
        "Привет, мир!",
        "日本語のテキスト",
        "👩‍👩‍👧 🇨🇭",
        "ﬁ①Ⅷ",
    ]
    + [
        "e\u0301",
        "\u200bzero",
        "▁under▁",
        "<0x41>",
        "def f(x):\n    return x  # why",
        "\x00\x01",
        "https://a.b/c?d=e&f=%20",
        "…—“”",
    ]
)


class Probes(NamedTuple):
    """Texts whose ids were compared, and how many differ."""

    texts: int
    differing: int


def export_tokenizer(source: Path, target: Path, max_length: int) -> tuple[Tokenizer, Probes]:
    """Write ``tokenizer.json`` and its configuration into ``target``; returns the tokenizer of ``source`` (a file or a folder) and the proof.

    ``max_length`` (tokens) is told to those who truncate. Raises ``UserError`` where the ids cannot be kept.
    """
    tokenizer = load_tokenizer(source)
    tree = _without_additions(tokenizer.file) if tokenizer.kind == "huggingface" else _convert(tokenizer.file)
    (target / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False) + "\n", encoding="utf-8")
    eos = _token(tree, tokenizer.eos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "left",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer.kind == "sentencepiece":
        shutil.copy(tokenizer.file, target / SENTENCEPIECE_COPY)
    return tokenizer, _compare(tokenizer, HuggingFaceTokenizer(target / "tokenizer.json"))


def _without_additions(file: Path) -> dict[str, Any]:
    """A ``tokenizer.json`` that neither truncates nor pads nor adds special tokens."""
    tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    processor = tree.get("post_processor")
    parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]  # moves offsets; the others add tokens
    return tree | {"truncation": None, "padding": None, "post_processor": kept[0] if kept else None}


def _token(tree: dict[str, Any], token_id: int) -> str:
    for token in tree["added_tokens"]:
        if token["id"] == token_id:
            return str(token["content"])
    vocabulary = tree["model"]["vocab"]
    return str(next(piece for piece, index in vocabulary.items() if index == token_id))


# ---- SentencePiece ----------------------------------------------------------------------------------------------------------


def _convert(file: Path) -> dict[str, Any]:
    """A SentencePiece model as a ``tokenizer.json``. Raises ``UserError`` for a kind of model that has no such form."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast

    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(f"{file}: reading a SentencePiece model for the export needs protobuf; pip install protobuf") from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    kind = model.trainer_spec.model_type
    own = any(piece.type == _USER_DEFINED for piece in model.pieces)
    if kind not in (_BPE, _UNIGRAM) or own or model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            f"{file}: cannot be written as a tokenizer.json: it is neither BPE nor Unigram, or has user-defined symbols, or ends words with"
            " spaces; give --tokenizer a Hugging Face tokenizer of the same ids"
        )
    fast = Fast(_model(model.pieces, kind == _BPE, model.trainer_spec.byte_fallback))
    fast.normalizer = _normalizer(model.normalizer_spec)
    fast.decoder = _decoder(model.normalizer_spec)
    if kind == _UNIGRAM:
        fast.pre_tokenizer = _cut_spelled_tokens(model.pieces)
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tree: dict[str, Any] = json.loads(fast.to_str())
    return tree


def _model(pieces: Sequence[Any], bpe: bool, byte_fallback: bool) -> Any:
    from tokenizers.models import BPE, Unigram

    unknown = next(index for index, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    if not bpe:
        return Unigram([(piece.piece, piece.score) for piece in pieces], unk_id=unknown, byte_fallback=byte_fallback)
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    merges = list(_merges(pieces, vocabulary))
    return BPE(vocabulary, merges, unk_token=pieces[unknown].piece, fuse_unk=True, byte_fallback=byte_fallback)


def _merges(pieces: Sequence[Any], vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the neighbours that make the piece of the highest score; so these are the pairs that make a piece, best first."""
    normal = {piece.piece for piece in pieces if piece.type == _NORMAL}
    for piece in sorted((piece for piece in pieces if piece.type == _NORMAL), key=lambda piece: -piece.score):
        text = piece.piece
        pairs = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in normal and text[at:] in normal]
        yield from sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _cut_spelled_tokens(pieces: Sequence[Any]) -> Any:
    """Cuts a text behind the first character of what spells a special token: SentencePiece never takes those from a text, Unigram would."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    spelled = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _BYTE)]
    pattern = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in spelled if len(piece) > 1)
    return Split(Regex(pattern), "merged_with_previous")


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex
    from tokenizers.normalizers import Precompiled, Prepend, Replace, Sequence

    steps: list[Any] = [Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(Replace(" ", _SPACE))
    return Sequence(steps)


def _decoder(spec: Any) -> Any:
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip

    steps: list[Any] = [Replace(_SPACE, " "), ByteFallback(), Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(Strip(" ", _ALL if spec.remove_extra_whitespaces else 1, 0))
    return Sequence(steps)


# ---- proof -----------------------------------------------------------------------------------------------------------------


def _compare(original: Tokenizer, exported: HuggingFaceTokenizer) -> Probes:
    """Refuse an export that gives any probe other ids, or other text back; of texts made of random ids a few may differ, and are counted."""
    refusal = (
        f"{original.file}: cannot be written as a tokenizer.json: {{}}; give --tokenizer a Hugging Face tokenizer of the same ids"
    )
    texts, mixed = _probes(exported)
    for text, expected, found in zip(texts, original.encode(texts), exported.encode(texts), strict=True):
        if expected != found:
            raise UserError(refusal.format(f"{text!r} has ids {expected}, but would have {found}"))
        text_back, back = original.decode(expected), exported.decode(expected)
        if text_back != back and _UNKNOWN_TEXT not in text_back:
            raise UserError(refusal.format(f"ids {expected} are {text_back!r}, but would be {back!r}"))
    differing = sum(expected != found for expected, found in zip(original.encode(mixed), exported.encode(mixed), strict=True))
    if differing > _FEW * len(mixed):
        raise UserError(refusal.format(f"of {len(mixed)} texts of random ids {differing} have other ids"))
    return Probes(len(texts) + len(mixed), differing)


def _probes(exported: HuggingFaceTokenizer) -> tuple[list[str], list[str]]:
    """Awkward texts and the text of every id; and texts of random ids (seeded), which are mostly nonsense."""
    drawn = random.Random(0)
    ids = range(exported.vocab_size)
    mixed = [[drawn.choice(ids) for _ in range(8)] for _ in range(2000)]
    return [*_AWKWARD, *(exported.decode([index]) for index in ids)], [exported.decode(text) for text in mixed]
