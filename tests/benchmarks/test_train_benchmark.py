"""The training benchmark on a CPU: it runs, its baseline is the same model, kernels find their class."""

from __future__ import annotations

import csv

import pytest
import tiny_run
import torch

from benchmarks import levers, losses, tables, train_report
from benchmarks.phases import Stopwatch
from benchmarks.plain import PlainTrainer
from benchmarks.profile import Kernel, kernel_class, summary
from benchmarks.train import main
from megarat.engine import Engine

LR = 1e-2


def copy_weights(plain: torch.nn.Module, model: torch.nn.Module) -> None:
    """Fills the plain model with megarat's weights; the rows of in_proj are o, q, k, v, g in both."""
    with torch.no_grad():
        plain.embedding.weight.copy_(model.embedding.weight)
        plain.norm.copy_(model.norm.weight)
        for ours, theirs in zip(model.blocks, plain.blocks, strict=True):
            for target, source in (
                (theirs.norm1, ours.mixer.norm), (theirs.norm2, ours.ffn.norm), (theirs.in_proj.weight, ours.mixer.in_proj),
                (theirs.out_proj.weight, ours.mixer.out_proj), (theirs.up.weight, ours.ffn.up), (theirs.down.weight, ours.ffn.down),
            ):  # fmt: skip
                target.copy_(source.weight)


@pytest.mark.slow
def test_the_plain_baseline_makes_the_same_updates(mesh):
    """Otherwise the two would not be compared at equal work. fp32: sums in another order, three updates carry it on."""
    settings = tiny_run.config()
    batches = tiny_run.micro_batches(2)
    model = tiny_run.model(settings)
    plain = PlainTrainer(settings, 2, torch.device("cpu"), Stopwatch(torch.device("cpu")))
    copy_weights(plain.model, model)
    engine = Engine(model, settings, mesh)
    for patterns in (settings.sparse_patterns, settings.patterns, settings.sparse_patterns):
        ours, theirs = engine.update(batches, patterns, LR), plain.update(batches, patterns, LR)
        assert theirs.loss == pytest.approx(ours.loss, rel=2e-5)
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)


@pytest.mark.parametrize("data", ["resident", "loader"])
def test_a_row_is_written(mesh, tmp_path, data):
    results = tmp_path / "train.csv"
    main(
        f"--size tiny --device cpu --length 64 --micro-batch 1 --accumulation 2 --pairs 2 --data {data} --results {results}".split()
        + ["--set", "model.layers=1"]
    )
    (row,) = csv.DictReader(results.open())
    assert row["implementation"] == "megarat" and row["settings"] == "model.layers=1"
    assert float(row["joint_tokens_s"]) > 0 and float(row["loss_sparse"]) == pytest.approx(5.5, abs=0.5)  # log 256
    passes = [float(row[f"{part}_{phase}_ms"]) for part in ("sparse", "dense") for phase in ("forward", "backward")]
    assert sum(passes) < float(row["pair_ms"]) * 1.5


def test_kernels_are_put_into_classes_and_gaps_are_what_is_left():
    kernels = [
        Kernel("nvjet_tst_192x192_64x4", "aten::mm", 0.0, 50.0),
        Kernel("_gated_scan_forward_kernel", "GatedScan", 50.0, 60.0),
        Kernel("_rms_norm_forward_kernel", "RMSNorm", 55.0, 65.0),  # 5 of its 10 us beside the scan
        Kernel("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "aten::x", 85.0, 100.0),
    ]
    rows = {row["class"]: (row["percent"], row["kernels"]) for row in summary(kernels)}
    assert rows == {
        "matrix products": (50.0, 1), "attention": (15.0, 1), "scan": (10.0, 1), "elementwise": (5.0, 1), "gaps": (20.0, 0)
    }  # fmt: skip


def test_losses_of_arms_are_compared_pair_by_pair(mesh, tmp_path):
    results = tmp_path / "losses.csv"
    shape = "--pairs 4 --layers 1 --hidden 32 --head 16 --length 48 --batch 2 --device cpu".split()
    first, again, seed = losses.main(["default", "reference operations", "another seed", *shape, "--results", str(results)])
    assert first["rms_distance"] == 0 and again["rms_distance"] == 0  # on a CPU all operations are the reference ones
    assert seed["rms_distance"] > 0 and seed["largest_distance"] >= seed["rms_distance"]
    assert len(list(csv.DictReader(results.open()))) == 3


def test_sparse_losses_are_compared_on_the_pairs_that_both_arms_made_a_sparse_pass_for():
    """Means over other pairs than the first arm's would differ by what these pairs are."""
    first = [(float(pair), 1.0) for pair in range(40)]
    every_other = [(sparse + 0.5 if pair % 2 == 0 else float("nan"), 1.25) for pair, (sparse, _) in enumerate(first)]
    row = losses.compare(every_other, first)
    assert row["loss_sparse"] == 37.5 and row["sparse_distance"] == 0.5
    assert row["mean_distance"] == row["rms_distance"] == row["largest_distance"] == 0.25


def test_a_later_call_leaves_earlier_arms_the_default_that_they_are_compared_with(monkeypatch, tmp_path):
    def row(commit, arm, loss):
        figures = {"gpu": "H200", "commit": commit, "arm": arm, "pairs": 4, "schedule": 4, "loss_dense": loss}
        return dict.fromkeys(losses.COLUMNS, "") | figures

    rows = [row("a", "default", 1.0), row("a", "fp8", 1.1), row("b", "default", 2.0), row("b", "one summed update", 2.1)]
    tables.append(rows, tmp_path / "losses.csv", losses.COLUMNS)
    monkeypatch.setattr(train_report, "FOLDER", tmp_path)
    shown = train_report.losses().splitlines()[2:]
    assert [line.split(" | ")[4] for line in shown] == ["1.0", "1.1", "2.0", "2.1"]
    summed, *exact = train_report.variants().splitlines()[2:]
    assert "`train.recipe=summed` | 4 | not timed | 2.1" in summed  # of 4 pairs 4 updates, not 8
    assert [line.split(" | ")[1] for line in exact] == ["8", "8"]


def test_the_page_shows_the_last_figures(monkeypatch, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(train_report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    written = page.read_text(encoding="utf-8")
    monkeypatch.setattr(train_report, "PAGE", page)
    train_report.main()
    assert page.read_text(encoding="utf-8") == written


@pytest.mark.parametrize(
    "name, label",
    [
        ("_dilated_attention_keys_kernel", "attention"), ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_mul_sigmoid_4", "elementwise"), ("_gated_scan_backward_kernel", "scan"),
        ("triton_spl_fused_associative_scan_sigmoid_2", "scan"), ("_rms_norm_backward_kernel", "elementwise"),
        ("_fp8_quantise_kernel", "elementwise"), ("_accumulate_kernel", "elementwise"),
        ("nvjet_sm90_qrtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT", "matrix products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<bf16>", "copies"), ("Memset (Device)", "copies"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ],
)  # fmt: skip
def test_each_kernel_has_its_class_by_its_name(name, label):
    assert kernel_class(name) == label


def test_levers_take_turns_with_what_they_are_compared_with(mesh, tmp_path):
    results = tmp_path / "levers.csv"
    names = [
        "parallel.recompute=full",
        "train.weight_gradients=product",
        "MEGARAT_OPS=reference:parts",
        "train.micro_batch=2 train.cuda_graphs=true",
    ]
    only = [word for name in names for word in ("--only", name)]
    shape = "--rounds 1 --size tiny --device cpu --length 32 --micro-batch 4 --accumulation 1 --set train.precision=bf16 --set model.layers=1"
    rows = levers.main([*only, *shape.split(), "--results", str(results)])
    assert [row["lever"] for row in csv.DictReader(results.open())] == names
    assert all(row["base_ms"] > 0 and row["lever_ms"] > 0 for row in rows[:3]) and rows[3]["note"] == "needs a GPU"


def test_a_lever_leaves_the_engine_as_it_was(mesh):
    config = tiny_run.config(train={"precision": "bf16", "global_batch": 8, "micro_batch": 4})
    engine = Engine(tiny_run.model(config), config, mesh)
    bench = levers.Bench(engine, config)
    batches = tiny_run.micro_batches(2, rows=4)

    def marks():
        blocks = engine.model.blocks
        return (
            [linear.product for block in blocks for linear in block.linears], [block.compiled for block in blocks], engine.model.recompute,
            [(block.mixer.recompute, block.ffn.recompute) for block in blocks], engine.model.config.residual_dtype,
            engine.model.embedding.loss_chunk, engine.micro_batches, engine._engine.gradient_accumulation_steps(), engine._adamw, bench.config,
        )  # fmt: skip

    before = marks()
    for name, lever in levers.LEVERS.items():
        if not lever.on_gpu:
            with lever.hold(bench):
                assert name.startswith(("train.recipe", "train.sparse", "MEGARAT_OPS")) or marks() != before, name
            assert marks() == before, name
    assert engine.update(batches, config.patterns, LR).made
