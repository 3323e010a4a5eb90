"""The training loop: build or resume, then pair after pair until the last one or a request to stop.

Pretraining and adaptation are the same loop; what differs is in the config (a sparse pass or none) and in where the weights come from.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

from megarat import comm
from megarat.checkpoint.manifest import CheckpointState, pair_of
from megarat.config import Config
from megarat.data.loader import PairBatch, chain
from megarat.errors import StoppedEarly, UserError
from megarat.log import RunLog
from megarat.mesh import DATA, start
from megarat.model.flops import pair_flops_per_token, parameter_count, peak_flops
from megarat.model.pattern import describe
from megarat.train.guard import SkipCounter, StopRequest, run_lock
from megarat.train.run import Parent, Run, build
from megarat.train.run_folder import open_run, record_start
from megarat.train.schedule import learning_rate
from megarat.train.step import PairResult, train_pair


def pretrain(config: Config) -> Path:
    """Train a model from scratch by sparse + dense pairs, or resume it from ``config.run.dir``; returns the last checkpoint.

    Raises ``StoppedEarly`` after a signal or the wall-clock limit, with a checkpoint from which the same call goes on;
    ``UserError`` for bad input, a run folder of another config, a damaged checkpoint, a full disk.
    """
    return train(config, "pretrain")


def train(config: Config, kind: str, parent: Parent | None = None) -> Path:
    """Run the loop as ``kind`` ("pretrain" or "adapt"); a new run takes its weights from ``parent``, else random ones."""
    run_dir = Path(config.run.dir)
    mesh = start(config.run.device, config)
    with ExitStack() as stack:
        stack.enter_context(_full_disk(run_dir))
        comm.first_decides(lambda: _enter(run_dir, stack), mesh.world)
        stop = stack.enter_context(StopRequest(config.train.wall_clock_minutes).listening())
        resume = comm.first_decides(lambda: open_run(config, kind), mesh.world)
        if resume is not None and resume.state.pair >= config.train.pairs:
            if mesh.is_first:
                print(f"{run_dir}: finished after {resume.state.pair} pairs; raise train.pairs to train on", file=sys.stderr)
            return resume.folder
        run = build(config, kind, mesh, resume, parent)
        if mesh.is_first:
            record_start(config)
        stack.callback(run.saver.join)  # an error of training must not cut off a save that is under way
        log = stack.enter_context(RunLog(run_dir, config, run.state.pair, mesh.is_first))
        log.say(_headline(run))
        return _loop(run, stop, log)


def _loop(run: Run, stop: StopRequest, log: RunLog) -> Path:
    """Train pair after pair; returns the last checkpoint or raises ``StoppedEarly``. All ranks stop after the same pair."""
    config, state, mesh = run.config, run.state, run.mesh
    skips = SkipCounter(config.train.max_skipped, state.skipped, state.skipped_in_row)
    clock = _Clock(run)
    batches = cast("Generator[PairBatch]", run.loader.iterate(state.pair, config.data.prefetch))
    with closing(batches):
        while state.pair < config.train.pairs and not _asked_to_end(run, stop):
            batch = clock.wait_for(batches)
            lr = learning_rate(state.pair, config.train.pairs, config.optim)
            result = train_pair(run.engine, batch.micro_batches, config.sparse_patterns, config.patterns, lr)
            skips.record(state.pair, result.finite)
            digest = comm.sum_wrapped(batch.digest, mesh.group(DATA), mesh.device)
            _advance(state, batch.tokens, digest, skips.in_row)
            log.pair(clock.metrics(batch, result, lr))
            if state.pair % config.checkpoint.every == 0:
                run.save()
    saved = _finish_saving(run)
    if state.pair < config.train.pairs:
        reasons = [reason for reason in comm.gather_objects(stop.reason, mesh.world) if reason is not None]
        raise StoppedEarly(
            f"stopped after pair {state.pair} of {config.train.pairs} ({reasons[0]}); {saved} is complete, the same command goes on from it"
        )
    log.say(f"{config.run.dir}: finished {state.pair} pairs, {state.tokens:,} tokens; {saved}")
    return saved


def _asked_to_end(run: Run, stop: StopRequest) -> bool:
    """Whether a rank was asked to stop. Raises on all ranks when a save that was under way has failed on one."""
    mesh = run.mesh
    asked, failed = comm.any_flags((stop.reason is not None, run.saver.failed), mesh.world, mesh.device)
    if failed:
        run.saver.wait()
    return asked


def _finish_saving(run: Run) -> Path:
    """The checkpoint of this moment, written if it is not there yet."""
    saved = run.saver.wait() or run.resumed_from
    if saved is None or pair_of(saved) != run.state.pair:
        run.save()
        saved = run.saver.wait()
    assert saved is not None
    return saved


def _advance(state: CheckpointState, tokens: int, digest: int, skipped_in_row: int) -> None:
    """Move counters and stream hash past a pair; a skipped pair has used its tokens and its place in the schedule, too."""
    state.pair += 1
    state.tokens += tokens
    state.stream_hash = chain(state.stream_hash, digest)
    state.skipped_in_row = skipped_in_row


def _enter(run_dir: Path, stack: ExitStack) -> None:
    """The run folder, made if need be and locked by the first rank for as long as the stack lives."""
    _make_folder(run_dir)
    stack.enter_context(run_lock(run_dir))


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
    mesh = f" x {run.mesh.world_size} ({run.mesh.shape})" if run.mesh.world_size > 1 else ""
    where = f"resuming after pair {run.state.pair} from {run.resumed_from}" if run.resumed_from else "new run"
    return (
        f"{config.run.dir}: {parameter_count(config.model) / 1e6:,.1f} M parameters on {run.mesh.device.type}{mesh}, "
        f"{run.engine.precision}, ZeRO {config.parallel.zero}; "
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
