"""The plan of a run against a measured run, against tensors that are really kept, and against its own definitions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny_run

from benchmarks import scaling
from megarat import plan, rates
from megarat.cli import main
from megarat.config import Config, from_dict
from megarat.errors import UserError
from megarat.mesh import Shape
from megarat.model.flops import visible_pairs
from megarat.model.pattern import Pattern


def published(**changes) -> Config:
    """The 1.5B model with its defaults; ``changes`` are sections."""
    tree = {"run": {"dir": "unused"}, "data": {"shards": "unused"}}
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree)


TIMED = [step for step in rates.steps("H200") if step.size in scaling.SIZES]


@pytest.mark.parametrize("step", TIMED, ids=lambda step: f"{step.size} {step.gpus} {step.parallel} {step.micro_batch}")
def test_memory_within_ten_percent_and_speed_within_twenty_of_what_was_measured(step):
    """Every step that benchmarks/train.csv and mesh.csv have of the published shapes."""
    made = scaling.plan_of(step)
    assert made.rates is not None
    assert made.memory.total == pytest.approx(step.peak_bytes, rel=0.1)
    assert made.tokens_per_second(made.gpu) == pytest.approx(step.tokens_per_s, rel=0.2)


def test_rates_are_those_of_the_benchmark_table():
    """A scan of 8 x 4096 tokens and 2048 channels, a dense and a sparse attention take the milliseconds that stand there."""
    known, elements = rates.measured("H200"), 8 * 4096 * 2048
    rows = {
        (row["op"], row["shape"], row["implementation"]): row for row in csv.DictReader((rates.FOLDER / "results.csv").open())
    }

    def both_ways(op: str, shape: str, implementation: str) -> float:
        return sum(float(rows[f"{op} {way}", shape, implementation]["median_ms"]) for way in ("forward", "backward")) / 1000

    assert known.scan_s * elements == pytest.approx(both_ways("gated_scan", "B=8 T=4096 C=2048", "megarat"))
    shape = "B=8 T=4096 D=64,W=0,I=0"
    for implementation, pattern in {"cuDNN SDPA, dense": Pattern(), "megarat": Pattern(64)}.items():
        seconds = known.attention_s + known.visible_s * visible_pairs(pattern, 4096) / 4096
        assert seconds * elements == pytest.approx(both_ways("dilated_attention", shape, implementation))
    assert rates.measured("H100") is None and rates.measured("H200", Path("none")) is None


def test_work_is_shared_by_all_ranks_and_gradients_are_added_once_a_micro_batch():
    known = rates.measured("H200")
    alone = plan.step_seconds(published(), Shape(), known)
    eight = plan.step_seconds(published(), Shape(data=4, tensor=2), known)
    assert all(
        eight[part] == pytest.approx(alone[part] / 8) for part in ("matrix products", "attention", "scan", "adding gradients")
    )
    assert eight["launches"] == pytest.approx(alone["launches"] / 4)
    larger = plan.step_seconds(published(train={"micro_batch": 4}), Shape(), known)
    assert larger["adding gradients"] == pytest.approx(alone["adding gradients"] * published().train.micro_batch / 4)


@pytest.mark.parametrize(
    ("train", "of_zero_1", "of_zero_2", "of_zero_3"),
    [
        ({}, 20, 68, 192),
        (
            {"recipe": "summed"},
            10,
            66,
            192,
        ),  # one update: fp32 sums and new weights travel once; each micro-batch of ZeRO 2 and 3 as before
        ({"sparse_every": 4}, 12.5, 42.5, 120),  # 1.25 passes and updates a pair
    ],
)
def test_bytes_that_a_parameter_sends_in_a_pair_follow_passes_and_updates(train, of_zero_1, of_zero_2, of_zero_3):
    """16 micro-batches over two ranks, each sending and receiving half. fp32 all-reduce 8, bf16 weights or gradients 2."""
    gpu, half = plan.GPUS["H200"], 1_474_922_496 / 2
    for zero, wanted in {1: of_zero_1, 2: of_zero_2, 3: of_zero_3}.items():
        config = published(train={"global_batch": 64, "micro_batch": 2, **train}, parallel={"zero": zero})
        seconds = plan.communication_seconds(config, Shape(data=2), gpu)["gradients and weights"]
        assert seconds * 0.8 * gpu.nvlink == pytest.approx(wanted * half)


def test_work_of_variants_of_the_recipe():
    known = rates.measured("H200")
    pair, summed, rare, alone = (
        plan.step_seconds(published(train=train, attention=attention), Shape(), known)
        for train, attention in (({}, {}), ({"recipe": "summed"}, {}), ({"sparse_every": 4}, {}), ({}, {"train_dilation": 1}))
    )
    assert summed == {**pair, "optimizer": pair["optimizer"] / 2}
    for part in pair:
        assert rare[part] == pytest.approx(alone[part] + (pair[part] - alone[part]) / 4)


def test_states_of_one_parameter():
    """ZeRO 1 in bf16: weights 2, gradients 4, masters 4, moments 8; the last two split over the data ranks. fp32 keeps no second copy."""
    config, parameters = published(), 1_474_922_496
    alone, four = plan.memory(config, Shape()), plan.memory(config, Shape(data=4))
    assert (alone.weights, alone.gradients, alone.masters, alone.moments) == tuple(parameters * n for n in (2, 4, 4, 8))
    assert (four.weights, four.gradients, four.masters, four.moments) == tuple(parameters * n for n in (2, 4, 1, 2))
    wide = plan.memory(published(train={"precision": "fp32"}), Shape())
    assert (wide.weights, wide.gradients, wide.masters, wide.moments) == tuple(parameters * n for n in (4, 4, 0, 8))
    piped = plan.memory(
        published(parallel={"pipeline": 2}), Shape(pipeline=2)
    )  # where DeepSpeed keeps the bf16 gradients as well
    assert piped.gradients == 6 * plan.stage_parameters(config.model, Shape(pipeline=2))
    third = plan.memory(published(parallel={"zero": 3}), Shape(data=4))
    assert third.weights == parameters / 2 and third.gradients == parameters


def test_recomputing_keeps_what_enters_each_layer_and_costs_a_third_more():
    kept, anew = (plan.make_plan(published(parallel={"recompute": mode}), 1) for mode in ("off", "full"))
    tokens = 2 * 4096
    assert anew.memory.activations == kept.memory.activations / 24 + 24 * (4 + 2) * 2048 * tokens
    for part in ("matrix products", "attention", "scan", "elementwise"):
        assert anew.compute_parts(anew.gpu)[part] == pytest.approx(kept.compute_parts(kept.gpu)[part] * 4 / 3)


def test_the_gpu_waits_for_the_host_only_where_there_is_less_to_compute():
    """16 micro-batches and passes of 24 layers take a host 4.9 s under context ranks, whatever their length."""
    short, long = (
        plan.make_plan(
            published(train={"global_batch": 8, "micro_batch": 1}, data={"sequence_length": length}, parallel={"context": 2}),
            2,
        )
        for length in (4096, 32768)
    )
    assert short.pair_seconds(short.gpu) == pytest.approx(16 * 24 * 12.8e-3)
    assert short.pair_seconds(short.gpu) > short.busy_seconds(short.gpu)
    assert long.pair_seconds(long.gpu) == long.busy_seconds(long.gpu)
    alone = plan.make_plan(published(train={"global_batch": 8, "micro_batch": 1}), 1)
    assert alone.pair_seconds(alone.gpu) == alone.busy_seconds(alone.gpu)


def test_logits_are_held_as_many_at_a_time_as_the_config_says():
    """The measured change of the peak, and a vocabulary of which whole micro-batches would not leave room for anything else."""
    rows = {row["lever"]: row for row in csv.DictReader((rates.FOLDER / "levers.csv").open())}
    usual = plan.memory(published(train={"micro_batch": 4}), Shape())
    for chunk in (2048, 131072):
        held = plan.memory(published(train={"micro_batch": 4, "loss_chunk": chunk}), Shape())
        row = rows[f"train.loss_chunk={chunk}"]
        more = float(row["lever_gb"]) - float(row["base_gb"])
        assert (held.total - usual.total) / 1e9 == pytest.approx(more, abs=1.0) and (held.total > usual.total) == (more > 0)
    model, tokens = {"vocab": 131072}, 8 * 4096
    whole = plan.memory(published(model=model, train={"micro_batch": 8, "loss_chunk": 10**6}), Shape())
    parts = plan.memory(published(model=model, train={"micro_batch": 8}), Shape())
    assert whole.logits - parts.logits == 2 * (2 * tokens * 131072 - (768 << 20))  # logits in bf16, and their gradient


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
    """Where nothing was measured: 18.93 GFLOP a data token (both passes) at 45 % of 989.4 TFLOP/s, 23,520 tokens/s."""
    made = plan.make_plan(published(), 1, "H100")
    assert made.tokens_per_second(made.gpu) == pytest.approx(0.45 * 989.4e12 / 18.93e9, rel=1e-3)
    assert made.communication_seconds(made.gpu) == {}


def test_alternatives_are_legal_fit_and_are_ranked():
    made = plan.make_plan(published(), 8)
    rates = [other.tokens_per_second(made.gpu) for other in plan.alternatives(made, made.gpu)]
    assert rates == sorted(rates, reverse=True) and len(rates) == 5
    for other in plan.alternatives(made, made.gpu):
        assert other.fits and other.shape.size == 8
        assert plan.make_plan(other.config, 8).shape == other.shape


def test_alternatives_keep_to_what_the_config_can_have():
    """FP8 layers know no tensor ranks; without FP8 some of the fastest have them."""
    fp8, usual = (plan.make_plan(published(train={"fp8": on}), 64) for on in (True, False))
    assert any(other.shape.tensor > 1 for other in plan.alternatives(usual, usual.gpu))
    assert all(other.shape.tensor == 1 for other in plan.alternatives(fp8, fp8.gpu))
    assert "FP8 products taken to be as slow as bf16" in plan.report(fp8) and "FP8" not in plan.report(usual)


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
    """Memory to the last digit; speeds move a little with every new row of the benchmark table, until `python -m benchmarks.scaling` is run."""
    written = [cells(line) for line in scaling.DOCUMENT.read_text().splitlines() if line.count("|") == 11]
    now = [cells(line) for line in scaling.calculated()]
    assert {row[1] for row in written[2:]} == {"1", "64", "256", "1024"}
    assert [row[:6] for row in written] == [row[:6] for row in now]
    for old, new in zip(written[2:], now[2:], strict=True):
        assert [float(cell) for cell in old[6:]] == pytest.approx([float(cell) for cell in new[6:]], rel=0.05, abs=0.01)


def cells(line: str) -> list[str]:
    return [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
