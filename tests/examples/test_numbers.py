"""The tables of the experiment's README, derived once more from the JSON files, without a line of megarat or of the experiment."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "examples" / "claim"
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
LETTERS = {
    "ratplus": "(a)",
    "recurrence": "(b)",
    "attention-pair": "(c)",
    "attention": "(d)",
    "recurrence-once": "(b1)",
    "attention-once": "(d1)",
}
SIZES = sorted(path.name for path in (HERE / "results").iterdir() if path.is_dir())


def lines_of(mark: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table behind a mark; nothing where there is none."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- / -->", TEXT, re.DOTALL)
    if found is None:
        return [], []
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in found[1].strip().splitlines()]
    return head, rows


def table(name: str, size: str) -> dict[tuple[str, str, int], str]:
    """Cells by letter of the arm, heading, and which of the arm's rows."""
    head, rows = lines_of(f"{name} {size}")
    cells: dict[tuple[str, str, int], str] = {}
    for row in rows:
        for heading, cell in zip(head, row, strict=True):
            number = sum(key[:2] == (row[0].split(" ")[0], heading) for key in cells)
            cells[row[0].split(" ")[0], heading, number] = cell
    return cells


def losses(size: str, arm: str) -> list[dict[str, dict]]:
    """Of each seed: loss by pattern, before and after adaptations by their number of batches."""
    seeds = []
    for path in sorted((HERE / "results" / size).glob(f"{arm}-[0-9]*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "scores" not in record:
            continue
        short = {"D=4": "D=4,W=0,I=0", "D=16": "D=16,W=0,I=0", "D=64": "D=64,W=0,I=0"}
        names = {long: name for name, long in short.items()}
        by_batches: dict[int, dict[str, float]] = {
            0: {names.get(r["pattern"], r["pattern"]): r["loss"] for r in record["scores"]}
        }
        for row in record.get("adaptations", []):
            by_batches.setdefault(row["batches"], {})[row["pattern"]] = row["score"]["loss"]
        pairs = record["config"]["train"]["pairs"]
        seeds.append({"before": by_batches[0], **{s: by_batches.get(round(s * pairs), {}) for s in (0.0025, 0.01, 0.041)}})
    return seeds


def middle(values: list[float]) -> float:
    return sum(values) / len(values)


def agree(cell: str, values: list[float], tolerance: float = 0.00051) -> None:
    """A cell shows the mean and, of several seeds, half the range; three digits."""
    if not values:
        assert cell == "-"
        return
    shown = [float(part) for part in cell.split(" ± ")]
    assert math.isclose(shown[0], middle(values), abs_tol=tolerance)
    assert len(shown) == (2 if len(values) > 1 else 1)
    if len(values) > 1:
        assert math.isclose(shown[1], (max(values) - min(values)) / 2, abs_tol=tolerance)


def test_there_are_results_and_tables():
    assert "small" in SIZES
    assert all(table(name, "small") for name in ("losses", "gaps", "ratios", "adaptation", "adapted", "runs"))
    assert all(table(name, "long") for name in ("losses", "gaps", "seeds", "adaptation", "milestones", "runs"))
    tuned = {(row[0].split(" ")[0], row[2]) for row in lines_of("needles small")[1]}
    assert tuned >= {
        (letter, read) for letter in ("(a)", "(b)", "(c)", "(d)") for read in ("dense", "D=16", "D=64", "3 blocks of 64")
    }


@pytest.mark.parametrize("size", SIZES)
def test_losses_and_gaps(size):
    shown, gaps = table("losses", size), table("gaps", size)
    readings = ("dense", "D=4", "D=16", "D=64", "D=16,W=256,I=4", "D=-1,W=256,I=4")
    for arm, letter in LETTERS.items():
        seeds = losses(size, arm)
        assert bool(seeds) == ((letter, "dense", 0) in shown) or not shown
        for reading in readings if seeds and shown else ():
            agree(shown[letter, reading, 0], [seed["before"][reading] for seed in seeds if reading in seed["before"]])
        for reading in readings[1:] if seeds and gaps else ():
            for when, key in (("", "before"), (", adapted", 0.041)):
                values = [seed[key][reading] - seed["before"]["dense"] for seed in seeds if reading in seed[key]]
                agree(gaps[letter, reading + when, 0], values)


@pytest.mark.parametrize("size", SIZES)
def test_adaptations(size):
    shown = table("adaptation", size)
    columns = {"before": "before", "after 0.25 %": 0.0025, "after 1 %": 0.01, "after 4 %": 0.041}
    for arm, letter in LETTERS.items():
        seeds = losses(size, arm)
        for reading in ("D=16", "D=64") if seeds and shown else ():
            for name, key in columns.items():
                agree(shown[letter, f"{reading} {name}", 0], [seed[key][reading] for seed in seeds if reading in seed[key]])


@pytest.mark.parametrize("size", SIZES)
def test_ratios(size):
    shown = table("ratios", size)
    for arm, letter in LETTERS.items():
        for reading in ("D=16", "D=64") if (letter, "D=16, pretrained", 0) in shown else ():
            gaps = {
                one: [seed["before"][reading] - seed["before"]["dense"] for seed in losses(size, one)] for one in (arm, "ratplus")
            }
            quotient = middle(gaps[arm]) / middle(gaps["ratplus"])
            assert math.isclose(float(shown[letter, f"{reading}, pretrained", 0]), quotient, abs_tol=0.051)


@pytest.mark.parametrize("size", SIZES)
def test_seeds(size):
    """The n-th line of an arm is its n-th file."""
    shown = table("seeds", size)
    for arm, letter in LETTERS.items():
        for number, path in enumerate(sorted((HERE / "results" / size).glob(f"{arm}-[0-9]*.json"))):
            seed = losses(size, arm)[number]
            assert path.stem == f"{arm}-{shown[letter, 'seed', number]}"
            for reading in ("D=16", "D=64"):
                gap = seed["before"][reading] - seed["before"]["dense"]
                agree(shown[letter, f"gap, {reading}", number], [gap])
                agree(
                    shown[letter, f"gap, {reading}, adapted", number],
                    [seed[0.041][reading] - seed["before"]["dense"]] if reading in seed[0.041] else [],
                )
                ours = HERE / "results" / size / f"ratplus-{shown[letter, 'seed', number]}.json"
                scores = {row["pattern"]: row["loss"] for row in json.loads(ours.read_text(encoding="utf-8"))["scores"]}
                quotient = gap / (scores[f"{reading},W=0,I=0"] - scores["dense"])
                assert math.isclose(float(shown[letter, f"of (a), {reading}", number]), quotient, abs_tol=0.051)


def record_of(size: str, arm: str, seed: str) -> dict:
    return json.loads((HERE / "results" / size / f"{arm}-{seed}.json").read_text(encoding="utf-8"))


def test_the_course_of_the_training():
    arms = {letter: arm for arm, letter in LETTERS.items()}
    _, rows = lines_of("course")
    assert len(rows) == sum(
        len(list((HERE / "results" / size).glob(f"{arm}-*"))) for size in SIZES for arm in (arms["(a)"], arms["(c)"])
    )
    for size, letter, seed, *tenths in rows:
        curve = record_of(size, arms[letter], seed)["pretraining"]["curve"]
        for tenth, cell in enumerate(tenths):
            part = curve[tenth * len(curve) // 10 : (tenth + 1) * len(curve) // 10]
            expected = middle([point["loss_sparse"] for point in part]) - middle([point["loss_dense"] for point in part])
            assert math.isclose(float(cell), expected, abs_tol=0.00051)


@pytest.mark.parametrize("size", SIZES)
def test_milestones(size):
    """The n-th line of an arm is its n-th checkpoint; where several seeds have it, their mean."""
    shown = table("milestones", size)
    for arm, letter in LETTERS.items():
        reached: dict[int, list[dict[str, float]]] = {}
        for path in (HERE / "results" / size).glob(f"{arm}-[0-9]*.json") if shown else ():
            for row in json.loads(path.read_text(encoding="utf-8")).get("milestones", []):
                reached.setdefault(row["tokens"], []).append({score["pattern"]: score["loss"] for score in row["scores"]})
        assert sum(key[:2] == (letter, "dense loss, nats") for key in shown) == len(reached)
        for number, tokens in enumerate(sorted(reached)):
            assert shown[letter, "tokens trained on", number] == f"{tokens / 1e6:.1f} M"
            agree(shown[letter, "dense loss, nats", number], [losses["dense"] for losses in reached[tokens]])
            for reading in ("D=16", "D=64"):
                gaps = [losses[f"{reading},W=0,I=0"] - losses["dense"] for losses in reached[tokens]]
                agree(shown[letter, f"gap, {reading}", number], gaps)


def test_sizes_are_those_of_their_experiments():
    _, rows = lines_of("scaling")
    assert sorted(row[0] for row in rows) == SIZES
    for size, _, _, dense, of_c, of_d, *_ in rows:
        for cell, arm in ((dense, "ratplus"), (of_c, "attention-pair"), (of_d, "attention")):
            agree(cell, [seed["before"]["dense"] for seed in losses(size, arm)])


@pytest.mark.parametrize("size", SIZES)
def test_needles(size):
    """Found: the mean of the seeds that were tuned so, in percent."""
    for title, trained, read, seeds, *cells in lines_of(f"needles {size}")[1]:
        [arm] = [arm for arm, letter in LETTERS.items() if title.startswith(letter)]
        shares: dict[str, list[float]] = {}
        for path in (HERE / "results" / size).glob(f"{arm}-[0-9]*.json"):
            for tuning in json.loads(path.read_text(encoding="utf-8")).get("needles", []):
                for row in tuning["scores"] if tuning["trained"] == trained else ():
                    pattern = row["pattern"].replace(",W=0,I=0", "")
                    blocks = re.search(r"blocks=(\d+)", pattern)
                    if read == (f"{blocks[1]} blocks of 64" if blocks else pattern):
                        shares.setdefault(row["task"], []).append(100 * row["ruler"])
        assert {len(values) for values in shares.values()} == {int(seeds)}
        for cell, task in zip(cells, ("single_1", "single_2", "multikey_1", "multikey_2"), strict=True):
            agree(cell, shares[task], tolerance=0.501)


def test_gaps_of_the_anchor_are_those_of_its_losses():
    """Losses of the published code as reported: dense, D=16, D=64."""
    reported = {"(a)": (3.255, 3.461, 3.500), "(c)": (3.600, 4.711, 4.867), "(d1)": (3.402, 6.233, 6.432)}
    rows = re.search(r"<!-- anchor \w+ -->\n(.*?)<!-- / -->", TEXT, re.DOTALL)
    assert rows is not None
    for letter, (dense, *sparse) in reported.items():
        for reading, loss in zip(("D=16", "D=64"), sparse, strict=True):
            [cell] = re.findall(rf"^\| {re.escape(letter)} [^|]*\| {reading} \| (\S+) \|", rows[1], re.MULTILINE)
            assert math.isclose(float(cell), loss - dense, abs_tol=0.00051)
