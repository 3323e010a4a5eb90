"""The training loop: build or resume, then pair after pair until the last one or a request to stop.

Pretraining and adaptation are the same loop; what differs is in the config (a sparse pass or none) and in where the weights come from.
"""

from __future__ import annotations

import base64
import errno
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from megarat.checkpoint import load as checkpoints
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import Snapshot, prune, remove_leftovers, save
from megarat.config import Config
from megarat.data.format import INDEX_NAME, file_sha256
from megarat.data.loader import Loader, PairBatch, chain
from megarat.data.plan import Plan, RandomOffsetPlan, ShuffledPlan
from megarat.data.reader import TokenReader, check_vocabulary
from megarat.engine import MASTER, Engine, resolve_precision
from megarat.errors import StoppedEarly, UserError
from megarat.log import RunLog
from megarat.mesh import Mesh, start
from megarat.model.flops import pair_flops_per_token, parameter_count, peak_flops
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import describe
from megarat.train.guard import SkipCounter, StopRequest, run_lock
from megarat.train.run_folder import open_run, record_start
from megarat.train.schedule import learning_rate
from megarat.train.step import PairResult, train_pair


class Parent(NamedTuple):
    """The checkpoint whose weights a run starts from."""

    folder: Path
    provenance: dict[str, Any]  # recorded in every checkpoint of the run; "content" is the hash that names the parent


def pretrain(config: Config) -> Path:
    """Train a model from scratch by sparse + dense pairs, or resume it from ``config.run.dir``; returns the last checkpoint.

    Raises ``StoppedEarly`` after a signal or the wall-clock limit, with a checkpoint from which the same call goes on;
    ``UserError`` for bad input, a run folder of another config, a damaged checkpoint, a full disk.
    """
    return train(config, "pretrain")


def train(config: Config, kind: str, parent: Parent | None = None) -> Path:
    """Run the loop as ``kind`` ("pretrain" or "adapt"); a new run takes its weights from ``parent``, else random ones."""
    run_dir = Path(config.run.dir)
    _make_folder(run_dir)
    with _full_disk(run_dir), run_lock(run_dir), StopRequest(config.train.wall_clock_minutes).listening() as stop:
        checkpoint, state = open_run(config, kind)
        if checkpoint is not None and state is not None and state.pair >= config.train.pairs:
            print(f"{run_dir}: finished after {state.pair} pairs; raise train.pairs to train on", file=sys.stderr)
            return checkpoint
        run = _build(config, kind, checkpoint, state, parent)
        with RunLog(run_dir, config, run.state.pair, run.mesh.is_first) as log:
            log.say(_headline(run))
            return _loop(run, stop, log)


def _loop(run: Run, stop: StopRequest, log: RunLog) -> Path:
    config, state = run.config, run.state
    skips = SkipCounter(config.train.max_skipped, state.skipped, state.skipped_in_row)
    clock = _Clock(run)
    saved = run.resumed_from
    batches = cast("Generator[PairBatch]", run.loader.iterate(state.pair, config.data.prefetch))
    with closing(batches):
        while state.pair < config.train.pairs and stop.reason is None:
            batch = clock.wait_for(batches)
            lr = learning_rate(state.pair, config.train.pairs, config.optim)
            result = train_pair(run.engine, batch.micro_batches, config.sparse_patterns, config.patterns, lr)
            skips.record(state.pair, result.finite)
            _advance(state, batch, result, skips)
            log.pair(clock.metrics(batch, result, lr))
            saved = run.save() if state.pair % config.checkpoint.every == 0 else None
    saved = saved or run.save()
    if state.pair < config.train.pairs:
        raise StoppedEarly(
            f"stopped after pair {state.pair} of {config.train.pairs} ({stop.reason}); {saved} is complete, the same command goes on from it"
        )
    log.say(f"{config.run.dir}: finished {state.pair} pairs, {state.tokens:,} tokens; {saved}")
    return saved


def _advance(state: CheckpointState, batch: PairBatch, result: PairResult, skips: SkipCounter) -> None:
    """Move counters and stream hash past a pair; a skipped pair has used its tokens and its place in the schedule, too."""
    state.pair += 1
    state.tokens += batch.tokens
    state.stream_hash = chain(state.stream_hash, batch.digest)
    state.skipped_in_row = skips.in_row


@dataclass
class Run:
    """Everything the loop works on. ``state`` says where it stands."""

    config: Config
    mesh: Mesh
    engine: Engine
    loader: Loader
    state: CheckpointState
    resumed_from: Path | None

    def save(self) -> Path:
        """Write a checkpoint of this moment and remove those the config no longer keeps."""
        folder = Path(self.config.run.dir) / checkpoints.CHECKPOINTS
        named, self.state.optimizer_steps = self.engine.named_state()
        masters = named.pop(MASTER)
        in_fp32 = self.engine.precision == "fp32"
        tokenizer = Path(self.config.data.shards) / "tokenizer"
        self.state.random_state = _random_state()
        snapshot = Snapshot(
            state=self.state,
            weights=masters if in_fp32 else {name: master.to(self.engine.dtype) for name, master in masters.items()},
            masters={} if in_fp32 else masters,
            moments=named,
            tokenizer=tokenizer if tokenizer.is_dir() else None,
        )
        saved = save(folder, snapshot)
        prune(folder, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        return saved


def _build(config: Config, kind: str, checkpoint: Path | None, state: CheckpointState | None, parent: Parent | None) -> Run:
    """Data, model and engine, and the state of ``checkpoint`` in them."""
    mesh = start(config.run.device)
    precision = resolve_precision(config.train.precision, mesh.device)
    reader = TokenReader(Path(config.data.shards) / "train")
    check_vocabulary(reader.index, config.model.vocab)
    loader = Loader(
        reader,
        _plan(config, reader),
        sequence_length=config.data.sequence_length,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        data_rank=mesh.rank,
        data_size=mesh.world_size,
    )
    data_identity = file_sha256(reader.index.folder / INDEX_NAME)
    if state is not None:
        _check_resumable(state, precision, data_identity, reader, parent)
    model = RATPlusLM(config.model)
    if checkpoint is None and parent is None:
        model.initialise(config.train.seed)
    engine = Engine(model, config, mesh)
    if checkpoint is not None and state is not None:
        engine.load_named_state(checkpoints.load_optimizer(checkpoint), state.optimizer_steps)
        _restore_random_state(state.random_state)
        state.config = config
    else:
        state = CheckpointState(kind, 0, 0, config, describe(config.patterns), precision, data_identity=data_identity)
        if parent is not None:
            engine.load_weights(checkpoints.load_weights(parent.folder))
            state.parent = parent.provenance
    state.mesh = mesh.describe() | {"zero": config.parallel.zero}
    record_start(config)
    remove_leftovers(Path(config.run.dir) / checkpoints.CHECKPOINTS)
    return Run(config, mesh, engine, loader, state, checkpoint)


def _plan(config: Config, reader: TokenReader) -> Plan:
    kind = RandomOffsetPlan if config.data.order == "random_offsets" else ShuffledPlan
    return kind(reader.num_tokens, config.data.sequence_length, config.train.seed)


def _check_resumable(
    state: CheckpointState, precision: str, data_identity: str, reader: TokenReader, parent: Parent | None
) -> None:
    if state.precision != precision:
        raise UserError(
            f"train.precision: the run was trained in {state.precision}, but this machine would go on in {precision}; "
            f"set train.precision={state.precision}"
        )
    if state.data_identity != data_identity:
        raise UserError(
            f"data.shards: {reader.index.folder / INDEX_NAME} is not the data this run was trained on (its hash is "
            f"{data_identity[:16]}…, the checkpoint's {state.data_identity[:16]}…); name the shards the run began with"
        )
    if parent is not None and state.parent is not None and state.parent["content"] != parent.provenance["content"]:
        raise UserError(
            f"run.dir {state.config.run.dir} was started from {state.parent['path']}, not from {parent.folder}; name that checkpoint to go "
            "on, or give this run another run.dir"
        )


def _make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot make this folder: {error.strerror}") from None


@contextmanager
def _full_disk(run_dir: Path) -> Iterator[None]:
    """Logs and settings are written all along; a disk without room for them is no bug either."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or run_dir
        raise UserError(
            f"cannot write {where}: {error.strerror}. The checkpoints in {run_dir} are untouched; make room, then start the same command again"
        ) from None


def _headline(run: Run) -> str:
    config = run.config
    sparse = "" if config.sparse_patterns is None else f"{describe(config.sparse_patterns)} then "
    where = f"resuming after pair {run.state.pair} from {run.resumed_from}" if run.resumed_from else "new run"
    return (
        f"{config.run.dir}: {parameter_count(config.model) / 1e6:,.1f} M parameters on {run.mesh.device}, {run.engine.precision}, ZeRO {config.parallel.zero}; "
        f"{sparse}{describe(config.patterns)}; {config.train.pairs} pairs; {where}"
    )


class _Clock:
    """Times of a pair and the metrics made from them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._flops = pair_flops_per_token(run.config)
        peak = peak_flops(run.mesh.device)
        self._peak = None if peak is None else peak * run.mesh.world_size
        self._started = self._waited = 0.0

    def wait_for(self, batches: Iterator[PairBatch]) -> PairBatch:
        """The next batch; the pair's time begins here."""
        self._started = time.perf_counter()
        batch = next(batches)
        self._waited = time.perf_counter() - self._started
        return batch

    def metrics(self, batch: PairBatch, result: PairResult, lr: float) -> dict[str, Any]:
        """The line of ``metrics.jsonl`` of a pair that has just ended."""
        seconds = time.perf_counter() - self._started
        state, sparse, dense = self._run.state, result.sparse, result.dense
        return {
            "pair": state.pair,
            "tokens": state.tokens,
            "loss_sparse": sparse and sparse.loss,
            "loss_dense": dense and dense.loss,
            "grad_norm_sparse": sparse and sparse.grad_norm,
            "grad_norm_dense": dense and dense.grad_norm,
            "lr": lr,
            "tokens_per_s": batch.tokens / seconds,
            "stream_hash": state.stream_hash,
            "mfu": None if self._peak is None else batch.tokens / seconds * self._flops / self._peak,
            "memory_gb": self._run.engine.memory_gb(),
            "data_wait_s": self._waited,
            "seconds": seconds,
            "skipped": not result.finite,
        }


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
