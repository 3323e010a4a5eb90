"""Switches in pairs: refused together with one clear message, or training as they do apart."""

from __future__ import annotations

import itertools

import pytest
import tiny_run

from megarat.engine import Engine
from megarat.errors import UserError
from megarat.model.lm import local_model
from megarat.train.step import sparse_patterns, train_pair

SWITCHES = {
    "selective": {"parallel": {"recompute": "selective"}},
    "full": {"parallel": {"recompute": "full"}},
    "fp8": {"train": {"fp8": True}},
    "product": {"train": {"weight_gradients": "product"}},
    "chunk": {"train": {"loss_chunk": 7}},
    "residual": {"model": {"residual_dtype": "compute"}},
    "summed": {"train": {"recipe": "summed"}},
    "every": {"train": {"sparse_every": 2}},
    "adaptation": {"attention": {"train_dilation": 1}},
}
REFUSED = {("selective", "full"), ("selective", "fp8"), ("fp8", "product")}  # the first is two values of one key
PAIRS = 3
TOLERANCE = 0.03  # of losses near log 64 = 4.2: bf16 keeps 8 bits, FP8 3 to 4 of each factor of sums of 16 to 64 products


def laid_together(*names: str) -> dict[str, dict]:
    """The settings of some switches; those of the same section side by side."""
    changes: dict[str, dict] = {"train": {"precision": "bf16"}}
    for name in names:
        for section, values in SWITCHES[name].items():
            changes.setdefault(section, {}).update(values)
    return changes


def course(mesh, *names: str) -> list[tuple[float | None, float]]:
    """(sparse loss, dense loss) of a few pairs; None for a pass that is left out."""
    config = tiny_run.config(**laid_together(*names))
    engine = Engine(local_model(config, mesh).initialise(0), config, mesh)
    losses = []
    for pair in range(PAIRS):
        result = train_pair(
            engine, tiny_run.micro_batches(2, seed=pair), sparse_patterns(config, pair), config.patterns, 1e-3, None, config.train.recipe == "summed"
        )  # fmt: skip
        assert result.made
        losses.append((result.sparse and result.sparse.loss, result.dense.loss))
    return losses


@pytest.fixture(scope="module")
def recipes(mesh):
    """What each recipe, alone and with others, does without any switch of speed."""
    of_recipe = ("summed", "every", "adaptation")
    chosen = [names for count in range(3) for names in itertools.combinations(of_recipe, count)]
    return {names: course(mesh, *names) for names in chosen}


@pytest.mark.parametrize("first, second", itertools.combinations(SWITCHES, 2))
def test_two_switches_are_refused_together_or_train_as_the_recipe_says(mesh, recipes, first, second):
    if (first, second) in REFUSED:
        if first != "selective" or second != "full":
            with pytest.raises(UserError, match=r"; set "):
                tiny_run.config(**laid_together(first, second))
        return
    recipe = tuple(name for name in ("summed", "every", "adaptation") if name in (first, second))
    for ours, wanted in zip(course(mesh, first, second), recipes[recipe], strict=True):
        assert (ours[0] is None) == (wanted[0] is None)
        assert ours[1] == pytest.approx(wanted[1], abs=TOLERANCE)
        assert ours[0] is None or ours[0] == pytest.approx(wanted[0], abs=TOLERANCE)


def test_recipes_leave_out_what_they_say(recipes):
    sparse_made = {names: [sparse is not None for sparse, _ in losses] for names, losses in recipes.items()}
    assert sparse_made[()] == sparse_made[("summed",)] == [True] * PAIRS
    assert sparse_made[("every",)] == sparse_made[("summed", "every")] == [True, False, True]
    assert not any(any(made) for names, made in sparse_made.items() if "adaptation" in names)
    assert recipes[("adaptation",)] == recipes[("every", "adaptation")] == recipes[("summed", "adaptation")]
