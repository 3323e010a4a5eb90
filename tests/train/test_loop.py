"""Whole runs: exact resume, stops, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.data import store
from megarat.errors import EXIT_STOPPED, StoppedEarly, UserError
from megarat.train import loop
from megarat.train.loop import pretrain

TIMINGS = ("tokens_per_s", "memory_gb", "data_wait_s", "seconds")
PAIRS = 6


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return tiny_run.write_shards(tmp_path_factory.mktemp("shards"))


def config(run_dir: Path, shards: Path, **changes) -> Config:
    train = {"pairs": PAIRS, **changes.pop("train", {})}
    data = {"shards": str(shards), **changes.pop("data", {})}
    return tiny_run.config(run={"dir": str(run_dir)}, data=data, train=train, **changes)


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def stop_after(monkeypatch, pairs: int, number: int = signal.SIGTERM) -> None:
    """Send this process a real signal in the middle of pair number ``pairs`` (from 1)."""
    calls = []

    def train_pair(*args):
        calls.append(None)
        if len(calls) == pairs:
            os.kill(os.getpid(), number)
        return original(*args)

    original = loop.train_pair
    monkeypatch.setattr(loop, "train_pair", train_pair)


@pytest.fixture(scope="session")
def uninterrupted(mesh, shards, tmp_path_factory) -> dict[str, Path]:
    """Run folders of runs that nobody stopped, by precision."""
    folders = {}
    for precision in ("fp32", "bf16"):
        folders[precision] = tmp_path_factory.mktemp(f"whole-{precision}")
        pretrain(config(folders[precision], shards, train={"precision": precision}))
    return folders


def assert_same_end(left: Path, right: Path) -> None:
    """Bit for bit: masters, moments, counters, and every recorded number that is no time."""
    assert metrics(left) == metrics(right)
    ours, theirs = checkpoints.load_optimizer(left), checkpoints.load_optimizer(right)
    for kind in theirs:
        for name, tensor in theirs[kind].items():
            assert torch.equal(ours[kind][name], tensor), (kind, name)
    states = [checkpoints.load_state(folder) for folder in (left, right)]
    for field in ("pair", "tokens", "stream_hash", "optimizer_steps", "skipped", "data_identity"):
        assert getattr(states[0], field) == getattr(states[1], field)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stopped_and_resumed_equals_uninterrupted(mesh, monkeypatch, shards, tmp_path, uninterrupted, zero, precision):
    if zero > 1:  # the stages round their norms differently, so each is compared with itself
        whole = tmp_path / "whole"
        pretrain(config(whole, shards, train={"precision": precision}, parallel={"zero": zero}))
    else:
        whole = uninterrupted[precision]
    settings = config(tmp_path / "run", shards, train={"precision": precision}, parallel={"zero": zero}, checkpoint={"every": 2})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedEarly, match=r"stopped after pair 3 of 6 \(SIGTERM\).*pair_00000003 is complete"):
            pretrain(settings)
    pretrain(settings)
    assert_same_end(tmp_path / "run", whole)


def test_a_run_killed_between_checkpoints_repeats_the_lost_pairs_exactly(mesh, monkeypatch, shards, tmp_path, uninterrupted):
    settings = config(tmp_path, shards, checkpoint={"every": 2})
    with monkeypatch.context() as patch:
        original, calls = loop.train_pair, []

        def crash_at_fourth(*args):
            calls.append(None)
            if len(calls) == 4:
                raise MemoryError
            return original(*args)

        patch.setattr(loop, "train_pair", crash_at_fourth)
        with pytest.raises(MemoryError):
            pretrain(settings)
    assert [line["pair"] for line in metrics(tmp_path)] == [1, 2, 3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"pair": 4, "loss')  # as a crash in the middle of a write leaves it
    pretrain(settings)
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_sigterm_from_outside_exits_75_and_the_same_command_finishes(shards, tmp_path, uninterrupted, mesh):
    settings = config(tmp_path / "run", shards, train={"pairs": 2000}, checkpoint={"every": 1000})
    file = tmp_path / "run.yaml"
    file.write_text(settings.to_yaml())
    command = [sys.executable, "-c", "import sys; from megarat.cli import main; sys.exit(main())", "pretrain", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    recorded = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (recorded.exists() and recorded.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, message
    assert "Traceback" not in message and "(SIGTERM)" in message
    state = checkpoints.load_state(tmp_path / "run")
    assert state.pair == len(metrics(tmp_path / "run")) >= 3
    settings.train.pairs = state.pair + 2
    pretrain(settings)
    assert [line["pair"] for line in metrics(tmp_path / "run")] == list(range(1, state.pair + 3))


def test_a_stop_before_the_first_pair_still_leaves_a_checkpoint(mesh, shards, tmp_path, uninterrupted):
    with pytest.raises(StoppedEarly, match="stopped after pair 0 of 6"):
        pretrain(config(tmp_path, shards, train={"wall_clock_minutes": 1e-9}))
    pretrain(config(tmp_path, shards))
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_a_stop_before_the_first_pair_of_a_resume_keeps_the_checkpoint_it_resumed_from(begun, shards):
    with pytest.raises(StoppedEarly, match=r"stopped after pair 1 of 6 .*pair_00000001 is complete"):
        pretrain(config(begun, shards, train={"wall_clock_minutes": 1e-9}))


def test_the_metrics_have_the_promised_keys_and_counts(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted["fp32"] / "metrics.jsonl").read_text().splitlines()]
    promised = (
        "pair tokens loss_sparse loss_dense grad_norm_sparse grad_norm_dense lr tokens_per_s stream_hash mfu memory_gb".split()
    )
    assert all(key in line for line in lines for key in promised)
    assert [line["tokens"] for line in lines] == [4 * tiny_run.LENGTH * (n + 1) for n in range(PAIRS)]
    assert all(line["mfu"] is None for line in lines)  # a CPU has no peak in the table
    assert len({line["stream_hash"] for line in lines}) == PAIRS


def test_the_run_folder_says_what_ran(uninterrupted, shards):
    folder = uninterrupted["fp32"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config(folder, shards).to_dict()
    start = json.loads((folder / "environment.json").read_text())["starts"][0]
    assert start["packages"]["torch"] == torch.__version__ and start["command"] == sys.argv
    assert start["git"] is None or len(start["git"]["commit"]) == 40


def test_tensorboard_gets_both_losses(mesh, shards, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(config(tmp_path, shards, train={"pairs": 2}, log={"tensorboard": True}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key, tag in {"loss_sparse": "loss/sparse", "loss_dense": "loss/dense", "lr": "schedule/lr"}.items():
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert points == [(line["pair"], pytest.approx(line[key], rel=1e-6)) for line in metrics(tmp_path)]


def test_a_finished_run_has_nothing_to_do_and_more_pairs_continue_it(mesh, shards, tmp_path, capsys):
    first = pretrain(config(tmp_path, shards, train={"pairs": 2}))
    assert pretrain(config(tmp_path, shards, train={"pairs": 2})) == first
    assert "finished after 2 pairs; raise train.pairs" in capsys.readouterr().err
    assert pretrain(config(tmp_path, shards, train={"pairs": 3})).name == "pair_00000003"


def test_old_checkpoints_are_removed_as_configured(mesh, shards, tmp_path):
    pretrain(config(tmp_path, shards, checkpoint={"every": 1, "keep": 2, "keep_every": 3}))
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "pair_00000003", "pair_00000005", "pair_00000006"]


@pytest.fixture
def begun(mesh, shards, tmp_path) -> Path:
    pretrain(config(tmp_path / "run", shards, train={"pairs": 1}))
    return tmp_path / "run"


def test_a_second_run_on_the_same_folder_is_refused(begun, shards):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", hold, str(begun / "lock")], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is in use by process"):
            pretrain(config(begun, shards, train={"pairs": 2}))
    finally:
        first.kill()
        first.wait()
    assert pretrain(config(begun, shards, train={"pairs": 2})).name == "pair_00000002"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"hidden": 32}}, "model.hidden: 16 -> 32"),
        ({"optim": {"lr": 2e-3}}, "optim.lr: 0.01 -> 0.002"),
        ({"train": {"seed": 8}}, "train.seed: 7 -> 8"),
        ({"data": {"sequence_length": 8}}, "data.sequence_length: 16 -> 8"),
        ({"attention": {"train_dilation": 8}}, "attention.train_dilation: 4 -> 8"),
    ],
)
def test_another_config_on_the_same_folder_is_refused_by_key(begun, shards, change, named):
    with pytest.raises(UserError, match=named):
        pretrain(config(begun, shards, **change))


def test_keys_that_do_not_change_the_run_may_change(begun, shards):
    changed = config(
        begun,
        shards,
        train={"pairs": 2, "micro_batch": 4, "max_skipped": 5},
        parallel={"zero": 2},
        checkpoint={"every": 1},
        log={"every": 2},
        data={"prefetch": 1},
    )
    assert pretrain(changed).name == "pair_00000002"


def test_other_shards_under_the_same_name_are_refused(mesh, tmp_path):
    shards = tiny_run.write_shards(tmp_path / "shards")
    pretrain(config(tmp_path / "run", shards, train={"pairs": 1}))
    (shards / "train").rename(shards / "old")
    tiny_run.write_shards(shards, seed=1)
    with pytest.raises(UserError, match=r"data.shards: .*index.json is not the data this run was trained on"):
        pretrain(config(tmp_path / "run", shards))


def test_another_precision_is_refused(begun, shards):
    with pytest.raises(UserError, match=r"trained in fp32, but this machine would go on in bf16; set train.precision=fp32"):
        pretrain(config(begun, shards, train={"pairs": 2, "precision": "bf16"}))


def test_auto_on_another_machine_is_refused_and_what_the_refusal_tells_to_set_goes_on(mesh, shards, tmp_path, monkeypatch):
    def settings(name: str, precision: str, pairs: int = 2) -> Config:
        optim = {"schedule": "constant", "warmup": 0}
        return config(tmp_path / name, shards, train={"pairs": pairs, "precision": precision}, optim=optim)

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    pretrain(settings("run", "auto", pairs=1))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UserError, match=r"trained in bf16, but this machine would go on in fp32; set train.precision=bf16"):
        pretrain(settings("run", "auto"))
    pretrain(settings("run", "bf16"))
    pretrain(settings("whole", "bf16"))
    ours, theirs = (checkpoints.load_optimizer(tmp_path / name)["master"] for name in ("run", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_lost_checkpoint_is_no_fresh_start(begun, shards):
    (begun / "checkpoints" / "pair_00000001").rename(begun / "elsewhere")
    with pytest.raises(UserError, match=r"latest names 'pair_00000001', which is not there \(found: no checkpoint\)"):
        pretrain(config(begun, shards))


def test_lost_checkpoints_folder_is_no_fresh_start(mesh, shards, tmp_path):
    settings = config(tmp_path, shards, checkpoint={"every": 2})
    pretrain(settings)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"records 6 pairs, but .*checkpoints holds no checkpoint"):
        pretrain(settings)


@pytest.mark.parametrize(("asynchronous", "still_being_written"), [(True, 4), (False, 2)])
def test_a_run_killed_in_its_first_save_begins_again(mesh, shards, tmp_path, asynchronous, still_being_written):
    """In the background a save ends before the next begins; else before the next pair."""
    settings = config(tmp_path, shards, checkpoint={"every": 2, "asynchronous": asynchronous})
    pretrain(settings)
    recorded, uninterrupted = tmp_path / "metrics.jsonl", metrics(tmp_path)
    lines = recorded.read_text().splitlines(keepends=True)
    shutil.rmtree(tmp_path / "checkpoints")
    recorded.write_text("".join(lines[: still_being_written + 1]))
    with pytest.raises(UserError, match="holds no checkpoint"):
        pretrain(settings)
    recorded.write_text("".join(lines[:still_being_written]))
    pretrain(settings)
    assert metrics(tmp_path) == uninterrupted


def test_a_damaged_checkpoint_is_no_fresh_start(begun, shards):
    file = begun / "checkpoints" / "pair_00000001" / "optimizer" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"optimizer/__0_0.distcp has SHA-256"):
        pretrain(config(begun, shards, train={"pairs": 2}))


@pytest.mark.parametrize("kilobytes", [4, 40, 450])
def test_a_full_disk_at_any_time_of_a_run_is_reported(mesh, shards, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            pretrain(config(disk, shards, train={"pairs": 20}, checkpoint={"every": 1}, log={"tensorboard": True}))
        if kilobytes == 450:  # room for the first checkpoint and whatever is recorded while it is written
            assert "good" in checkpoints.verify(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_non_finite_pairs_are_skipped_counted_and_finally_stop_the_run(mesh, monkeypatch, shards, tmp_path):
    original, calls = loop.train_pair, []

    def poisoned(engine, batches, *rest):
        calls.append(None)
        if len(calls) in (2, 4, 5):
            with monkeypatch.context() as patch:
                forward = engine.model.forward
                patch.setattr(engine.model, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * float("inf"))
                return original(engine, batches, *rest)
        return original(engine, batches, *rest)

    monkeypatch.setattr(loop, "train_pair", poisoned)
    with pytest.raises(UserError, match="2 pairs in a row"):
        pretrain(config(tmp_path, shards, train={"max_skipped": 2}, checkpoint={"every": 1}))
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [False, True, False, True]
    assert lines[1]["loss_sparse"] is None and lines[1]["loss_dense"] is None
    state = checkpoints.load_state(tmp_path)
    assert (state.pair, state.skipped, state.skipped_in_row) == (4, [1, 3], 1)
    assert state.optimizer_steps == 4  # two good pairs


def test_a_model_smaller_than_the_tokenizer_is_refused(mesh, shards, tmp_path):
    with pytest.raises(UserError, match=r"has 64 entries, but model.vocab is 32"):
        pretrain(config(tmp_path, shards, model={"vocab": 32}))


def test_missing_shards_are_named(mesh, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        pretrain(config(tmp_path / "run", tmp_path / "nowhere"))


def test_checkpoints_carry_the_tokenizer_of_a_remote_corpus(mesh, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "PAUSES", ())
    corpus = tmp_path / "corpus"
    shutil.copytree(shards, corpus)
    files = {"tokenizer.json": b'{"made": "up"}', "tokenizer_config.json": b"{}"}
    index = json.loads((corpus / "train" / "index.json").read_text())
    sha256 = hashlib.sha256(files["tokenizer.json"]).hexdigest()
    index["tokenizer"] = {"name": "tokenizer.json", "kind": "huggingface", "sha256": sha256}
    (corpus / "train" / "index.json").write_text(json.dumps(index))
    remote = f"pipe:cat {corpus}/{{}}"

    def carried(run):
        folder = checkpoints.resolve(pretrain(config(tmp_path / run, remote, train={"pairs": 1}))) / "tokenizer"
        return {file.name: file.read_bytes() for file in folder.glob("*")}

    assert carried("without") == {} and "checkpoints will carry no tokenizer" in capsys.readouterr().err
    (corpus / "tokenizer").mkdir()
    for name, content in files.items():
        (corpus / "tokenizer" / name).write_bytes(content)
    assert carried("with") == files
    (corpus / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"cat {corpus}/tokenizer/tokenizer.json: SHA-256 \w+ is not that of the tokenizer"):
        carried("of another")
