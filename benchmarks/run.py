"""`make bench`, or `python -m benchmarks.run [--only TEXT ...] [--no-peers]`: checks, measures, appends, reports.

Every case is first compared with a float64 oracle (and not timed if it fails), then timed with its peers. Rows are appended to
benchmarks/results.csv, and benchmarks/README.md is made anew from the last row of each implementation.
"""

from __future__ import annotations

import argparse
import datetime
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case, all_cases
from benchmarks.measure import Ceilings, environment, measure_ceilings, time_cuda
from benchmarks.report import write_report
from benchmarks.tables import append

FOLDER = Path(__file__).parent
COLUMNS = (
    "time", "gpu", "driver", "torch", "triton", "commit", "copy_tb_s", "matmul_tflop_s", "op", "shape", "implementation", "median_ms",
    "spread_ms", "floor_ms", "ratio", "accept_ms", "aim_ms", "flop", "bytes", "extra_gb", "error_over_tolerance",
)  # fmt: skip


def measure_case(case: Case, ceilings: Ceilings, peers: bool) -> list[dict[str, object]]:
    """Rows of one case, ours first; a peer that this machine cannot run is reported and left out."""
    error = case.error() if case.error else None
    if error is not None and not error <= 1:
        print(f"WRONG {case.op} {case.shape}: {error:.2f} times its tolerance; not timed")
        return []
    rows = []
    for name, run in case.build().items():
        if name != "megarat" and not peers:
            continue
        try:
            timing, extra = time_cuda(run), extra_memory_gb(run)
        except Exception as failure:
            print(f"  {name} does not run here: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        floor_ms = ceilings.floor_ms(case.bytes_moved, case.flop)
        rows.append(
            {
                "op": case.op, "shape": case.shape, "implementation": name, "median_ms": round(timing.median, 4),
                "spread_ms": round(timing.spread, 4), "floor_ms": round(floor_ms, 4),
                "ratio": round(timing.median / floor_ms, 3),
                "accept_ms": case.accept_ms, "aim_ms": case.aim_ms, "flop": case.flop, "bytes": case.bytes_moved,
                "extra_gb": round(extra, 2) if "memory" in case.tags else None,
                "error_over_tolerance": None if error is None or name != "megarat" else round(error, 3),
            }
        )  # fmt: skip
        print(f"{case.op:34} {case.shape:28} {name:34} {timing.median:9.3f} ms (floor {rows[-1]['floor_ms']})", flush=True)
    return rows


def extra_memory_gb(run: Callable[[], object]) -> float:
    """Peak memory during a call beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def wanted_cases(texts: list[str]) -> list[Case]:
    """Cases that contain one of the texts, those of the first text first."""
    names = {f"{case.op} {case.shape}": case for case in all_cases()}
    order = dict.fromkeys(name for text in texts for name in names if text in name)
    return [names[name] for name in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose operation and shape contain one of these, in their order"
    )
    parser.add_argument("--no-peers", action="store_true", help="measure only megarat's implementations")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA GPU; the kernels' correctness on a CPU is checked by `make test`")
    ceilings = measure_ceilings()
    shared = {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"), **environment(),
        "copy_tb_s": round(ceilings.bytes_per_s / 1e12, 3), "matmul_tflop_s": round(ceilings.flop_per_s / 1e12, 1),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in shared.items()))
    for case in wanted_cases(arguments.only):
        append([{**shared, **row} for row in measure_case(case, ceilings, not arguments.no_peers)], arguments.results, COLUMNS)
        gc.collect()
        torch.cuda.empty_cache()
    write_report(arguments.results)


if __name__ == "__main__":
    main()
