"""Generation by the 1.5B model on one GPU, through the engine: `python -m benchmarks.inference [--only decode,throughput] [--pattern D=16]`.

Random weights in bf16. Rows are appended to benchmarks/inference.csv, and the tables of docs/inference.md are made anew from the last
row of each case.

    decode      a step of 64 sequences that are almost 4096 tokens long, beside the floor of its bytes
    throughput  as many sequences as fit, in whole tiles of a matrix product: 1024 tokens each behind prompts of 3072 (all the same one, which
                is read once and copied)
    prefill     a prompt of 131072 tokens to its first new token, beside the floor of its arithmetic
    memory      what the allocator was asked for, beside the formula

Steps are timed by the wall clock, with everything the host does in them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import ROOT, Ceilings, environment, measure_ceilings
from benchmarks.tables import append, between, read
from megarat.config import ModelConfig
from megarat.eval.speed import NoText
from megarat.infer.cache import SparseCache, cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.memory import largest_batch
from megarat.infer.reading import read_as
from megarat.infer.sampling import GREEDY, Sampling
from megarat.model.flops import forward_flops_per_token, parameter_count
from megarat.model.lm import RATPlusLM

CSV, PAGE = ROOT / "benchmarks" / "inference.csv", ROOT / "docs" / "inference.md"
BEGIN, END = "<!-- measured: python -m benchmarks.inference -->", "<!-- end of measured -->"
COLUMNS = (
    "time", "gpu", "driver", "torch", "triton", "commit", "copy_tb_s", "matmul_tflop_s", "kind", "pattern", "sequences", "prompt", "new",
    "value", "unit", "floor", "note",
)  # fmt: skip
DENSE = "dense"
_TILE = 128  # rows of a tile of a matrix product
_WARM = 3  # steps before the clock starts, the first of which reads the prompt
Row = dict[str, object]


class Bench:
    """The model, and what the chip can do."""

    def __init__(self, shape: ModelConfig, device: str) -> None:
        self.shape, self.device = shape, device
        with torch.device(device):
            self.model = RATPlusLM(shape).bfloat16().requires_grad_(False).eval()
        for parameter in self.model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, shape.init_std)
        self.ceilings = measure_ceilings() if device == "cuda" else Ceilings(1e10, 1e11)

    def engine(self, pattern: str, rows: int, capacity: int) -> Engine:
        return Engine(
            self.model, read_as(pattern, self.shape), NoText(self.shape.vocab), rows=rows, capacity=capacity, buckets=(rows,)
        )

    def prompt(self, length: int) -> list[int]:
        return torch.randint(3, self.shape.vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step_bytes(self, pattern: str, rows: int, length: int) -> float:
        """Weights once, and of each sequence the slots it sees and its state, read and written."""
        weights = 2.0 * parameter_count(self.shape)
        state = 8 * self.shape.hidden * self.shape.layers
        seen = cache_bytes(self.shape, read_as(pattern, self.shape), length) - state
        return weights + rows * (seen + 2 * state)


def decode(bench: Bench, pattern: str, rows: int, length: int, sampling: Sampling = GREEDY) -> Row:
    """The median of 40 steps, the last ones before ``length`` tokens."""
    engine = bench.engine(pattern, rows, length)
    for _ in range(rows):
        engine.submit(Request(bench.prompt(length - 50), 50, sampling))
    for _ in range(6):  # read, compile, capture
        engine.step()
    times = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    floor = bench.ceilings.floor_ms(bench.step_bytes(pattern, rows, length), 0.0)
    how = "greedy" if sampling == GREEDY else "temperature 0.8, top-p 0.9, penalty 1.1"
    return {
        "kind": "decode", "pattern": pattern, "sequences": rows, "prompt": length - 50, "new": 50,
        "value": round(1e3 * median(times[:40]), 4), "unit": "ms a step", "floor": round(floor, 4), "note": how,
    }  # fmt: skip


def throughput(bench: Bench, pattern: str, prompt: int, new: int, most: int | None = None) -> Row:
    """Tokens a second of the largest batch that fits, from the first steps (read, compile, capture) to the last."""
    each = cache_bytes(bench.shape, read_as(pattern, bench.shape), prompt + new)
    rows = largest_batch(each, bench.device)
    rows = min(rows, most) if most else rows
    rows = rows // _TILE * _TILE if rows > 8 * _TILE else rows
    engine = bench.engine(pattern, rows, prompt + new)
    ids = bench.prompt(prompt)
    for _ in range(rows):
        engine.submit(Request(ids, new))
    for _ in range(_WARM):
        engine.step()
    bench.sync()
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - start
    floors = [bench.ceilings.floor_ms(bench.step_bytes(pattern, rows, n), 0.0) for n in range(prompt, prompt + new, 64)]
    return {
        "kind": "throughput", "pattern": pattern, "sequences": rows, "prompt": prompt, "new": new,
        "value": round(rows * (new - 1 - _WARM) / seconds), "unit": "tokens/s", "floor": round(rows / (sum(floors) / len(floors)) * 1e3),
        "note": f"{rows * each / 2**30:.1f} GiB of cache",
    }  # fmt: skip


def prefill(bench: Bench, pattern: str, length: int) -> Row:
    """The median of three prompts to their first new token, as the host sees it."""
    engine = bench.engine(pattern, 1, length + 1)
    ids = bench.prompt(length)
    times = []
    for _ in range(5):
        engine.submit(Request(ids, 1))
        bench.sync()
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    flop = length * (forward_flops_per_token(bench.shape, read_as(pattern, bench.shape).patterns, length))
    flop -= 2.0 * (length - 1) * bench.shape.vocab * bench.shape.hidden  # only the last token meets the head
    return {
        "kind": "prefill", "pattern": pattern, "sequences": 1, "prompt": length, "new": 1,
        "value": round(1e3 * median(times[2:]), 2), "unit": "ms", "floor": round(bench.ceilings.floor_ms(0.0, flop), 2), "note": "",
    }  # fmt: skip


def memory(bench: Bench, pattern: str, rows: int, length: int) -> Row:
    """MiB a sequence that the allocator was asked for by a cache, its tables and counts of positions aside; the formula stands as the floor."""
    reading = read_as(pattern, bench.shape)
    before = _requested()
    cache = SparseCache(bench.shape, reading, rows, length, torch.bfloat16, bench.device)
    beside = sum(tensor.nbytes for tensor in (*cache.rotary, cache.lengths_B, cache.dropped_B))
    taken = _requested() - before - beside
    return {
        "kind": "memory", "pattern": pattern, "sequences": rows, "prompt": length, "new": 0, "value": taken / rows / 2**20,
        "unit": "MiB a sequence", "floor": cache_bytes(bench.shape, reading, length) / 2**20, "note": "",
    }  # fmt: skip


def _requested() -> int:
    requested: int = torch.cuda.memory_stats()["requested_bytes.all.current"]
    return requested


def cases(bench: Bench, kinds: list[str], wanted: list[str]) -> Iterator[Callable[[], Row]]:
    """In the order of their worth; ``wanted`` are patterns, none: all."""
    for pattern, case in _all_cases(bench, kinds):
        if not wanted or pattern in wanted:
            yield case


def _all_cases(bench: Bench, kinds: list[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    if "decode" in kinds:
        for pattern in ("D=64", "D=16", "D=16,W=256,I=4", DENSE):
            yield pattern, partial(decode, bench, pattern, 64, 4096)
        yield "D=16", partial(decode, bench, "D=16", 64, 4096, Sampling(0.8, 0.9, 1.1))
    if "prefill" in kinds:
        for pattern in ("D=16", DENSE, "D=64"):
            yield pattern, partial(prefill, bench, pattern, 131072)
    if "memory" in kinds:
        for pattern in (DENSE, "D=16,I=4", "D=64,I=4", "D=16,W=256,I=4"):
            yield pattern, partial(memory, bench, pattern, 16, 4096)
    if "throughput" in kinds:
        for pattern in ("D=16", DENSE, "D=64"):
            yield pattern, partial(throughput, bench, pattern, 3072, 1024)


def page(rows: list[dict[str, str]]) -> str:
    """The tables of docs/inference.md."""
    last = list({(row["kind"], row["pattern"], row["note"] if row["kind"] == "decode" else ""): row for row in rows}.values())
    named = ("time", "gpu", "driver", "torch", "triton", "commit", "copy_tb_s", "matmul_tflop_s")
    runs = sorted({tuple(row[name] for name in named) for row in last})
    lines = [
        "| run | GPU | driver | torch | triton | commit | copy TB/s | matmul TFLOP/s |",
        "|---|---|---|---|---|---|---:|---:|",
        *("| " + " | ".join(run) + " |" for run in runs),
    ]
    for kind, (title, head, line) in _TABLES.items():
        own = [row for row in last if row["kind"] == kind]
        dense = next((float(row["value"]) for row in own if row["pattern"] == DENSE), None)
        if own:
            lines += ["", title, "", head, "|---|" + "---:|" * (head.count("|") - 2), *(line(row, dense) for row in own)]
    return "\n".join(lines)


def _times(row: dict[str, str], dense: float | None, more_is_better: bool) -> str:
    if dense is None:
        return ""
    factor = float(row["value"]) / dense if more_is_better else dense / float(row["value"])
    return f"{factor:.1f}"


_TABLES: dict[str, tuple[str, str, Callable[[dict[str, str], float | None], str]]] = {
    "decode": (
        "A decode step of 64 sequences of 4096 tokens; the floor is the bytes of weights, visible slots and states over the copy bandwidth:",
        "| pattern | drawing | ms a step | floor | x floor | x dense |",
        lambda r, d: f"| `{r['pattern']}` | {r['note']} | {float(r['value']):.3f} | {float(r['floor']):.3f} "
        f"| {float(r['value']) / float(r['floor']):.2f} | {_times(r, d, False)} |",
    ),
    "throughput": (
        "Most tokens a second: 1024 new tokens behind prompts of 3072, for the largest batch that fits. The prompts are read before the clock starts; "
        "the floor is the bytes alone:",
        "| pattern | sequences | cache | tokens/s | byte floor | x dense |",
        lambda r, d: f"| `{r['pattern']}` | {r['sequences']} | {r['note'].removesuffix(' of cache')} | {float(r['value']):,.0f} | {float(r['floor']):,.0f} "
        f"| {_times(r, d, True)} |",
    ),
    "prefill": (
        "One prompt of 131072 tokens to its first new token; the floor is the arithmetic over the rate of matrix products:",
        "| pattern | ms | floor | x floor | x dense |",
        lambda r, d: f"| `{r['pattern']}` | {float(r['value']):,.0f} | {float(r['floor']):,.0f} | {float(r['value']) / float(r['floor']):.2f} "
        f"| {_times(r, d, False)} |",
    ),
    "memory": (
        "MiB of cache a sequence of 4096 tokens, as the allocator was asked for, and the formula:",
        "| pattern | measured | formula |",
        lambda r, d: f"| `{r['pattern']}` | {float(r['value']):.4f} | {float(r['floor']):.4f} |",
    ),
}  # fmt: skip


def write_page(results: Path = CSV, target: Path = PAGE) -> None:
    """Put the tables between the marks of the page."""
    target.write_text(between(target.read_text(encoding="utf-8"), BEGIN, END, page(read(results))), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,prefill,memory,throughput")
    parser.add_argument("--pattern", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--results", type=Path, default=CSV)
    parser.add_argument("--page", action="store_true", help="only make the page's tables from the results there are")
    arguments = parser.parse_args()
    if arguments.page:
        write_page(arguments.results)
        return
    bench = Bench(ModelConfig(), "cuda")
    shared = {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"), **environment(),
        "copy_tb_s": round(bench.ceilings.bytes_per_s / 1e12, 3), "matmul_tflop_s": round(bench.ceilings.flop_per_s / 1e12, 1),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in shared.items()), flush=True)
    for case in cases(bench, arguments.only.split(","), arguments.pattern):
        gc.collect()
        torch.cuda.empty_cache()
        start = time.perf_counter()
        row = case()
        print(f"{row} ({time.perf_counter() - start:.1f} s)", flush=True)
        append([{**shared, **row}], arguments.results, COLUMNS)
    write_page(arguments.results)


if __name__ == "__main__":
    main()
