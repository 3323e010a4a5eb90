"""The tables of docs/parallelism.md, from benchmarks/mesh.csv and links.csv: `python -m benchmarks.mesh --report`.

The last row of each (size, run) counts. The noise of bf16 is the spread of the runs of one GPU around their mean; see `noise_lines`.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# 99 % quantile of an F distribution with 3 and 6 degrees of freedom, as a ratio of root mean squares.
BOUND = 9.78**0.5


def write(document: Path, results: Path, links: Path) -> None:
    """Puts the tables between the marks of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    rows = latest(results, ("size", "run"))
    lines = [*header(rows), *(line for size in sizes(rows) for line in size_lines(size, rows)), *link_lines(links)]
    document.write_text("\n".join([before + BEGIN, *lines, END + after]))


def latest(path: Path, key: tuple[str, ...]) -> list[dict[str, str]]:
    """The last row of each key, in order of first appearance."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list({tuple(row[name] for name in key): row for row in csv.DictReader(file)}.values())


def sizes(rows: list[dict[str, str]]) -> list[str]:
    return sorted({row["size"] for row in rows})


def header(rows: list[dict[str, str]]) -> list[str]:
    runs = sorted({(row["time"][:10], row["gpu"], row["driver"], row["torch"], row["triton"], row["commit"]) for row in rows})
    return ["", "| day | GPU | driver | torch | triton | commit |", "|---|---|---|---|---|---|", *(_row(*run) for run in runs)]


def size_lines(size: str, rows: list[dict[str, str]]) -> list[str]:
    """One row a run: speed beside one GPU's, memory beside the plan's, and how far its losses are from those of one GPU."""
    rows = [row for row in rows if row["size"] == size]
    alone = [row for row in rows if row["gpus"] == "1"]
    if not any(row["run"] == "one" for row in alone):
        return []
    one = next(float(row["tokens_s"]) for row in alone if row["run"] == "one")
    distances = noise(rows)
    lines = [
        "",
        f"**{size.upper()}**, bf16, 8 x 4096 tokens a pair:",
        "",
        "| run | GPUs | micro-batches | tokens/s | of GPUs x one | peak GB a GPU (planned) | loss: rms distance | last sparse, dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, gpus = float(row["tokens_s"]), int(row["gpus"])
        last = ", ".join(row[f"loss_{kind}"].split()[-1] for kind in ("sparse", "dense"))
        distance = f"{distances[row['run']]:.1e}" if row["run"] in distances else ""
        lines.append(
            _row(
                f"`{row['run']}`", gpus, f"{row['accumulation']} x {row['micro_batch']}", f"{speed:,.0f}", f"{speed / one / gpus:.1%}",
                f"{row['peak_gb']} ({row['planned_gb']})", distance, last,
            )
        )  # fmt: skip
    return lines + noise_lines(rows, distances)


def noise(rows: list[dict[str, str]]) -> dict[str, float]:
    """Of each run the root mean square distance of its losses from the mean of the runs of one GPU (of the others, for those)."""
    pairs = min(int(row["pairs"]) for row in rows)
    alone = {row["run"]: curve(row, pairs) for row in rows if row["gpus"] == "1"}
    distances = {}
    for row in rows:
        others = [losses for run, losses in alone.items() if run != row["run"]]
        if len(others) > 1:
            middle = [statistics.fmean(values) for values in zip(*others, strict=True)]
            distances[row["run"]] = (
                statistics.fmean((found - mean) ** 2 for found, mean in zip(curve(row, pairs), middle, strict=True)) ** 0.5
            )
    return distances


def curve(row: dict[str, str], pairs: int) -> list[float]:
    """Both losses of the first pairs of a run."""
    return [float(loss) for kind in ("sparse", "dense") for loss in row[f"loss_{kind}"].split()[:pairs]]


def noise_lines(rows: list[dict[str, str]], distances: dict[str, float]) -> list[str]:
    """The verdict: every mesh within the noise of one GPU, or which are not."""
    alone = [distances[row["run"]] for row in rows if row["gpus"] == "1" and row["run"] in distances]
    if len(alone) < 3:
        return []
    level = statistics.fmean(distance**2 for distance in alone) ** 0.5
    outside = [f"`{row['run']}`" for row in rows if row["gpus"] != "1" and distances[row["run"]] > BOUND * level]
    verdict = f"outside of it: {', '.join(outside)}" if outside else "every mesh is inside"
    return [
        "",
        f"The runs of one GPU are {level:.1e} apart (rms over pairs and passes, each against the mean of the others); with the factor "
        f"{BOUND:.1f} the bound is {BOUND * level:.1e}: {verdict}.",
    ]


def link_lines(path: Path) -> list[str]:
    """Rates of the collectives, one line a size."""
    rows = latest(path, ("collective", "megabytes"))
    if not rows:
        return []
    kinds = sorted({row["collective"] for row in rows})
    by_key = {(row["collective"], row["megabytes"]): row["bus_gb_s"] for row in rows}
    megabytes = sorted({row["megabytes"] for row in rows}, key=int)
    return [
        "",
        f"Collectives of {rows[0]['gpus']} GPUs over NCCL, bytes that a GPU sends, GB/s:",
        "",
        _row("MB", *kinds),
        "|---" * (len(kinds) + 1) + "|",
        *(_row(size, *(by_key.get((kind, size), "") for kind in kinds)) for size in megabytes),
        "",
    ]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
