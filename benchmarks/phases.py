"""Time by phase: CUDA events around calls (so that nothing waits for the device), the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Collects durations by name; `part` is put in front of each (the pass that is running)."""

    def __init__(self, device: torch.device) -> None:
        self.part = ""
        self.enabled = True
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any, Any]] = []
        self._times: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        if not self.enabled:
            yield
            return
        begin = self._mark()
        yield
        self._open.append((f"{self.part} {name}".strip(), begin, self._mark()))

    def time(self, owner: Any, method: str, name: str) -> None:
        """Times every call of a method of this one object from now on."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Waits for the device and reads the events."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._open:
            self._times.setdefault(name, []).append(begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3)
        self._open.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._open.clear()
        self._times.clear()

    def median(self, name: str, pairs: int) -> float | None:
        """Milliseconds a pair spends in a phase, the median over `pairs` pairs; None for a phase that never ran."""
        times = self._times.get(name)
        if not times:
            return None
        calls = len(times) // pairs
        return round(statistics.median(sum(times[pair * calls : (pair + 1) * calls]) for pair in range(pairs)), 3)
