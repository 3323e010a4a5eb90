"""Tables and figures of the experiment, made from the arms' JSON files alone.

A folder of results holds one folder an experiment (a size and a number of tokens) with one file an arm and seed. The tables are written
between the marks ``<!-- NAME -->`` and ``<!-- / -->`` of a Markdown file, the figures beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from examples.claim import arms
from megarat.errors import UserError

Record = dict[str, Any]

# The published code at this size, on a corpus of the same kinds (nats, held-out, one seed): arm -> reading -> loss.
ANCHOR: dict[str, dict[str, float]] = {
    "ratplus": {"dense": 3.255, "D=4": 3.389, "D=16": 3.461, "D=64": 3.500, arms.WINDOWED: 3.275, arms.SINKS: 3.279},
    "attention-pair": {"dense": 3.600, "D=4": 4.634, "D=16": 4.711, "D=64": 4.867, arms.WINDOWED: 3.632, arms.SINKS: 3.637},
    "attention-once": {"dense": 3.402, "D=4": 5.693, "D=16": 6.233, "D=64": 6.432, arms.WINDOWED: 3.456, arms.SINKS: 3.463},
}
ANCHOR_ADAPTED: dict[str, dict[str, float]] = {
    "ratplus": {"D=16": 3.463, "D=64": 3.505, "dense": 3.258},
    "attention-pair": {"D=16": 4.702, "D=64": 4.877, "dense": 3.600},
    "attention-once": {"D=16": 4.960, "D=64": 5.199, "dense": 3.411},
}


class Experiment(NamedTuple):
    """One folder of results."""

    name: str
    records: list[Record]

    def of(self, arm: str) -> list[Record]:
        """The arm's seeds."""
        return [record for record in self.records if record["arm"] == arm and "scores" in record]

    def shown(self, arm: str) -> Record:
        """The seed that a figure shows: the first of those with most stages."""
        return max(self.of(arm), key=len)

    @property
    def present(self) -> list[str]:
        """The arms that were scored, in their usual order."""
        return [arm for arm in arms.ARMS if self.of(arm)]


class Spread(NamedTuple):
    """A mean over seeds, and half the distance between the smallest and the largest."""

    mean: float
    half_range: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(sum(values) / len(values), (max(values) - min(values)) / 2, len(values))

    def text(self, sign: str = "") -> str:
        """``3.255`` of one seed, ``3.255 ± 0.004`` of several."""
        return f"{self.mean:{sign}.3f}" + (f" ± {self.half_range:.3f}" if self.seeds > 1 else "")


def read_results(folder: str | Path) -> list[Experiment]:
    """All experiments of a folder, by name. Raises ``UserError`` when there is none."""
    found: dict[str, list[Record]] = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text(encoding="utf-8")))
    if not found:
        raise UserError(f"{folder}: holds no EXPERIMENT/ARM-SEED.json")
    return [Experiment(name, records) for name, records in found.items()]


def loss(record: Record, reading: str) -> float | None:
    """Held-out loss of the pretrained weights (nats)."""
    return _find(record["scores"], reading)


def adapted_loss(record: Record, reading: str, share: float = arms.LONG) -> float | None:
    """Held-out loss after the adaptation to a reading."""
    return _find(_adapted_scores(record, share), reading)


def _adapted_scores(record: Record, share: float) -> list[Record]:
    """Scores of the adaptations that took this share of the pretraining's batches."""
    batches = arms.batches_of(share, record["config"]["train"]["pairs"])
    return [row["score"] for row in record.get("adaptations", []) if row["batches"] == batches]


def _find(rows: Sequence[Record], reading: str) -> float | None:
    """The loss of the row of a reading, as ``megarat eval`` names it (it writes W and I out)."""
    for row in rows:
        if _plain(row["pattern"]) == _plain(reading):
            return float(row["loss"])
    return None


def _plain(reading: str) -> str:
    return reading.replace(" ", "").replace(",W=0,I=0", "")


def gap(record: Record, reading: str) -> float | None:
    """Loss under a reading minus dense loss, both of the pretrained weights."""
    sparse, dense = loss(record, reading), loss(record, "dense")
    return None if sparse is None or dense is None else sparse - dense


def adapted_gap(record: Record, reading: str) -> float | None:
    """Loss after the adaptation to a reading minus the dense loss of the pretrained weights."""
    sparse, dense = adapted_loss(record, reading), loss(record, "dense")
    return None if sparse is None or dense is None else sparse - dense


def spread(records: Sequence[Record], of: Callable[[Record], float | None]) -> Spread | None:
    """A figure over the seeds that have it."""
    values = [value for record in records if (value := of(record)) is not None]
    return Spread.of(values) if values else None


def _cell(records: Sequence[Record], of: Callable[[Record], float | None], sign: str = "") -> str:
    found = spread(records, of)
    return "-" if found is None else found.text(sign)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


# --- the tables ---------------------------------------------------------------------------------------------------------------


def runs_table(experiment: Experiment) -> str:
    """What was run: a line an arm and seed."""
    head = ("arm", "seed", "parameters", "updates", "MFLOPs a token", "tokens", "seconds", "tokens/s", "GPU", "torch", "commit")
    return _table(head, (_run_row(record) for arm in experiment.present for record in experiment.of(arm)))


def _run_row(record: Record) -> list[str]:
    pretraining, environment = record["pretraining"], record["environment"]
    updates = pretraining["pairs"] * (1 if record["config"]["attention"]["train_dilation"] == 1 else 2)
    return [
        arms.TITLES[record["arm"]],
        str(record["seed"]),
        f"{record['parameters'] / 1e6:.1f} M",
        f"{updates:,}",
        f"{record['flops_per_token'] / 1e6:.0f}",
        f"{pretraining['tokens'] / 1e6:.1f} M",
        f"{pretraining['seconds']:.0f}",
        f"{pretraining['median_tokens_per_s']:,.0f}",
        ", ".join(environment["gpus"]) or "CPU",
        str(environment["packages"]["torch"]),
        str(environment["commit"])[:7],
    ]


def losses_table(experiment: Experiment) -> str:
    """Held-out loss before adaptation: a line an arm, a column a reading."""
    rows = (
        [
            arms.TITLES[arm],
            str(len(experiment.of(arm))),
            *(_cell(experiment.of(arm), _loss_of(reading)) for reading in arms.READINGS),
        ]
        for arm in experiment.present
    )
    return _table(("held-out loss, nats", "seeds", *arms.READINGS), rows)


def _loss_of(reading: str) -> Callable[[Record], float | None]:
    return lambda record: loss(record, reading)


def adapted_table(experiment: Experiment) -> str:
    """Held-out loss after the adaptation to the column's reading, with 1 % and 4 % of the pretraining's tokens."""
    rows = []
    for arm in experiment.present:
        for share, name in ((arms.SHORT, "1 %"), (arms.LONG, "4 %")):
            cells = [_cell(experiment.of(arm), _adapted_of(reading, share)) for reading in arms.READINGS]
            if any(cell != "-" for cell in cells):
                rows.append([arms.TITLES[arm], name, *cells])
    return _table(("held-out loss after adaptation, nats", "tokens", *arms.READINGS), rows)


def _adapted_of(reading: str, share: float) -> Callable[[Record], float | None]:
    return lambda record: adapted_loss(record, reading, share)


def gaps_table(experiment: Experiment) -> str:
    """Sparse minus dense, before and after adaptation."""
    readings = arms.READINGS[1:]
    head = ("loss minus dense loss, nats", *(f"{reading}{when}" for reading in readings for when in ("", ", adapted")))
    rows = (
        [
            arms.TITLES[arm],
            *(_cell(experiment.of(arm), of, "+") for reading in readings for of in (_gap_of(reading), _adapted_gap_of(reading))),
        ]
        for arm in experiment.present
    )
    return _table(head, rows)


def _gap_of(reading: str) -> Callable[[Record], float | None]:
    return lambda record: gap(record, reading)


def _adapted_gap_of(reading: str) -> Callable[[Record], float | None]:
    return lambda record: adapted_gap(record, reading)


def ratios_table(experiment: Experiment) -> str:
    """How many times larger an arm's gap is than that of (a): pretrained, both adapted, and each at its best, adapted or not."""
    readings = ("D=16", "D=64")
    ways = {"pretrained": _gap_of, "adapted": _adapted_gap_of, "at its best": _best_gap_of}
    head = ("gap as a multiple of that of (a)", *(f"{reading}, {way}" for reading in readings for way in ways))
    others = (arm for arm in experiment.present if arm != "ratplus")
    rows = (
        [arms.TITLES[arm], *(_ratio_cell(experiment, arm, way(reading)) for reading in readings for way in ways.values())]
        for arm in others
    )
    return _table(head, rows)


def _ratio_cell(experiment: Experiment, arm: str, of: Callable[[Record], float | None]) -> str:
    found = ratio(experiment, arm, of)
    return "-" if found is None else f"{found:.1f}"


def seeds_table(experiment: Experiment) -> str:
    """Every arm and seed alone: its gaps, and how many times larger they are than those of (a) of the same seed."""
    ways = {
        f"{reading}{when}": of(reading)
        for reading in ("D=16", "D=64")
        for when, of in (("", _gap_of), (", adapted", _adapted_gap_of))
    }
    head = ("arm", "seed", "dense", *(f"gap, {way}" for way in (*ways, arms.SINKS)), *(f"of (a), {way}" for way in ways))
    rows = []
    for arm in experiment.present:
        for record in experiment.of(arm):
            ours = Experiment(experiment.name, [other for other in experiment.records if other["seed"] == record["seed"]])
            gaps = (_cell([record], of, "+") for of in (*ways.values(), _gap_of(arms.SINKS)))
            folds = (_ratio_cell(ours, arm, of) for of in ways.values())
            rows.append([arms.TITLES[arm], str(record["seed"]), _cell([record], _loss_of("dense")), *gaps, *folds])
    return _table(head, rows)


def ratio(experiment: Experiment, arm: str, of: Callable[[Record], float | None]) -> float | None:
    """An arm's mean over that of (a); None where one of them was not measured."""
    theirs, ours = (spread(experiment.of(one), of) for one in (arm, "ratplus"))
    return None if theirs is None or ours is None else theirs.mean / ours.mean


def _best_gap_of(reading: str) -> Callable[[Record], float | None]:
    def best(record: Record) -> float | None:
        gaps = [found for found in (gap(record, reading), adapted_gap(record, reading)) if found is not None]
        return min(gaps, default=None)

    return best


def adaptation_table(experiment: Experiment) -> str:
    """What adaptation buys: loss before, and after growing shares of the pretraining's batches."""
    steps = ((arms.TINY, "0.25 %"), (arms.SHORT, "1 %"), (arms.LONG, "4 %"))
    readings = ("D=16", "D=64")
    names = ("before", *(f"after {name}" for _, name in steps))
    rows = (
        [
            arms.TITLES[arm],
            *(
                _cell(experiment.of(arm), of)
                for reading in readings
                for of in (_loss_of(reading), *(_adapted_of(reading, share) for share, _ in steps))
            ),
        ]
        for arm in experiment.present
    )
    return _table(("held-out loss, nats", *(f"{reading} {name}" for reading in readings for name in names)), rows)


def cache_table(experiment: Experiment) -> str:
    """Perplexity, of the pretrained weights or adapted ones, whichever is lower, against the bytes of the cache of one sequence."""
    first = experiment.present[0]
    names = (f"perplexity, {_letter(arm)}" for arm in experiment.present)
    dense = cache_mib(experiment, first, "dense")
    rows = []
    for reading in arms.READINGS:
        size = cache_mib(experiment, first, reading)
        places = [f"{size:.2f}", f"1/{dense / size:.0f}"] if dense and size else ["-", "-"]
        rows.append([reading, *places, *(_cache_cell(experiment.of(arm), reading) for arm in experiment.present)])
    return _table(("reading", f"KV cache of a sequence, {_letter(first)}, MiB", "of dense", *names), rows)


def cache_mib(experiment: Experiment, arm: str, reading: str) -> float | None:
    """The KV cache of a sequence under a reading, in MiB."""
    for row in experiment.shown(arm)["scores"]:
        if _plain(row["pattern"]) == reading:
            return float(row["cache_bytes_per_sequence"]) / 2**20
    return None


def _cache_cell(records: Sequence[Record], reading: str) -> str:
    found = spread(records, lambda record: _best_loss(record, reading))
    return "-" if found is None else f"{math.exp(found.mean):.1f}"


def _best_loss(record: Record, reading: str) -> float | None:
    losses = [found for found in (loss(record, reading), adapted_loss(record, reading)) if found is not None]
    return min(losses, default=None)


def memory_table(experiment: Experiment) -> str:
    """Gates and effective memory by layer, of the arms with a recurrence (one seed each)."""
    head = (
        "arm",
        "layer",
        "mean gate",
        "95 % of the gates below",
        "memory, tokens: mean",
        "median",
        "95 % of the channels below",
        "99 %",
    )
    rows = [
        [
            arms.TITLES[arm],
            str(number),
            *(f"{layer['gate'][key]:.2f}" for key in ("mean", "q95")),
            *(f"{layer['memory'][key]:.1f}" for key in ("mean", "q50", "q95", "q99")),
        ]
        for arm in experiment.present
        for number, layer in enumerate(experiment.shown(arm).get("gates", []), start=1)
    ]
    return _table(head, rows)


def anchor_table(experiment: Experiment) -> str:
    """Gaps of the published code and ours, and how far they are apart."""
    rows = []
    for arm, published in ANCHOR.items():
        for reading in arms.READINGS[1:]:
            rows.append(_anchor_row(experiment, arm, reading, published[reading] - published["dense"], _gap_of(reading), ""))
        for reading in ("D=16", "D=64"):
            theirs = ANCHOR_ADAPTED[arm][reading] - published["dense"]
            rows.append(_anchor_row(experiment, arm, reading, theirs, _adapted_gap_of(reading), ", adapted"))
    return _table(("arm", "reading", "gap, published code", "gap, megarat", "difference"), rows)


def _anchor_row(
    experiment: Experiment, arm: str, reading: str, theirs: float, of: Callable[[Record], float | None], when: str
) -> list[str]:
    ours = spread(experiment.of(arm), of)
    measured = ["-", "-"] if ours is None else [ours.text("+"), f"{ours.mean - theirs:+.3f}"]
    return [arms.TITLES[arm], f"{reading}{when}", f"{theirs:+.3f}", *measured]


def kinds_table(experiment: Experiment) -> str:
    """By kind of held-out text: dense loss, and loss minus dense loss under sparse patterns; a line an arm and kind."""
    kinds = sorted({kind for record in experiment.records for kind in record.get("kinds", {})})
    sparse = arms.KIND_READINGS[1:]
    rows = []
    for arm in experiment.present:
        for kind in kinds:
            if apart := _kinds_of(experiment, arm, kind):
                gaps = (_cell(apart, _gap_of(reading), "+") for reading in sparse)
                rows.append([arms.TITLES[arm], kind, _cell(apart, _loss_of("dense")), *gaps])
    return _table(("arm", "held-out text", "dense loss, nats", *(f"gap, {reading}" for reading in sparse)), rows)


def topk_table(experiment: Experiment) -> str:
    """Held-out loss when every query reads a few blocks of 64 keys."""
    rows = (
        [arms.TITLES[arm], *(_cell(experiment.of(arm), _topk_of(reading)) for reading in arms.TOPK)] for arm in experiment.present
    )
    return _table(("held-out loss, nats", *(f"K = {_blocks(reading)}" for reading in arms.TOPK)), rows)


def _topk_of(reading: str) -> Callable[[Record], float | None]:
    return lambda record: _find(record.get("topk", []), reading)


def _blocks(reading: str) -> str:
    found = re.search(r"blocks=(\d+)", reading)
    return found[1] if found else "-"


def needles_table(experiment: Experiment) -> str:
    """Needles found, percent (mean and half the range of several seeds): a line an arm and reading, a column a task."""
    tasks = arms.NEEDLE_TASKS.split(",")
    rows = []
    for arm in experiment.present:
        for trained, reading in _needle_readings(experiment.of(arm)):
            cells = (_needle_cell(experiment.of(arm), trained, reading, task) for task in tasks)
            rows.append([arms.TITLES[arm], trained, _short(reading), str(_tuned_seeds(experiment.of(arm), trained)), *cells])
    return _table(("arm", "fine-tuned under", "read under", "seeds", *tasks), rows)


def _needle_readings(records: Sequence[Record]) -> list[tuple[str, str]]:
    found = (
        (tuning["trained"], row["pattern"])
        for record in records
        for tuning in record.get("needles", [])
        for row in tuning["scores"]
    )
    return list(dict.fromkeys(found))


def _short(reading: str) -> str:
    """``3 blocks of 64`` for a top-k reading of nothing else, the plain pattern for any other."""
    return f"{_blocks(reading)} blocks of 64" if "blocks=" in reading else _plain(reading)


def _tuned_seeds(records: Sequence[Record], trained: str) -> int:
    return sum(tuning["trained"] == trained for record in records for tuning in record.get("needles", []))


def _needles_of(reading: str, task: str, trained: str = "pair") -> Callable[[Record], float | None]:
    """Share of the needles of a task found."""

    def share(record: Record) -> float | None:
        for tuning in record.get("needles", []):
            for row in tuning["scores"]:
                if (tuning["trained"], _plain(row["pattern"]), row["task"]) == (trained, _plain(reading), task):
                    return float(row["ruler"])
        return None

    return share


def _needle_cell(records: Sequence[Record], trained: str, reading: str, task: str) -> str:
    share = _needles_of(reading, task, trained)
    values = [100 * value for record in records if (value := share(record)) is not None]
    if not values:
        return "-"
    found = Spread.of(values)
    return f"{found.mean:.0f}" + (f" ± {found.half_range:.0f}" if found.seeds > 1 else "")


def milestones_table(experiment: Experiment) -> str:
    """Held-out dense loss and gaps of the checkpoints kept on the way: a line an arm and checkpoint."""
    sparse = arms.MILESTONE_READINGS[1:]
    rows = []
    for arm in experiment.present:
        for tokens in sorted({row["tokens"] for record in experiment.of(arm) for row in record.get("milestones", [])}):
            reached = [row for record in experiment.of(arm) for row in record.get("milestones", []) if row["tokens"] == tokens]
            gaps = (_cell(reached, _gap_of(reading), "+") for reading in sparse)
            rows.append([arms.TITLES[arm], f"{tokens / 1e6:.1f} M", _cell(reached, _loss_of("dense")), *gaps])
    return _table(("arm", "tokens trained on", "dense loss, nats", *(f"gap, {reading}" for reading in sparse)), rows)


def checks_table(experiment: Experiment) -> str:
    """What the claim says must be seen, and what was."""
    return _table(("what must be seen", "measured", "seen"), [[*row] for row in _checks(experiment)])


def _checks(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """(condition, figures, verdict); a verdict needs every arm that it names."""
    dense = {arm: _mean(experiment, arm, _loss_of("dense")) for arm in arms.ARMS}
    for other in ("attention-pair", "attention", "attention-once"):
        yield _check(f"dense (a) not worse than dense {_letter(other)}", dense["ratplus"], dense[other], lambda a, b: a <= b)
    for reading in ("D=16", "D=64"):
        gaps = {arm: _mean(experiment, arm, _gap_of(reading)) for arm in arms.ARMS}
        for other in ("recurrence", "recurrence-once"):
            lowest = f"gap of (a) below that of {_letter(other)} at {reading}"
            yield _check(lowest, gaps["ratplus"], gaps[other], lambda a, b: a < b, "+")
            for rival in ("attention-pair", "attention" if other == "recurrence" else "attention-once"):
                yield _check(
                    f"gap of {_letter(other)} below that of {_letter(rival)} at {reading}",
                    gaps[other],
                    gaps[rival],
                    lambda a, b: a < b,
                    "+",
                )
        adapted = {arm: _mean(experiment, arm, _adapted_gap_of(reading)) for arm in arms.ARMS}
        for other in ("attention-pair", "attention", "attention-once"):
            fold = f"adapted to {reading}, the gap of {_letter(other)} at least 5 times that of (a)"
            yield _check(fold, adapted["ratplus"], adapted[other], lambda a, b: b >= 5 * a, "+")
        for less, more in (("ratplus", "recurrence"), ("recurrence", "attention-pair"), ("recurrence", "attention")):
            order = f"adapted to {reading}, gap of {_letter(less)} below that of {_letter(more)}"
            yield _check(order, adapted[less], adapted[more], lambda a, b: a < b, "+")
    topk = {arm: _mean(experiment, arm, _topk_of(arms.TOPK[0])) for arm in ("ratplus", "attention-pair")}
    yield _check(
        "by 3 blocks of 64 keys, loss of (a) below that of (c)", topk["ratplus"], topk["attention-pair"], lambda a, b: a < b
    )
    for task in arms.NEEDLE_TASKS.split(","):
        found = {arm: _mean(experiment, arm, _needles_of(arms.TOPK[0], task)) for arm in topk}
        yield _check(
            f"by 3 blocks of 64 keys, share of {task} found by (a) above that of (c)",
            found["ratplus"],
            found["attention-pair"],
            lambda a, b: a > b,
        )


def _check(
    condition: str, ours: float | None, theirs: float | None, holds: Callable[[float, float], bool], sign: str = ""
) -> tuple[str, str, str]:
    if ours is None or theirs is None:
        return condition, "-", "not measured"
    return condition, f"{ours:{sign}.3f}, {theirs:{sign}.3f}", "yes" if holds(ours, theirs) else "no"


def _mean(experiment: Experiment, arm: str, of: Callable[[Record], float | None]) -> float | None:
    found = spread(experiment.of(arm), of)
    return None if found is None else found.mean


def _letter(arm: str) -> str:
    return arms.TITLES[arm].partition(" ")[0]


def scaling_table(experiments: Sequence[Experiment]) -> str:
    """Every size: dense losses, gaps of (a), and how many times larger those of attention alone are."""
    rivals = ("attention-pair", "attention", "attention-once")
    head = (
        "experiment",
        "parameters of (a)",
        "tokens",
        *(f"dense {_letter(arm)}" for arm in ("ratplus", *rivals[:2])),
        "(a), D=16",
        *(f"gap of (a), {reading}{when}" for reading in ("D=16", "D=64") for when in ("", ", adapted")),
        *(f"{_letter(arm)} / (a), D=16 adapted" for arm in rivals),
    )
    return _table(head, (_scaling_row(experiment, rivals) for experiment in _by_size(experiments)))


def _by_size(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Those that have (a), the fewest parameters first."""
    return sorted((experiment for experiment in experiments if experiment.of("ratplus")), key=_size)


def _size(experiment: Experiment) -> tuple[int, int, str]:
    ours = experiment.of("ratplus")[0]
    return ours["parameters"], ours["pretraining"]["tokens"], experiment.name


def _scaling_row(experiment: Experiment, rivals: Sequence[str]) -> list[str]:
    records = experiment.of("ratplus")
    return [
        experiment.name,
        f"{records[0]['parameters'] / 1e6:.1f} M",
        f"{records[0]['pretraining']['tokens'] / 1e6:.1f} M",
        *(_cell(experiment.of(arm), _loss_of("dense")) for arm in ("ratplus", *rivals[:2])),
        _cell(records, _loss_of("D=16")),
        *(_cell(records, of(reading), "+") for reading in ("D=16", "D=64") for of in (_gap_of, _adapted_gap_of)),
        *(_ratio_cell(experiment, arm, _adapted_gap_of("D=16")) for arm in rivals),
    ]


def sizes_table(experiments: Sequence[Experiment]) -> str:
    """By kind of held-out text and size: dense loss of (a), its gap at D=16, and how far its dense loss is from that of (d)."""
    sizes = [
        experiment for experiment in _by_size(experiments) if experiment.of("attention") and _kinds_of(experiment, "ratplus")
    ]
    what = ("dense (a)", "gap of (a), D=16", "dense (a) - dense (d)")
    kinds = sorted({kind for experiment in sizes for kind in experiment.of("ratplus")[-1]["kinds"]})
    rows = ([kind, *(cell for one in sizes for cell in _size_cells(one, kind))] for kind in kinds)
    return _table(("held-out text", *(f"{one.name}: {name}" for one in sizes for name in what)), rows)


def _size_cells(experiment: Experiment, kind: str) -> list[str]:
    ours, theirs = (_kinds_of(experiment, arm, kind) for arm in ("ratplus", "attention"))
    dense, rival = (spread(records, _loss_of("dense")) for records in (ours, theirs))
    apart = "-" if dense is None or rival is None else f"{dense.mean - rival.mean:+.3f}"
    return [_cell(ours, _loss_of("dense")), _cell(ours, _gap_of("D=16"), "+"), apart]


def _kinds_of(experiment: Experiment, arm: str, kind: str | None = None) -> list[Record]:
    """The seeds that were read by kind of text; with a kind, their scores on it alone."""
    records = [record for record in experiment.of(arm) if "kinds" in record]
    return records if kind is None else [{"scores": record["kinds"][kind]} for record in records]


_STRETCHES = 10


def course_table(experiments: Sequence[Experiment]) -> str:
    """The sparse pass's training loss minus that of the dense pass behind it, tenth by tenth of the training, of arms trained by pairs."""
    head = ("experiment", "arm", "seed", *(f"{100 * (tenth + 1) // _STRETCHES} %" for tenth in range(_STRETCHES)))
    rows = (
        [one.name, _letter(arm), str(record["seed"]), *(f"{found:.3f}" for found in _course(record))]
        for one in _by_size(experiments)
        for arm in ("ratplus", "attention-pair")
        for record in one.of(arm)
    )
    return _table(head, rows)


def _course(record: Record) -> list[float]:
    """Means over equal stretches of the loss curve."""
    curve = record["pretraining"]["curve"]
    apart = [point["loss_sparse"] - point["loss_dense"] for point in curve]
    edges = [len(apart) * stretch // _STRETCHES for stretch in range(_STRETCHES + 1)]
    return [sum(apart[first:end]) / (end - first) for first, end in pairwise(edges)]


def repeats_table(path: Path) -> str:
    """How much of each kind of held-out text could be copied from far back."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = (
        [kind, f"{row['tokens']:,}", f"{100 * row['from_afar']:.1f} %", f"{100 * row['from_nearby']:.1f} %"]
        for kind, row in sorted(found.items(), key=lambda item: item[1]["from_afar"])
    )
    return _table(("held-out text", "tokens", "could be copied from more than 64 tokens back", "from nearer"), rows)


def rounding_table(folder: Path) -> str:
    """The same weights read in fp32 and in bf16, by ``megarat eval``."""
    losses = {}
    for precision in ("fp32", "bf16"):
        [path] = folder.glob(f"read-{precision}-*.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["tasks"]["ppl"]
        losses[precision] = {_plain(row["pattern"]): float(row["loss"]) for row in rows}
    fp32, bf16 = losses["fp32"], losses["bf16"]
    lines = [
        [f"loss, {reading}", f"{fp32[reading]:.5f}", f"{bf16[reading]:.5f}", f"{bf16[reading] - fp32[reading]:+.5f}"]
        for reading in fp32
    ]
    for reading in [reading for reading in fp32 if reading != "dense"]:
        gaps = [loss[reading] - loss["dense"] for loss in (fp32, bf16)]
        lines.append([f"gap, {reading}", *(f"{found:+.5f}" for found in gaps), f"{gaps[1] - gaps[0]:+.5f}"])
    return _table(("nats", "read in fp32", "read in bf16", "difference"), lines)


TABLES: dict[str, Callable[[Experiment], str]] = {
    "runs": runs_table,
    "losses": losses_table,
    "adapted": adapted_table,
    "gaps": gaps_table,
    "ratios": ratios_table,
    "seeds": seeds_table,
    "adaptation": adaptation_table,
    "cache": cache_table,
    "memory": memory_table,
    "anchor": anchor_table,
    "kinds": kinds_table,
    "topk": topk_table,
    "needles": needles_table,
    "milestones": milestones_table,
    "checks": checks_table,
}


def fill(text: str, folder: str | Path) -> str:
    """The text with every table between its marks written anew: ``<!-- runs small -->`` (table, experiment), ``<!-- scaling -->``,
    ``<!-- sizes -->``, ``<!-- course -->``, ``<!-- repeats -->`` and ``<!-- rounding -->``. Raises ``UserError``."""
    experiments = read_results(folder)
    by_name = {experiment.name: experiment for experiment in experiments}
    alone: dict[str, Callable[[], str]] = {
        "scaling": lambda: scaling_table(experiments),
        "sizes": lambda: sizes_table(experiments),
        "course": lambda: course_table(experiments),
        "repeats": lambda: repeats_table(Path(folder) / "repeats.json"),
        "rounding": lambda: rounding_table(Path(folder)),
    }

    def made(match: re.Match[str]) -> str:
        table, name = match[1], match[2]
        if table in alone and not name:
            content = alone[table]()
        elif table in TABLES and name in by_name:
            content = TABLES[table](by_name[name])
        else:
            known = f"tables are {', '.join(TABLES)}, experiments {', '.join(by_name)}; {', '.join(alone)} stand alone"
            raise UserError(f"mark '{' '.join(filter(None, (table, name)))}': {known}")
        return f"<!-- {' '.join(filter(None, (table, name)))} -->\n{content}\n<!-- / -->"

    return re.sub(r"<!-- (\w+)(?: ([\w-]+))? -->\n.*?<!-- / -->", made, text, flags=re.DOTALL)


# --- the figures --------------------------------------------------------------------------------------------------------------


_COLORS = {
    "ratplus": "C0",
    "recurrence": "C1",
    "attention-pair": "C2",
    "attention": "C3",
    "recurrence-once": "C1",
    "attention-once": "C3",
}


def draw(experiment: Experiment, folder: Path) -> list[Path]:
    """Loss curves, perplexity against cache bytes, and effective memory by layer, as PNG files named after the experiment."""
    figures = {"loss": _draw_losses, "perplexity": _draw_perplexity, "memory": _draw_memory}
    return [
        _save(partial(make, experiment), folder / f"{experiment.name}-{name}.png")
        for name, make in figures.items()
        if name != "memory" or any("gates" in record for record in experiment.records)
    ]


def _save(make: Callable[[Any], None], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.6))
    make(axis)
    axis.grid(color="0.9", linewidth=0.8)
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
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
            axis.plot(tokens, sparse, color=_COLORS[arm], linestyle=":", label=f"{_letter(arm)}, its sparse pass, D=64")
    curves = [record["pretraining"]["curve"] for record in shown]
    highest = max(curve[len(curve) // 10]["loss_dense"] for curve in curves)  # the fall of the first tenth is left out
    axis.set(xlabel="million tokens", ylabel="training loss, nats", ylim=(None, highest))


def _draw_course(experiments: Sequence[Experiment], axis: Any) -> None:
    """How far apart the passes of (a) and (c) are as the training goes on: a line an experiment, its first seed."""
    for number, one in enumerate(_by_size(experiments)):
        for arm, style in (("ratplus", "-"), ("attention-pair", ":")):
            for record in one.of(arm)[:1]:
                course, tokens = _course(record), record["pretraining"]["tokens"] / 1e6
                places = [tokens * (stretch + 0.5) / _STRETCHES for stretch in range(_STRETCHES)]
                axis.plot(places, course, style, color=f"C{number}", marker="o", label=f"{one.name}, {_letter(arm)}")
    axis.set(xlabel="million tokens", ylabel="training loss, sparse pass minus dense pass, nats", yscale="log")
    _plain_numbers(axis.yaxis)


def _draw_perplexity(experiment: Experiment, axis: Any) -> None:
    """Means of the seeds' losses; bars are half the seeds' range to both sides."""
    dilated, windowed = ("D=64", "D=16", "D=4", "dense"), (arms.SINKS, arms.WINDOWED)
    for arm in experiment.present:
        before, after = (_points(experiment, arm, dilated, of) for of in (_loss_of, _adapted_by_4_percent))
        if len(after) > 1:
            _draw_points(axis, before, color=_COLORS[arm], alpha=0.35, linewidth=1)
        _draw_points(axis, after if len(after) > 1 else before, marker="o", label=arms.TITLES[arm], **_look(arm))
        _draw_points(
            axis, _points(experiment, arm, windowed, _loss_of), marker="D", linestyle="", mfc="white", color=_COLORS[arm]
        )
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
    return _adapted_of(reading, arms.LONG)


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


def write(folder: str | Path, readme: str | Path) -> list[Path]:
    """Fill the tables of ``readme`` and draw the figures of every experiment beside it, in ``figures/``; returns what was written."""
    experiments = read_results(folder)
    readme = Path(readme)
    figures = readme.parent / "figures"
    figures.mkdir(exist_ok=True)
    readme.write_text(fill(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
    course = _save(partial(_draw_course, experiments), figures / "course.png")
    return [readme, course, *(path for experiment in experiments for path in draw(experiment, figures))]
