"""Shows what a corpus holds: totals, tokenizer, provenance, shards, and on request some documents as text.

python data_tools/inspect_shards.py FOLDER [--documents N] [--tokenizer PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.verify_shards import find_corpora
from megarat.data.format import Index, TokenArray, block_sizes
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, UserError


def documents(index: Index) -> Iterator[TokenArray]:
    """The ids of each document from the start of the stream, without its EOS.

    A document ends at EOS: text never turns into that id, because tokenizers here encode special tokens in a text as plain text.
    """
    carried: list[TokenArray] = []  # of a document that began in an earlier block
    for block in _blocks(index):
        pieces = np.split(block, np.flatnonzero(block == index.eos_id) + 1)
        for piece in pieces[:-1]:
            yield np.concatenate([*carried, piece[:-1]])
            carried = []
        carried.append(pieces[-1])


def _blocks(index: Index) -> Iterator[TokenArray]:
    for shard in index.shards:
        with open(index.check_file(shard), "rb") as file:
            for offset, tokens in zip(
                shard.offsets.tolist(), block_sizes(shard.tokens, index.block_tokens).tolist(), strict=True
            ):
                file.seek(offset)
                yield np.frombuffer(file.read(tokens * index.dtype.itemsize), index.dtype)


def describe(index: Index) -> str:
    """A page on a corpus."""
    lines = [
        f"{index.folder}: {index.total_tokens:,} tokens, {index.total_documents:,} documents"
        f" ({index.total_tokens / index.total_documents:,.0f} tokens a document)",
        f"  ids {index.dtype.name}, vocabulary {index.vocab_size}, EOS {index.eos_id}, blocks of {index.block_tokens:,} tokens",
        f"  tokenizer {index.tokenizer.name} ({index.tokenizer.kind}, SHA-256 {index.tokenizer.sha256})",
        f"  options {json.dumps(index.source.get('options', {}))}",
    ]
    lines += [f"  input {s['name']}: {s['bytes']:,} bytes, SHA-256 {s['sha256']}" for s in index.source.get("inputs", [])]
    lines += [f"  {s.file}: {s.bytes:,} bytes, {s.tokens:,} tokens, {s.documents:,} documents ended" for s in index.shards]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Show what a corpus of token shards holds.")
    parser.add_argument("folder", type=Path, help="output of build_shards.py, or one side of it")
    parser.add_argument("--documents", type=int, default=0, metavar="N", help="print the first N documents of each side as text")
    parser.add_argument("--tokenizer", type=Path, help="to decode with (the corpus's own if not given)")
    given = parser.parse_args(arguments)
    try:
        for corpus in find_corpora(given.folder):
            index = Index.read(corpus)
            print(describe(index))
            if given.documents:
                _print_documents(index, given.documents, given.tokenizer or corpus.parent / "tokenizer")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


def _print_documents(index: Index, count: int, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for number, ids in enumerate(islice(documents(index), count)):
        print(f"--- document {number} ({len(ids)} tokens)\n{tokenizer.decode(ids.tolist())}")


if __name__ == "__main__":
    sys.exit(main())
