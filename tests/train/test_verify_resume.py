"""A resume that is verified: one recorded pair is trained again and must give the recorded numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch
from test_going_back import Spikes

from megarat.checkpoint import load as checkpoints
from megarat.cli import main
from megarat.config import Config
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, StoppedEarly, ToldByFirstRank, UserError
from megarat.parallel import worlds
from megarat.train import loop, run
from megarat.train.loop import pretrain


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))


def config(run_dir: Path, shards: Path, pairs: int = 5, **changes) -> Config:
    checkpoint = {"every": 2, "keep": 5, **changes.pop("checkpoint", {})}
    train = {"pairs": pairs, "global_batch": 8, **changes.pop("train", {})}
    return tiny_run.config(run={"dir": str(run_dir)}, data={"shards": str(shards)}, train=train, checkpoint=checkpoint, **changes)


def killed_after(run_dir: Path, shards: Path, monkeypatch, pairs: int, **changes) -> Config:
    """A run that ends without a word after so many pairs: the next one starts from the checkpoint before."""
    original, done = loop.train_pair, []

    def dies(*arguments):
        if len(done) == pairs:
            raise MemoryError
        done.append(None)
        return original(*arguments)

    settings = config(run_dir, shards, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_pair", dies)
        with pytest.raises(MemoryError):
            pretrain(settings)
    return settings


def change_record(run_dir: Path, pair: int, **figures) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | (figures if line["pair"] == pair else {})) + "\n" for line in lines))


def content(run_dir: Path) -> dict[str, bytes]:
    ignored = ("lock", "environment.json", "rank0.txt")
    return {str(path): path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file() and path.name not in ignored}


def test_a_killed_run_trains_the_pair_after_its_checkpoint_again_and_goes_on_as_if_it_had_not(
    mesh, shards, tmp_path, monkeypatch, capsys
):
    whole, settings = config(tmp_path / "whole", shards), killed_after(tmp_path / "run", shards, monkeypatch, 3)
    pretrain(whole)
    capsys.readouterr()
    pretrain(settings, verify_resume=True)
    assert "pair 3, trained again from" in (told := capsys.readouterr().err) and "bit for bit" in told
    ours, theirs = (checkpoints.load_optimizer(folder) for folder in (tmp_path / "run", tmp_path / "whole"))
    assert all(torch.equal(ours[kind][name], tensor) for kind, named in theirs.items() for name, tensor in named.items())


def test_a_run_that_stopped_after_a_save_is_verified_from_an_older_checkpoint(mesh, shards, tmp_path, capsys):
    pretrain(config(tmp_path, shards, pairs=4))
    capsys.readouterr()
    assert pretrain(config(tmp_path, shards, pairs=5), verify_resume=True).name == "pair_00000005"
    assert "pair 3, trained again from" in (told := capsys.readouterr().err) and "pair_00000002" in told


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_after_going_back_no_pair_is_verified_that_was_trained_on_other_samples(mesh, shards, tmp_path, monkeypatch, capsys, how):
    """Pair 5 was trained on batch 6 after the run went back to pair 4, whose checkpoint knows nothing of that."""
    guard = {"deviations": 10, "window": 2, "rollback_after": 2}
    settings = config(tmp_path / "run", shards, pairs=7, guard=guard)
    spikes, stop = Spikes(bad=(4, 5)), []
    with monkeypatch.context() as patch:
        spikes.install(patch.setattr)

        def interrupt(*arguments):
            if len(spikes.met) == 6 and how == "stopped":
                stop.append("a test")
            if len(spikes.met) == 7 and how == "killed":
                raise MemoryError
            return spikes.train_pair(*arguments)

        patch.setattr(loop, "train_pair", interrupt)
        patch.setattr(loop.StopRequest, "reason", property(lambda _: stop[0] if stop else None))
        with pytest.raises(StoppedEarly if how == "stopped" else MemoryError):
            pretrain(settings)
    assert [json.loads(line)["rollbacks"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        0
    ] * 4 + [1]
    capsys.readouterr()
    Spikes(bad=(4, 5)).install(monkeypatch.setattr)
    assert pretrain(settings, verify_resume=True).name == "pair_00000007"
    assert "pair 3, trained again from" in (told := capsys.readouterr().err) and "bit for bit" in told


@pytest.mark.parametrize(("figure", "factor"), [("loss_dense", 1.001), ("grad_norm_sparse", 0.99)])
def test_other_numbers_than_the_recorded_ones_are_refused_and_nothing_is_touched(
    mesh, shards, tmp_path, monkeypatch, figure, factor
):
    settings = killed_after(tmp_path, shards, monkeypatch, 3)
    recorded = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])[figure]
    change_record(tmp_path, 3, **{figure: recorded * factor})
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"--verify-resume: pair 3, .* {figure} was {recorded * factor}, is {recorded} "):
        pretrain(settings, verify_resume=True)
    assert content(tmp_path) == before


def test_moments_that_were_lost_are_noticed(mesh, shards, tmp_path, monkeypatch):
    settings = killed_after(tmp_path, shards, monkeypatch, 3)
    load = run.checkpoints.load_optimizer_into

    def without_moments(folder, state, group):
        load(folder, state, group)
        for held in state["exp_avg_sq"].values():
            for _, box in held.boxes:
                box.zero_()

    monkeypatch.setattr(run.checkpoints, "load_optimizer_into", without_moments)
    with pytest.raises(UserError, match="loss_dense was"):
        pretrain(settings, verify_resume=True)


def test_a_run_without_a_recorded_pair_after_a_checkpoint_cannot_be_verified(mesh, shards, tmp_path):
    pretrain(config(tmp_path, shards, pairs=2))
    with pytest.raises(UserError, match=r"records no pair that follows a checkpoint \(there are 2\)"):
        pretrain(config(tmp_path, shards), verify_resume=True)


def test_a_new_run_has_nothing_to_verify_and_the_command_line_tells_a_refusal(mesh, shards, tmp_path, monkeypatch, capsys):
    settings = config(tmp_path / "run", shards, pairs=3, checkpoint={"every": 1})
    (tmp_path / "run.yaml").write_text(settings.to_yaml())
    command = ["pretrain", str(tmp_path / "run.yaml"), "--verify-resume"]
    assert main(command) == EXIT_OK
    change_record(tmp_path / "run", 3, loss_sparse=1.0)
    assert main([*command, "--set", "train.pairs=4"]) == EXIT_BAD_INPUT
    assert "loss_sparse was 1.0, is " in capsys.readouterr().err


def verified(settings: Config) -> str:
    try:
        return str(pretrain(settings, verify_resume=True))
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def test_another_mesh_gives_the_recorded_numbers_within_rounding(shards, tmp_path, monkeypatch, mesh):
    # eps: above the rounding of gradients, see megarat.parallel.invariance
    optim = {"eps": 1e-3, "schedule": "constant", "warmup": 0}
    killed_after(tmp_path, shards, monkeypatch, 3, optim=optim)
    settings = config(tmp_path, shards, optim=optim, parallel={"tensor": 2})
    assert worlds.run(2, verified, settings) == [str(tmp_path / "checkpoints" / "pair_00000005")] * 2
    change_record(tmp_path, 5, grad_norm_dense=0.1)
    first, second = worlds.run(2, verified, config(tmp_path, shards, pairs=6, optim=optim, parallel={"tensor": 2}))
    assert first.startswith("UserError: --verify-resume: pair 5") and second == first.replace(
        "UserError", ToldByFirstRank.__name__
    )
