"""Whole runs on several ranks: the same metrics as on one, and checkpoints that any mesh goes on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.errors import StoppedEarly, ToldByFirstRank, UserError
from megarat.eval.runner import EvalSettings, evaluate
from megarat.model import names
from megarat.parallel import worlds
from megarat.train.loop import pretrain

EXACT = ("pair", "tokens", "lr", "stream_hash", "skipped")
CLOSE = ("loss_sparse", "loss_dense", "grad_norm_sparse", "grad_norm_dense")
VALIDATION = ("validation_sparse", "validation_dense")  # of every second pair


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tiny_run.write_shards(tmp_path_factory.mktemp("corpus"))
    shutil.copytree(folder / "train", folder / "validation")
    return folder


def run_config(run_dir: Path, shards: Path, pairs: int, micro_batch: int = 2, precision: str = "fp32", **parallel) -> Config:
    return tiny_run.config(
        run={"dir": str(run_dir)},
        data={"shards": str(shards), "validation_tokens": 16 * tiny_run.LENGTH},
        # eps: above the rounding of gradients, see megarat.parallel.invariance
        optim={"eps": 1e-3, "schedule": "constant", "warmup": 0},
        train={"pairs": pairs, "global_batch": 8, "micro_batch": micro_batch, "precision": precision, "validate_every": 2},
        parallel=parallel,
        checkpoint={"every": 2},
    )


def train(config: Config) -> str:
    """One rank of a run: the folder of its last checkpoint, or how it ended."""
    try:
        return str(pretrain(config))
    except (UserError, StoppedEarly) as error:
        return f"{type(error).__name__}: {error}"


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def assert_same_course(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[key] for key in EXACT] == [theirs[key] for key in EXACT]
        for key in CLOSE + (() if theirs["pair"] % 2 else VALIDATION):
            # Sums in another order, some units of 2^-24 each, carried through a few updates. Batches whose rows have different
            # numbers of labels weigh them by micro-batch: all runs here cut micro-batches of two.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@pytest.fixture(scope="module")
def course(shards, tmp_path_factory) -> list[dict]:
    """Eight pairs on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    worlds.run(1, train, run_config(run_dir, shards, 8))
    return metrics(run_dir)


MESHES = {
    "data 2, ZeRO 1": (2, {"zero": 1}),
    "data 2, ZeRO 3": (2, {"zero": 3}),
    "tensor 2, ZeRO 2": (2, {"tensor": 2, "zero": 2}),
    "tensor 2 with sequence, ZeRO 3": (2, {"tensor": 2, "zero": 3, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "context 2, ZeRO 3": (2, {"context": 2, "zero": 3}),
    "one, ZeRO 2": (1, {"zero": 2}),
    "data 2 x tensor 2, ZeRO 1": (4, {"tensor": 2, "zero": 1}),
}
CHAINS = [
    ("context 2, ZeRO 3", "data 2, ZeRO 1", "tensor 2 with sequence, ZeRO 3", "one, ZeRO 2"),
    ("tensor 2, ZeRO 2", "pipeline 2", "data 2 x tensor 2, ZeRO 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=" -> ".join)
def test_a_run_goes_on_from_mesh_to_mesh_as_if_nothing_had_changed(shards, tmp_path, course, chain):
    run_dir = tmp_path / "run"
    for leg, mesh in enumerate(chain):
        size, parallel = MESHES[mesh]
        ends = worlds.run(size, train, run_config(run_dir, shards, 2 * (leg + 1), **parallel))
        assert set(ends) == {str(run_dir / "checkpoints" / f"pair_{2 * (leg + 1):08d}")}
    assert_same_course(metrics(run_dir), course[: 2 * len(chain)])
    assert "good" in checkpoints.verify(run_dir)


def test_validation_on_a_pipeline_is_what_eval_says_of_the_checkpoint(shards, tmp_path):
    run_dir = tmp_path / "run"
    worlds.run(2, train, run_config(run_dir, shards, 2, pipeline=2))
    settings = EvalSettings(patterns=["dense", "D=4"], device="cpu", limit_tokens=16 * tiny_run.LENGTH, progress=False)
    dense, sparse = evaluate(run_dir, settings)["tasks"]["ppl"]
    last = metrics(run_dir)[-1]
    assert last["validation_dense"] == pytest.approx(dense["loss"], rel=1e-6)
    assert last["validation_sparse"] == pytest.approx(sparse["loss"], rel=1e-6)


def state_after_loading(config: Config) -> dict[str, dict[str, torch.Tensor]]:
    """What a run on this mesh holds after resuming, gathered."""
    from megarat import mesh as meshes
    from megarat.train.run import build
    from megarat.train.run_folder import open_run

    mesh = meshes.start("cpu", config)
    run = build(config, "pretrain", mesh, open_run(config, "pretrain"), None)
    state, steps = run.engine.named_state()
    assert steps == 4
    return state


@pytest.mark.parametrize(
    ("writer", "precision"), [("data 2, ZeRO 1", "fp32"), ("pipeline 2", "bf16"), ("tensor 2 with sequence, ZeRO 3", "bf16")]
)
def test_weights_and_moments_arrive_bit_for_bit_on_every_mesh(shards, tmp_path, writer, precision):
    size, parallel = MESHES[writer]
    worlds.run(size, train, run_config(tmp_path / "run", shards, 2, precision=precision, **parallel))
    written = checkpoints.load_optimizer(tmp_path / "run")
    assert set(written) == {"master", "exp_avg", "exp_avg_sq"}
    shapes = {name: tuple(tensor.shape) for name, tensor in written["master"].items()}
    assert shapes == names.logical_shapes(run_config(tmp_path, shards, 2).model)
    assert any(tensor.any() for tensor in written["exp_avg_sq"].values())
    read_by = list(MESHES.items())[list(MESHES).index(writer) % 2 :: 2]  # by every second mesh: among the writers, all are met
    for reader, (readers, other) in read_by:
        for state in worlds.run(
            readers, state_after_loading, run_config(tmp_path / "run", shards, 4, precision=precision, **other)
        ):
            for kind, tensors in written.items():
                for name, tensor in tensors.items():
                    assert torch.equal(state[kind][name], tensor), (reader, kind, name)


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "broadcast", "gather", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv", "isend", "irecv",
)  # fmt: skip


def bytes_sent_while_loading(config: Config) -> dict[str, int]:
    """Bytes handed to collectives of several ranks, while masters and moments are read and until all is in place."""
    from megarat import mesh as meshes
    from megarat.train import run as runs
    from megarat.train.run_folder import open_run

    sent = {"": 0}
    phase = ""

    def counted(call):
        def told(*arguments, **named):
            group = named.get("group")
            if torch.distributed.get_world_size(group) > 1:
                tensors = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
                sent[phase] = sent.get(phase, 0) + sum(x.nbytes for x in tensors)
            return call(*arguments, **named)

        return told

    def within(name, call):
        def told(*arguments, **named):
            nonlocal phase
            phase, before = name, phase
            sent.setdefault(name, 0)
            try:
                return call(*arguments, **named)
            finally:
                phase = before

        return told

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
        patch.setattr(runs.Run, "load", within("load", runs.Run.load))
        patch.setattr(checkpoints, "load_optimizer_into", within("read", checkpoints.load_optimizer_into))
        runs.build(config, "pretrain", meshes.start("cpu", config), open_run(config, "pretrain"), None)
    return sent


@pytest.mark.parametrize("mesh", ["data 2, ZeRO 1", "tensor 2, ZeRO 2", "pipeline 2"])
def test_the_same_mesh_reads_its_own_parts_and_sends_no_weights(shards, tmp_path, mesh):
    """Ranks that ZeRO gives whole weights but a part of the masters gather the former at the end, as behind every step."""
    size, parallel = MESHES[mesh]
    worlds.run(size, train, run_config(tmp_path / "run", shards, 2, **parallel))
    for sent in worlds.run(size, bytes_sent_while_loading, run_config(tmp_path / "run", shards, 4, **parallel)):
        assert sent["read"] == 0
        assert (sent["load"] > 0) == mesh.startswith("data")


def test_the_format_has_no_trace_of_the_mesh(shards, tmp_path):
    shown = []
    for mesh in ("one, ZeRO 2", "data 2 x tensor 2, ZeRO 1"):
        size, parallel = MESHES[mesh]
        run_dir = tmp_path / str(size)
        worlds.run(size, train, run_config(run_dir, shards, 1, **parallel))
        lines = checkpoints.show(run_dir).splitlines()
        shown.append(lines[lines.index("tensors") :])
    assert shown[0] == shown[1]


def stop_rank_one(config: Config) -> str:
    """Rank 1 is told to stop once the first rank has recorded a few pairs."""
    if os.environ["RANK"] == "1":
        threading.Thread(target=stop_after_three_pairs, args=(Path(config.run.dir),), daemon=True).start()
    return train(config)


def stop_after_three_pairs(run_dir: Path) -> None:
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_rank_stops_all_after_the_same_pair_with_a_checkpoint(shards, tmp_path):
    config = run_config(tmp_path / "run", shards, 100_000)
    ends = worlds.run(2, stop_rank_one, config)
    assert all(end.startswith("StoppedEarly: stopped after pair") and "(SIGTERM)" in end for end in ends)
    assert ends[0] == ends[1]
    assert f"pair {checkpoints.load_state(tmp_path / 'run').pair} of" in ends[0]
    assert checkpoints.load_state(tmp_path / "run").pair == metrics(tmp_path / "run")[-1]["pair"]


def test_bad_input_is_told_by_the_first_rank_and_ends_all(shards, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("pair_00000009\n")
    first, second = worlds.run(2, train, run_config(tmp_path / "run", shards, 2))
    assert first.startswith("UserError: ") and "pair_00000009" in first
    assert second == first.replace("UserError", ToldByFirstRank.__name__)


def test_a_disk_that_refuses_one_rank_fails_the_save_on_all_and_costs_no_checkpoint(shards, tmp_path):
    config = run_config(tmp_path / "run", shards, 4, zero=1)
    ends = worlds.run(2, train_with_a_full_disk_on_rank_one, config)
    assert ends[0].startswith("UserError: cannot write") and "File too large" in ends[0]
    assert ends[1].startswith("ToldByFirstRank: cannot write")
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["latest", "pair_00000002"]
    assert "good" in checkpoints.verify(tmp_path / "run")


def train_with_a_full_disk_on_rank_one(config: Config) -> str:
    import resource

    from megarat.train.run import Run

    save = Run.save

    def save_with_a_limit(run: Run) -> Path:
        if run.state.pair == 4 and run.mesh.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return save(run)

    Run.save = save_with_a_limit
    return train(config)
