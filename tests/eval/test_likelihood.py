"""Log-likelihoods and greedy text against loops over single sequences, in float64 and without batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.eval.likelihood import Scorer
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

PATTERNS = resolve("D=4,W=3,I=1", 2, 2)


class Pairs:
    """Bytes, but for "ab", which is one token, so that a cut in a text may move its tokens. 0 is EOS."""

    eos_id, vocab_size, file = 0, 129, Path("pairs")

    def encode(self, texts):
        return [list(text.encode().replace(b"ab", b"\x80")) for text in texts]

    def decode(self, ids):
        return bytes(ids).replace(b"\x80", b"ab").decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> RATPlusLM:
    shape = ModelConfig(layers=2, hidden=16, heads=2, vocab=140, init_std=0.4)
    return RATPlusLM(shape).double().initialise(3)


def scorer(model, batch: int = 3, max_length: int = 64) -> Scorer:
    return Scorer(model, Reading(PATTERNS), Pairs(), batch=batch, max_length=max_length)


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """(T, V) of the next token, over the tokens the tokenizer has."""
    return model(torch.tensor([ids]), PATTERNS)[0, :, : Pairs.vocab_size].log_softmax(dim=-1)


@pytest.mark.parametrize(
    ("context", "continuation", "before", "scored"),
    [
        ("xyz", " one", b"xyz", b" one"),
        ("xyz  ", "one", b"xyz", b"  one"),
        ("", "hello", b"\0", b"hello"),
        ("  ", "hi", b"\0", b"  hi"),
        ("abab", "ab", b"\x80\x80", b"\x80"),
        ("xa", "b.", b"xa", b"."),  # the cut falls into a token: what the whole text has behind the context's tokens is scored
        ("a long context that goes on", " c", b"a long context that goes on", b" c"),
    ],
)
def test_a_continuation_is_scored_given_its_context(model, context, continuation, before, scored):
    row = list(before + scored)
    expected = log_probabilities(model, row[:-1])[len(before) - 1 :]
    total = sum(float(expected[i, token]) for i, token in enumerate(scored))
    [likelihood] = scorer(model).continuations([(context, continuation)])
    assert likelihood.total == pytest.approx(total, abs=1e-9)
    assert likelihood.greedy == (expected.argmax(dim=-1).tolist() == list(scored))


def test_greedy_continuations_are_known_as_such(model):
    ids = list(b"start")
    for _ in range(4):
        ids.append(int(log_probabilities(model, ids)[-1].argmax()))
    [yes, no] = scorer(model)._score([_continuation(ids, 5), _continuation([*ids[:-1], (ids[-1] + 1) % 129], 5)])
    assert yes.greedy and not no.greedy


def _continuation(ids, cut):
    from megarat.eval.likelihood import Continuation

    return Continuation(ids[:cut], ids[cut:])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_of_unequal_requests_change_nothing_but_the_order_of_work(model, batch):
    pairs = [("x" * length, " " + "y" * (length % 4 + 1)) for length in (3, 17, 1, 9, 30)]
    heard = []
    several = scorer(model, batch)
    several.on_answers = heard.append
    together = several.continuations(pairs)
    alone = [scorer(model).continuations([pair])[0] for pair in pairs]
    assert [score.total for score in together] == pytest.approx([score.total for score in alone], abs=1e-9)
    assert sum(heard) == 5


def test_what_is_too_long_loses_its_start(model):
    context, continuation = "abcdefghijklmnop", " qr"
    row = Pairs().encode([context + continuation])[0][-9:]  # 8 inputs and the last label
    expected = log_probabilities(model, row[:-1])
    total = sum(float(expected[i, row[i + 1]]) for i in (5, 6, 7))
    [likelihood] = scorer(model, max_length=8).continuations([(context, continuation)])
    assert likelihood.total == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("text", ["", "z", "12345678", "123456789", "a text of several windows, each full"])
def test_every_token_of_a_text_is_scored_once_with_all_the_context_that_fits(model, text):
    length = 8
    stream = [0, *Pairs().encode([text])[0]]
    total = 0.0
    for index in range(1, len(stream)):
        window_end = min((index - 1) // length * length + length, len(stream) - 1)  # the last token predicted with this one
        inputs = stream[max(0, window_end - length) : index]
        total += float(log_probabilities(model, inputs)[-1, stream[index]])
    assert scorer(model, max_length=length).texts([text]) == pytest.approx([total], abs=1e-9)


def test_generated_text_ends_before_the_first_stop(model):
    free = scorer(model).until([("the", [], 12)])[0]
    assert len(free) >= 6
    stop, late = free[3:5], free[5:6]
    at = min(free.find(stop), free.find(late))
    assert scorer(model).until([("the", [late, "", stop], 12), ("the", ["nowhere", ""], 12), ("the", [], 4)]) == [
        free[:at],
        free,
        Pairs().decode(list(free.encode().replace(b"ab", b"\x80"))[:4]),
    ]


def test_a_tokenizer_of_another_vocabulary_is_refused():
    small = RATPlusLM(ModelConfig(layers=1, hidden=16, heads=2, vocab=64))
    with pytest.raises(UserError, match="pairs: has 129 entries, but the model's vocabulary has 64"):
        Scorer(small, Reading(resolve("dense", 1, 2)), Pairs(), batch=1, max_length=8)
