"""Adaptation of a pretrained checkpoint."""

from __future__ import annotations

import json
import os
import signal

import pytest
import tiny_run
import torch

from megarat.checkpoint import load as checkpoints
from megarat.errors import StoppedEarly, UserError
from megarat.train import loop
from megarat.train.adapt import adapt
from megarat.train.loop import pretrain

PATTERN = "D=4,W=2,I=1"


@pytest.fixture(scope="module")
def parents(mesh, tmp_path_factory):
    """A pretraining run per precision, and its shards."""
    base = tmp_path_factory.mktemp("parents")
    shards = tiny_run.write_shards(base / "shards")
    for precision in ("fp32", "bf16"):
        train = {"pairs": 2, "precision": precision}
        pretrain(tiny_run.config(run={"dir": str(base / precision)}, data={"shards": str(shards)}, train=train))
    return base


def config(base, run_dir, **changes):
    train = {"pairs": 3, "precision": "fp32", **changes.pop("train", {})}
    attention = {"pattern": PATTERN, **changes.pop("attention", {})}
    return tiny_run.config(
        run={"dir": str(run_dir)}, data={"shards": str(base / "shards")}, train=train, attention=attention, **changes
    )


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_starts_from_the_parents_masters_under_the_new_pattern(parents, tmp_path, precision):
    settings = config(parents, tmp_path, train={"precision": precision, "pairs": 1})
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        original = loop.train_pair

        def watch(engine, batches, sparse, dense, *rest):
            seen.update(weights=engine.named_state()[0]["master"], steps=engine.named_state()[1], batches=batches)
            assert sparse is None and dense == settings.patterns
            return original(engine, batches, sparse, dense, *rest)

        patch.setattr(loop, "train_pair", watch)
        adapt(settings, parents / precision)
    masters = checkpoints.load_weights(parents / precision)
    assert seen["steps"] == 0
    assert all(torch.equal(seen["weights"][name], master) for name, master in masters.items())
    [line] = lines(tmp_path)
    assert line["loss_sparse"] is None
    if precision == "fp32":
        model = tiny_run.model(settings)
        model.load_state_dict({name: join(name, tuple(p.shape), masters) for name, p in model.named_parameters()})
        loss = sum(model(ids, settings.patterns, labels).item() for ids, labels in seen["batches"]) / 2
        assert line["loss_dense"] == pytest.approx(loss, rel=1e-6)


def join(name, shape, tensors):
    from megarat.model import names

    return names.join(name, shape, tensors)


def test_the_parent_is_recorded(parents, tmp_path):
    adapt(config(parents, tmp_path), parents / "bf16" / "checkpoints" / "latest")
    state, parent = checkpoints.load_state(tmp_path), parents / "bf16" / "checkpoints" / "pair_00000002"
    assert state.kind == "adapt" and state.pattern == PATTERN and state.config.data.order == "random_offsets"
    assert state.parent == {
        "kind": "pretrain",
        "path": str(parent),
        "pair": 2,
        "tokens": 2 * 4 * tiny_run.LENGTH,
        "content": checkpoints.identity(parent),
    }
    assert "kind pretrain" in checkpoints.show(tmp_path)


def test_stopped_and_resumed_equals_uninterrupted(parents, tmp_path, monkeypatch):
    adapt(config(parents, tmp_path / "whole"), parents / "fp32")
    original = loop.train_pair

    def stop(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    settings = config(parents, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_pair", stop)
        with pytest.raises(StoppedEarly, match="after pair 1 of 3"):
            adapt(settings, parents / "fp32")
    adapt(settings, parents / "fp32")
    for key in ("pair", "loss_dense", "grad_norm_dense", "lr", "stream_hash"):
        assert [line[key] for line in lines(tmp_path / "run")] == [line[key] for line in lines(tmp_path / "whole")]


def test_resuming_from_another_parent_is_refused(parents, tmp_path):
    adapt(config(parents, tmp_path, train={"pairs": 1}), parents / "fp32")
    with pytest.raises(UserError, match=r"was started from .*fp32.*, not from .*bf16"):
        adapt(config(parents, tmp_path, train={"pairs": 2}), parents / "bf16")


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_the_same_command_goes_on_when_the_parent_has_gone_on_and_removed_what_was_started_from(parents, tmp_path, named):
    """An adaptation's own checkpoint has all that it needs."""

    def pretraining(pairs):
        settings = config(parents, tmp_path / "parent", train={"pairs": pairs}, checkpoint={"keep": 1})
        return pretrain(settings)

    first = pretraining(1)
    command = first if named == "checkpoint" else tmp_path / "parent"
    constant = {"schedule": "constant", "warmup": 0}
    for name, pairs in (("whole", 2), ("run", 1)):
        adapt(config(parents, tmp_path / name, train={"pairs": pairs}, optim=constant), command)
    pretraining(2)
    assert not first.exists()
    adapt(config(parents, tmp_path / "run", train={"pairs": 2}, optim=constant), command)
    ours, theirs = (checkpoints.load_optimizer(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(ours[kind][name], tensor) for kind, named in theirs.items() for name, tensor in named.items())
    assert checkpoints.load_state(tmp_path / "run").parent == checkpoints.load_state(tmp_path / "whole").parent
    with pytest.raises(UserError, match=r"was started from .*parent.*, not from .*fp32"):
        adapt(config(parents, tmp_path / "run", train={"pairs": 3}, optim=constant), parents / "fp32")
    with pytest.raises(UserError, match="no such folder"):
        adapt(config(parents, tmp_path / "run", train={"pairs": 3}, optim=constant), tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        adapt(config(parents, tmp_path / "new", train={"pairs": 3}), first)


def test_a_folder_of_the_other_kind_is_refused(parents, tmp_path):
    adapt(config(parents, tmp_path, train={"pairs": 1}), parents / "fp32")
    with pytest.raises(UserError, match="holds a run of megarat adapt, not pretrain"):
        pretrain(config(parents, tmp_path))


def test_the_parents_own_folder_is_refused(parents):
    with pytest.raises(UserError, match="give the adaptation a folder of its own"):
        adapt(config(parents, parents / "fp32"), parents / "fp32")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden": 32}, r"embedding.weight has shape \(64, 16\), but the config's model needs \(64, 32\)"),
        ({"layers": 3}, r"layers.2.mixer.norm.weight has shape none \(no such tensor\), but the config's model needs \(16,\)"),
        ({"recurrence": False}, r"layers.0.mixer.g.weight has shape \(16, 16\), but the config's model needs none"),
        ({"heads": 4}, r"was trained with model.heads = 2, but the config has 4"),
        ({"rope_base": 5e5}, r"was trained with model.rope_base = 10000.0, but the config has 500000.0"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(parents, tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        adapt(config(parents, tmp_path, model=model), parents / "fp32")
