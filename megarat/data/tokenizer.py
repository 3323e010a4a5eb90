"""One face for SentencePiece and Hugging Face tokenizers.

`load_tokenizer` accepts a SentencePiece model under any name, a Hugging Face `tokenizer.json`, or a folder that holds one of the
two. Text that spells a special token ("</s>") is encoded as ordinary text: only the writer of the shards places EOS.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from megarat.data.format import Index, TokenizerInfo, check_tokenizer, file_sha256
from megarat.data.store import Gone, Store
from megarat.errors import UserError

# Files beside a tokenizer.json that name its special tokens, most specific first.
_CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
# What end-of-text is called where no configuration says so.
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")


class Tokenizer(ABC):
    """Text to ids and back, without special ids.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file: the file that defines the tokenizer; `sha256` is its hash.
        files: `file` and the configuration files read with it.
        vocab_size: one more than the highest id.
        eos_id: id that closes a document. bos_id: id that opens one, or None.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_id: int | None

    def __init__(self, file: Path, configs: Iterable[Path] = ()):
        self.file = file
        self.files = (file, *configs)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the defining file."""
        return file_sha256(self.file)

    @property
    def info(self) -> TokenizerInfo:
        """What an index of shards records of the tokenizer."""
        return TokenizerInfo(self.file.name, self.kind, self.sha256)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of a list of ids; special ids are left out."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. It encodes in one thread: corpora are tokenised by many processes."""

    kind = "sentencepiece"

    def __init__(self, file: Path):
        super().__init__(file)
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file}: neither a Hugging Face tokenizer.json nor a SentencePiece model ({error})") from None
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{file}: SentencePiece model without an end-of-sentence piece; train it with one (eos_id >= 0)")
        bos_id = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._processor.encode(list(texts), num_threads=1)  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a list of ids; special ids are left out."""
        return self._processor.decode([int(i) for i in ids])  # type: ignore[no-any-return]


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; EOS and BOS come from the configuration files beside it, or go by their usual names."""

    kind = "huggingface"

    def __init__(self, file: Path):
        configs = [path for name in _CONFIG_NAMES if (path := file.with_name(name)).is_file()]
        super().__init__(file, configs)
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a tokenizer.json that tokenizers {tokenizers.__version__} can read ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # that is, "</s>" in a text is text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes: counting entries is not enough
        eos_id = self._special_id("eos_token", _USUAL_EOS, vocabulary)
        if eos_id is None:
            raise UserError(
                f"{file}: no end-of-text token: put its name under `eos_token` into {file.with_name(_CONFIG_NAMES[0])}"
                f" (looked for {', '.join(_USUAL_EOS)})"
            )
        self.eos_id = eos_id
        self.bos_id = self._special_id("bos_token", _USUAL_BOS, vocabulary)
        self._placed = {i: str(self._tokenizer.id_to_token(i)) for i in (eos_id, self.bos_id) if i is not None}
        self._tokenizer.add_special_tokens(list(self._placed.values()))  # a file may list them as ordinary ones, found in texts

    def _special_id(self, key: str, usual: Sequence[str], vocabulary: dict[str, int]) -> int | None:
        for config in self.files[1:]:
            if (token := _special_token(config, key)) is not None:
                if token not in vocabulary:
                    raise UserError(f"{config}: key `{key}` is {token!r}, which {self.file.name} does not hold")
                return vocabulary[token]
        return next((vocabulary[token] for token in usual if token in vocabulary), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded = self._encode(texts)
        placed = frozenset(self._placed)
        return [ids if placed.isdisjoint(ids) else self._encode_spelled(text) for text, ids in zip(texts, encoded, strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _encode_spelled(self, text: str) -> list[int]:
        """Ids of a text that spells EOS or BOS, for a model that knows the whole word (Unigram's do).

        The text is cut behind the first character of each, so that no piece reaches over the rest. What a normaliser still makes into
        the token is left out.
        """
        spelled = re.compile("|".join(map(re.escape, self._placed.values())))
        cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
        pieces = self._encode([text[start:stop] for start, stop in pairwise(cuts)])
        return [i for ids in pieces for i in ids if i not in self._placed]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a list of ids; special ids are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)  # type: ignore[no-any-return]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer file or a folder that holds one.

    Args:
        path: a SentencePiece model (any name), a `tokenizer.json`, or a folder with exactly one of them; in a folder a
            `tokenizer.json` goes before SentencePiece models.

    Raises:
        UserError: nothing there, not a tokenizer, several to choose from, or no EOS.
    """
    file = _find_file(Path(path))
    with open(file, "rb") as opened:
        is_json = opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    return HuggingFaceTokenizer(file) if is_json else SentencePieceTokenizer(file)


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such tokenizer; give a SentencePiece model, a tokenizer.json, or a folder that holds one")
    found = sorted(path.glob("tokenizer.json")) or sorted(p for p in path.glob("*.model*") if p.is_file())
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{path}: expected one tokenizer.json or one SentencePiece *.model in this folder, found {names}")
    return found[0]


def _special_token(config: Path, key: str) -> str | None:
    """The text of a special token in a configuration file, written as a string or as {"content": …}."""
    try:
        values: Any = json.loads(config.read_bytes())
    except ValueError as error:
        raise UserError(f"{config}: not JSON ({error})") from None
    token = values.get(key) if isinstance(values, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def fetch_tokenizer(store: Store, index: Index, folder: Path) -> Path | None:
    """A copy in `folder` of the tokenizer that a remote corpus carries in `store`; None, and a word on stderr, where none can be had.

    A copy that is there already is taken as it is. Training does not need one: what lacks is only what checkpoints would carry.

    Raises:
        UserError: what `store` holds is not the tokenizer that the shards of `index` were made with.
    """
    made_by = index.tokenizer
    file = folder / made_by.name
    if file.is_file() and file_sha256(file) == made_by.sha256:
        return folder
    found = _load(store, made_by.name)
    if found is None:
        print(f"{store.name(made_by.name)}: not to be had; checkpoints will carry no tokenizer", file=sys.stderr)
        return None
    check_tokenizer(index, store.name(made_by.name), hashlib.sha256(found).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CONFIG_NAMES if made_by.kind == HuggingFaceTokenizer.kind else ():
        if (config := _load(store, name)) is not None:
            (folder / name).write_bytes(config)
    file.write_bytes(found)  # last: it says that all is there
    return folder


def _load(store: Store, file: str) -> bytes | None:
    """What a command or a server cannot give counts as not there: a command's exit code does not tell the two apart."""
    try:
        return store.load(file)
    except (Gone, UserError):
        return None
