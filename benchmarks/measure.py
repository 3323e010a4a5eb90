"""How everything here is timed: CUDA events around each repetition, medians, and the ceilings of the same chip in the same run.

The GPU is kept busy while the repetitions are queued, and spins for a moment in front of each of them. So an operation of 0.1 ms is
timed alone, from an idle memory system on, and not together with the host's pauses between its launches.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
HEAD_START_CYCLES = 60_000_000  # some 35 ms on an H200: time enough to queue the repetitions of a short operation
PAUSE_CYCLES = 100_000  # some 60 us


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the distance between the first and the last decile."""

    median: float
    spread: float


def time_cuda(run: Callable[[], object], *, budget_ms: float = 150.0, warm_up: int = 3) -> Timing:
    """Times `run` over as many repetitions as fit the budget, 7 to 100. Inputs should exceed the L2 cache (60 MB on an H200)."""
    for _ in range(warm_up):
        run()
    first = _repeat(run, 1)[0]
    times = sorted(_repeat(run, max(7, min(100, int(budget_ms / max(first, 1e-3))))))
    return Timing(statistics.median(times), times[int(0.9 * (len(times) - 1))] - times[int(0.1 * (len(times) - 1))])


def _repeat(run: Callable[[], object], count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    for begin, end in events:
        torch.cuda._sleep(PAUSE_CYCLES)
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


@dataclass(frozen=True)
class Ceilings:
    """What this chip does at best, as measured now."""

    bytes_per_s: float
    flop_per_s: float

    def floor_ms(self, bytes_moved: float, flop: float) -> float:
        """The time below which no implementation can go."""
        return max(bytes_moved / self.bytes_per_s, flop / self.flop_per_s) * 1e3


def measure_ceilings() -> Ceilings:
    """A 2 GiB device copy (bytes read plus bytes written) and an 8192^3 bf16 matrix product, on random data."""
    source, target = torch.randn(2, 1 << 29, device="cuda")
    copy_ms = time_cuda(lambda: target.copy_(source)).median
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_ms = time_cuda(lambda: a @ b, budget_ms=400.0).median
    return Ceilings(2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3)


def environment() -> dict[str, str]:
    """What a figure depends on besides the code: GPU, driver, versions, commit."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The version of the code: of the checkout, or as told where there is none."""
    return os.environ.get("MEGARAT_COMMIT") or _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]
