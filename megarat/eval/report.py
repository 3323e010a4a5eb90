"""The report of an evaluation: every table, and pictures of quality and speed against the bytes of cache a sequence takes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarat.errors import UserError
from megarat.eval.runner import human_bytes, table

REPORT, PICTURE = "report.md", "report.png"
_MARKS = "os^Dv"
_NAME = 60  # letters of a pattern in the legend: one with many layers' patterns has more


def write_report(results: dict[str, Any], folder: str | Path) -> Path:
    """Write ``report.md``, with ``report.png`` where there is something to draw, into ``folder``; returns the page's path."""
    folder = Path(folder)
    checkpoint, model = results["checkpoint"], results["model"]
    lines = [
        f"# {checkpoint['path']}",
        "",
        f"After pair {checkpoint['pair']}, {checkpoint['tokens']:,} tokens; content `{checkpoint['content']}`.",
        f"{model['layers']} layers x {model['hidden']}, {model['heads']} heads; {results['dtype']} on {results['device']}; sequences of "
        f"{results['sequence_length']} tokens; megarat {results['megarat']}.",
        "",
        table(results),
        "",
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _draw(results, folder / PICTURE):
            lines += [f"![Quality and speed against cache]({PICTURE})", ""]
        (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {folder / REPORT}: {error}") from None
    return folder / REPORT


def panels(results: dict[str, Any]) -> dict[str, list[tuple[str, int, float]]]:
    """What is drawn: by the name of the vertical axis, (pattern, bytes of cache, value). Accuracies are means over tasks."""
    tasks, drawn = results["tasks"], {}
    if "ppl" in tasks:
        drawn["loss (nats)"] = _means(tasks["ppl"], lambda row: row["loss"])
    if "needle" in tasks:
        drawn["needle accuracy (%)"] = _means(tasks["needle"], lambda row: 100 * row["ruler"])
    if "longbench" in tasks:
        drawn["LongBench, mean (%)"] = _means(tasks["longbench"], lambda row: 100 * row["score"])
    if scored := [row for row in tasks.get("harness", []) if "acc" in row["metrics"]]:
        drawn["harness, mean acc (%)"] = _means(scored, lambda row: 100 * row["metrics"]["acc"])
    if speed := results.get("speed"):
        drawn["prefill (tokens/s)"] = _means(speed, lambda row: row["prefill_tokens_per_s"])
        drawn["decode (tokens/s)"] = _means(speed, lambda row: row["decode_tokens_per_s"])
    return drawn


def _means(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> list[tuple[str, int, float]]:
    """Of each pattern's rows, and the largest of their caches."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["pattern"], []).append(row)
    return [
        (pattern, max(row["cache_bytes_per_sequence"] for row in own), sum(map(value, own)) / len(own))
        for pattern, own in found.items()
    ]


def _draw(results: dict[str, Any], path: Path) -> bool:
    """The panels in rows of three, a colour and a mark for each pattern; False where there is none."""
    drawn = panels(results)
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.8), layout="constrained")
    every_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    patterns = list(dict.fromkeys(pattern for points in drawn.values() for pattern, _, _ in points))
    for axes, (name, points) in zip(every_axes, drawn.items(), strict=False):
        for pattern, size, value in points:
            index = patterns.index(pattern)
            axes.plot(size, value, _MARKS[index // 10 % len(_MARKS)], color=f"C{index % 10}", markersize=8, label=pattern)
        _label(axes, name)
    for axes in every_axes[len(drawn) :]:
        axes.set_axis_off()
    handles = {line.get_label(): line for axes in every_axes for line in axes.lines}
    names = [textwrap.shorten(pattern, _NAME, placeholder=" …") for pattern in patterns]
    figure.legend(
        [handles[pattern] for pattern in patterns], names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    checkpoint = results["checkpoint"]
    figure.suptitle(f"{checkpoint['path']}, pair {checkpoint['pair']}, {checkpoint['content'][:12]}", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))
    return True


def _label(axes: Any, name: str) -> None:
    """Axes, ticks and limits of one panel: bytes in powers of two, shares of 100 in full, speeds from zero."""
    axes.set_xscale("log", base=2)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_formatter(lambda size, _: human_bytes(size).replace(".0 ", " "))
    if name.endswith("(%)"):
        axes.set_ylim(-3, 103)
    elif name.endswith("/s)"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(xlabel="cache of one sequence", ylabel=name)
    axes.grid(alpha=0.3)
