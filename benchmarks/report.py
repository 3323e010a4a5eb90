"""benchmarks/README.md and its roofline plot, from benchmarks/results.csv: `python -m benchmarks.report`.

The last row of each (operation, shape, implementation) counts. What bounds a target that was missed is written by hand in notes.md and
included below the table.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables import latest, read

FOLDER = Path(__file__).parent


def write_report(results: Path = FOLDER / "results.csv") -> None:
    """Writes README.md and roofline.png beside the results."""
    rows = latest(read(results), "op", "shape", "implementation")
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"]), []).append(row)
    plot(rows, results.parent / "roofline.png")
    text = "\n".join([*header(rows), *(line for group in groups.values() for line in table_lines(group)), "", notes()])
    (results.parent / "README.md").write_text(text)


def header(rows: list[dict[str, str]]) -> list[str]:
    runs = sorted(
        {
            (r["time"], r["gpu"], r["driver"], r["torch"], r["triton"], r["commit"], r["copy_tb_s"], r["matmul_tflop_s"])
            for r in rows
        }
    )
    return [
        "# Kernel benchmarks",
        "",
        "Made by `make bench` (`python -m benchmarks.run`); do not edit. Medians of CUDA-event timings on random bf16 data, after a check",
        "against a float64 oracle; *spread* is the distance between the first and the last decile. The *floor* is the larger of counted bytes",
        "over the copy bandwidth and counted FLOPs over the bf16 matmul rate, both measured in the same run:",
        "",
        "| run | GPU | driver | torch | triton | commit | copy TB/s | matmul TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(run) + " |" for run in runs),
        "",
        "| operation | shape | implementation | ms | spread | floor | x floor | accept / aim | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]


def table_lines(group: list[dict[str, str]]) -> list[str]:
    """Ours first, then the peers with how many times slower than ours they are."""
    group = sorted(group, key=lambda row: row["implementation"] != "megarat")
    ours = float(group[0]["median_ms"]) if group[0]["implementation"] == "megarat" else None
    lines = []
    for row in group:
        median, floor = float(row["median_ms"]), float(row["floor_ms"])
        mine = row["implementation"] == "megarat"
        what = f"| {row['op']} | {row['shape']} " if mine else "| | "
        if mine:
            remark = verdict(row)
        else:
            remark = "" if ours is None else f"{median / ours:.1f}x ours"
        memory = f", {row['extra_gb']} GB extra" if row["extra_gb"] else ""
        targets = f"{row['accept_ms']} / {row['aim_ms']}" if mine and row["accept_ms"] else ""
        lines.append(
            f"{what}| {row['implementation']} | {median:.3f} | {row['spread_ms']} | {floor:.3f} | {median / floor:.2f} | {targets} "
            f"| {remark}{memory} |"
        )
    return lines


def verdict(row: dict[str, str]) -> str:
    if not row["accept_ms"]:
        return ""
    median = float(row["median_ms"])
    return "aim met" if median <= float(row["aim_ms"]) else "accepted" if median <= float(row["accept_ms"]) else "**missed**"


def notes() -> str:
    path = FOLDER / "notes.md"
    return "![roofline](roofline.png)\n\n" + (path.read_text() if path.exists() else "")


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Achieved FLOP/s over counted intensity for what computes, under the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [row for row in rows if row["implementation"] == "megarat" and float(row["flop"]) > 0]
    if not ours:
        return
    bandwidth, rate = float(ours[-1]["copy_tb_s"]) * 1e12, float(ours[-1]["matmul_tflop_s"]) * 1e12
    figure, axes = pyplot.subplots(figsize=(8, 5))
    intensities = [10**x for x in (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5)]
    axes.plot(intensities, [min(rate, bandwidth * i) / 1e12 for i in intensities], "k-", label="measured roof")
    for row in ours:
        flop, moved = float(row["flop"]), float(row["bytes"])
        axes.plot(flop / moved, flop / float(row["median_ms"]) * 1e3 / 1e12, "o", label=f"{row['op']} {row['shape']}")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s", title=f"Roofline, {ours[-1]['gpu']}"
    )
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    write_report()
