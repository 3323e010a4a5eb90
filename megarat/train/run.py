"""What the training loop works on: mesh, data, model under its engine, and where the run stands; built new or from a checkpoint."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megarat import comm
from megarat.checkpoint import load as checkpoints
from megarat.checkpoint.background import Moment, Saver
from megarat.checkpoint.manifest import CheckpointState
from megarat.config import Config, ShardsSetting
from megarat.data.corpus import check_budget, open_corpus, tokenizer_folder
from megarat.data.loader import Loader, PairSource
from megarat.data.tokenizer import load_tokenizer
from megarat.engine import MASTER, Engine, resolve_precision
from megarat.errors import UserError
from megarat.mesh import Mesh
from megarat.model.lm import local_model
from megarat.model.pattern import describe
from megarat.train.run_folder import Resume
from megarat.train.task_data import TaskLoader


class Parent(NamedTuple):
    """The checkpoint whose weights a run starts from."""

    folder: Path
    provenance: dict[str, Any]  # recorded in every checkpoint of the run; "content" is the hash that names the parent


@dataclass
class Run:
    """Everything the loop works on. ``state`` says where it stands."""

    config: Config
    mesh: Mesh
    engine: Engine
    loader: PairSource
    state: CheckpointState
    resumed_from: Path | None
    saver: Saver
    tokenizer: Path | None  # the folder of its files, which go into every checkpoint

    def save(self) -> None:
        """Begin a checkpoint of this moment, and then remove those that the config no longer keeps; ``saver.wait`` ends it."""
        state, self.state.optimizer_steps = self.engine.state(), self.engine.steps
        self.state.random_state = _random_state()
        self.saver.begin(Moment(self.state, state, self.engine.dtype, self.tokenizer, protected=self.state.guard.get("safe")))

    def load(self, folder: Path, state: CheckpointState) -> None:
        """Be where the checkpoint ``folder``, whose state is ``state``, was written."""
        checkpoints.load_optimizer_into(folder, self.engine.state(), self.mesh.world)
        self.engine.adopt(state.optimizer_steps)
        _restore_random_state(state.random_state)
        self.state = state
        state.config = self.config
        state.mesh = self.mesh.describe() | {"zero": self.config.parallel.zero}


def build(config: Config, kind: str, mesh: Mesh, resume: Resume | None, parent: Parent | None) -> Run:
    """Data, model and engine: in the state of a checkpoint, or new with the weights of ``parent``, or new with random ones."""
    precision = resolve_precision(config.train.precision, mesh.device)
    loader, data_identity, tokenizer = _open_data(config, mesh)
    if resume is not None:
        _check_resumable(resume.state, precision, data_identity, config.data.shards, parent)
    with mesh.device:  # the whole model need never lie on the host
        model = local_model(config, mesh)
    if resume is None and parent is None:
        model.initialise(config.train.seed)
    engine = Engine(model, config, mesh)
    saver = Saver(Path(config.run.dir) / checkpoints.CHECKPOINTS, config.checkpoint, mesh.device)
    saver.prepare(engine.state())
    state = CheckpointState(kind, 0, 0, config, describe(config.patterns), precision, data_identity=data_identity)
    state.mesh = mesh.describe() | {"zero": config.parallel.zero}
    run = Run(config, mesh, engine, loader, state, resume.folder if resume else None, saver, tokenizer)
    if resume is not None:
        run.load(resume.folder, resume.state)
    elif parent is not None:
        checkpoints.load_weights_into(parent.folder, engine.state()[MASTER], mesh.world)
        engine.adopt(0)
        state.parent = parent.provenance
    return run


def _open_data(config: Config, mesh: Mesh) -> tuple[PairSource, str, Path | None]:
    """What the run trains on, the hash by which a resume knows it again, and its tokenizer; the first rank says how much is read."""
    if config.data.task:
        folder = Path(config.data.primary) / "tokenizer"
        tasks = TaskLoader(config, load_tokenizer(folder), mesh.place.data, mesh.shape.data)
        return tasks, tasks.identity, folder
    corpus = open_corpus(config)
    budget = check_budget(config, corpus)
    if mesh.is_first:
        print("\n".join(budget), file=sys.stderr)
    loader = Loader(
        corpus.reader,
        corpus.plan,
        sequence_length=config.data.sequence_length,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=mesh.place.data,
        data_size=mesh.shape.data,
        separate_documents=config.data.documents == "separate",
    )
    return loader, corpus.reader.identity, comm.first_decides(lambda: tokenizer_folder(config, corpus), mesh.world)


def _check_resumable(
    state: CheckpointState, precision: str, data_identity: str, shards: ShardsSetting, parent: Parent | None
) -> None:
    if state.precision != precision:
        raise UserError(
            f"train.precision: the run was trained in {state.precision}, but this machine would go on in {precision}; "
            f"set train.precision={state.precision}"
        )
    if state.data_identity != data_identity:
        raise UserError(
            f"data.shards: {shards}: its index.json is not the data this run was trained on (its hash is "
            f"{data_identity[:16]}…, the checkpoint's {state.data_identity[:16]}…); name the shards the run began with"
        )
    if parent is not None and state.parent is not None and state.parent["content"] != parent.provenance["content"]:
        raise UserError(
            f"run.dir {state.config.run.dir} was started from {state.parent['path']}, not from {parent.folder}; name that checkpoint to go "
            "on, or give this run another run.dir"
        )


def _random_state() -> dict[str, str]:
    """Generators' states. Training draws nothing from them after the weights are made; they are kept so that this may change."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def _restore_random_state(states: dict[str, str]) -> None:
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
