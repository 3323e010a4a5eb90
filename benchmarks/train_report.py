"""The tables of docs/performance.md, from train.csv, levers.csv, profile.csv and losses.csv: `python -m benchmarks.train_report`.

What stands between `<!-- name -->` and `<!-- end -->` is made anew; the text around it is written by hand. The last row of each setting
counts; what it is compared with is the row measured nearest to it in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.losses import ARMS
from benchmarks.tables import Row, between, latest, nearest, read

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "performance.md"


def table(columns: str, lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers of columns after the first are set to the right."""
    names = [name.strip() for name in columns.split("|")]
    rule = "| --- |" + " ---: |" * (len(names) - 1)
    return "\n".join(["| " + " | ".join(names) + " |", rule, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


SETTING = ("gpus", "implementation", "size", "length", "micro_batch", "accumulation", "mesh", "settings", "data")


def thousands(text: str) -> str:
    return f"{float(text) / 1e3:.1f} k" if text else "–"


def scaling(row: Row, rows: list[Row]) -> str:
    """Of several GPUs, what part of as many times one GPU's rate they reach."""
    alike = ("implementation", "size", "length", "micro_batch", "accumulation", "data")
    alone = (
        one
        for one in rows
        if one["gpus"] == "1" and _on_any_mesh(one) == _on_any_mesh(row) and all(one[key] == row[key] for key in alike)
    )
    if row["gpus"] == "1" or (one := nearest(alone, row)) is None:
        return ""
    share = float(row["joint_tokens_s"]) / float(one["joint_tokens_s"]) / int(row["gpus"])
    return f" ({100 * share:.1f} % of {row['gpus']} x one)"


def _run(row: Row) -> str:
    return f"{row['implementation']} {row['size']}, T={row['length']}, {row['micro_batch']} x {row['accumulation']}, {row['gpus']} GPU(s)"


def _on_any_mesh(row: Row) -> list[str]:
    axes = ("parallel.tensor=", "parallel.context=", "parallel.pipeline=")
    return [setting for setting in row["settings"].split() if not setting.startswith(axes)]


def speed() -> str:
    """Every setting once."""
    everything = read(FOLDER / "train.csv")
    rows = sorted(
        latest(everything, *SETTING),
        key=lambda r: (r["size"], int(r["length"]), int(r["gpus"]), r["implementation"], r["settings"]),
    )
    lines = (
        (
            f"{row['implementation']} {row['size']}, T={row['length']}{'' if row['gpus'] == '1' else ', ' + row['gpus'] + ' GPUs: ' + row['mesh']}",
            f"{row['micro_batch']} x {row['accumulation']}",
            (row["settings"] or "defaults") + ("" if row["data"] == "resident" else f", {row['data']}"),
            thousands(row["sparse_tokens_s"]), thousands(row["dense_tokens_s"]),
            f"**{thousands(row['joint_tokens_s'])}**{scaling(row, everything)}", f"{100 * float(row['mfu']):.1f} %", row["peak_gb"],
            row["update_ms"] or "–", row["copy_tb_s"], row["matmul_tflop_s"], row["commit"],
        )
        for row in rows
    )  # fmt: skip
    rates = "sparse tokens/s | dense tokens/s | joint data-tokens/s | MFU"
    head = f"what | micro-batch | settings | {rates} | peak GB | update ms | copy TB/s | matmul TFLOP/s | commit"
    return table(head, lines)


def phases() -> str:
    """Milliseconds of a pair by pass and direction, of each setting."""
    names = ("sparse_forward", "sparse_backward", "dense_forward", "dense_backward", "update", "data")
    lines = (
        (
            _run(row),
            row["settings"] or "defaults", *(f"{float(row[name + '_ms']):.1f}" if row[name + "_ms"] else "–" for name in names),
            row["pair_ms"], row["commit"],
        )
        for row in latest(read(FOLDER / "train.csv"), *SETTING)
    )  # fmt: skip
    heads = " | ".join(name.replace("_", " ") for name in names).replace("update", "each update")
    return table(f"run | settings | {heads} | pair | commit", lines)


def levers() -> str:
    """Each setting beside the default of the same size, micro-batch and number of GPUs."""
    everything = [row for row in read(FOLDER / "train.csv") if row["implementation"] == "megarat"]
    lines = []
    for row in latest(everything, *SETTING):
        alike = ("size", "length", "micro_batch", "accumulation", "gpus", "data")
        defaults = (r for r in everything if not r["settings"] and all(r[key] == row[key] for key in alike))
        if not row["settings"] or (base := nearest(defaults, row)) is None:
            continue
        change = float(row["joint_tokens_s"]) / float(base["joint_tokens_s"]) - 1
        memory = float(row["peak_gb"]) - float(base["peak_gb"])
        lines.append(
            (
                f"`{row['settings']}`, {row['size']}, {row['micro_batch']} x {row['length']}",
                f"{100 * change:+.1f} %",
                f"{memory:+.1f} GB",
                f"{base['commit']}, {row['commit']}",
            )
        )
    return table("switch | joint tokens/s | peak memory | commits", lines)


def turns() -> str:
    """Each lever in turns with what it is compared with, in one process."""
    lines = []
    for row in latest(read(FOLDER / "levers.csv"), "size", "micro_batch", "accumulation", "length", "lever"):
        run = f"{row['size']}, {row['micro_batch']} x {row['accumulation']}, T={row['length']}"
        figures = [row["note"], "–", "–", "–"]
        if row["change"]:
            times, memory = f"{row['base_ms']} → {row['lever_ms']}", f"{row['base_gb']} → {row['lever_gb']}"
            figures = [f"{100 * float(row['change']):+.1f} %", times, memory, f"{100 * float(row['spread']):.1f} %"]
        lines.append((f"`{row['lever']}`", run, f"`{row['base']}`" if row["base"] else "defaults", *figures, row["commit"]))
    return table("switch | run | against | tokens/s | ms a pair | peak GB | spread of turns | commit", lines)


def start() -> str:
    """From the start of the process to the end of the first pair, where it was taken."""
    rows = [row for row in latest(read(FOLDER / "train.csv"), *SETTING) if row["to_first_step_s"]]
    lines = (
        (
            _run(row),
            row["settings"] or "defaults", row["data"], row["to_first_step_s"], row["start_s"], row["first_pair_s"], row["commit"],
        )
        for row in rows
    )  # fmt: skip
    return table(
        "run | settings | data | process to first pair done, s | of it building, s | of it the first pair, s | commit", lines
    )


def profile() -> str:
    """GPU time by class of kernel of the last profile of each setting, in percent."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in read(FOLDER / "profile.csv"):
        if not row["class"].startswith("kernel:"):
            runs.setdefault(
                tuple(row[key] for key in ("implementation", "size", "settings", "micro_batch", "time", "commit")), []
            ).append(row)
    newest = {key[:4]: (key, rows) for key, rows in runs.items()}
    classes = list(dict.fromkeys(row["class"] for _, rows in newest.values() for row in rows))
    lines = []
    for (implementation, size, settings, micro_batch, _, commit), rows in newest.values():
        shares = {row["class"]: row["percent"] for row in rows}
        total = sum(float(row["ms"]) for row in rows)
        name = f"{implementation} {size}, micro-batch {micro_batch}, {settings or 'defaults'} ({commit})"
        lines.append((name, f"{total:.0f}", *(f"{shares.get(label, '0')} %" for label in classes)))
    return table("run | ms | " + " | ".join(classes), lines)


def _measured_losses() -> list[Row]:
    """The last row of each arm at each commit: distances are from the first arm of the same call, which stays beside them."""
    return latest(read(FOLDER / "losses.csv"), "gpu", "commit", "arm", "pairs", "schedule", "layers", "hidden", "batch")


def losses() -> str:
    """The arms of each comparison."""
    lines = (
        (
            r["arm"], f"{r['gpu']}, {r['layers']} x {r['hidden']}, {r['batch']} x {r['length']}",
            r["pairs"] if r["schedule"] == r["pairs"] else f"{r['pairs']} of {r['schedule']}", r["loss_sparse"], r["loss_dense"],
            r["mean_distance"], r["rms_distance"], r["largest_distance"], r["sparse_distance"] or "–", r["commit"] or "–",
        )
        for r in _measured_losses()
    )  # fmt: skip
    columns = "arm | on, layers x width, batch | pairs | sparse loss | dense loss"
    distances = "mean distance | rms distance | largest, any pair | mean distance, sparse"
    return table(f"{columns} | {distances} | commit", lines)


def variants() -> str:
    """What changes the recipe, by speed and loss; below it arms of the exact recipe, for how far two of its runs lie apart."""
    speeds = {row["lever"]: f"{100 * float(row['change']):+.1f} %" for row in read(FOLDER / "levers.csv") if row["change"]}
    of_recipe, exact = [], []
    for row in _measured_losses():
        if row["gpu"] == "cpu" or row["schedule"] != row["pairs"]:
            continue
        settings = ARMS[row["arm"]].settings.get("train", {})
        changes = [f"train.{key}={value}" for key, value in settings.items() if key in ("recipe", "sparse_every")]
        each = 1.0 if "recipe" in settings else 1 + 1 / settings.get("sparse_every", 1)
        name = f"{row['arm']}, `{changes[0]}`" if changes else f"exact recipe, {row['arm']}"
        line = (
            name, f"{each * int(row['pairs']):.0f}", speeds.get(changes[0], "not timed") if changes else "–", row["loss_dense"],
            row["mean_distance"], row["sparse_distance"], row["commit"],
        )  # fmt: skip
        if changes:
            of_recipe.append(line)
        elif row["arm"] in ("default", "rows in another order", "another seed"):
            exact.append(line)
    distances = "dense, from its default | sparse, from its default"
    return table(f"run | updates | tokens/s | dense loss | {distances} | commit", of_recipe + exact)


def machines() -> str:
    """What the figures were measured on."""
    keys = ("gpu", "driver", "torch", "triton", "deepspeed")
    return "; ".join(
        " ".join(f"{key} {row[key]}" if key != "gpu" else row[key] for key in keys)
        for row in latest(read(FOLDER / "train.csv"), *keys)
    )


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, make in (
        ("speed", speed),
        ("levers", levers),
        ("turns", turns),
        ("start", start),
        ("profile", profile),
        ("losses", losses),
        ("variants", variants),
        ("phases", phases),
        ("machines", machines),
    ):
        text = between(text, f"<!-- {name} -->", "<!-- end -->", make())
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
