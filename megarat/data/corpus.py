"""The data of a run as its config describes it: one corpus or a blend of several, opened, ordered and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megarat.config import Config, DataConfig
from megarat.data.format import Index, check_tokenizer_file, load_index
from megarat.data.plan import BlendPlan, Plan, RandomOffsetPlan, ShuffledPlan
from megarat.data.reader import BlendReader, Reader, TokenReader, check_same_tokenizer, check_vocabulary
from megarat.data.store import Cache, default_cache_folder, is_remote, join, open_store
from megarat.data.tokenizer import fetch_tokenizer
from megarat.errors import UserError


@dataclass(frozen=True)
class Part:
    """One corpus of a run: where it lies and how many tokens of its training side are used."""

    location: str
    num_tokens: int


@dataclass(frozen=True)
class Corpus:
    """What a `Loader` needs, and what the budget is checked against."""

    reader: Reader
    plan: Plan
    parts: tuple[Part, ...]
    primary: Index  # of the first corpus, whose tokenizer is the run's

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples of the run come from each part."""
        return self.plan.counts(samples) if isinstance(self.plan, BlendPlan) else [samples]


def open_corpus(config: Config) -> Corpus:
    """Opens the training side of `data.shards`.

    Raises:
        UserError: a bad corpus, ids that do not fit `model.vocab`, a tokenizer beside the shards that is not theirs, corpora of a
            blend with different tokenizers.
    """
    data, cache = config.data, _cache(config.data)
    weights = data.shards if isinstance(data.shards, Mapping) else {data.shards: 1.0}
    readers = [TokenReader(join(location, "train"), cache) for location in weights]
    for reader in readers:
        check_vocabulary(reader.index, config.model.vocab)
        check_tokenizer_file(reader.index)
    parts = tuple(Part(reader.index.location, _used_tokens(data, reader)) for reader in readers)
    plans = [_plan(data, part.num_tokens, config.train.seed + number) for number, part in enumerate(parts)]
    if len(readers) == 1:
        return Corpus(readers[0], plans[0], parts, readers[0].index)
    shares = list(weights.values())
    plan = BlendPlan(plans, [reader.num_tokens for reader in readers], shares)
    return Corpus(BlendReader(readers, shares), plan, parts, readers[0].index)


def open_validation(config: Config) -> TokenReader:
    """Opens the held-out side that a run measures its loss on.

    Raises:
        UserError: a bad corpus, ids that do not fit `model.vocab`, another tokenizer than that of the training side.
    """
    data, cache = config.data, _cache(config.data)
    reader = TokenReader(join(data.validation or data.primary, "validation"), cache)
    check_vocabulary(reader.index, config.model.vocab)
    if data.validation and not data.task:  # a task needs no training side
        store = open_store(join(data.primary, "train"), cache)
        primary = Index.parse(load_index(store), store.location)
        check_same_tokenizer(reader.index, primary, "data.validation", "the loss on other ids would mean nothing")
    return reader


def tokenizer_folder(config: Config, corpus: Corpus) -> Path | None:
    """Where the files of the run's tokenizer lie: beside the shards, or, of a remote corpus, in the run's folder, into which they are fetched.

    Raises:
        UserError: what lies beside a remote corpus is not the tokenizer that its shards were made with.
    """
    data = config.data
    if is_remote(data.primary):
        store = open_store(join(data.primary, "tokenizer"), _cache(data))
        return fetch_tokenizer(store, corpus.primary, Path(config.run.dir) / "tokenizer")
    folder = Path(data.primary) / "tokenizer"
    return folder if folder.is_dir() else None


def _used_tokens(data: DataConfig, reader: TokenReader) -> int:
    return min(reader.num_tokens, data.limit_tokens or reader.num_tokens)


def _cache(data: DataConfig) -> Cache:
    limit = int(data.cache_gb * 1e9)
    return Cache(Path(data.cache) if data.cache else default_cache_folder(), limit)


def _plan(data: DataConfig, num_tokens: int, seed: int) -> Plan:
    if data.order == "random_offsets":
        return RandomOffsetPlan(num_tokens, data.sequence_length, seed)
    return ShuffledPlan(num_tokens, data.sequence_length, seed, run=data.shuffle_run, window=data.shuffle_window)


def check_budget(config: Config, corpus: Corpus) -> list[str]:
    """One line a corpus on how much of it the run reads.

    Raises:
        UserError: more epochs of one of them than `data.max_epochs` allows.
    """
    length, samples = config.data.sequence_length, config.train.pairs * config.train.global_batch
    lines = []
    for part, count in zip(corpus.parts, corpus.counts(samples), strict=True):
        epochs = count * length / part.num_tokens
        line = f"{part.location}: the run reads {count * length:,} tokens of {part.num_tokens:,}, {epochs:.3g} epochs"
        if 0 < config.data.max_epochs < epochs:
            pairs = int(config.train.pairs * config.data.max_epochs / epochs)
            raise UserError(
                f"{line}, but data.max_epochs is {config.data.max_epochs:g}: lower train.pairs from {config.train.pairs} to"
                f" {pairs}, give more text, or raise data.max_epochs"
            )
        lines.append(line)
    return lines
