"""Tables and figures of the experiment, made from the arms' JSON files alone.

The tables are written between the marks ``<!-- NAME -->`` and ``<!-- / -->`` of a Markdown file, the figures beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from examples.claim import arms, drawing
from examples.claim.records import (
    STRETCHES,
    Experiment,
    Record,
    Spread,
    adapted_gap_of,
    adapted_of,
    best_gap_of,
    best_loss,
    by_size,
    cache_mib,
    course,
    gap_of,
    kinds_of,
    letter,
    loss_of,
    mean,
    needles_of,
    plain,
    ratio,
    read_results,
    spread,
    topk_of,
)
from megarat.errors import UserError

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


def _cell(records: Sequence[Record], of: Callable[[Record], float | None], sign: str = "") -> str:
    found = spread(records, of)
    return "-" if found is None else found.text(sign)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


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
            *(_cell(experiment.of(arm), loss_of(reading)) for reading in arms.READINGS),
        ]
        for arm in experiment.present
    )
    return _table(("held-out loss, nats", "seeds", *arms.READINGS), rows)


def adapted_table(experiment: Experiment) -> str:
    """Held-out loss after the adaptation to the column's reading, with 1 % and 4 % of the pretraining's tokens."""
    rows = []
    for arm in experiment.present:
        for share, name in ((arms.SHORT, "1 %"), (arms.LONG, "4 %")):
            cells = [_cell(experiment.of(arm), adapted_of(reading, share)) for reading in arms.READINGS]
            if any(cell != "-" for cell in cells):
                rows.append([arms.TITLES[arm], name, *cells])
    return _table(("held-out loss after adaptation, nats", "tokens", *arms.READINGS), rows)


def gaps_table(experiment: Experiment) -> str:
    """Sparse minus dense, before and after adaptation."""
    readings = arms.READINGS[1:]
    head = ("loss minus dense loss, nats", *(f"{reading}{when}" for reading in readings for when in ("", ", adapted")))
    rows = (
        [
            arms.TITLES[arm],
            *(_cell(experiment.of(arm), of, "+") for reading in readings for of in (gap_of(reading), adapted_gap_of(reading))),
        ]
        for arm in experiment.present
    )
    return _table(head, rows)


def ratios_table(experiment: Experiment) -> str:
    """How many times larger an arm's gap is than that of (a): pretrained, both adapted, and each at its best, adapted or not."""
    readings = ("D=16", "D=64")
    ways = {"pretrained": gap_of, "adapted": adapted_gap_of, "at its best": best_gap_of}
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
        for when, of in (("", gap_of), (", adapted", adapted_gap_of))
    }
    head = ("arm", "seed", "dense", *(f"gap, {way}" for way in (*ways, arms.SINKS)), *(f"of (a), {way}" for way in ways))
    rows = []
    for arm in experiment.present:
        for record in experiment.of(arm):
            ours = Experiment(experiment.name, [other for other in experiment.records if other["seed"] == record["seed"]])
            gaps = (_cell([record], of, "+") for of in (*ways.values(), gap_of(arms.SINKS)))
            folds = (_ratio_cell(ours, arm, of) for of in ways.values())
            rows.append([arms.TITLES[arm], str(record["seed"]), _cell([record], loss_of("dense")), *gaps, *folds])
    return _table(head, rows)


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
                for of in (loss_of(reading), *(adapted_of(reading, share) for share, _ in steps))
            ),
        ]
        for arm in experiment.present
    )
    return _table(("held-out loss, nats", *(f"{reading} {name}" for reading in readings for name in names)), rows)


def cache_table(experiment: Experiment) -> str:
    """Perplexity, of the pretrained weights or adapted ones, whichever is lower, against the bytes of the cache of one sequence."""
    first = experiment.present[0]
    names = (f"perplexity, {letter(arm)}" for arm in experiment.present)
    dense = cache_mib(experiment, first, "dense")
    rows = []
    for reading in arms.READINGS:
        size = cache_mib(experiment, first, reading)
        places = [f"{size:.2f}", f"1/{dense / size:.0f}"] if dense and size else ["-", "-"]
        rows.append([reading, *places, *(_cache_cell(experiment.of(arm), reading) for arm in experiment.present)])
    return _table(("reading", f"KV cache of a sequence, {letter(first)}, MiB", "of dense", *names), rows)


def _cache_cell(records: Sequence[Record], reading: str) -> str:
    found = spread(records, lambda record: best_loss(record, reading))
    return "-" if found is None else f"{math.exp(found.mean):.1f}"


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
            rows.append(_anchor_row(experiment, arm, reading, published[reading] - published["dense"], gap_of(reading), ""))
        for reading in ("D=16", "D=64"):
            theirs = ANCHOR_ADAPTED[arm][reading] - published["dense"]
            rows.append(_anchor_row(experiment, arm, reading, theirs, adapted_gap_of(reading), ", adapted"))
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
            if apart := kinds_of(experiment, arm, kind):
                gaps = (_cell(apart, gap_of(reading), "+") for reading in sparse)
                rows.append([arms.TITLES[arm], kind, _cell(apart, loss_of("dense")), *gaps])
    return _table(("arm", "held-out text", "dense loss, nats", *(f"gap, {reading}" for reading in sparse)), rows)


def topk_table(experiment: Experiment) -> str:
    """Held-out loss when every query reads a few blocks of 64 keys."""
    rows = (
        [arms.TITLES[arm], *(_cell(experiment.of(arm), topk_of(reading)) for reading in arms.TOPK)] for arm in experiment.present
    )
    return _table(("held-out loss, nats", *(f"K = {_blocks(reading)}" for reading in arms.TOPK)), rows)


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
    """(fine-tuned under, read under), in the order of ``arms.NEEDLE_READINGS``."""
    found = (
        (tuning["trained"], row["pattern"])
        for record in records
        for tuning in record.get("needles", [])
        for row in tuning["scores"]
    )
    return sorted(dict.fromkeys(found), key=lambda pair: arms.NEEDLE_READINGS.index(pair[0]))


def _short(reading: str) -> str:
    """``3 blocks of 64`` for a top-k reading of nothing else, the plain pattern for any other."""
    return f"{_blocks(reading)} blocks of 64" if "blocks=" in reading else plain(reading)


def _tuned_seeds(records: Sequence[Record], trained: str) -> int:
    return sum(tuning["trained"] == trained for record in records for tuning in record.get("needles", []))


def _needle_cell(records: Sequence[Record], trained: str, reading: str, task: str) -> str:
    share = needles_of(reading, task, trained)
    found = spread(records, share)
    return "-" if found is None else Spread(100 * found.mean, 100 * found.half_range, found.seeds).text(digits=0)


def milestones_table(experiment: Experiment) -> str:
    """Held-out dense loss and gaps of the checkpoints kept on the way: a line an arm and checkpoint."""
    sparse = arms.MILESTONE_READINGS[1:]
    rows = []
    for arm in experiment.present:
        for tokens in sorted({row["tokens"] for record in experiment.of(arm) for row in record.get("milestones", [])}):
            reached = [row for record in experiment.of(arm) for row in record.get("milestones", []) if row["tokens"] == tokens]
            gaps = (_cell(reached, gap_of(reading), "+") for reading in sparse)
            rows.append([arms.TITLES[arm], f"{tokens / 1e6:.1f} M", _cell(reached, loss_of("dense")), *gaps])
    return _table(("arm", "tokens trained on", "dense loss, nats", *(f"gap, {reading}" for reading in sparse)), rows)


def checks_table(experiment: Experiment) -> str:
    """What the claim says must be seen, and what was."""
    return _table(("what must be seen", "measured", "seen"), [[*row] for row in _checks(experiment)])


def _checks(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """(condition, figures, verdict); a verdict needs every arm that it names."""
    dense = {arm: mean(experiment, arm, loss_of("dense")) for arm in arms.ARMS}
    for other in ("attention-pair", "attention", "attention-once"):
        yield _check(f"dense (a) not worse than dense {letter(other)}", dense["ratplus"], dense[other], lambda a, b: a <= b)
    for reading in ("D=16", "D=64"):
        gaps = {arm: mean(experiment, arm, gap_of(reading)) for arm in arms.ARMS}
        for other in ("recurrence", "recurrence-once"):
            lowest = f"gap of (a) below that of {letter(other)} at {reading}"
            yield _check(lowest, gaps["ratplus"], gaps[other], lambda a, b: a < b, "+")
            for rival in ("attention-pair", "attention" if other == "recurrence" else "attention-once"):
                yield _check(
                    f"gap of {letter(other)} below that of {letter(rival)} at {reading}",
                    gaps[other],
                    gaps[rival],
                    lambda a, b: a < b,
                    "+",
                )
        adapted = {arm: mean(experiment, arm, adapted_gap_of(reading)) for arm in arms.ARMS}
        for other in ("attention-pair", "attention", "attention-once"):
            fold = f"adapted to {reading}, the gap of {letter(other)} at least 5 times that of (a)"
            yield _check(fold, adapted["ratplus"], adapted[other], lambda a, b: b >= 5 * a, "+")
        for less, more in (("ratplus", "recurrence"), ("recurrence", "attention-pair"), ("recurrence", "attention")):
            order = f"adapted to {reading}, gap of {letter(less)} below that of {letter(more)}"
            yield _check(order, adapted[less], adapted[more], lambda a, b: a < b, "+")
    topk = {arm: mean(experiment, arm, topk_of(arms.TOPK[0])) for arm in ("ratplus", "attention-pair")}
    yield _check(
        "by 3 blocks of 64 keys, loss of (a) below that of (c)", topk["ratplus"], topk["attention-pair"], lambda a, b: a < b
    )
    for task in arms.NEEDLE_TASKS.split(","):
        found = {arm: mean(experiment, arm, needles_of(arms.TOPK[0], task)) for arm in topk}
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


def scaling_table(experiments: Sequence[Experiment]) -> str:
    """Every size: dense losses, gaps of (a), and how many times larger those of attention alone are."""
    rivals = ("attention-pair", "attention", "attention-once")
    head = (
        "experiment",
        "parameters of (a)",
        "tokens",
        *(f"dense {letter(arm)}" for arm in ("ratplus", *rivals[:2])),
        "(a), D=16",
        *(f"gap of (a), {reading}{when}" for reading in ("D=16", "D=64") for when in ("", ", adapted")),
        *(f"{letter(arm)} / (a), D=16 adapted" for arm in rivals),
    )
    return _table(head, (_scaling_row(experiment, rivals) for experiment in by_size(experiments)))


def _scaling_row(experiment: Experiment, rivals: Sequence[str]) -> list[str]:
    records = experiment.of("ratplus")
    return [
        experiment.name,
        f"{records[0]['parameters'] / 1e6:.1f} M",
        f"{records[0]['pretraining']['tokens'] / 1e6:.1f} M",
        *(_cell(experiment.of(arm), loss_of("dense")) for arm in ("ratplus", *rivals[:2])),
        _cell(records, loss_of("D=16")),
        *(_cell(records, of(reading), "+") for reading in ("D=16", "D=64") for of in (gap_of, adapted_gap_of)),
        *(_ratio_cell(experiment, arm, adapted_gap_of("D=16")) for arm in rivals),
    ]


def sizes_table(experiments: Sequence[Experiment]) -> str:
    """By kind of held-out text and size: dense loss of (a), its gap at D=16, and how far its dense loss is from that of (d)."""
    sizes = [experiment for experiment in by_size(experiments) if experiment.of("attention") and kinds_of(experiment, "ratplus")]
    what = ("dense (a)", "gap of (a), D=16", "dense (a) - dense (d)")
    kinds = sorted({kind for experiment in sizes for kind in experiment.of("ratplus")[-1]["kinds"]})
    rows = ([kind, *(cell for one in sizes for cell in _size_cells(one, kind))] for kind in kinds)
    return _table(("held-out text", *(f"{one.name}: {name}" for one in sizes for name in what)), rows)


def _size_cells(experiment: Experiment, kind: str) -> list[str]:
    ours, theirs = (kinds_of(experiment, arm, kind) for arm in ("ratplus", "attention"))
    dense, rival = (spread(records, loss_of("dense")) for records in (ours, theirs))
    apart = "-" if dense is None or rival is None else f"{dense.mean - rival.mean:+.3f}"
    return [_cell(ours, loss_of("dense")), _cell(ours, gap_of("D=16"), "+"), apart]


def course_table(experiments: Sequence[Experiment]) -> str:
    """The sparse pass's training loss minus that of the dense pass behind it, tenth by tenth of the training, of arms trained by pairs."""
    head = ("experiment", "arm", "seed", *(f"{100 * (tenth + 1) // STRETCHES} %" for tenth in range(STRETCHES)))
    rows = (
        [one.name, letter(arm), str(record["seed"]), *(f"{found:.3f}" for found in course(record))]
        for one in by_size(experiments)
        for arm in ("ratplus", "attention-pair")
        for record in one.of(arm)
    )
    return _table(head, rows)


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
        losses[precision] = {plain(row["pattern"]): float(row["loss"]) for row in rows}
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


def write(folder: str | Path, readme: str | Path) -> list[Path]:
    """Fill the tables of ``readme`` and draw the figures of every experiment beside it, in ``figures/``; returns what was written."""
    readme = Path(readme)
    beside = readme.parent / "figures"
    beside.mkdir(exist_ok=True)
    readme.write_text(fill(readme.read_text(encoding="utf-8"), folder), encoding="utf-8")
    return [readme, *drawing.draw(read_results(folder), beside)]
