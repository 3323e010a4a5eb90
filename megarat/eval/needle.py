"""Needles in a haystack: RULER's eight retrieval tasks (arXiv 2404.06654), made here from a seed, for any length and tokenizer.

A prompt hides sentences "One of the special magic numbers for KEY is: VALUE." in filler and asks for the values of one or several keys.

    task          filler    keys    values    keys hidden   values a key   keys asked
    single_1      noise     words   numbers   1             1              1
    single_2      essay     words   numbers   1             1              1
    single_3      essay     words   uuids     1             1              1
    multikey_1    essay     words   numbers   4             1              1
    multikey_2    needles   words   numbers   1             1              1
    multikey_3    needles   uuids   uuids     1             1              1
    multivalue    essay     words   numbers   1             4              1
    multiquery    essay     words   numbers   4             1              4

noise: five short sentences over and over. essay: sentences of a given text, or of `megarat.eval.words`. needles: more needles, of keys
that are not asked for. Every sample is a pure function of (seed, split, task, index), the token budget, the tokenizer and the essay text.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.eval import words

ANSWER_TOKENS = 128  # greedy tokens an answer may take; prompts leave room for them
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PROMPT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    "{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
_PROMPT_FOR_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
    "{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
_ESSAY_SENTENCES = 4096  # of the built-in essay; longer haystacks start over


@dataclass(frozen=True)
class NeedleTask:
    """What one task hides where, and what it asks for."""

    filler: Literal["noise", "essay", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    hidden: int = 1
    values_a_key: int = 1
    asked: int = 1


NEEDLE_TASKS = {
    "single_1": NeedleTask("noise"),
    "single_2": NeedleTask("essay"),
    "single_3": NeedleTask("essay", values="uuids"),
    "multikey_1": NeedleTask("essay", hidden=4),
    "multikey_2": NeedleTask("needles"),
    "multikey_3": NeedleTask("needles", keys="uuids", values="uuids"),
    "multivalue": NeedleTask("essay", values_a_key=4),
    "multiquery": NeedleTask("essay", hidden=4, asked=4),
}


class Sample(NamedTuple):
    """A prompt, its tokens, and the values it asks for, in the order of the keys in the question."""

    prompt: str
    ids: array[int]
    answers: tuple[str, ...]

    @property
    def target(self) -> str:
        """The answer as it is trained: values joined by commas."""
        return ",".join(self.answers)


class NeedleMaker:
    """Samples whose prompts have at most ``prompt_tokens`` tokens of ``tokenizer``, and hardly fewer.

    ``essay`` is a list of sentences (`read_essay`); None takes made-up ones.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tokens: int, *, seed: int, essay: Sequence[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._budget = prompt_tokens
        self._seed = seed
        self._essay = essay or made_up_essay()
        self.identity = hashlib.sha256(
            repr((seed, prompt_tokens, tokenizer.sha256, self._essay)).encode()
        ).hexdigest()  # names its samples

    def sample(self, task: str, split: str, index: int) -> Sample:
        """Sample ``index`` of a split of a task. Raises ``UserError`` where even the bare question is longer than the budget."""
        spec = NEEDLE_TASKS[task]
        rng = random.Random(f"{self._seed}/{split}/{task}/{index}")
        keys = _distinct(lambda: _entry(spec.keys, rng), spec.hidden)
        values = {key: _distinct(lambda: _entry(spec.values, rng), spec.values_a_key) for key in keys}
        needles = [_needle(spec, key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        depths = sorted(rng.random() for _ in needles)
        asked = rng.sample(keys, spec.asked)
        filler = self._filler(spec, set(keys), rng)
        prompt, ids = self._longest_that_fits(
            lambda units: _prompt(spec, asked, _hide(needles, depths, filler(units), spec)), task
        )
        return Sample(prompt, ids, tuple(chain.from_iterable(values[key] for key in asked)))

    def _filler(self, spec: NeedleTask, keys: set[str], rng: random.Random) -> Callable[[int], list[str]]:
        """The first n units of this sample's filler; more units never change the ones before."""
        if spec.filler == "noise":
            return lambda units: [NOISE] * units
        if spec.filler == "essay":
            essay, start = self._essay, rng.randrange(len(self._essay))
            return lambda units: [essay[(start + i) % len(essay)] for i in range(units)]
        others: list[str] = []

        def distractors(units: int) -> list[str]:
            while len(others) < units:
                key = _entry(spec.keys, rng)
                if key not in keys:
                    others.append(_needle(spec, key, _entry(spec.values, rng)))
            return others[:units]

        return distractors

    def _longest_that_fits(self, build: Callable[[int], str], task: str) -> tuple[str, array[int]]:
        """The prompt with as many filler units as their mean cost suggests, corrected once, and fewer while that is too long; and its tokens."""

        @cache  # to encode is nearly all that a sample costs, and the last guess is the one before more often than not
        def built(units: int) -> tuple[str, array[int]]:
            prompt = build(units)
            return prompt, array("i", self._tokenizer.encode([prompt])[0])

        def tokens(units: int) -> int:
            return len(built(units)[1])

        bare = tokens(0)
        if bare > self._budget:
            raise UserError(
                f"needle task {task}: the bare question has {bare} tokens, more than the {self._budget} a prompt may have; ask for longer "
                f"sequences (prompts leave {ANSWER_TOKENS} tokens for the answer)"
            )
        probe = 32
        cost = (tokens(probe) - bare) / probe
        units = int((self._budget - bare) / cost)
        units += int((self._budget - tokens(units)) / cost)
        while (excess := tokens(units) - self._budget) > 0:
            units = max(0, units - math.ceil(excess / cost))
        return built(units)


def read_essay(path: str | Path, setting: str = "--needle-text") -> list[str]:
    """The sentences of a local text, which ``setting`` names. Raises ``UserError`` when it cannot be read or has none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting} {path}: cannot read it as UTF-8 text: {error}") from None
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if sentence]
    if not sentences:
        raise UserError(f"{setting} {path}: holds no text")
    return sentences


def made_up_essay() -> list[str]:
    """Sentences of plain English words, the same every time."""
    rng = random.Random("essay")
    return [words.sentence(rng) for _ in range(_ESSAY_SENTENCES)]


def ruler_score(prediction: str, answers: Sequence[str]) -> float:
    """RULER's metric: the share of the answers that occur anywhere in the prediction, in any case."""
    said = prediction.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


def set_score(prediction: str, answers: Sequence[str]) -> float:
    """The stricter metric: the share of the answers that are one of the prediction's comma-separated parts, exactly."""
    said = {part.strip() for part in prediction.split(",")}
    return len(said & set(answers)) / len(set(answers))


def _needle(spec: NeedleTask, key: str, value: str) -> str:
    return f"One of the special magic {spec.values} for {key} is: {value}."


def _hide(needles: list[str], depths: list[float], filler: list[str], spec: NeedleTask) -> str:
    """The filler with each needle put in front of the unit at its depth (0 the start, 1 the end)."""
    pieces = list(filler)
    for needle, depth in zip(
        reversed(needles), reversed(depths), strict=True
    ):  # from the back: insertions do not move what is left
        pieces.insert(round(depth * len(filler)), needle)
    return (" " if spec.filler == "essay" else "\n").join(pieces)


def _prompt(spec: NeedleTask, asked: list[str], context: str) -> str:
    """The text, the question and the first words of the answer."""
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    if spec.asked * spec.values_a_key == 1:
        return _PROMPT_FOR_ONE.format(kind=spec.values.removesuffix("s"), context=context, query=query)
    return _PROMPT.format(kind=spec.values, context=context, query=query)


def _entry(kind: str, rng: random.Random) -> str:
    """A random key or value: seven digits, two words, or a UUID of version 4."""
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return words.key(rng)


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        if (entry := draw()) not in drawn:
            drawn.append(entry)
    return drawn
