"""What an evaluation harness asks of a language model: log-likelihoods of continuations and of whole texts, and greedy text until a stop.

No BOS is ever put in front; where a text has nothing before it, its first token follows EOS, as the start of a document does in training.

Shapes: B requests of a batch, T tokens, C width, N scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.forward import hidden
from megarat.infer.generate import generate
from megarat.infer.reading import Reading
from megarat.model.lm import RATPlusLM

Item = TypeVar("Item")


class Continuation(NamedTuple):
    """Tokens to be scored and those before them."""

    context: list[int]
    scored: list[int]


class Likelihood(NamedTuple):
    """Sum of the log-probabilities (nats) of a continuation, and whether greedy decoding would have produced it."""

    total: float
    greedy: bool


Answer = TypeVar("Answer", Likelihood, str)


class Scorer:
    """One model read in one way. ``max_length`` bounds the tokens of a sequence: what is longer loses its start."""

    def __init__(self, model: RATPlusLM, reading: Reading, tokenizer: Tokenizer, *, batch: int, max_length: int) -> None:
        if tokenizer.vocab_size > model.config.vocab:
            raise UserError(
                f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {model.config.vocab}"
            )
        self._model, self._reading, self._tokenizer = model, reading, tokenizer
        self._batch, self._max_length = batch, max_length
        self.on_answers: Callable[[int], object] = lambda _: None  # hears how many requests have just been answered

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """How likely each (context, continuation) is, given its context."""
        return self._score([self._split(context, continuation) for context, continuation in pairs])

    def texts(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each whole text, in windows that do not overlap in what they score and overlap as much as they can in context."""
        windows = [list(self._windows(ids)) for ids in self._tokenizer.encode(list(texts))]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        return [sum(next(scores).total for _ in of_text) for of_text in windows]

    def until(self, prompts: Sequence[tuple[str, Sequence[str], int]]) -> list[str]:
        """Greedy continuations of (prompt, stops, tokens at most): up to EOS or the first stop string, which is left out."""

        def answers(chunk: list[tuple[str, Sequence[str], int]]) -> list[str]:
            longest = max(tokens for _, _, tokens in chunk)
            rows = [
                ids[-max(1, self._max_length - longest) :] or [self._tokenizer.eos_id]
                for ids in self._tokenizer.encode([prompt for prompt, _, _ in chunk])
            ]
            ids_BT, real_BT = self._pad(rows)
            tokens_BN = generate(
                self._model,
                ids_BT,
                longest,
                self._reading,
                attention_mask_BT=real_BT,
                stop_id=self._tokenizer.eos_id,
                vocabulary=self._tokenizer.vocab_size,
            )
            return [
                _cut(self._tokenizer.decode(_before(row[:limit], self._tokenizer.eos_id)), stops)
                for row, (_, stops, limit) in zip(tokens_BN.tolist(), chunk, strict=True)
            ]

        return self._in_batches(list(prompts), lambda prompt: (prompt[2], len(prompt[0])), answers)

    def _split(self, context: str, continuation: str) -> Continuation:
        """Token ids of both, cut where the context's own tokens end; spaces at the end of the context belong to the continuation."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            return Continuation([self._tokenizer.eos_id], self._tokenizer.encode([continuation])[0])
        before, whole = self._tokenizer.encode([bare, bare + continuation])
        return Continuation(before, whole[len(before) :])

    def _windows(self, ids: list[int]) -> Iterator[Continuation]:
        stream = [self._tokenizer.eos_id, *ids]
        for first in range(1, len(stream), self._max_length):
            end = min(first + self._max_length, len(stream))
            yield Continuation(stream[max(0, end - 1 - self._max_length) : first], stream[first:end])

    def _score(self, requests: list[Continuation]) -> list[Likelihood]:
        return self._in_batches(requests, lambda request: len(request.context) + len(request.scored), self._score_batch)

    def _in_batches(
        self, items: list[Item], size: Callable[[Item], object], run: Callable[[list[Item]], list[Answer]]
    ) -> list[Answer]:
        """``run`` over batches of items of similar size, largest first; answers in the order of the items."""
        order = sorted(range(len(items)), key=lambda index: size(items[index]), reverse=True)  # type: ignore[arg-type,return-value]
        answers: dict[int, Answer] = {}
        for first in range(0, len(order), self._batch):
            chunk = order[first : first + self._batch]
            answers.update(zip(chunk, run([items[index] for index in chunk]), strict=True))
            self.on_answers(len(chunk))
        return [answers[index] for index in range(len(items))]

    @torch.no_grad()
    def _score_batch(self, requests: list[Continuation]) -> list[Likelihood]:
        """Only the scored positions meet the vocabulary."""
        rows = [(context + scored)[-(self._max_length + 1) :] for context, scored in requests]
        counts = [min(len(scored), len(row) - 1) for (_, scored), row in zip(requests, rows, strict=True)]
        ids_BT, _ = self._pad([row[:-1] for row in rows])
        hidden_BTC = hidden(self._model, ids_BT, self._reading)
        hidden_NC = torch.cat(
            [
                hidden_BTC[index, len(row) - 1 - count : len(row) - 1]
                for index, (row, count) in enumerate(zip(rows, counts, strict=True))
            ]
        )
        logits_NV = self._model.logits(hidden_NC[None])[0, :, : self._tokenizer.vocab_size]
        targets_N = torch.tensor([token for row, count in zip(rows, counts, strict=True) for token in row[len(row) - count :]])
        targets_N = targets_N.to(logits_NV.device)
        chosen_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
        greedy_N = logits_NV.argmax(dim=1) == targets_N
        return [
            Likelihood(float(chosen.double().sum()), bool(greedy.all()))
            for chosen, greedy in zip(chosen_N.split(counts), greedy_N.split(counts), strict=True)
        ]

    def _pad(self, rows: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of ids padded on the right, and which of them are real; causal models need no mask to score the real ones."""
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        ids_BT = pad_sequence(tensors, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in tensors])
        device = self._model.embedding.weight.device
        return ids_BT.to(device), (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).to(device)


def _before(ids: list[int], stop_id: int) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any stop."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
