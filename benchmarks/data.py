"""`python -m benchmarks.data [--tokenizer PATH --text FILE.jsonl]`: measures the data tools and the loader, writes docs/data.md's table.

Every figure comes with the processor seconds it cost where that is what matters: on a machine that does other things as well, wall
clocks say how busy it was. Without --text and --tokenizer both are made up here, which flatters nobody but shows the same ratios.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import itertools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import ROOT, commit
from benchmarks.tables import between

DOCUMENT = ROOT / "docs" / "data.md"
MARKERS = ("<!-- measured: begin -->", "<!-- measured: end -->")

LENGTH, GLOBAL_BATCH = 4096, 512
H200_TOKENS_PER_S = 30_000  # what one H200 trains of the 1.5B model, of which the loader must give 20 times as much


class Row(NamedTuple):
    what: str
    value: str


@contextmanager
def stopwatch() -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields a function that gives (wall, processor) seconds since the start, those of ended child processes included."""
    wall, cpu = time.perf_counter(), _cpu()
    yield lambda: (time.perf_counter() - wall, _cpu() - cpu)


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# --- the index and the order --------------------------------------------------------------------------------------------------


def write_big_index(folder: Path, tokens: int) -> None:
    """The index of a corpus that is not there: full shards of 1024 blocks, documents of about 1000 tokens."""
    from megarat.data.format import DEFAULT_BLOCK_TOKENS, DEFAULT_SHARD_TOKENS, Index, Shard, TokenizerInfo, block_sizes

    random = np.random.default_rng(0)
    shards = []
    for number, start in enumerate(range(0, tokens, DEFAULT_SHARD_TOKENS)):
        held = min(DEFAULT_SHARD_TOKENS, tokens - start)
        sizes = block_sizes(held, DEFAULT_BLOCK_TOKENS)
        ends = random.integers(40, 90, len(sizes))
        members = 1024 + -(-(128 + 2 * sizes) // 512) * 512 + -(-(128 + 4 * ends) // 512) * 512
        offsets = np.cumsum(members) - members + 640
        crc32 = random.integers(0, 1 << 32, len(sizes), dtype=np.uint32)
        shards.append(Shard(f"{number:06d}.tar", int(members.sum()) + 10240, "0" * 64, held, int(ends.sum()), offsets, crc32))
    made_by = TokenizerInfo("none", "sentencepiece", "0" * 64)
    Index(str(folder), np.dtype("<u2"), 32000, 2, DEFAULT_BLOCK_TOKENS, made_by, tuple(shards), {}).write()


def measure_index(folder: Path) -> list[Row]:
    from megarat.data.format import Index
    from megarat.data.plan import ShuffledPlan

    tokens = 200 * 10**9
    writer = multiprocessing.get_context("spawn").Process(target=write_big_index, args=(folder, tokens))
    writer.start()  # elsewhere, so that its memory is not here to be used again
    writer.join()
    before = _resident_mb()
    with stopwatch() as elapsed:
        index = Index.read(folder)
        plan = ShuffledPlan(index.total_tokens, LENGTH, seed=1)
        plan.starts(np.arange(GLOBAL_BATCH) + 123 * 10**6)
        wall, cpu = elapsed()
    memory = _resident_mb() - before
    with stopwatch() as elapsed:
        for position in range(0, 10**8, 10**6):
            plan.starts(np.arange(GLOBAL_BATCH) + position)
        seek = elapsed()[0] / 100
    size = (folder / "index.json").stat().st_size / 1e6
    order = plan.starts(np.arange(1 << 17)) // LENGTH
    distance = np.abs(np.diff(order)) / plan.samples_per_epoch
    near = float(np.mean(np.abs(np.diff(order)) < 16))
    return [
        Row("index of 200B tokens: file", f"{size:.0f} MB, {len(index.shards):,} shards"),
        Row("… opened and sought to a position", f"{wall:.2f} s ({cpu:.2f} s of processor), +{memory:.0f} MB resident"),
        Row("… sought to another position, places of a batch of 512", f"{seek * 1e3:.2f} ms"),
        Row("distance between the sources of neighbours, of the corpus", f"{distance.mean():.4f} (independent: 0.3333)"),
        Row("neighbours out of one run of 16 sequences", f"{near:.2e} (1 in 2048 runs: {15 / 16 / 2048:.2e})"),
    ]


# --- the loader ---------------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, tokens: int) -> None:
    """Random documents of 1000 tokens."""
    from megarat.data.format import Piece, ShardWriter, TokenizerInfo

    random = np.random.default_rng(0)
    made_by = TokenizerInfo("none", "sentencepiece", "0" * 64)
    with ShardWriter(folder, vocab_size=32000, eos_id=2, tokenizer=made_by) as writer:
        for _ in range(tokens // 10**6):
            stream = random.integers(3, 32000, 10**6).astype("<u2")
            stream[999::1000] = 2
            writer.add(Piece(stream, np.arange(1000, 10**6 + 1, 1000)))
        writer.finish({})


def _loader(location: str | Path, global_batch: int, cache: Any = None, **options: Any) -> Any:
    from megarat.data.loader import Loader
    from megarat.data.plan import ShuffledPlan
    from megarat.data.reader import TokenReader

    reader = TokenReader(location, cache)
    plan = ShuffledPlan(reader.num_tokens, LENGTH, seed=1)
    return Loader(reader, plan, sequence_length=LENGTH, global_batch=global_batch, micro_batch=2, **options)


def measure_loader(folder: Path) -> list[Row]:
    write_corpus(folder, 200 * 10**6)
    rows = []
    for name, options in (("packed", {}), ("separate", {"separate_documents": True})):
        loader = _loader(folder, 64, **options)
        before = _resident_mb()
        pairs = 100
        with stopwatch() as elapsed:
            for n in range(pairs):
                loader.pair(n)
            wall, cpu = elapsed()
        tokens = pairs * 64 * LENGTH
        rows.append(
            Row(
                f"loader, documents {name}, one process, files in the page cache",
                f"{tokens / wall / 1e6:.1f}M tokens/s; {tokens / cpu / 1e6:.1f}M a processor second;"
                f" +{_resident_mb() - before:.0f} MB resident after {tokens / 1e6:.0f}M tokens",
            )
        )
    return [*rows, _measure_wait(folder)]


def _measure_wait(folder: Path) -> Row:
    """A step that takes as long as an H200 would for 32 sequences, with the loader's thread beside it."""
    seconds = 32 * LENGTH / (20 * H200_TOKENS_PER_S)
    pairs = _loader(folder, 32).iterate(0)
    next(pairs)
    waits = []
    for _ in range(60):
        time.sleep(seconds)
        start = time.perf_counter()
        next(pairs)
        waits.append(time.perf_counter() - start)
    pairs.close()
    share = sum(waits) / (len(waits) * seconds + sum(waits))
    return Row(
        f"data wait of steps that use {20 * H200_TOKENS_PER_S:,} tokens/s",
        f"{share:.2%} of the time, at most {max(waits) * 1e3:.1f} ms",
    )


class _RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Python's file server with the one kind of range that the reader asks for."""

    def send_head(self) -> Any:
        wanted = self.headers.get("Range")
        if wanted is None:
            return super().send_head()
        start, stop = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        file = open(self.translate_path(self.path), "rb")  # noqa: SIM115 (closed by the server)
        file.seek(start)
        self.send_response(206)
        self.send_header("Content-Length", str(stop + 1 - start))
        self.end_headers()
        self.wfile.write(file.read(stop + 1 - start))
        file.close()
        return None

    def log_message(self, *_: object) -> None:
        pass


def measure_remote(folder: Path, cache_folder: Path) -> list[Row]:
    from megarat.data.store import Cache

    handler = functools.partial(_RangeHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        limit = 100 * 10**6
        loader = _loader(f"http://127.0.0.1:{server.server_port}", 64, Cache(cache_folder, limit))
        pairs = 40
        with stopwatch() as elapsed:
            for n in range(pairs):
                loader.pair(n)
            wall = elapsed()[0]
        server.shutdown()
    held = sum(path.stat().st_size for path in cache_folder.rglob("*") if path.is_file())
    tokens = pairs * 64 * LENGTH
    return [
        Row(
            "loader from a web server on the same host, cache of 100 MB",
            f"{tokens / wall / 1e6:.2f}M tokens/s; {held / 1e6:.0f} MB in the cache at the end",
        )
    ]


# --- the tools ----------------------------------------------------------------------------------------------------------------


def make_text(path: Path) -> None:
    """Documents of made-up words with the frequencies of a language (Zipf's law)."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(random.choice(letters, random.integers(2, 11))) for _ in range(30_000)]
    with open(path, "w") as file:
        for _ in range(4000):
            numbers = np.minimum(random.zipf(1.2, 700), len(words)) - 1
            file.write(json.dumps({"text": " ".join(words[number] for number in numbers)}) + "\n")


def measure_build(folder: Path, tokenizer_path: Path | None, text: Path | None) -> list[Row]:
    from data_tools.build_shards import build
    from data_tools.tokenise import Options
    from data_tools.train_tokenizer import train
    from megarat.data.format import verify
    from megarat.data.tokenizer import load_tokenizer

    if text is None:
        make_text(text := folder / "text.jsonl")
    if tokenizer_path is None:
        tokenizer_path = train([text], folder / "tokenizer", vocab_size=8000, progress=False)
    tokenizer = load_tokenizer(tokenizer_path)
    options = Options(deduplicate=True)
    with _timed_encode(type(tokenizer)) as encoding, stopwatch() as elapsed:
        result = build([text], tokenizer_path, folder / "out", options, workers=1, progress=False)
        wall, cpu = elapsed()
    tokens = sum(index.total_tokens for index in (result.train, result.validation) if index is not None)
    rows = [
        Row(
            f"build_shards, de-duplicating, one process ({tokenizer.kind}, {tokens / 1e6:.1f}M tokens)",
            f"{tokens / cpu / 1e3:.0f}k tokens a processor second; {encoding.seconds / cpu:.1%} of it in the tokenizer itself",
        )
    ]
    rows.append(_measure_processes(folder, tokenizer_path, text, options, tokens))
    with stopwatch() as elapsed:
        index = verify(result.train.folder, workers=len(os.sched_getaffinity(0)))
        wall = elapsed()[0]
    rows.append(Row("verify_shards", f"{sum(shard.bytes for shard in index.shards) / wall / 1e9:.2f} GB/s of wall clock"))
    return [*rows, *_measure_long_documents(tokenizer, text)]


def _measure_processes(folder: Path, tokenizer_path: Path, text: Path, options: Any, tokens: int) -> Row:
    """The build against processes that do nothing but parse lines and encode them; both in turn, the best of three of each."""
    from data_tools.build_shards import build

    cores = len(os.sched_getaffinity(0))
    builds, alone = [], []
    for attempt in range(3):
        with stopwatch() as elapsed:
            build([text], tokenizer_path, folder / f"again{attempt}", options, workers=cores, progress=False)
            builds.append(elapsed()[1])
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool, stopwatch() as elapsed:
            encoded = sum(pool.map(_encode_share, [(tokenizer_path, text, n, cores) for n in range(cores)]))
            pool.shutdown()
            alone.append(elapsed()[1])
    return Row(
        f"build_shards with {cores} processes against {cores} processes that only encode, starts included",
        f"{tokens / min(builds) / 1e3:.0f}k against {encoded / min(alone) / 1e3:.0f}k tokens a processor second"
        f" ({min(alone) / min(builds) * tokens / encoded:.0%})",
    )


def _encode_share(task: tuple[Path, Path, int, int]) -> int:
    """Tokens, with one EOS a document, of every `step`-th line of a file from line `first` on."""
    from megarat.data.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer_path, text, first, step = task
    tokenizer = load_tokenizer(tokenizer_path)
    with open(text) as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, first, None, step)]
    return sum(len(ids) + 1 for n in range(0, len(texts), 200) for ids in tokenizer.encode(texts[n : n + 200]))


class _Encoding:
    """Processor seconds spent in a tokenizer."""

    seconds = 0.0


@contextmanager
def _timed_encode(kind: Any) -> Iterator[_Encoding]:
    """Counts what every call of a tokenizer costs: inside one build, so that both figures see the same machine."""
    encode, total = kind.encode, _Encoding()

    def timed(self: Any, texts: Any) -> Any:
        start = time.process_time()
        ids = encode(self, texts)
        total.seconds += time.process_time() - start
        return ids

    kind.encode = timed
    try:
        yield total
    finally:
        kind.encode = encode


def _measure_long_documents(tokenizer: Any, text: Path) -> list[Row]:
    with open(text) as file:
        whole = "\n".join(json.loads(line)["text"] for line in file)
    whole = whole * (1 + 10**7 // len(whole))
    times = []
    for size in (10**5, 10**6, 10**7):
        with stopwatch() as elapsed:
            tokenizer.encode([whole[:size]])
            times.append(f"{size / 1e6:g} MB {elapsed()[1]:.2f} s")
    return [Row("one document of", ", ".join(times) + " of processor")]


# --- all together -------------------------------------------------------------------------------------------------------------


def _isolated(case: str, arguments: list[str]) -> list[Row]:
    """A case in its own process, so that memory and caches of one do not show in another."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--case", case, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return [Row(*values) for values in json.loads(done.stdout.splitlines()[-1])]


def _run_case(case: str, given: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        if case == "index":
            return measure_index(folder)
        if case == "loader":
            return measure_loader(folder)
        if case == "remote":
            write_corpus(folder / "corpus", 100 * 10**6)
            return measure_remote(folder / "corpus", folder / "cache")
        return measure_build(folder, given.tokenizer, given.text)


CASES = ("index", "loader", "remote", "build")


def table(rows: list[Row], command: str) -> str:
    """The rows as Markdown, with what they depend on."""
    import torch

    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[1]
    head = (
        f"`{command}`, commit {commit()}, Python"
        f" {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}; {_processor()}, {cores} cores, load"
        f" {load:.1f} from other work and this:"
    )
    return "\n".join([head, "", "| what | measured |", "|---|---|", *(f"| {row.what} | {row.value} |" for row in rows)])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_table(text: str) -> None:
    """Puts the table between the markers of docs/data.md."""
    DOCUMENT.write_text(between(DOCUMENT.read_text(), *MARKERS, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="for the measurement of the tools; trained here if not given")
    parser.add_argument("--text", type=Path, help="a .jsonl with a field `text`; made up if not given")
    parser.add_argument("--folder", type=Path, help="for files of about 1 GB (the system's temporary folder if not given)")
    parser.add_argument("--case", choices=CASES, help="only this one, as JSON; the document stays as it is")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(_run_case(given.case, given)))
        return
    arguments = sys.argv[1:]
    rows = [row for case in CASES for row in _isolated(case, arguments)]
    named = [f"--{name} {Path(value).name}" for name in ("tokenizer", "text") if (value := getattr(given, name))]
    text = table(rows, " ".join(["python -m benchmarks.data", *named]))
    print(text)
    write_table(text)


if __name__ == "__main__":
    main()
