"""Random access to the token stream of a corpus, on ordinary WebDataset tars, near or far.

The index says where each block of tokens starts, so that a read is arithmetic and a copy. Sizes of all shards of a folder are
compared when a corpus is opened; each block is compared with its checksum when it is first touched, so that a flipped bit is
found before it is trained on and at no more cost than reading the block. Blocks of a remote corpus are compared every time: they may
have been evicted and fetched again in between.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megarat.data.format import Index, IntArray, Shard, TokenArray, block_sizes, load_index
from megarat.data.store import Cache, Extent, Store, is_remote, open_store
from megarat.errors import UserError

if TYPE_CHECKING:
    import webdataset


class Reader(Protocol):
    """Tokens by their place in one long array.

    Attributes:
        eos_id, dtype: of the tokens.
        identity: hash of what will be read, 64 hexadecimal digits.
    """

    eos_id: int
    dtype: np.dtype[Any]
    identity: str

    @property
    def num_tokens(self) -> int:
        """Length of the array, EOS included."""

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count - 1, a new array."""


class TokenReader:
    """The token stream of one corpus as one long array.

    Not safe for several threads at once. Memory: the index, and one byte a block; nothing of the tokens is kept.

    Raises:
        UserError: a bad index, or a shard that is missing, truncated or too long.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None):
        self._store = open_store(location, cache)
        content = load_index(self._store)
        self.index = Index.parse(content, self._store.location)
        self.identity = hashlib.sha256(content).hexdigest()
        self.eos_id, self.dtype = self.index.eos_id, self.index.dtype
        if not is_remote(location):
            for shard in self.index.shards:
                self.index.check_file(shard)
        self._shard_starts = np.cumsum([0] + [shard.tokens for shard in self.index.shards])  # (shards + 1,)
        self._open: dict[int, _OpenShard] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, EOS included."""
        return int(self._shard_starts[-1])

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count - 1 of the stream, a new array in the dtype of the shards.

        Raises:
            UserError: a block that is damaged, cut or gone, or holds an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        out = np.empty(count, self.dtype)
        done = 0
        while done < count:
            number = int(np.searchsorted(self._shard_starts, start + done, side="right")) - 1
            done += self._shard(number).read_into(out[done:], start + done - int(self._shard_starts[number]))
        return out

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = _OpenShard(self.index, self.index.shards[number], self._store)
        return self._open[number]


class _OpenShard:
    """One tar, and which of its blocks have been proven."""

    def __init__(self, index: Index, shard: Shard, store: Store):
        self._index, self._shard, self._store = index, shard, store
        self._sizes: IntArray = block_sizes(shard.tokens, index.block_tokens)
        self._proven = np.zeros(len(self._sizes), dtype=bool)

    def read_into(self, out: TokenArray, position: int) -> int:
        """Copies tokens from a position of the shard until `out` is full or the shard ends; returns how many."""
        count = min(len(out), self._shard.tokens - position)
        done = 0
        while done < count:
            block, skip = divmod(position + done, self._index.block_tokens)
            wanted = min(count - done, int(self._sizes[block]) - skip)
            out[done : done + wanted] = self._tokens(block, skip, wanted)
            done += wanted
        return count

    def _tokens(self, block: int, skip: int, count: int) -> TokenArray:
        """Some tokens of a block; the whole block is read and proven the first time, or each time it may have been fetched again."""
        if self._proven[block]:
            return self._read(block, skip, count)
        tokens = self._read(block, 0, int(self._sizes[block]))
        if not self._is_whole(block, tokens) and self._store.forget(self._extent(block)):
            tokens = self._read(block, 0, int(self._sizes[block]))
        self._prove(block, tokens)
        self._proven[block] = not self._store.fetches_again
        return tokens[skip : skip + count]

    def _read(self, block: int, skip: int, count: int) -> TokenArray:
        extent, size = self._extent(block), self._index.dtype.itemsize
        content = self._store.read(extent, skip * size, count * size)
        if len(content) != count * size:  # evicted from the cache since it was fetched, or cut
            content = self._store.read(extent, skip * size, count * size)
        if len(content) != count * size:
            raise UserError(
                f"{self._store.name(self._shard.file)}: shard was truncated while it was read: block {block} lacks"
                f" {count * size - len(content)} bytes; restore the file"
            )
        return np.frombuffer(content, self._index.dtype)

    def _extent(self, block: int) -> Extent:
        length = int(self._sizes[block]) * self._index.dtype.itemsize
        return Extent(self._shard.file, self._shard.bytes, block, int(self._shard.offsets[block]), length)

    def _is_whole(self, block: int, tokens: TokenArray) -> bool:
        return zlib.crc32(tokens.data) == int(self._shard.crc32[block])

    def _prove(self, block: int, tokens: TokenArray) -> None:
        name = self._store.name(self._shard.file)
        if not self._is_whole(block, tokens):
            raise UserError(
                f"{name}: shard is damaged: block {block} (bytes {self._shard.offsets[block]} to"
                f" {self._shard.offsets[block] + tokens.nbytes}) does not match its checksum; restore the file"
            )
        if int(tokens.max()) >= self._index.vocab_size:
            where = int(np.argmax(tokens >= self._index.vocab_size))
            raise UserError(
                f"{name}: token {block * self._index.block_tokens + where} is id {tokens[where]}, outside the vocabulary of"
                f" {self._index.vocab_size}: the shards were made with another tokenizer"
            )


class BlendReader:
    """Several corpora, one behind the other, in one address space: what the offsets of a `plan.BlendPlan` point into.

    Raises:
        UserError: corpora of different tokenizers, or whose documents end with different ids.
    """

    def __init__(self, readers: Sequence[TokenReader], weights: Sequence[float]):
        first = readers[0].index
        for reader in readers[1:]:
            check_same_tokenizer(reader.index, first, "data.shards", "corpora of a blend need one tokenizer")
        self._readers = readers
        self._starts = np.cumsum([0] + [reader.num_tokens for reader in readers])
        self.eos_id, self.dtype = first.eos_id, first.dtype
        parts = [f"{reader.identity} {float(weight).hex()}" for reader, weight in zip(readers, weights, strict=True)]
        self.identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora together."""
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens of one corpus; a stretch that would run into the next is an IndexError."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        return self._readers[number].read(start - int(self._starts[number]), count)


def stream(folder: str | Path) -> webdataset.WebDataset:
    """The same shards through WebDataset's own reader: an iterable of (tokens, ends), one pair of arrays a block.

    For other programs' pipelines. Shards are split over ranks and workers by WebDataset, unevenly if their numbers do not divide,
    and the position cannot be saved: training uses `TokenReader`.
    """
    import webdataset

    index = Index.read(folder)
    urls = [str(index.check_file(shard)) for shard in index.shards]
    dataset: Any = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=webdataset.split_by_node, empty_check=False)
    return dataset.decode().to_tuple("tokens.npy", "ends.npy")


def check_vocabulary(index: Index, model_vocab: int) -> None:
    """Refuses a corpus whose ids do not all fit the model's embedding.

    Raises:
        UserError: the tokenizer of the shards has more entries than `model.vocab`.
    """
    if index.vocab_size > model_vocab:
        raise UserError(
            f"{index.location}: the tokenizer of these shards ({index.tokenizer.name}) has {index.vocab_size} entries, but"
            f" model.vocab is {model_vocab}: set model.vocab to at least {index.vocab_size}"
        )


def check_same_tokenizer(index: Index, first: Index, key: str, why: str) -> None:
    """Refuses a corpus whose ids do not mean what those of the `first` one do.

    Args:
        index: the corpus that the setting `key` names.
        first: the corpus it goes with.
        why: what needs that, for the message.

    Raises:
        UserError: they were made with different tokenizers, or their documents end with different ids.
    """
    made_by, wanted = index.tokenizer, first.tokenizer
    if made_by.sha256 != wanted.sha256:
        raise UserError(
            f"{key}: {index.location} was made with {made_by.name} (SHA-256 {made_by.sha256}), but {first.location} with {wanted.name}"
            f" (SHA-256 {wanted.sha256}); {why}"
        )
    if index.eos_id != first.eos_id:
        raise UserError(
            f"{key}: documents of {index.location} end with id {index.eos_id}, those of {first.location} with {first.eos_id}; {why}"
        )
