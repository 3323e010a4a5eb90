"""The tables of docs/scaling.md: `python -m benchmarks.scaling`.

One holds what `megarat plan` says of the published shapes on many GPUs; the other what it says of every step that benchmarks/train.csv and
benchmarks/mesh.csv have timed, beside what came out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import between
from megarat import plan, rates
from megarat.config import from_dict

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/scaling.md"
SIZES: dict[str, dict[str, int]] = {"1.5b": {}, "2.6b": {"layers": 28, "hidden": 2560, "heads": 20}}
GPU, TOKENS = "H200", 100e9

# GPUs, ZeRO, global batch, micro-batch
CASES = {
    "1.5b": [(1, 1, 512, 2), (64, 1, 512, 8), (64, 2, 512, 8), (256, 1, 512, 2), (256, 2, 512, 2), (1024, 1, 1024, 1), (1024, 2, 1024, 1)],
    "2.6b": [(1, 1, 512, 2), (64, 2, 512, 8), (256, 1, 512, 2), (256, 2, 512, 2), (1024, 1, 1024, 1), (1024, 2, 1024, 1)],
}  # fmt: skip


def make_plan(size: str, gpus: int, batch: int, micro_batch: int, length: int = 4096, **parallel: Any) -> plan.Plan:
    """The plan of a published shape on H200s."""
    tree = {
        "run": {"dir": "unused"},
        "data": {"shards": "unused", "sequence_length": length},
        "model": SIZES[size],
        "train": {"global_batch": batch, "micro_batch": micro_batch},
        "parallel": parallel,
    }
    return plan.make_plan(from_dict(tree), gpus, GPU)


def plan_of(step: rates.Step) -> plan.Plan:
    """The plan of a step that was timed."""
    model_ranks = 1
    for axis in ("tensor", "context", "pipeline"):
        model_ranks *= int(step.parallel.get(axis, 1))
    batch = step.micro_batch * step.accumulation * step.gpus // model_ranks
    return make_plan(step.size, step.gpus, batch, step.micro_batch, step.length, **step.parallel)


def calculated() -> list[str]:
    """The table of many GPUs."""
    lines = [
        "| model | GPUs | ZeRO | global batch | micro-batch | GB a GPU | pair (s) | of it links (s) | tokens/s | days for 100 B tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size, cases in CASES.items():
        for gpus, zero, batch, micro_batch in cases:
            made = make_plan(size, gpus, batch, micro_batch, zero=zero)
            assert made.gpu is not None
            rate, links = made.tokens_per_second(made.gpu), sum(made.communication_seconds(made.gpu).values())
            row = (
                size.upper(),
                gpus,
                zero,
                batch,
                micro_batch,
                f"{made.memory.total / 1e9:.1f}",
                f"{made.pair_seconds(made.gpu):.2f}",
            )
            lines.append(f"| {' | '.join(map(str, row))} | {links:.2f} | {rate:,.0f} | {TOKENS / rate / 86400:.2f} |")
    return lines


def compared() -> list[str]:
    """The table of what was measured."""
    lines = [
        "| model | GPUs | mesh | micro-batches | GB a GPU: measured, calculated | tokens/s: measured, calculated | commit |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for step in sorted(rates.steps(GPU), key=lambda step: (step.size, step.gpus)):
        if step.size in SIZES:
            made = plan_of(step)
            assert made.gpu is not None
            memory, rate = made.memory.total, made.tokens_per_second(made.gpu)
            lines.append(
                f"| {step.size.upper()} | {step.gpus} | {_mesh(step)} | {step.accumulation} x {step.micro_batch} "
                f"| {step.peak_bytes / 1e9:.1f}, {memory / 1e9:.1f} ({_off(memory, step.peak_bytes)}) "
                f"| {step.tokens_per_s:,.0f}, {rate:,.0f} ({_off(rate, step.tokens_per_s)}) | {step.source.rpartition(' ')[2]} |"
            )
    return lines


def _mesh(step: rates.Step) -> str:
    named = [f"{key} {value}" for key, value in step.parallel.items() if key in ("tensor", "context", "pipeline") and value != 1]
    named += ["sequence"] if step.parallel.get("sequence") else []
    named += [f"recompute {step.parallel['recompute']}"] if "recompute" in step.parallel else []
    return ", ".join([*named, f"ZeRO {step.parallel.get('zero', 1)}"])


def _off(calculated: float, measured: float) -> str:
    return f"{100 * (calculated / measured - 1):+.1f} %"


def document(text: str) -> str:
    """docs/scaling.md with its tables written anew."""
    for name, lines in {"calculated": calculated(), "measured": compared()}.items():
        text = between(text, f"<!-- {name}: begin -->", f"<!-- {name}: end -->", "\n".join(lines))
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
