"""The plan of a run against a measured run, against tensors that are really kept, and against its own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run

from megarat import plan
from megarat.cli import main
from megarat.config import Config, from_dict
from megarat.errors import UserError
from megarat.mesh import Shape


def published(**changes) -> Config:
    """The 1.5B model with its defaults; ``changes`` are sections."""
    tree = {"run": {"dir": "unused"}, "data": {"shards": "unused"}}
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree)


def test_peak_memory_is_within_ten_percent_of_a_measured_run():
    """1.5B parameters on one H200, bf16, ZeRO 1, micro-batches of 2 x 4096 tokens: 54 GB."""
    assert plan.make_plan(published(train={"micro_batch": 2}), 1).memory.total == pytest.approx(54e9, rel=0.1)


def test_states_of_one_parameter():
    """ZeRO 1 in bf16: weights 2, gradients 2 + 4, masters 4, moments 8; the last two split over the data ranks. fp32 keeps no second copy."""
    config, parameters = published(), 1_474_922_496
    alone, four = plan.memory(config, Shape()), plan.memory(config, Shape(data=4))
    assert (alone.weights, alone.gradients, alone.masters, alone.moments) == tuple(parameters * n for n in (2, 6, 4, 8))
    assert (four.weights, four.gradients, four.masters, four.moments) == tuple(parameters * n for n in (2, 6, 1, 2))
    wide = plan.memory(published(train={"precision": "fp32"}), Shape())
    assert (wide.weights, wide.gradients, wide.masters, wide.moments) == tuple(parameters * n for n in (4, 4, 0, 8))
    third = plan.memory(published(parallel={"zero": 3}), Shape(data=4))
    assert third.weights == parameters / 2 and third.gradients == parameters


def test_recomputing_keeps_what_enters_each_layer_and_costs_a_third_more():
    kept, anew = (plan.make_plan(published(parallel={"recompute": mode}), 1) for mode in ("off", "full"))
    tokens = 2 * 4096
    assert anew.memory.activations == kept.memory.activations / 24 + 24 * (4 + 2) * 2048 * tokens
    assert anew.pair_seconds(anew.gpu) == pytest.approx(kept.pair_seconds(kept.gpu) * 4 / 3)


def test_stage_and_tensor_ranks_divide_the_parameters():
    config = published()
    halves = plan.stage_parameters(config.model, Shape(tensor=2))
    assert halves == pytest.approx(plan.stage_parameters(config.model, Shape()) / 2)
    embedding = 32000 * 2048 + 2048
    quarter = plan.stage_parameters(config.model, Shape(pipeline=4)) - embedding
    assert quarter == pytest.approx((plan.stage_parameters(config.model, Shape()) - embedding) / 4)


def test_checkpoints_have_the_size_that_is_written(mesh, tmp_path):
    """Against the files of a real checkpoint in bf16, whose tensors dominate when the model is not tiny."""
    from megarat.train.loop import pretrain

    shards = tiny_run.write_shards(tmp_path / "shards")
    config = tiny_run.config(
        run={"dir": str(tmp_path / "run")},
        model={"hidden": 128, "layers": 4},
        data={"shards": str(shards)},
        train={"pairs": 1, "precision": "bf16"},
    )
    saved = pretrain(config)
    written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert plan.checkpoint_bytes(config) == pytest.approx(written, rel=0.05)


def test_bubble_of_a_pipeline():
    """(p - 1) / (m + p - 1) with m micro-batches: p = 4, m = 8 gives 3/11."""
    config = published(train={"global_batch": 64, "micro_batch": 2})
    made = plan.make_plan(config, 4)
    assert made.bubble == 0
    piped = plan.Plan(config, Shape(pipeline=4, data=4), made.gpu, made.memory, 0.45, "estimate")
    assert piped.micro_batches == 8 and piped.bubble == pytest.approx(3 / 11)


def test_a_measured_run_sets_the_efficiency(tmp_path):
    lines = [{"pair": pair, "mfu": 0.9 if pair < 4 else 0.5} for pair in range(1, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = plan.make_plan(published(), 1, measured=tmp_path)
    assert made.efficiency == 0.5 and "measured" in plan.report(made)
    with pytest.raises(UserError, match="cannot read"):
        plan.make_plan(published(), 1, measured=tmp_path / "none")


def test_one_gpu_does_its_arithmetic_at_that_efficiency():
    """18.93 GFLOP a data token (both passes) at 45 % of 989.4 TFLOP/s: 23,520 tokens/s."""
    made = plan.make_plan(published(), 1)
    assert made.tokens_per_second(made.gpu) == pytest.approx(0.45 * 989.4e12 / 18.93e9, rel=1e-3)
    assert made.communication_seconds(made.gpu) == {}


def test_alternatives_are_legal_fit_and_are_ranked():
    made = plan.make_plan(published(), 8)
    rates = [other.tokens_per_second(made.gpu) for other in plan.alternatives(made, made.gpu)]
    assert rates == sorted(rates, reverse=True) and len(rates) == 5
    for other in plan.alternatives(made, made.gpu):
        assert other.fits and other.shape.size == 8
        assert plan.make_plan(other.config, 8).shape == other.shape


def test_a_run_too_large_is_refused_with_what_fits(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: unused}\ndata: {shards: unused}\ntrain: {micro_batch: 32}\n")
    assert main(["plan", str(path), "--gpus", "1"]) == 2
    printed = capsys.readouterr()
    assert "DOES NOT FIT" in printed.out and "of which there are 139; this fits: parallel." in printed.err
    assert main(["plan", str(path), "--gpus", "7"]) == 2
    assert "train.global_batch" in capsys.readouterr().err
    assert main(["plan", str(path), "--gpus", "8", "--gpu", "cpu", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mesh"]["data"] == 8 and values["config"]["train"]["micro_batch"] == 32


def test_the_table_of_the_documentation_is_what_the_plan_says():
    sizes = {"1.5B": {}, "2.6B": {"layers": 28, "hidden": 2560, "heads": 20}}
    rows = [
        [cell.strip().replace(",", "") for cell in line.strip("|\n").split("|")]
        for line in (Path(__file__).parents[1] / "docs/scaling.md").read_text().splitlines()
        if line.startswith(("| 1.5B |", "| 2.6B |"))
    ]
    assert {int(row[1]) for row in rows} == {1, 64, 256, 1024}
    for size, gpus, zero, batch, micro, memory, seconds, links, rate, days in rows:
        train = {"global_batch": int(batch), "micro_batch": int(micro)}
        made = plan.make_plan(published(model=sizes[size], train=train, parallel={"zero": int(zero)}), int(gpus))
        tokens_per_s = made.tokens_per_second(made.gpu)
        assert f"{made.memory.total / 1e9:.1f} {made.pair_seconds(made.gpu):.2f}" == f"{memory} {seconds}"
        assert f"{sum(made.communication_seconds(made.gpu).values()):.2f} {tokens_per_s:.0f}" == f"{links} {rate}"
        assert f"{100e9 / tokens_per_s / 86400:.2f}" == days
