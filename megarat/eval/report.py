"""The report of an evaluation: every table, and pictures of quality against the bytes of cache a sequence takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarat.errors import UserError
from megarat.eval.runner import table

REPORT, PICTURE = "report.md", "report.png"


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
        if _draw(results["tasks"], folder / PICTURE):
            lines += [f"![Quality against cache]({PICTURE})", ""]
        (folder / REPORT).write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {folder / REPORT}: {error}") from None
    return folder / REPORT


def panels(tasks: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[str, int, float]]]:
    """What is drawn: by the name of the vertical axis, (pattern, bytes of cache, value). Needle accuracy and LongBench are means over the tasks."""
    drawn: dict[str, list[tuple[str, int, float]]] = {}
    if "ppl" in tasks:
        drawn["loss (nats)"] = [(row["pattern"], row["cache_bytes_per_sequence"], row["loss"]) for row in tasks["ppl"]]
    if "needle" in tasks:
        drawn["needle accuracy (%)"] = [
            (pattern, max(row["cache_bytes_per_sequence"] for row in rows), 100 * sum(row["ruler"] for row in rows) / len(rows))
            for pattern, rows in _by_pattern(tasks["needle"]).items()
        ]
    if "longbench" in tasks:
        drawn["LongBench, mean (%)"] = [
            (pattern, max(row["cache_bytes_per_sequence"] for row in rows), 100 * sum(row["score"] for row in rows) / len(rows))
            for pattern, rows in _by_pattern(tasks["longbench"]).items()
        ]
    return drawn


def _by_pattern(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["pattern"], []).append(row)
    return found


def _draw(tasks: dict[str, list[dict[str, Any]]], path: Path) -> bool:
    """The panels side by side; False where there is none."""
    drawn = panels(tasks)
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * len(drawn), 4.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for pattern, size, value in points:
            axes.plot(size / 2**20, value, "o", color="tab:blue")
            axes.annotate(pattern, (size / 2**20, value), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        if name.endswith("(%)"):
            axes.set_ylim(-3, 108)  # all of it, and room for the names
        axes.set(xlabel="cache of one sequence (MiB)", ylabel=name)
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
    return True
