"""The training benchmark on a CPU: it runs, its baseline is the same model, kernels find their class."""

from __future__ import annotations

import csv

import pytest
import tiny_run
import torch

from benchmarks import losses, train_report
from benchmarks.phases import Stopwatch
from benchmarks.plain import PlainTrainer
from benchmarks.profile import Kernel, summary
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


def test_the_page_shows_the_last_figures(monkeypatch, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(train_report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    written = page.read_text(encoding="utf-8")
    monkeypatch.setattr(train_report, "PAGE", page)
    train_report.main()
    assert page.read_text(encoding="utf-8") == written
