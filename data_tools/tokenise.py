"""Records -> tokens of the training and the validation stream, in order, by any number of processes."""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.sources import TXT_SPLITS, BadRecord, Chunk, record_name, to_text
from megarat.data.format import DEFAULT_BLOCK_TOKENS, DEFAULT_SHARD_TOKENS, IntArray, TokenArray, join_documents, token_dtype
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import UserError

BAD_LINES = ("error", "skip")
SIDES = ("train", "validation")


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards, beside the inputs and the tokenizer.

    Attributes:
        held_out: share of the documents that goes to validation, from 0 to below 1.
        text_field: field of a JSON line, or column of a table, that holds the text.
        txt_split: a document of a .txt is the whole "file", or a "paragraph" (lines between blank ones).
        bad_lines: "error" stops at a malformed line or row, "skip" leaves it out and counts it.
        block_tokens: tokens of a block.
        shard_tokens: tokens of a shard, a multiple of `block_tokens`.
        seed: of the held-out split.
        deduplicate: keep only the first of documents with exactly the same text. Equal documents are on one side in any case.
    """

    held_out: float = 0.005
    text_field: str = "text"
    txt_split: str = "file"
    bad_lines: str = "error"
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    seed: int = 0
    deduplicate: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out}, expected a share from 0 to below 1")
        for name, value, allowed in (("txt-split", self.txt_split, TXT_SPLITS), ("bad-lines", self.bad_lines, BAD_LINES)):
            if value not in allowed:
                raise UserError(f"--{name} is {value!r}, expected one of {', '.join(allowed)}")
        if self.block_tokens < 1 or self.shard_tokens < 1 or self.shard_tokens % self.block_tokens:
            raise UserError(
                f"shard tokens ({self.shard_tokens}) must be a positive multiple of block tokens ({self.block_tokens})"
            )


class Documents(NamedTuple):
    """Whole documents, each closed by EOS."""

    tokens: TokenArray  # (n,)
    lengths: IntArray  # (documents,) with EOS
    digests: npt.NDArray[np.uint64]  # (documents, 2) hash of each text, or (0, 2) when nobody asks for it


class Tokenised(NamedTuple):
    """One chunk after a worker: its documents by side, how many records were left out and why, bytes of the file used up."""

    train: Documents
    validation: Documents
    left_out: Counter[str]
    consumed: int
    part: int
    closes_part: bool


class Worker:
    """Turns chunks of records into pieces of the two streams."""

    def __init__(self, tokenizer: Tokenizer, options: Options):
        self._tokenizer, self._options = tokenizer, options
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._key = str(options.seed).encode()

    def __call__(self, chunk: Chunk) -> Tokenised:
        """Tokenises one chunk.

        Raises:
            UserError: a malformed record, named by file and line, unless such are skipped.
        """
        texts, left_out = self._parse(chunk)
        train: list[tuple[str, list[int]]] = []
        validation: list[tuple[str, list[int]]] = []
        for text, ids in zip(texts, self._tokenizer.encode(texts), strict=True):
            (validation if self._is_held_out(text) else train).append((text, ids))
        return Tokenised(self._join(train), self._join(validation), left_out, chunk.consumed, chunk.part, chunk.closes_part)

    def _join(self, documents: list[tuple[str, list[int]]]) -> Documents:
        tokens, ends = join_documents((ids for _, ids in documents), self._tokenizer.eos_id, self._dtype)
        if len(tokens) and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise UserError(
                f"{self._tokenizer.file}: the tokenizer gave id {tokens.max()}, outside its vocabulary of {self._tokenizer.vocab_size}"
            )
        digests = b"".join(_digest(text) for text, _ in documents) if self._options.deduplicate else b""
        return Documents(tokens, np.diff(ends, prepend=0), np.frombuffer(digests, "<u8").reshape(-1, 2))

    def _parse(self, chunk: Chunk) -> tuple[list[str], Counter[str]]:
        texts: list[str] = []
        left_out: Counter[str] = Counter()
        for record in chunk.records:
            try:
                text = to_text(chunk.stretch.source, record, self._options.text_field)
            except BadRecord as fault:
                if self._options.bad_lines == "error":
                    raise UserError(
                        f"{record_name(chunk, record, fault.lines)}: {fault};"
                        " correct it, or leave such records out with --bad-lines skip"
                    ) from None
                left_out["malformed"] += 1
                continue
            if text.strip():
                texts.append(text)
            else:
                left_out["empty"] += 1
        return texts, left_out

    def _is_held_out(self, text: str) -> bool:
        """By a hash of the text, so that equal documents fall on the same side."""
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") < self._options.held_out * 2**64


def _digest(text: str) -> bytes:
    """128 bits: with a billion documents, two different texts share them with a chance of 2e-21."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def tokenise(chunks: Iterator[Chunk], tokenizer: Tokenizer, options: Options, workers: int) -> Generator[Tokenised]:
    """Tokenised chunks in the order of the chunks. One worker means this process.

    Raises:
        UserError: from a worker, or when one was killed.
    """
    if workers == 1:
        yield from map(Worker(tokenizer, options), chunks)
        return
    pool = _start_pool(workers, tokenizer, options)
    try:
        yield from _ordered(pool, chunks, waiting=2 * workers + 2)
    except BrokenProcessPool:
        raise UserError("a tokenising process was killed, perhaps for want of memory: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool(workers: int, tokenizer: Tokenizer, options: Options) -> Executor:
    """Processes that neither Ctrl-C nor a signal to the whole job reaches: they finish their chunk, and the parent ends them.

    They are spawned, not forked: the parent may hold threads (the Rust tokenizers', torch's) that a fork would leave locked.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (tokenizer.file, options))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, until they can ignore it
    try:
        for _ in range(workers):
            pool.submit(os.getpid)  # each makes the pool start one process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pool


def _ordered(pool: Executor, chunks: Iterator[Chunk], waiting: int) -> Iterator[Tokenised]:
    """Like `pool.map`, but with a bounded number of chunks read ahead."""
    pending: deque[Future[Tokenised]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_run_in_process, chunk))
        if len(pending) >= waiting:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_worker: Worker | None = None  # of a tokenising process, made once when the process starts


def _start_process(tokenizer: Path, options: Options) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = Worker(load_tokenizer(tokenizer), options)


def _run_in_process(chunk: Chunk) -> Tokenised:
    assert _worker is not None
    return _worker(chunk)
