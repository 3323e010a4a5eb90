"""Text files -> token shards: OUT/train, OUT/validation, OUT/tokenizer.

    python data_tools/build_shards.py INPUT… --tokenizer PATH --output OUT
    mpirun -n 4 python data_tools/build_shards.py …        several processes, also over several hosts (srun likewise)

The stream is every document in the order of the inputs, each closed by EOS. A document goes to the validation side by a hash of
its text, so that equal documents never lie on both sides. First the parts of the input are turned into tokens, by as many ranks
and processes as there are; then the shards are cut from all tokens in order. The bytes are the same for any number of either.

The folder OUT appears, whole, when everything is on disk; a finished OUT is never written again. Until then the work lies in
.OUT.partial beside it: a build that was stopped, killed or met bad input goes on from its finished parts and shards when it is
started again, as far as they still come from the same input. Ranks share that folder, so it must be on a common file system.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_tools.assemble import ShardFolder, make_stream
from data_tools.parts import PART_BYTES, Part, PartFolder, PartRecord, chunks_of, plan_parts
from data_tools.sources import TXT_SPLITS, Source, find_sources
from data_tools.team import Interrupted, Team, find_team, launched_rank
from data_tools.tokenise import BAD_LINES, SIDES, Options, tokenise
from megarat.data.format import INDEX_NAME, Index, Shard, file_sha256, named_errors, token_dtype
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, UserError
from megarat.files import sync


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
    part_bytes: int = PART_BYTES,
    progress: bool = True,
    team: Team | None = None,
) -> Result:
    """Builds a corpus, or finds it built. Every rank of the team makes the same call.

    Args:
        inputs: files and folders; see `data_tools.sources` for the types.
        tokenizer: see `megarat.data.tokenizer.load_tokenizer`.
        output: folder to make.
        options: what decides the bytes.
        workers: processes that tokenise; None = as many as this rank has cores, 1 = this process.
        part_bytes: input, as stored, that a rank takes at a time and an interrupted build keeps.
        progress: show a bar on standard error.
        team: the processes that share the work; this one alone if not given.

    Raises:
        UserError: bad input, an `output` that holds something else, a full disk.
        Interrupted: a signal asked to stop. In both cases finished parts stay, and nothing else does.
    """
    team = team or Team()
    workers = workers or team.cores()
    with team.listening():
        opened, sources = team.together(lambda: (load_tokenizer(tokenizer), find_sources(inputs)))
        job = _Job(sources, _hash_inputs(sources, workers, team), opened, Path(output), options, workers)
        if team.together(lambda: _is_finished(job)):
            if team.rank == 0:
                _remove_leftover(_staging_path(job.output))
            return _read_result(job.output, built=False)
        with _staging_folder(job, team) as staging:
            parts = team.together(lambda: plan_parts(sources, job.hashes, opened, options, part_bytes))
            folder = PartFolder(staging / "parts", token_dtype(opened.vocab_size), with_digests=options.deduplicate)
            team.together(lambda: _tokenise_parts(job, folder, parts, team, progress and team.rank == 0))
            corpus = _assemble(job, staging, folder, parts, team)
            team.together(lambda: _publish(corpus, job.output) if team.rank == 0 else None)
    return _read_result(job.output, built=True)


class _Job(NamedTuple):
    """What is to be done."""

    sources: list[Source]
    hashes: list[str]  # SHA-256 of each input file
    tokenizer: Tokenizer
    output: Path
    options: Options
    workers: int

    @property
    def provenance(self) -> dict[str, Any]:
        """What an index records under `source`."""
        inputs = [
            {"name": source.name, "bytes": source.path.stat().st_size, "sha256": sha256}
            for source, sha256 in zip(self.sources, self.hashes, strict=True)
        ]
        return {"inputs": inputs, "options": asdict(self.options)}


def _hash_inputs(sources: list[Source], workers: int, team: Team) -> list[str]:
    """SHA-256 of every input file; each rank hashes its share, in threads, since hashing releases the interpreter."""

    def hash_own() -> list[str]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda source: _hash_input(source, team), sources[team.rank :: team.size]))

    by_rank = team.gather(team.together(hash_own))
    return [by_rank[n % team.size][n // team.size] for n in range(len(sources))]


def _hash_input(source: Source, team: Team) -> str:
    with named_errors(source.path, "read"):
        return file_sha256(source.path, lambda done: team.check())


def _is_finished(job: _Job) -> bool:
    """Whether the output holds just this corpus.

    Raises:
        UserError: it holds another corpus or something else.
    """
    output = job.output
    with named_errors(output, "read"):
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return False
    if not (output / "train" / INDEX_NAME).is_file():
        raise UserError(f"{output}: exists and is not a finished corpus; give a folder that does not exist yet")
    index = Index.read(output / "train")
    provenance = job.provenance
    options = {**asdict(Options()), **index.source.get("options", {})}  # an option it does not know is as it was before
    found = {"tokenizer": index.tokenizer.sha256, "eos_id": index.eos_id, "inputs": index.source.get("inputs"), **options}
    wanted = {"tokenizer": job.tokenizer.sha256, "eos_id": job.tokenizer.eos_id, "inputs": provenance["inputs"]}
    wanted |= provenance["options"]
    if different := [key for key in wanted if found.get(key) != wanted[key]]:
        raise UserError(
            f"{output}: holds a finished corpus made with other {' and other '.join(different)}; give another folder, or remove it"
        )
    return True


def _read_result(output: Path, *, built: bool) -> Result:
    has_validation = (output / "validation").is_dir()
    return Result(Index.read(output / "train"), Index.read(output / "validation") if has_validation else None, built)


def _staging_path(output: Path) -> Path:
    return output.absolute().parent / f".{output.absolute().name}.partial"


def _remove_leftover(staging: Path) -> None:
    """Frees the disk of what a build has left that was killed after its last rename: the tokens of all parts, out of sight."""
    with suppress(OSError):  # there is none, most often; or its build is still clearing up
        descriptor = _lock(staging)
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _staging_folder(job: _Job, team: Team) -> Iterator[Path]:
    """The hidden folder of the work beside the output; it goes when the work is done, or when nothing finished is in it.

    Raises:
        UserError: it cannot be made, or a build of the same output is running.
    """
    staging = _staging_path(job.output)
    descriptor = team.together(lambda: _make_staging(staging) if team.rank == 0 else None)
    team.watch(staging / "stop")
    try:
        yield staging
        if team.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
    except (UserError, Interrupted):
        if team.rank == 0 and not any((staging / "parts").glob("*.json")):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _make_staging(staging: Path) -> int:
    """Makes the folders of the work and locks them; returns the descriptor that holds the lock."""
    with named_errors(staging):
        for folder in (staging, staging / "parts", staging / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _lock(staging)
        except BlockingIOError:
            raise UserError(f"{staging}: another build of the same output is running") from None
    (staging / "stop").unlink(missing_ok=True)
    return descriptor


def _lock(staging: Path) -> int:
    """Locks the folder of the work; returns the descriptor that holds the lock. Raises ``BlockingIOError`` where another build has it."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _tokenise_parts(job: _Job, folder: PartFolder, parts: list[Part], team: Team, progress: bool) -> None:
    """This rank's share of the parts that are not finished yet."""
    own = parts[team.rank :: team.size]
    missing = [part for part in own if folder.find(part) is None]
    with _Progress("tokenising", sum(part.bytes for part in own), shown=progress) as bar:
        bar.skip(sum(part.bytes for part in own) - sum(part.bytes for part in missing))
        tokenised = tokenise(chunks_of(missing, job.options), job.tokenizer, job.options, job.workers)
        with closing(tokenised), closing(folder.write(missing, tokenised)) as written:
            for done in written:
                bar.advance(done.consumed, len(done.train.tokens) + len(done.validation.tokens))
                team.check()


def _assemble(job: _Job, staging: Path, folder: PartFolder, parts: list[Part], team: Team) -> Path:
    """Cuts the shards from the finished parts; returns the folder of the whole corpus.

    Raises:
        UserError: from writing; or no document is left to train on.
    """
    records = team.together(lambda: [_record(folder, part) for part in parts])
    fingerprint = hashlib.sha256(repr(([part.fingerprint for part in parts], job.options)).encode()).hexdigest()
    left_out = sum((Counter(record.left_out) for record in records), Counter[str]())
    streams = {side: make_stream(side, folder, records, team, deduplicate=job.options.deduplicate) for side in SIDES}
    if duplicates := sum(len(stream.dropped) for stream in streams.values()):
        left_out["duplicate"] = duplicates
    if streams["train"].documents == 0:
        for part in parts:  # nothing here is worth keeping
            folder.path(part.number, "json").unlink(missing_ok=True)
        raise UserError(_empty_message(job.sources, streams["validation"].documents, left_out))
    corpus = staging / "corpus"
    for side, stream in streams.items():
        shards = ShardFolder(corpus, staging / "shards", stream, job.options, fingerprint).write(team, job.workers)
        provenance = {**job.provenance, "split": side, "left_out": dict(left_out)}
        team.together(lambda: _finish_side(job, corpus / side, shards, provenance) if team.rank == 0 else None)  # noqa: B023 (called at once)
    team.together(lambda: _copy_tokenizer(job.tokenizer, corpus / "tokenizer") if team.rank == 0 else None)
    return corpus


def _record(folder: PartFolder, part: Part) -> PartRecord:
    record = folder.find(part)
    if record is None:
        raise UserError(
            f"{folder.path(part.number, 'json')}: not there or damaged although its rank has finished; ranks on several hosts need"
            " an output on a file system that all of them share"
        )
    return record


def _finish_side(job: _Job, folder: Path, shards: list[Shard], source: dict[str, Any]) -> None:
    """Writes the index of a side, and removes what an earlier build with other input left beside its shards."""
    known = {shard.file for shard in shards}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
    if not shards:
        with suppress(FileNotFoundError):
            folder.rmdir()
        return
    Index(
        location=str(folder),
        dtype=token_dtype(job.tokenizer.vocab_size),
        vocab_size=job.tokenizer.vocab_size,
        eos_id=job.tokenizer.eos_id,
        block_tokens=job.options.block_tokens,
        tokenizer=job.tokenizer.info,
        shards=tuple(shards),
        source=source,
    ).write()


def _publish(corpus: Path, output: Path) -> None:
    """The one rename that makes the output."""
    with named_errors(output):
        sync(corpus)
        os.rename(corpus, output)
        sync(output.absolute().parent)


def _empty_message(sources: list[Source], held_out: int, left_out: Counter[str]) -> str:
    reasons = [f"{number} {reason}" for reason, number in sorted(left_out.items())]
    if held_out:
        reasons.append(f"{held_out} held out for validation (lower --held-out, or see --txt-split)")
    files = ", ".join(str(source.path) for source in sources[:3]) + (", …" if len(sources) > 3 else "")
    return f"empty corpus: no document to train on in {files} ({'; '.join(reasons) or 'no records'})"


def _copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Puts the tokenizer's files beside the shards, so that the corpus is complete by itself. What an earlier build left there goes."""
    with named_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in tokenizer.files:
            shutil.copyfile(file, folder / file.name)
            with open(folder / file.name, "rb") as copied:
                os.fsync(copied.fileno())


class _Progress:
    """A bar over the bytes of the inputs that also tells the tokens made, their rate and the time left."""

    def __init__(self, title: str, total_bytes: int, *, shown: bool):
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=title, disable=not shown, dynamic_ncols=True)
        self._tokens = 0
        self._start = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def skip(self, done: int) -> None:
        """Counts bytes that an earlier build has done; they do not count in the rate."""
        self._bar.initial = done
        self._bar.update(done)

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
    parser.add_argument(
        "--deduplicate", action=argparse.BooleanOptionalAction, help="keep only the first of documents with the same text"
    )
    parser.add_argument("--workers", type=int, help="processes that tokenise, of each rank (its cores if not given)")
    parser.add_argument(
        "--part-bytes",
        type=int,
        default=PART_BYTES,
        help="input that a rank takes at a time and an interrupted build keeps; does not change the output",
    )
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
    """The command line; returns the exit code. Under mpirun or srun rank 0 speaks for all."""
    given = _parser().parse_args(arguments)
    team = Team()
    try:
        options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
        if given.workers is not None and given.workers < 1:
            raise UserError(f"--workers is {given.workers}, expected at least 1")
        if given.part_bytes < 1:
            raise UserError(f"--part-bytes is {given.part_bytes}, expected at least 1")
        team = find_team()
        result = build(
            given.inputs,
            given.tokenizer,
            given.output,
            options,
            workers=given.workers,
            part_bytes=given.part_bytes,
            team=team,
        )
        if team.rank == 0:
            _report(result, given.output, options)
    except UserError as error:
        return _end(f"error: {error}", EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt):
        return _end("interrupted; finished parts are kept: the same command goes on from them", EXIT_STOPPED)
    except Exception:
        team.abort()
        raise
    return EXIT_OK


def _end(message: str, code: int) -> int:
    if launched_rank() == 0:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
