"""The experiment's figures: loss curves, perplexity against cache bytes, memory by layer, how far the two passes are apart, gaps by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from examples.claim import arms
from examples.claim.records import (
    STRETCHES,
    Experiment,
    Record,
    Spread,
    adapted_of,
    by_size,
    cache_mib,
    course,
    gap,
    gap_of,
    letter,
    loss_of,
    spread,
)

_COLORS = {
    "ratplus": "C0",
    "recurrence": "C1",
    "attention-pair": "C2",
    "attention": "C3",
    "recurrence-once": "C1",
    "attention-once": "C3",
}

_LEGEND_LINES = 8  # more are set in more columns, or the legend would take the place of the figure


def draw(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """All figures, as PNG files in a folder: ``course.png`` and ``gap.png`` of all experiments, the others named after their own."""
    together = {"course": _draw_course, "gap": _draw_gaps}
    of_all = [_save(partial(make, experiments), folder / f"{name}.png") for name, make in together.items()]
    return [*of_all, *(path for experiment in experiments for path in _draw_one(experiment, folder))]


def _draw_one(experiment: Experiment, folder: Path) -> list[Path]:
    """Loss curves, perplexity against cache bytes; effective memory by layer and the gap on the way where they were measured."""
    figures = {"loss": _draw_losses, "perplexity": _draw_perplexity, "memory": _draw_memory, "milestones": _draw_milestones}
    needed = {"memory": "gates", "milestones": "milestones"}
    return [
        _save(partial(make, experiment), folder / f"{experiment.name}-{name}.png")
        for name, make in figures.items()
        if name not in needed or any(needed[name] in record for record in experiment.records)
    ]


def _save(make: Callable[[Any], None], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.6))
    make(axis)
    axis.grid(color="0.9", linewidth=0.8)
    columns = 2 if len(axis.get_legend_handles_labels()[0]) <= _LEGEND_LINES else 4
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _look(arm: str) -> dict[str, Any]:
    """An arm's line; arms with one update a batch are dashed, in the color of their twin."""
    return {"color": _COLORS[arm], "linestyle": "--" if arm.endswith("-once") else "-"}


def _draw_losses(experiment: Experiment, axis: Any) -> None:
    """The dense pass of every arm (one seed each), and the sparse pass where there is one."""
    shown = [experiment.shown(arm) for arm in experiment.present]
    for record in shown:
        arm, curve = record["arm"], record["pretraining"]["curve"]
        tokens = [point["tokens"] / 1e6 for point in curve]
        dense, sparse = ([point[f"loss_{which}"] for point in curve] for which in ("dense", "sparse"))
        axis.plot(tokens, dense, label=f"{arms.TITLES[arm]}; seed {record['seed']}", linewidth=1.2, **_look(arm))
        if record["config"]["attention"]["train_dilation"] == 64:
            axis.plot(tokens, sparse, color=_COLORS[arm], linestyle=":", label=f"{letter(arm)}, its sparse pass, D=64")
    curves = [record["pretraining"]["curve"] for record in shown]
    highest = max(curve[len(curve) // 10]["loss_dense"] for curve in curves)  # the fall of the first tenth is left out
    axis.set(xlabel="million tokens", ylabel="training loss, nats", ylim=(None, highest))


def _draw_course(experiments: Sequence[Experiment], axis: Any) -> None:
    """How far apart the passes of (a) and (c) are as the training goes on: a line an experiment, its first seed."""
    for number, one in enumerate(by_size(experiments)):
        for arm, style in (("ratplus", "-"), ("attention-pair", ":")):
            for record in one.of(arm)[:1]:
                apart, tokens = course(record), record["pretraining"]["tokens"] / 1e6
                places = [tokens * (stretch + 0.5) / STRETCHES for stretch in range(STRETCHES)]
                axis.plot(places, apart, style, color=f"C{number}", marker="o", label=f"{one.name}, {letter(arm)}")
    axis.set(xlabel="million tokens", ylabel="training loss, sparse pass minus dense pass, nats", yscale="log")
    _plain_numbers(axis.yaxis)


def _draw_gaps(experiments: Sequence[Experiment], axis: Any) -> None:
    """Held-out gap of (a) at D=16, not adapted: where each training ended, and the checkpoints on the way, a line a seed."""
    for number, one in enumerate(by_size(experiments)):
        records = one.of("ratplus")
        tokens, color = records[0]["pretraining"]["tokens"] / 1e6, f"C{number}"
        found = spread(records, gap_of("D=16"))
        assert found is not None  # every experiment reads it
        label = f"{one.name}: {records[0]['parameters'] / 1e6:.1f} M parameters"
        axis.errorbar([tokens], [found.mean], yerr=[found.half_range], capsize=2, marker="o", color=color, label=label)
        for record in records:
            axis.plot(*_on_the_way(record, "D=16"), ".-", color=color)
    axis.set(xlabel="million tokens", ylabel="held-out gap of (a) at D=16, nats", ylim=(0, None))


def _draw_milestones(experiment: Experiment, axis: Any) -> None:
    """Held-out gaps of the checkpoints kept on the way, a line a seed."""
    for arm in experiment.present:
        for number, record in enumerate(record for record in experiment.of(arm) if "milestones" in record):
            for reading, style in (("D=16", "-"), ("D=64", ":")):
                label = f"{arms.TITLES[arm]}: {reading}" if number == 0 else None
                axis.plot(*_on_the_way(record, reading), style, color=_COLORS[arm], marker="o", label=label)
    axis.set(xlabel="million tokens", ylabel="held-out loss minus dense loss, nats, not adapted", yscale="log")
    _plain_numbers(axis.yaxis)


def _on_the_way(record: Record, reading: str) -> tuple[list[float], list[float | None]]:
    """Million tokens and held-out gap of the checkpoints kept on the way; none where none was kept."""
    reached = record.get("milestones", [])
    return [row["tokens"] / 1e6 for row in reached], [gap(row, reading) for row in reached]


def _draw_perplexity(experiment: Experiment, axis: Any) -> None:
    """Means of the seeds' losses; bars are half the seeds' range to both sides."""
    dilated, windowed = ("D=64", "D=16", "D=4", "dense"), (arms.SINKS, arms.WINDOWED)
    for arm in experiment.present:
        before, after = (_points(experiment, arm, dilated, of) for of in (loss_of, _adapted_by_4_percent))
        if len(after) > 1:
            _draw_points(axis, before, color=_COLORS[arm], alpha=0.35, linewidth=1)
        _draw_points(axis, after if len(after) > 1 else before, marker="o", label=arms.TITLES[arm], **_look(arm))
        _draw_points(axis, _points(experiment, arm, windowed, loss_of), marker="D", linestyle="", mfc="white", color=_COLORS[arm])
    axis.plot([], [], color="0.4", alpha=0.5, linewidth=1, label="faint: before adaptation, where there was one")
    axis.plot([], [], "D", color="0.4", mfc="white", label="window of 256: D=-1, D=16; not adapted")
    axis.set(
        xlabel="KV cache of a sequence, MiB (lines: D = 64, 16, 4, dense)",
        ylabel="held-out perplexity",
        xscale="log",
        yscale="log",
    )
    _plain_numbers(axis.xaxis, axis.yaxis)


def _plain_numbers(*scales: Any) -> None:
    """On logarithmic scales, 20 and not 2 x 10^1, at 1, 2, 3, 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for scale in scales:
        scale.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())


def _adapted_by_4_percent(reading: str) -> Callable[[Record], float | None]:
    return adapted_of(reading, arms.LONG)


def _points(
    experiment: Experiment, arm: str, readings: Sequence[str], of: Callable[[str], Callable[[Record], float | None]]
) -> list[tuple[float, Spread]]:
    """Cache and loss of an arm under the readings that were measured."""
    found = [(cache_mib(experiment, arm, reading), spread(experiment.of(arm), of(reading))) for reading in readings]
    return [(size, losses) for size, losses in found if size and losses]


def _draw_points(axis: Any, points: Sequence[tuple[float, Spread]], **look: Any) -> None:
    means = [math.exp(found.mean) for _, found in points]
    reach = [[mean - math.exp(f.mean - f.half_range) for mean, (_, f) in zip(means, points, strict=True)]]
    reach.append([math.exp(f.mean + f.half_range) - mean for mean, (_, f) in zip(means, points, strict=True)])
    several = any(found.seeds > 1 for _, found in points)
    axis.errorbar([size for size, _ in points], means, yerr=reach if several else None, capsize=2, markersize=5, **look)


def _draw_memory(experiment: Experiment, axis: Any) -> None:
    for arm in (arm for arm in experiment.present if "gates" in experiment.shown(arm)):
        layers = experiment.shown(arm)["gates"]
        numbers = range(1, len(layers) + 1)
        for key, style, which in (("mean", "-", "mean"), ("q95", ":", "95 % below")):
            memory = [layer["memory"][key] for layer in layers]
            axis.plot(numbers, memory, style, color=_COLORS[arm], marker="o", label=f"{arms.TITLES[arm]}: {which}")
    axis.set(xlabel="layer", ylabel="effective memory of the channels, tokens", yscale="log")
    _plain_numbers(axis.yaxis)
