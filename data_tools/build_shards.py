"""Text files -> token shards: OUT/train, OUT/validation, OUT/tokenizer.

    python data_tools/build_shards.py INPUT… --tokenizer PATH --output OUT

The stream is every document in the order of the inputs, each closed by EOS. A document goes to the validation side by a hash of
its text, so that equal documents never lie on both sides. Tokenising runs in processes; the shards are the same bytes for any
number of them. The folder OUT appears, whole, when everything is on disk; a finished OUT is never written again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_tools.sources import TXT_SPLITS, Source, find_sources, read_chunks
from data_tools.tokenise import BAD_LINES, Options, tokenise
from megarat.data.format import INDEX_NAME, Index, Piece, ShardWriter, file_sha256, named_errors, sync_folder
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, UserError


class Result(NamedTuple):
    """What lies in the output: `validation` is None when no document was held out; `built` is False when it was there already."""

    train: Index
    validation: Index | None
    built: bool


def build(
    inputs: Iterable[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    options: Options = Options(),  # noqa: B008 (frozen)
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Result:
    """Builds a corpus, or finds it built.

    Args:
        inputs: files and folders; see `data_tools.sources` for the types.
        tokenizer: see `megarat.data.tokenizer.load_tokenizer`.
        output: folder to make.
        options: what decides the bytes.
        workers: processes that tokenise; None = as many as there are cores, 1 = this process.
        progress: show a bar on standard error.

    Raises:
        UserError: bad input, an `output` that holds something else, a full disk. Nothing is left behind.
    """
    output = Path(output)
    opened = load_tokenizer(tokenizer)
    sources = find_sources(inputs)
    workers = workers or len(os.sched_getaffinity(0))
    provenance = {"inputs": _describe(sources, workers), "options": asdict(options)}
    if _is_finished(output, provenance, opened):
        return _read_result(output, built=False)
    with _staging_folder(output) as staging:
        _write_corpus(staging, sources, opened, options, provenance, workers, progress)
        _copy_tokenizer(opened, staging / "tokenizer")
    return _read_result(output, built=True)


def _describe(sources: list[Source], workers: int) -> list[dict[str, Any]]:
    """Name, size and hash of every input file. Hashing runs in threads, since it releases the interpreter."""
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(lambda source: file_sha256(source.path), sources)
        return [
            {"name": source.name, "bytes": source.path.stat().st_size, "sha256": sha256}
            for source, sha256 in zip(sources, hashes, strict=True)
        ]


def _is_finished(output: Path, provenance: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether `output` holds just this corpus.

    Raises:
        UserError: it holds another corpus or something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "train" / INDEX_NAME).is_file():
        raise UserError(f"{output}: exists and is not a finished corpus; give a folder that does not exist yet")
    index = Index.read(output / "train")
    found = {"tokenizer": index.tokenizer.sha256, "inputs": index.source.get("inputs"), **index.source.get("options", {})}
    wanted = {"tokenizer": tokenizer.info.sha256, "inputs": provenance["inputs"], **provenance["options"]}
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        raise UserError(
            f"{output}: holds a finished corpus made with other {' and other '.join(different)}; give another folder, or remove it"
        )
    return True


def _read_result(output: Path, *, built: bool) -> Result:
    has_validation = (output / "validation").is_dir()
    return Result(Index.read(output / "train"), Index.read(output / "validation") if has_validation else None, built)


@contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes `output` by one rename, or is removed.

    What a killed build left there is removed; a build that still runs is told by its lock.
    """
    staging = output.absolute().parent / f".{output.absolute().name}.partial"
    with named_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
    try:
        _lock(descriptor, staging)
        try:
            _empty(staging)
            yield staging
            with named_errors(output):
                sync_folder(staging)
                os.rename(staging, output)
                sync_folder(staging.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, staging: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{staging}: another build of the same output is running") from None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_corpus(
    staging: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    options: Options,
    provenance: dict[str, Any],
    workers: int,
    progress: bool,
) -> None:
    """Writes both sides of the corpus; a side without documents gets no folder.

    Raises:
        UserError: from reading, tokenising or writing; or no document is left to train on.
    """
    chunks = (chunk for s in sources for chunk in read_chunks(s, text_field=options.text_field, txt_split=options.txt_split))
    left_out: Counter[str] = Counter()
    with ExitStack() as stack:
        bar = stack.enter_context(_Progress(sum(entry["bytes"] for entry in provenance["inputs"]), shown=progress))
        train, validation = (_Side(stack, staging / side, tokenizer, options) for side in ("train", "validation"))
        for done in tokenise(chunks, tokenizer, options, workers):
            train.add(done.train)
            validation.add(done.validation)
            left_out += done.left_out
            bar.advance(done.consumed, len(done.train.tokens) + len(done.validation.tokens))
        if train.documents == 0:
            raise UserError(_empty_message(sources, validation.documents, left_out))
        for side in (train, validation):
            side.finish({**provenance, "split": side.folder.name, "left_out": dict(left_out)})


class _Side:
    """One of the two streams being written."""

    def __init__(self, stack: ExitStack, folder: Path, tokenizer: Tokenizer, options: Options):
        self.folder = folder
        self.documents = 0
        self._writer = stack.enter_context(
            ShardWriter(
                folder,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                tokenizer=tokenizer.info,
                block_tokens=options.block_tokens,
                shard_tokens=options.shard_tokens,
            )
        )

    def add(self, piece: Piece) -> None:
        self.documents += len(piece.ends)
        self._writer.add(piece)

    def finish(self, source: dict[str, Any]) -> None:
        if self.documents:
            self._writer.finish(source)
        else:
            self.folder.rmdir()


def _empty_message(sources: list[Source], held_out: int, left_out: Counter[str]) -> str:
    reasons = [f"{number} {reason}" for reason, number in sorted(left_out.items())]
    if held_out:
        reasons.append(f"{held_out} held out for validation (lower --held-out, or see --txt-split)")
    files = ", ".join(str(source.path) for source in sources[:3]) + (", …" if len(sources) > 3 else "")
    return f"empty corpus: no document to train on in {files} ({'; '.join(reasons) or 'no records'})"


def _copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Puts the tokenizer's files beside the shards, so that the corpus is complete by itself."""
    with named_errors(folder):
        folder.mkdir()
        for file in tokenizer.files:
            shutil.copyfile(file, folder / file.name)
            with open(folder / file.name, "rb") as copied:
                os.fsync(copied.fileno())


class _Progress:
    """A bar over the bytes of the inputs that also tells the tokens made, their rate and the time left."""

    def __init__(self, total_bytes: int, *, shown: bool):
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenising", disable=not shown, dynamic_ncols=True)
        self._tokens = 0
        self._start = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, consumed: int, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{self._tokens / 1e6:.1f}M tokens, {rate / 1e3:.0f}k tokens/s", refresh=False)
        self._bar.update(consumed)


def _parser() -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in fields(Options)}
    parser = argparse.ArgumentParser(
        description="Text files to token shards.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help=".txt, .jsonl (plain, .gz, .zst), .parquet, or folders"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model, tokenizer.json, or a folder with one")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--held-out", type=float, help="share of the documents for validation")
    parser.add_argument("--text-field", help="JSON field or table column with the text")
    parser.add_argument(
        "--txt-split", choices=TXT_SPLITS, help="what one document of a .txt is; paragraphs lie between blank lines"
    )
    parser.add_argument("--bad-lines", choices=BAD_LINES, help="what to do with malformed lines and rows")
    parser.add_argument("--block-tokens", type=int, help="tokens of a block")
    parser.add_argument("--shard-tokens", type=int, help="tokens of a shard, a multiple of the block's")
    parser.add_argument("--seed", type=int, help="of the held-out split")
    parser.add_argument("--workers", type=int, help="processes that tokenise (all cores if not given)")
    parser.set_defaults(**defaults)
    return parser


def _report(result: Result, output: Path, options: Options) -> None:
    print(f"{output}: {'built' if result.built else 'already built from the same inputs and options; nothing written'}")
    for side, index in (("train", result.train), ("validation", result.validation)):
        if index is not None:
            print(f"  {side}: {index.total_tokens:,} tokens, {index.total_documents:,} documents, {len(index.shards)} shards")
    for reason, number in sorted(result.train.source["left_out"].items()):
        print(f"  left out: {number:,} {reason} records")
    if result.validation is None and options.held_out > 0:
        print(f"  no validation side: none of the documents fell into the held-out share of {options.held_out}; raise --held-out")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
        if given.workers is not None and given.workers < 1:
            raise UserError(f"--workers is {given.workers}, expected at least 1")
        _report(build(given.inputs, given.tokenizer, given.output, options, workers=given.workers), given.output, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
