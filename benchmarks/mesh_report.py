"""The tables of docs/parallelism.md, from benchmarks/mesh.csv, links.csv and train.csv: `python -m benchmarks.mesh --report`.

The last row of each (size, run, number of GPUs) counts. The distance of two runs is that of their losses (both passes of each pair), as the
median of the differences in the first half of the pairs and in the second (medians: whether a training stumbles at some pair is chance).

Noise is told by several runs of one GPU, whose initial weights were moved by less than bf16 resolves (`rounded`): nobody can tell these trainings
apart by what they computed with. A mesh is within it when it is as near to one of them as each of them is to another one: no further from its
nearest than the loneliest of them from its own. (Only distances from `one` would call a mesh wrong where `one` itself is the odd one out.)
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.tables import between, latest, nearest, read

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
FOLDER = Path(__file__).parent


def write(document: Path, results: Path, links: Path, training: Path = FOLDER / "train.csv") -> None:
    """Puts the tables between the marks of the document."""
    rows = latest(read(results), "size", "run", "gpus")
    tables = [*header(rows), *(line for size in sizes(rows) for line in size_lines(size, rows))]
    lines = [*tables, *scaling_lines(training), *link_lines(links)]
    document.write_text(between(document.read_text(), BEGIN, END, "\n".join(lines)))


def sizes(rows: list[dict[str, str]]) -> list[str]:
    return sorted({row["size"] for row in rows})


def header(rows: list[dict[str, str]]) -> list[str]:
    runs = sorted({(row["time"][:10], row["gpu"], row["driver"], row["torch"], row["triton"], row["commit"]) for row in rows})
    return ["", "| day | GPU | driver | torch | triton | commit |", "|---|---|---|---|---|---|", *(_row(*run) for run in runs)]


def size_lines(size: str, rows: list[dict[str, str]]) -> list[str]:
    """One row a run: speed beside one GPU's, memory beside the plan's, and how far its losses are from those of one GPU."""
    rows = sorted((row for row in rows if row["size"] == size), key=lambda row: int(row["gpus"]))
    one = next((row for row in rows if row["run"] == "one"), None)
    if one is None:
        return []
    lines = [
        "",
        f"{size.upper()}, bf16, pairs of 8 x 4096 tokens:",
        "",
        "| run | GPUs | micro-batches | tokens/s | of GPUs x `one` | peak GB a GPU | planned | losses from `one`: first half, second half "
        "| from the nearest run of one GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    family = [one, *(row for row in rows if "rounded" in row["run"])]
    for row in rows:
        speed, gpus = float(row["tokens_s"]), int(row["gpus"])
        lines.append(
            _row(
                f"`{row['run']}`", gpus, f"{row['accumulation']} x {row['micro_batch']}", f"{speed:,.0f}",
                f"{speed / float(one['tokens_s']) / gpus:.1%}", row["peak_gb"], row["planned_gb"],
                "" if row is one else "{:.1e}, {:.1e}".format(*distance(row, one)),
                "{:.1e}, {:.1e}".format(*nearest_distance(row, family)) if len(family) > 1 else "",
            )
        )  # fmt: skip
    return lines + noise_lines(rows, family)


def distance(row: dict[str, str], one: dict[str, str]) -> tuple[float, float]:
    """Median difference of the losses of both passes in each half of the pairs that both runs have."""
    pairs = min(int(row["pairs"]), int(one["pairs"]))
    curves = [[list(map(float, run[f"loss_{kind}"].split())) for kind in ("sparse", "dense")] for run in (row, one)]
    halves = (range(pairs // 2), range(pairs // 2, pairs))
    first, second = (
        statistics.median(abs(ours[pair] - theirs[pair]) for ours, theirs in zip(*curves, strict=True) for pair in half)
        for half in halves
    )
    return first, second


def noise_lines(rows: list[dict[str, str]], family: list[dict[str, str]]) -> list[str]:
    """The verdict: every mesh within the noise of one GPU, or which are not."""
    if len(family) == 1:
        return []
    bound = [max(values) for values in zip(*(nearest_distance(row, family) for row in family), strict=True)]
    outside = [
        f"`{row['run']}` on {row['gpus']} GPUs"
        for row in rows
        if row["gpus"] != "1" and any(found > limit for found, limit in zip(nearest_distance(row, family), bound, strict=True))
    ]
    verdict = f"outside of it: {', '.join(outside)}." if outside else "every mesh is within it."
    return [
        "",
        f"A run of one GPU is at most {bound[0]:.1e} from the nearest other one in the first half and {bound[1]:.1e} in the second: the noise of "
        f"bf16; {verdict}",
    ]


def nearest_distance(row: dict[str, str], family: list[dict[str, str]]) -> tuple[float, float]:
    """The distance from the nearest other run of a family, for each half by itself."""
    first, second = (min(values) for values in zip(*(distance(row, other) for other in family if other is not row), strict=True))
    return first, second


def scaling_lines(path: Path) -> list[str]:
    """Several GPUs beside one at equal work a GPU, from runs of `benchmarks.train`, each pair of rows measured nearest in time."""
    everything = read(path)
    rows = latest(everything, "implementation", "size", "length", "micro_batch", "accumulation", "settings", "data", "mesh")
    shared = [
        (row, one) for row in rows
        if row["gpus"] != "1"
        and (one := nearest((r for r in everything if r["gpus"] == "1" and _work(r) == _work(row)), row)) is not None
    ]  # fmt: skip
    if not shared:
        return []
    return [
        "",
        "Data ranks at equal work a GPU (`benchmarks.train`):",
        "",
        "| size | mesh | micro-batches a GPU | tokens/s | of GPUs x one |",
        "|---|---|---|---|---|",
        *(
            _row(
                row["size"], row["mesh"], f"{row['accumulation']} x {row['micro_batch']} x {row['length']}", row["joint_tokens_s"],
                f"{float(row['joint_tokens_s']) / float(one['joint_tokens_s']) / int(row['gpus']):.1%}",
            )
            for row, one in shared
        ),
    ]  # fmt: skip


def _work(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("implementation", "size", "length", "micro_batch", "accumulation", "settings", "data"))


def link_lines(path: Path) -> list[str]:
    """Rates of the collectives, one line a size."""
    rows = latest(read(path), "collective", "megabytes")
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
