"""GPU time by class of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

# The first match of a kernel's name counts.
CLASSES = (
    # torch.compile calls a pointwise kernel after all that it fuses, so only its templates (triton_tem) are attention.
    ("attention", r"sdpa|flash|fmha|^_dilated_attention|^_decode_|^triton_tem_.*attention"),
    ("scan", r"_scan"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|_scaled_mm|gemv"),
    ("optimizer", r"FusedAdam|fused_adam|FusedOptimizer|multi_tensor|foreach|lpnorm|norm_kernel|NormOps|clip"),
    ("communication", r"nccl"),
    ("copies", r"^Memcpy|^Memset|direct_copy|CatArray|copy_kernel|FillFunctor"),
)


class Kernel(NamedTuple):
    """One kernel on the device: microseconds, and the operation that launched it."""

    name: str
    operation: str
    begin: float
    end: float


def kernel_class(name: str) -> str:
    """The class of a kernel; what no rule knows is elementwise (norms, GELU, rotary, gates, residual sums, cross entropy)."""
    matching = (label for label, rule in CLASSES if re.search(rule, name, re.IGNORECASE))
    return next(matching, "elementwise")


def summary(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Rows (class, ms, percent of the span, number of kernels), the largest first, then what the device spent idle between kernels."""
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    if not ordered:
        return []
    totals: dict[str, list[float]] = {}
    busy, reached = 0.0, ordered[0].begin
    for kernel in ordered:
        alone = max(0.0, kernel.end - max(kernel.begin, reached))  # overlapping kernels share the time: the first one counts
        busy, reached = busy + alone, max(reached, kernel.end)
        entry = totals.setdefault(kernel_class(kernel.name), [0.0, 0])
        entry[0] += alone
        entry[1] += 1
    span = reached - ordered[0].begin
    rows = [(label, time, int(count)) for label, (time, count) in sorted(totals.items(), key=lambda item: -item[1][0])]
    rows.append(("gaps", span - busy, 0))
    return [
        {"class": label, "ms": round(time / 1e3, 2), "percent": round(100 * time / span, 1), "kernels": count}
        for label, time, count in rows
    ]


def kernels_of(profiler: Any) -> list[Kernel]:
    """The device's kernels, copies and fills in a profile, each with the torch operation inside of which it was launched."""
    events = list(profiler.profiler.kineto_results.events())
    cpu = torch.autograd.DeviceType.CPU
    operations = {event.correlation_id(): event.name() for event in events if event.device_type() == cpu}
    return [
        Kernel(
            event.name(), operations.get(event.linked_correlation_id(), ""), event.start_ns() / 1e3,
            (event.start_ns() + event.duration_ns()) / 1e3,
        )
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]  # fmt: skip


def profile_rows(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The summary of one call, followed by its longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    kernels = kernels_of(profiler)
    return summary(kernels) + longest(kernels)


def longest(kernels: Iterable[Kernel], count: int = 25) -> list[dict[str, Any]]:
    """The kernels that take most time, each as a row of the class `kernel: name`."""
    totals: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        entry = totals.setdefault((kernel.name, kernel.operation), [0.0, 0])
        entry[0] += kernel.end - kernel.begin
        entry[1] += 1
    everything = sum(time for time, _ in totals.values()) or 1.0
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return [
        {
            "class": f"kernel: {kernel_class(name)}: {name[:90]} < {operation[:40]}", "ms": round(time / 1e3, 2),
            "percent": round(100 * time / everything, 1), "kernels": int(calls),
        }
        for (name, operation), (time, calls) in ranked
    ]  # fmt: skip
