"""What an evaluation harness asks of a language model: log-likelihoods of continuations and of whole texts, and greedy text until a stop.

No BOS is ever put in front; where a text has nothing before it, its first token follows EOS, as the start of a document does in training.

Shapes: B requests of a batch, T tokens, C width, N scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.engine import Engine, Request
from megarat.infer.forward import hidden
from megarat.infer.reading import Reading
from megarat.infer.sampling import GREEDY
from megarat.model.lm import RATPlusLM


class Continuation(NamedTuple):
    """Tokens to be scored and those before them."""

    context: list[int]
    scored: list[int]


class Likelihood(NamedTuple):
    """Sum of the log-probabilities (nats) of a continuation, and whether greedy decoding would have produced it."""

    total: float
    greedy: bool


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

        encoded = self._tokenizer.encode([prompt for prompt, _, _ in prompts])
        requests = [
            Request(
                ids[-max(1, self._max_length - tokens) :] or [self._tokenizer.eos_id],
                tokens,
                GREEDY,
                (self._tokenizer.eos_id,),
                tuple(filter(None, stops)),  # a task may name "", which the harness passes over: it would end every text at once
            )
            for ids, (_, stops, tokens) in zip(encoded, prompts, strict=True)
        ]
        capacity = max(len(request.ids) + request.max_new_tokens for request in requests)
        engine = Engine(self._model, self._reading, self._tokenizer, rows=min(self._batch, len(requests)), capacity=capacity)
        return [generation.text for generation in engine.run(requests, self.on_answers)]

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
        """In batches of similar length, longest first; scores in the order of the requests."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].context) - len(requests[index].scored))
        scores: dict[int, Likelihood] = {}
        for first in range(0, len(order), self._batch):
            chunk = order[first : first + self._batch]
            scores.update(zip(chunk, self._score_batch([requests[index] for index in chunk]), strict=True))
            self.on_answers(len(chunk))
        return [scores[index] for index in range(len(requests))]

    @torch.no_grad()
    def _score_batch(self, requests: list[Continuation]) -> list[Likelihood]:
        """Only the scored positions meet the vocabulary."""
        rows = [(context + scored)[-(self._max_length + 1) :] for context, scored in requests]
        counts = [min(len(scored), len(row) - 1) for (_, scored), row in zip(requests, rows, strict=True)]
        ids_BT = pad_sequence(
            [torch.tensor(row[:-1]) for row in rows], batch_first=True
        )  # what lies behind a token never touches it
        hidden_BTC = hidden(self._model, ids_BT.to(self._model.embedding.weight.device), self._reading)
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
