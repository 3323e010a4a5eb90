"""Fine-tuning on generated tasks: sequences of a prompt, its answer and EOS, with the loss on answer and EOS alone.

Sample p of a run takes a task at random and is made for p: fresh every time, a pure function of (seed, p), whatever the ranks are.

Shapes: b sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megarat.config import Config
from megarat.data.format import TokenArray, token_dtype
from megarat.data.loader import IGNORED_LABEL, MicroBatch, PairBatch, PairSource, own_samples, sample_digest
from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, read_essay
from megarat.eval.tasks import parse_tasks

_THREADS = 4  # tokenizers let go of the interpreter's lock; one thread starved an H200 of sequences of 1024 tokens


class TaskLoader(PairSource):
    """Pair n holds the samples n*G … n*G + G - 1 of the run, shared among ranks as `Loader` does.

    A sequence is prompt, answer, EOS, then EOS up to T tokens.

    Raises:
        UserError: a `data.task` that is none, a text that cannot be read, a tokenizer beyond `model.vocab`.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, data_rank: int = 0, data_size: int = 1) -> None:
        data, train = config.data, config.train
        if tokenizer.vocab_size > config.model.vocab:
            raise UserError(f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but model.vocab is {config.model.vocab}")
        self._tasks = needle_tasks(data.task)
        self._tokenizer, self._length, self._seed = tokenizer, data.sequence_length, train.seed
        essay = read_essay(data.task_text, "data.task_text") if data.task_text else None
        self._maker = NeedleMaker(tokenizer, data.sequence_length - ANSWER_TOKENS, seed=train.seed, essay=essay)
        self._global_batch, self._micro_batch = train.global_batch, train.micro_batch
        self._own = own_samples(train.global_batch, train.micro_batch, data_rank, data_size)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="megarat-tasks")
        self.identity = hashlib.sha256(repr((self._tasks, tokenizer.sha256, essay)).encode()).hexdigest()

    def pair(self, n: int) -> PairBatch:
        """This rank's micro-batches of pair n."""
        positions = (n * self._global_batch + self._own).tolist()
        samples = list(self._threads.map(self.sample, positions))
        digest = sum(sample_digest(p, tokens) for p, (tokens, _) in zip(positions, samples, strict=True)) % (1 << 64)
        size = self._micro_batch
        micro_batches = [_micro_batch(samples[first : first + size]) for first in range(0, len(samples), size)]
        return PairBatch(micro_batches, digest, self._global_batch * self._length)

    def sample(self, position: int) -> tuple[TokenArray, slice]:
        """T + 1 tokens of a sample, and where in them answer and EOS are."""
        task = random.Random(f"{self._seed}/{position}").choice(self._tasks)
        made = self._maker.sample(task, "train", position)
        (answer,) = self._tokenizer.encode([made.target])
        end = len(made.ids) + len(answer) + 1
        if end > self._length + 1:
            raise UserError(
                f"data.task: the answer to a {task} prompt has {len(answer)} tokens of {self._tokenizer.file.name}, more than the "
                f"{ANSWER_TOKENS} that prompts leave for it; choose other tasks"
            )
        tokens = np.full(self._length + 1, self._tokenizer.eos_id, token_dtype(self._tokenizer.vocab_size))
        tokens[: end - 1] = [*made.ids, *answer]
        return tokens, slice(len(made.ids), end)


def needle_tasks(text: str) -> tuple[str, ...]:
    """The tasks `data.task` names; sft is another word for needle. Raises ``UserError`` where it names none, or one that cannot be trained on."""
    tasks = parse_tasks(re.sub(r"^\s*sft\b", "needle", text).split(","))
    if set(tasks) != {"needle"}:
        raise UserError(
            f"data.task is {text!r}; expected needle (or sft), or some of its tasks such as needle:single_1,multikey_2"
        )
    return tasks["needle"]


def _micro_batch(samples: list[tuple[TokenArray, slice]]) -> MicroBatch:
    """Inputs and labels, each (b, T) int64: y_t = x_{t+1} where that is answer or EOS after it."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in samples]).astype(np.int64))
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for row, (_, answer) in enumerate(samples):
        labels[row, answer] = tokens[row, answer]
    return tokens[:, :-1].contiguous(), labels[:, 1:].contiguous()
