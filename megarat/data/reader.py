"""Random access to the token stream of a corpus, on ordinary WebDataset tars.

The tars are memory-mapped and the index says where each block of tokens starts, so that a read is arithmetic and a copy.
Sizes of all shards are compared when a corpus is opened; each block is compared with its checksum when it is first touched, so
that a flipped bit is found before it is trained on and at no more cost than reading the block.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megarat.data.format import Index, IntArray, Shard, TokenArray, block_sizes
from megarat.errors import UserError

if TYPE_CHECKING:
    import webdataset


class TokenReader:
    """The token stream of one corpus folder as one long array.

    Not safe for several threads at once. Memory: the page cache of what is read, and one byte a block.

    Raises:
        UserError: a bad index, or a shard that is missing, truncated or too long.
    """

    def __init__(self, folder: str | Path):
        self.index = Index.read(folder)
        for shard in self.index.shards:
            self.index.check_file(shard)
        self._shard_starts = np.cumsum([0] + [shard.tokens for shard in self.index.shards])  # (shards + 1,)
        self._open: dict[int, _MappedShard] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, EOS included."""
        return int(self._shard_starts[-1])

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens start … start + count - 1 of the stream, a new array in the dtype of the shards.

        Raises:
            UserError: a block that is damaged or holds an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        out = np.empty(count, self.index.dtype)
        done = 0
        while done < count:
            number = int(np.searchsorted(self._shard_starts, start + done, side="right")) - 1
            done += self._shard(number).read_into(out[done:], start + done - int(self._shard_starts[number]))
        return out

    def _shard(self, number: int) -> _MappedShard:
        if number not in self._open:
            self._open[number] = _MappedShard(self.index, self.index.shards[number])
        return self._open[number]


class _MappedShard:
    """One memory-mapped tar. The mapping lives as long as this object; no file descriptor stays open."""

    def __init__(self, index: Index, shard: Shard):
        self._index, self._shard = index, shard
        self._path = index.check_file(shard)  # again: a mapping of a file that has shrunk since would be a crash
        with open(self._path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._sizes: IntArray = block_sizes(shard.tokens, index.block_tokens)
        self._proven = np.zeros(len(self._sizes), dtype=bool)

    def read_into(self, out: TokenArray, position: int) -> int:
        """Copies tokens from a position of the shard until `out` is full or the shard ends; returns how many."""
        count = min(len(out), self._shard.tokens - position)
        done = 0
        while done < count:
            block, skip = divmod(position + done, self._index.block_tokens)
            tokens = self._block(block)[skip : skip + count - done]
            out[done : done + len(tokens)] = tokens
            done += len(tokens)
        return count

    def _block(self, block: int) -> TokenArray:
        tokens: TokenArray = np.frombuffer(
            self._map, self._index.dtype, count=int(self._sizes[block]), offset=int(self._shard.offsets[block])
        )
        if not self._proven[block]:
            self._prove(block, tokens)
            self._proven[block] = True
        return tokens

    def _prove(self, block: int, tokens: TokenArray) -> None:
        if zlib.crc32(tokens.data) != int(self._shard.crc32[block]):
            raise UserError(
                f"{self._path}: shard is damaged: block {block} (bytes {self._shard.offsets[block]} to"
                f" {self._shard.offsets[block] + tokens.nbytes}) does not match its checksum; restore the file"
            )
        if int(tokens.max()) >= self._index.vocab_size:
            where = int(np.argmax(tokens >= self._index.vocab_size))
            raise UserError(
                f"{self._path}: token {block * self._index.block_tokens + where} is id {tokens[where]}, outside the vocabulary of"
                f" {self._index.vocab_size}: the shards were made with another tokenizer"
            )


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
            f"{index.folder}: the tokenizer of these shards ({index.tokenizer.name}) has {index.vocab_size} entries, but"
            f" model.vocab is {model_vocab}: set model.vocab to at least {index.vocab_size}"
        )


def check_tokenizer(index: Index, name: str, sha256: str) -> None:
    """Refuses a tokenizer file that is not the one the shards were made with."""
    if sha256 != index.tokenizer.sha256:
        raise UserError(
            f"{name}: SHA-256 {sha256} is not the tokenizer of {index.folder}"
            f" ({index.tokenizer.name}, SHA-256 {index.tokenizer.sha256})"
        )
