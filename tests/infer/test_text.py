from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer import decoder
from megarat.infer.load import LoadedModel
from megarat.infer.sampling import GREEDY
from megarat.infer.text import continue_text, encode_prompt, find_tokenizer
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8: a character may take several tokens."""

    eos_id, vocab_size, file = 0, 256, Path("bytes")

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def model(vocab: int = 256) -> LoadedModel:
    lm = RATPlusLM(ModelConfig(layers=1, hidden=16, heads=2, vocab=vocab, init_std=0.4)).initialise(0)
    return LoadedModel(lm, resolve("D=4,W=2", 1, 2), Path("nowhere"))


class Screen(io.StringIO):
    """What a terminal was sent, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, piece: str) -> int:
        if piece:
            self.writes.append(piece)
        return super().write(piece)


def test_characters_of_several_tokens_appear_whole(monkeypatch):
    """The model's part is played by a script, so that the bytes of the text are known."""
    script = iter("é€😀a".encode())
    drawn = lambda self, logits, draws, ids_B, greedy: ids_B.fill_(next(script, 0))  # noqa: E731
    monkeypatch.setattr(decoder.Decoder, "_draw", drawn)
    screen = Screen()
    assert continue_text(model(), Bytes(), "ü:", 20, GREEDY, screen) == len("é€😀a".encode())
    assert screen.writes == ["é", "€", "😀", "a"]


def free_run(prompt: bytes, tokens: int) -> list[int]:
    return model().generate(torch.tensor([list(prompt)]), tokens)[0].tolist()


def test_the_tokens_are_those_of_generate():
    ids = free_run(b"abc", 12)
    screen = Screen()
    assert Bytes.eos_id not in ids and continue_text(model(), Bytes(), "abc", 12, GREEDY, screen) == 12
    assert screen.getvalue() == Bytes().decode([*b"abc", *ids]).removeprefix("abc")
    assert len(screen.writes) > 1  # as it grows


def test_any_of_several_stops_ends_the_text_before_it():
    ids = free_run(b"abc", 12)
    screen = Screen()
    assert continue_text(model(), Bytes(), "abc", 12, GREEDY, screen, stop_ids=(255, ids[5])) == ids.index(ids[5])
    text = Bytes().decode([*b"abc", *ids]).removeprefix("abc")
    stop = next(text[n : n + 2] for n in range(4, 10) if "\ufffd" not in text[n : n + 2])
    screen = Screen()
    continue_text(model(), Bytes(), "abc", 12, GREEDY, screen, stops=("never", stop))
    assert screen.getvalue() == text[: text.index(stop)]
    with pytest.raises(UserError, match="--stop-id: 256 is no token; the model has 0 to 255"):
        continue_text(model(), Bytes(), "abc", 12, GREEDY, stop_ids=(256,))


def test_ids_without_a_tokenizer_entry_are_never_drawn():
    """A model may have more rows than its tokenizer has entries."""
    loaded = model(vocab=400)
    loaded.lm.embedding.weight.data[256:] *= 20  # the likeliest ids, were they allowed
    ids = torch.tensor([list(b"abc")])
    assert int(loaded.generate(ids, 12).max()) >= 256
    screen = Screen()
    assert continue_text(loaded, Bytes(), "abc", 12, GREEDY, screen) <= 12


def test_a_prompt_without_tokens_or_beyond_the_model_is_refused():
    with pytest.raises(UserError, match="the text is empty"):
        encode_prompt(model(), Bytes(), "")
    with pytest.raises(UserError, match=r"bytes: gives id 195, but the model's vocabulary has 128 entries"):
        encode_prompt(model(vocab=128), Bytes(), "é")


def test_a_checkpoint_without_a_tokenizer_asks_for_one():
    with pytest.raises(UserError, match="nowhere: holds no tokenizer; name one with --tokenizer"):
        find_tokenizer(model(), None)
