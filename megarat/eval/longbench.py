"""LongBench (arXiv 2308.14508): questions about, summaries of and continuations of long texts, from a local folder of its jsonl files.

Each line of ``<folder>/<task>.jsonl`` holds ``context``, ``input`` and ``answers``, and for `trec` its ``all_classes``. Where the folder also holds
``dataset2prompt.json`` of the benchmark's own repository, its prompts are taken; otherwise those below, which ask for the same in other words.

A prompt longer than the budget (sequence length - tokens of the answer) loses its middle, where instructions never are. Answers are greedy, without
BOS, up to EOS; those of summaries with a repetition penalty of 1.2 over what has been generated. Scores, the best over the reference answers:

    f1       words in common with the answer, as a harmonic mean of precision and recall, without case, punctuation and articles
    rouge    ROUGE-L of a summary: distinct words in the longest common subsequences of its sentences with those of the answer, likewise
    edit     similarity of the first line of code, 2 x characters in matching blocks / characters of both, in whole percent
    class    1 / number of the classes named, if the right one is among them

They are those of the benchmark's own scorer, its odd sides included, so that figures can be compared: sentences end at every full stop, and what
is left behind the last one is a sentence even if it is empty.
"""

from __future__ import annotations

import difflib
import json
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megarat.data.format import file_sha256
from megarat.errors import UserError
from megarat.eval.answers import Answerer
from megarat.eval.queue import PIECE, Item, short_hash
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Request
from megarat.infer.reading import Reading
from megarat.infer.sampling import Sampling

_PROMPTS = "dataset2prompt.json"
_SUMMARY_PENALTY = 1.2
_LEAST = 3  # tokens of a prompt: a first, a last, and one fewer than there is room for
_FIELD = re.compile(r"\{(context|input)\}")


class LongBenchTask(NamedTuple):
    """How a task asks, how long its answers may be, where they end and how they are scored."""

    prompt: str
    tokens: int
    metric: str
    ends: tuple[str, ...] = ()  # an answer stops before any of these, newlines in front of it aside
    penalty: float = 1.0


_QUESTION = ("\nQuestion",)
_ABOUT_PASSAGES = (
    "Here are passages of text. Answer the question about them in as few words as possible and write nothing but the answer.\n\n"
    "{context}\n\nAnswer the question in as few words as possible and write nothing but the answer.\n\nQuestion: {input}\nAnswer:"
)
_ABOUT_ARTICLE = (
    'Here is an article. Answer the question about it in a short phrase or sentence; where the article does not say, write "unanswerable"; '
    'answer a yes-no question by "yes", "no" or "unanswerable".\n\nArticle: {context}\n\nQuestion: {input}\nAnswer:'
)
_SUMMARISE = "Here is {what}. Write a summary of it on one page.\n\n{{context}}\n\nSummary:"
_CODE = "Continue the code below by its next line.\n{context}{input}Next line of code:\n"

LONGBENCH_TASKS = {
    "narrativeqa": LongBenchTask(
        "Here is a story, a book or the script of a film. Answer the question about it in as few words as possible.\n\n"
        "Story: {context}\n\nQuestion: {input}\nAnswer:",
        128, "f1", _QUESTION,
    ),
    "qasper": LongBenchTask(_ABOUT_ARTICLE, 128, "f1", _QUESTION),
    "multifieldqa_en": LongBenchTask(
        "Read the text and answer a question about it briefly.\n\n{context}\n\nQuestion: {input}\nAnswer:", 64, "f1", _QUESTION
    ),
    "hotpotqa": LongBenchTask(_ABOUT_PASSAGES, 32, "f1", _QUESTION),
    "2wikimqa": LongBenchTask(_ABOUT_PASSAGES, 32, "f1", _QUESTION),
    "musique": LongBenchTask(_ABOUT_PASSAGES, 32, "f1", _QUESTION),
    "gov_report": LongBenchTask(_SUMMARISE.format(what="a report of a government agency"), 512, "rouge", (), _SUMMARY_PENALTY),
    "qmsum": LongBenchTask(
        "Here is the transcript of a meeting. Answer the query about it in one or several sentences.\n\n"
        "Transcript:\n{context}\n\nQuery: {input}\nAnswer:",
        512, "rouge", ("\nQuestion", "\nQuery"), _SUMMARY_PENALTY,
    ),
    "multi_news": LongBenchTask(_SUMMARISE.format(what="what several newspapers wrote"), 512, "rouge", (), _SUMMARY_PENALTY),
    "trec": LongBenchTask("Say of what type each question is, as in the examples.\n\n{context}\n{input}", 64, "class", ("\n",)),
    "triviaqa": LongBenchTask(
        "Answer the question from the passage and write nothing but the answer, as in the examples.\n\n{context}\n\n{input}", 32, "f1", ("\n",)
    ),
    "samsum": LongBenchTask("Summarise the dialogue in a few sentences, as in the examples.\n\n{context}\n\n{input}", 128, "rouge", ("\n",)),
    "lcc": LongBenchTask(_CODE, 64, "edit"),
    "repobench-p": LongBenchTask(_CODE, 64, "edit"),
}  # fmt: skip
LONGBENCH_AVERAGE = tuple(list(LONGBENCH_TASKS)[:9]) + ("lcc", "repobench-p")  # the eleven that RAT+ reports


@dataclass(frozen=True)
class LongBenchScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    task: str
    metric: str
    score: float  # mean, 0 to 1
    samples: int
    cut: int  # prompts that lost their middle
    cache_bytes_per_sequence: int  # bf16, for a full sequence
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def check_files(folder: str | Path | None, tasks: Sequence[str]) -> Path:
    """The folder, once it is known to hold every task. Raises ``UserError`` that names what is missing, and where."""
    how = "unpack LongBench's data (its jsonl files, one a task) into a folder and give --longbench-data DIR"
    if folder is None:
        raise UserError(f"--tasks longbench: needs local data; {how}")
    missing = [f"{task}.jsonl" for task in tasks if not (Path(folder) / f"{task}.jsonl").is_file()]
    if missing:
        found = ", ".join(sorted(path.name for path in Path(folder).glob("*.jsonl"))) or "no jsonl file"
        raise UserError(f"--tasks longbench: {folder} lacks {', '.join(missing)} (it has {found}); {how}")
    return Path(folder)


class LongBenchRun:
    """The LongBench tasks of one evaluation: at most ``limit`` samples each, sequences of at most ``length`` tokens with their answers."""

    def __init__(self, answerer: Answerer, folder: Path, *, length: int, limit: int | None, piece: int = PIECE) -> None:
        self._answerer, self._folder, self._length, self._limit, self._piece = answerer, folder, length, limit, piece
        self._own_prompts = _read_prompts(folder / _PROMPTS)
        self._samples: dict[str, list[dict[str, Any]]] = {}

    def items(self, task: str, reading: Reading) -> list[Item]:
        """A task under a reading, in pieces. Raises ``UserError`` where its answers leave no room for a prompt."""
        tokens = LONGBENCH_TASKS[task].tokens
        if self._length - tokens < _LEAST:
            raise UserError(f"--tasks longbench: {task} answers in {tokens} tokens; sequences of {self._length} leave no prompt")
        count = len(self._read(task))
        content = file_sha256(self._folder / f"{task}.jsonl")
        prefix = short_hash(f"{content}/{self._own_prompts.get(task)}/{self._length}/{reading}")
        return [
            Item(f"longbench-{task}-{prefix}-{first}-{end}", end - first, partial(self._score, task, reading, first, end))
            for first in range(0, count, self._piece)
            for end in [min(first + self._piece, count)]
        ]

    def combine(self, task: str, reading: Reading, parts: Sequence[dict[str, Any]]) -> LongBenchScore:
        """The row of a task under a reading from its items' results."""
        scores = [score for part in parts for score in part["scores"]]
        return LongBenchScore(
            pattern=str(reading),
            task=task,
            metric=LONGBENCH_TASKS[task].metric,
            score=sum(scores) / len(scores),
            samples=len(scores),
            cut=sum(part["cut"] for part in parts),
            cache_bytes_per_sequence=cache_bytes(self._answerer.model.config, reading, self._length),
            seconds=sum(part["seconds"] for part in parts),
        )

    def _score(self, task: str, reading: Reading, first: int, end: int) -> dict[str, Any]:
        """Scores of each sample, and what was answered."""
        start, spec, tokenizer = time.perf_counter(), LONGBENCH_TASKS[task], self._answerer.tokenizer
        samples = self._read(task)[first:end]
        prompt = self._own_prompts.get(task, spec.prompt)
        texts = [_FIELD.sub(lambda field, sample=sample: sample[field[1]], prompt) for sample in samples]  # type: ignore[misc]
        encoded = tokenizer.encode(texts)
        budget = self._length - spec.tokens
        sampling = Sampling(repetition_penalty=spec.penalty)
        requests = [Request(without_middle(ids, budget), spec.tokens, sampling, (tokenizer.eos_id,)) for ids in encoded]
        answers = [shortened(answer, spec.ends) for answer in self._answerer.answers(reading, requests)]
        return {
            "scores": [score(spec.metric, answer, sample) for answer, sample in zip(answers, samples, strict=True)],
            "answers": answers,
            "cut": sum(len(ids) >= budget for ids in encoded),
            "seconds": time.perf_counter() - start,
        }

    def _read(self, task: str) -> list[dict[str, Any]]:
        if task not in self._samples:
            self._samples[task] = read_samples(self._folder / f"{task}.jsonl")[: self._limit]
        return self._samples[task]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of one task. Raises ``UserError`` that names file and line of what is none."""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(sample, dict) or not all(isinstance(sample.get(key), str) for key in ("context", "input")):
            raise UserError(
                f"{path}, line {number}: expected an object with the texts `context` and `input` and the list `answers`"
            )
        if not isinstance(sample.get("answers"), list) or not sample["answers"]:
            raise UserError(f"{path}, line {number}: `answers` is {sample.get('answers')!r}; expected a list of texts")
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: holds no sample")
    return samples


def _read_prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        prompts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return prompts


def without_middle(ids: list[int], budget: int) -> list[int]:
    """Fewer than ``budget`` tokens: the first half of what is allowed, and the last."""
    if len(ids) < budget:
        return ids
    first = (budget - 1) // 2
    return ids[:first] + ids[len(ids) - (budget - 1 - first) :]


def shortened(answer: str, ends: Sequence[str]) -> str:
    """An answer without newlines in front, up to the first of ``ends``; as it is where there are none."""
    if not ends:
        return answer
    answer = answer.lstrip("\n")
    return answer[: min((at for end in ends if (at := answer.find(end)) >= 0), default=len(answer))]


def score(metric: str, answer: str, sample: dict[str, Any]) -> float:
    """The best score over the sample's reference answers, 0 to 1."""
    return max(_METRICS[metric](answer, reference, sample) for reference in sample["answers"])


def f1(answer: str, reference: str, _: object = None) -> float:
    """Of words in any order."""
    said, expected = _plain_words(answer), _plain_words(reference)
    return _harmonic((Counter(said) & Counter(expected)).total(), len(said), len(expected))


def rouge_l(answer: str, reference: str, _: object = None) -> float:
    """Of the distinct words of both; common are those of the longest common subsequence of any two sentences."""
    said, expected = _sentences(answer), _sentences(reference)
    common = {word for one in expected for other in said for word in _common_subsequence(one, other)}
    return _harmonic(len(common), len(set().union(*said)), len(set().union(*expected)))


def edit_similarity(answer: str, reference: str, _: object = None) -> float:
    """Of the answer's first line that is code, no comment and no fence."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def class_named(answer: str, reference: str, sample: dict[str, Any]) -> float:
    """A class whose name is part of the right one's does not count as named, unless it comes directly behind another such class."""
    named: list[str] = []
    was_part = False
    for name in (name for name in sample.get("all_classes") or [] if name in answer):
        was_part = not was_part and name != reference and name in reference
        if not was_part:
            named.append(name)
    return 1 / len(named) if reference in named else 0.0


_METRICS: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "f1": f1, "rouge": rouge_l, "edit": edit_similarity, "class": class_named,
}  # fmt: skip


def _plain_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_subsequence(one: list[str], other: list[str]) -> list[str]:
    """A longest one, from the back; of several the one that leaves out words of ``other`` first."""
    longest = [[0] * (len(other) + 1)]  # longest[i][j]: of the first i and the first j words
    for word in one:
        row = [0]
        for j, candidate in enumerate(other):
            row.append(longest[-1][j] + 1 if word == candidate else max(longest[-1][j + 1], row[j]))
        longest.append(row)
    words, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.append(one[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _harmonic(common: int, said: int, expected: int) -> float:
    return 2 * common / (said + expected) if common else 0.0
