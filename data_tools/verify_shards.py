"""Proves that corpora are whole: sizes and SHA-256 of every shard, and of the tokenizer, against the index.

    python data_tools/verify_shards.py FOLDER… [--workers N]

FOLDER is the output of build_shards.py or one side of it. Exit code 2, and one line a fault, when anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megarat.data.format import INDEX_NAME, Index, verify
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, UserError


def find_corpora(folder: Path) -> list[Path]:
    """The folder itself, or those of its sides `train` and `validation` that are there.

    Raises:
        UserError: neither is.
    """
    if (folder / INDEX_NAME).is_file():
        return [folder]
    if not (sides := [folder / side for side in ("train", "validation") if (folder / side).is_dir()]):
        raise UserError(
            f"{folder}: no {INDEX_NAME}, train or validation in it; expected a folder made by data_tools/build_shards.py"
        )
    return sides


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check the sizes and hashes of token shards.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="shards hashed at a time (all cores)")
    given = parser.parse_args(arguments)
    faults = 0
    for folder in given.folders:
        try:
            for corpus in find_corpora(folder):
                index = _verify_with_bar(corpus, max(1, given.workers))
                print(f"{corpus}: whole ({len(index.shards)} shards, {index.total_tokens:,} tokens)")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            faults += 1
    return EXIT_BAD_INPUT if faults else EXIT_OK


def _verify_with_bar(corpus: Path, workers: int) -> Index:
    total = sum(shard.bytes for shard in Index.read(corpus).shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(corpus), leave=False) as bar:
        lock = threading.Lock()

        def advance(done: int) -> None:
            with lock:
                bar.update(done)

        return verify(corpus, advance, workers)


if __name__ == "__main__":
    sys.exit(main())
