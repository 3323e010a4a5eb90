"""Trains a byte-level BPE tokenizer, for those who have none.

    python data_tools/train_tokenizer.py INPUT… --output DIR [--vocab-size 32000]

DIR/tokenizer.json and DIR/tokenizer_config.json are what `build_shards.py --tokenizer DIR` takes. Every text has ids and comes back
from them byte by byte. The special ids are Llama's: <unk> 0 (never produced), <s> 1, </s> 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_tools.sources import TXT_SPLITS, BadRecord, Source, Stretch, find_sources, read_chunks, to_text
from megarat.data.format import named_errors
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, UserError

UNKNOWN, BEGIN, END = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte is a token
DEFAULT_TEXT_BYTES = 2 * 10**9


def train(
    inputs: Iterable[str | Path],
    output: str | Path,
    *,
    vocab_size: int = 32000,
    text_bytes: int = DEFAULT_TEXT_BYTES,
    text_field: str = "text",
    txt_split: str = "file",
    progress: bool = True,
) -> Path:
    """Trains on the beginnings of all input files, `text_bytes` of text together; returns the tokenizer.json.

    Malformed records are left out: build_shards.py is the one to name them.

    Raises:
        UserError: bad input, too little text for the vocabulary, or an `output` that exists already.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size is {vocab_size}, expected at least {SMALLEST_VOCABULARY} (all bytes and the special tokens)"
        )
    file = Path(output) / "tokenizer.json"
    if file.exists():
        raise UserError(f"{file}: exists already; give another folder, or remove it")
    sources = find_sources(inputs)
    tokenizer = _train(_texts(sources, text_bytes, text_field, txt_split), vocab_size, progress)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(
            f"the text gives a vocabulary of {found} entries only, not {vocab_size}: give more text or a smaller --vocab-size"
        )
    with named_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        names = {"unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END}
        file.with_name("tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n")
        staging = file.with_suffix(".partial")
        tokenizer.save(str(staging))
        os.replace(staging, file)
    return file


def _train(texts: Iterator[str], vocab_size: int, progress: bool):  # type: ignore[no-untyped-def]  # (a library without types)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(sources: list[Source], text_bytes: int, text_field: str, txt_split: str) -> Iterator[str]:
    """The documents at the beginning of each file, an equal share of the bytes from each."""
    share = max(1, text_bytes // len(sources))
    for source in tqdm(sources, desc="reading", unit="file", disable=len(sources) == 1):
        read = 0
        whole = Stretch(source, 0, source.path.stat().st_size, (0, sys.maxsize) if source.kind == ".parquet" else None)
        for chunk in read_chunks(whole, text_field=text_field, txt_split=txt_split):
            for record in chunk.records:
                try:
                    text = to_text(source, record, text_field)
                except BadRecord:
                    continue
                read += len(record.content or b"")
                yield text
            if read >= share:
                break


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".txt, .jsonl (plain, .gz, .zst), .parquet, or folders"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--vocab-size", type=int, default=32000, help="entries, special tokens and bytes included")
    parser.add_argument(
        "--text-bytes", type=int, default=DEFAULT_TEXT_BYTES, help="text to train on, an equal share of each file"
    )
    parser.add_argument("--text-field", default="text", help="JSON field or table column with the text")
    parser.add_argument("--txt-split", choices=TXT_SPLITS, default="file", help="what one document of a .txt is")
    given = vars(parser.parse_args(arguments))
    try:
        print(f"{train(given.pop('inputs'), given.pop('output'), **given)}: {given['vocab_size']} entries")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
