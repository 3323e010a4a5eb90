"""A checkpoint of training opens for evaluation and generation: under any pattern, without DeepSpeed, reading nothing but the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_run
import torch

import megarat
from megarat.checkpoint.manifest import CheckpointState, read_manifest
from megarat.checkpoint.save import Snapshot, save
from megarat.config import ModelConfig
from megarat.eval.runner import EvalSettings, evaluate
from megarat.model import names
from megarat.train.adapt import adapt

MODEL = ModelConfig(layers=2, hidden=256, heads=2, vocab=2048)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """As a bf16 run writes it: 2 + 4 + 8 bytes a parameter."""
    config = tiny_run.config()
    config.model = MODEL
    fp32 = {name: torch.randn(shape) for name, shape in names.logical_shapes(MODEL).items()}
    state = CheckpointState("pretrain", 1, 1, config, "dense", "bf16")
    bf16 = {name: tensor.bfloat16() for name, tensor in fp32.items()}
    return save(tmp_path_factory.mktemp("run"), Snapshot(state, bf16, fp32, {"exp_avg": fp32, "exp_avg_sq": fp32}))


def bytes_read() -> int:
    """By this process so far, from files or their cache."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, "weights"), (torch.float32, "masters")])
def test_only_the_bytes_of_the_weights_are_read(checkpoint, dtype, part):
    """Once to prove them and once to take them; and torch reads around in the file for each tensor, some tens of kilobytes."""
    megarat.load(checkpoint, "D=4", "cpu", dtype)  # what is imported on the way is read only once
    files = {name: entry.bytes for name, entry in read_manifest(checkpoint).items()}
    needed = sum(size for name, size in files.items() if name.startswith(part + "/"))
    before = bytes_read()
    megarat.load(checkpoint, "D=4", "cpu", dtype)
    around = 50_000 * len(names.logical_shapes(MODEL))
    assert 2 * needed <= bytes_read() - before < 2 * needed + around < sum(files.values())


def adapt_one_pair(checkpoint: Path, shards: Path, run_dir: Path) -> None:
    config = tiny_run.config(
        run={"dir": str(run_dir)},
        model={"layers": MODEL.layers, "hidden": MODEL.hidden, "heads": MODEL.heads, "vocab": MODEL.vocab},
        attention={"pattern": "D=4,W=2,I=1"},
        data={"shards": str(shards)},
        train={"pairs": 1, "precision": "bf16"},
    )
    adapt(config, checkpoint)


def evaluate_a_little(checkpoint: Path, shards: Path, _: Path) -> None:
    settings = EvalSettings(["D=4"], shards=str(shards), split="train", limit_tokens=64, precision="fp32", device="cpu")
    evaluate(checkpoint, settings)


@pytest.mark.parametrize("phase", [adapt_one_pair, evaluate_a_little])
def test_of_the_tensors_adaptation_and_evaluation_read_the_masters_alone(mesh, checkpoint, tmp_path, phase):
    """Counted by the system, which knows nothing of checkpoints; what is read beside them (shards, config) is small."""
    shards = tiny_run.write_shards(tmp_path / "shards")
    phase(checkpoint, shards, tmp_path / "first")  # imports
    files = {name: entry.bytes for name, entry in read_manifest(checkpoint).items()}
    needed = sum(size for name, size in files.items() if name.startswith("masters/"))
    before = bytes_read()
    phase(checkpoint, shards, tmp_path / "second")
    beside = 50_000 * len(names.logical_shapes(MODEL)) + 1_000_000
    assert 2 * needed <= bytes_read() - before < 2 * needed + beside
    assert beside < min(
        sum(size for name, size in files.items() if name.startswith(f"{part}/")) for part in ("weights", "optimizer")
    )


@pytest.mark.parametrize("pattern", ["dense", "D=4,W=2,I=1", ["D=8", ["D=2", "D=-1,W=3"]]], ids=str)
def test_no_deepspeed_and_no_optimizer_are_needed_for_any_pattern(checkpoint, monkeypatch, pattern):
    """From a folder without what only training needs, where every import of DeepSpeed fails."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (checkpoint / "optimizer").rename(checkpoint.parent / "optimizer.away")
    model = megarat.load(checkpoint, pattern, "cpu", torch.float32)
    (checkpoint.parent / "optimizer.away").rename(checkpoint / "optimizer")
    prompt = torch.arange(3, 19)[None]
    new = model.generate(prompt, 4)
    whole = model(torch.cat((prompt, new), dim=1))
    assert torch.equal(whole[0, 15:-1].argmax(-1), new[0])
