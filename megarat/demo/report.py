"""The demo's report: Markdown and two plots, from the runs' own files."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megarat
from megarat.eval.runner import human_bytes

_GRID = {"color": "0.9", "linewidth": 0.8}


@dataclass(frozen=True)
class Released:
    """What a released model showed."""

    source: Path
    results: dict[str, Any]
    samples: list[tuple[str, str]]


@dataclass(frozen=True)
class Story:
    """What happened in a demo."""

    folder: Path
    pairs: int
    parameters: int
    sources: list[str]
    stop: str
    before: dict[str, Any]
    after: dict[str, Any]
    samples: list[tuple[str, str]]
    seconds: float
    released: Released | None = None


def write_report(story: Story) -> Path:
    """Write ``report.md``, ``loss.png`` and ``perplexity.png`` into the demo's folder; returns the report's path."""
    pretrain, adapt = (read_metrics(story.folder / run) for run in ("pretrain", "adapt"))
    plot_losses(pretrain, adapt, story.folder / "loss.png")
    plot_perplexity(story.before, story.after, story.folder / "perplexity.png")
    path = story.folder / "report.md"
    path.write_text(_markdown(story, pretrain), encoding="utf-8")
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _markdown(story: Story, pretrain: list[dict[str, Any]]) -> str:
    first, last = pretrain[0], pretrain[-1]
    shape = story.before["model"]
    lines = [
        "# Text in, sparse model out",
        "",
        f"megarat {megarat.__version__}, torch {torch.__version__}, {_machine()}; {story.seconds:.0f} s in all.",
        "",
        "## What was done",
        "",
        f"- Model: RAT+, {shape['layers']} layers x {shape['hidden']}, {shape['heads']} heads, {story.parameters / 1e6:.1f} M parameters.",
        f"- Pretraining: {story.pairs} pairs, {last['tokens']:,} tokens, two updates each (sparse D=64, then dense).",
        f"- Loss of the first and last pair: sparse {first['loss_sparse']:.3f} -> {last['loss_sparse']:.3f}, "
        f"dense {first['loss_dense']:.3f} -> {last['loss_dense']:.3f}.",
        f"- The stop: {story.stop}. Stream hash at the end: `{last['stream_hash']}`.",
        *(f"- {line}" for line in story.sources),
        "",
        "![loss](loss.png)",
        "",
        "## One set of weights, many patterns",
        "",
        f"Held-out perplexity over {story.before['tasks']['ppl'][0]['tokens']:,} tokens, sequences of {story.before['sequence_length']} tokens; "
        "the cache is what one such sequence keeps while decoding (bf16).",
        "",
        "| pattern | KV cache | perplexity before adaptation | after |",
        "|---|---:|---:|---:|",
        *(
            f"| {before['pattern']} | {human_bytes(before['cache_bytes_per_sequence'])} | {before['perplexity']:.1f} | {after['perplexity']:.1f} |"
            for before, after in zip(story.before["tasks"]["ppl"], story.after["tasks"]["ppl"], strict=True)
        ),
        "",
        "![perplexity](perplexity.png)",
        "",
        "## Text from the sparse cache",
        "",
        *_quoted(story.samples),
        "A model trained for minutes writes little sense; what the demo shows is that every step of its life works.",
        *([] if story.released is None else _of_released(story.released)),
    ]
    return "\n".join(lines) + "\n"


def _of_released(released: Released) -> list[str]:
    rows, shape = released.results["tasks"]["ppl"], released.results["model"]
    return [
        "",
        "## The released model",
        "",
        f"{released.source}: {shape['layers']} layers x {shape['hidden']}, {shape['heads']} heads, not adapted. {rows[0]['tokens']:,} tokens of documents "
        f"that it has not seen, sequences of {released.results['sequence_length']} tokens.",
        "",
        "| pattern | KV cache | loss (nats) | perplexity |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['pattern']} | {human_bytes(row['cache_bytes_per_sequence'])} | {row['loss']:.4f} | {row['perplexity']:.2f} |"
            for row in rows
        ),
        "",
        "What it writes from a cache of D=16:",
        "",
        *_quoted(released.samples),
    ]


def _quoted(samples: list[tuple[str, str]]) -> list[str]:
    return [f"> **{prompt}** {' '.join(text.split())}\n" for prompt, text in samples]


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def plot_losses(pretrain: list[dict[str, Any]], adapt: list[dict[str, Any]], path: Path) -> None:
    """Loss of both passes of pretraining, and of the adaptation, against tokens."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), gridspec_kw={"width_ratios": [2, 1]}, sharey=False)
    for name, label in (("loss_sparse", "sparse pass, D=64"), ("loss_dense", "dense pass")):
        left.plot([row["tokens"] for row in pretrain], [row[name] for row in pretrain], label=label)
    left.set(title="pretraining", xlabel="tokens", ylabel="loss (nats)")
    right.plot([row["tokens"] for row in adapt], [row["loss_dense"] for row in adapt], color="C2", label="adapted pattern")
    right.set(title="adaptation", xlabel="tokens")
    for axis in (left, right):
        axis.grid(**_GRID)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_perplexity(before: dict[str, Any], after: dict[str, Any], path: Path) -> None:
    """Perplexity against cache size, before and after adaptation, one labelled point a pattern."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for results, label, marker in ((before, "before adaptation", "o"), (after, "after adaptation", "s")):
        rows = sorted(results["tasks"]["ppl"], key=lambda row: row["cache_bytes_per_sequence"])
        axis.plot(
            [row["cache_bytes_per_sequence"] / 1024 for row in rows],
            [row["perplexity"] for row in rows],
            marker=marker,
            label=label,
        )
    for row in after["tasks"]["ppl"]:
        axis.annotate(
            row["pattern"],
            (row["cache_bytes_per_sequence"] / 1024, row["perplexity"]),
            textcoords="offset points",
            xytext=(4, -12),
            fontsize=8,
        )
    axis.set(xscale="log", xlabel="KV cache per sequence (KiB)", ylabel="held-out perplexity")
    axis.margins(x=0.15, y=0.1)  # room for the labels
    axis.grid(**_GRID)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
