"""The training loop: build or resume, then pair after pair until the last one or a request to stop.

Pretraining and adaptation are the same loop; what differs is in the config (a sparse pass or none) and in where the weights come from.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from megarat import comm
from megarat.checkpoint.load import CHECKPOINTS, load_state
from megarat.checkpoint.manifest import CheckpointState, folder_name, pair_of
from megarat.checkpoint.save import discard_newer
from megarat.config import Config
from megarat.data.loader import PairBatch, chain
from megarat.errors import StoppedEarly, UserError
from megarat.files import make_folder
from megarat.log import RunLog
from megarat.mesh import DATA, start
from megarat.model.flops import pair_flops_per_token, parameter_count, peak_flops
from megarat.model.pattern import describe
from megarat.ops.dilated_attention import dense_backend
from megarat.train.guard import StopRequest, run_lock
from megarat.train.pair_guard import Decision, PairGuard, gone_back, mark_safe, record_event
from megarat.train.run import Parent, Run, build
from megarat.train.run_folder import open_run, record_start
from megarat.train.schedule import learning_rate
from megarat.train.step import PairResult, sparse_patterns, train_pair
from megarat.train.stragglers import Stragglers
from megarat.train.validation import Validation
from megarat.train.verify import verify
from megarat.train.watchdog import Watchdog


def pretrain(config: Config, verify_resume: bool = False) -> Path:
    """Train a model from scratch by sparse + dense pairs, or resume it from ``config.run.dir``; returns the last checkpoint.

    Raises ``StoppedEarly`` after a signal or the wall-clock limit, with a checkpoint from which the same call goes on;
    ``UserError`` for bad input, a run folder of another config, a damaged checkpoint, a full disk.
    """
    return train(config, "pretrain", verify_resume=verify_resume)


def train(config: Config, kind: str, parent: Parent | None = None, verify_resume: bool = False) -> Path:
    """Run the loop as ``kind`` ("pretrain" or "adapt"); a new run takes its weights from ``parent``, else random ones.

    With ``verify_resume`` a resumed run first trains one recorded pair again (``megarat.train.verify``).
    """
    run_dir = Path(config.run.dir)
    mesh = start(config.run.device, config)
    with ExitStack() as stack:
        stack.enter_context(_full_disk(run_dir))
        comm.first_decides(lambda: _enter(run_dir, stack), mesh.world)
        stop = stack.enter_context(StopRequest(config.train.wall_clock_minutes).listening())
        at_last = stack.enter_context(ExitStack())
        watchdog = stack.enter_context(Watchdog(run_dir, mesh.rank, mesh.world_size, config.guard.hang_minutes).watching())
        resume = comm.first_decides(lambda: open_run(config, kind), mesh.world)
        if resume is not None and resume.state.pair >= config.train.pairs:
            if mesh.is_first:
                print(f"{run_dir}: finished after {resume.state.pair} pairs; raise train.pairs to train on", file=sys.stderr)
            return resume.folder
        run = build(config, kind, mesh, resume, parent)
        at_last.callback(run.saver.join)  # an error of training must not cut off a save that is under way
        if verify_resume:
            watchdog.beat("verifying the resume")
            verify(run)
        log = stack.enter_context(_open_log(run))
        log.say(_headline(run))
        return _loop(run, stop, log, watchdog)


def _loop(run: Run, stop: StopRequest, log: RunLog, watchdog: Watchdog) -> Path:
    """Train pair after pair; returns the last checkpoint or raises ``StoppedEarly``. All ranks stop after the same pair."""
    guard, pairs = PairGuard(run.config), run.config.train.pairs
    stragglers = Stragglers(run.engine.model.blocks, run.mesh, run.config.guard.slow_every)
    while _train_on(run, stop, log, watchdog, guard, stragglers) is Decision.ROLL_BACK:
        watchdog.beat("going back to a checkpoint")
        _go_back(run, log, guard.why)
    watchdog.beat("saving")
    saved = _finish_saving(run)
    if run.state.pair < pairs:
        reasons = [reason for reason in comm.gather_objects(stop.reason, run.mesh.world) if reason is not None]
        raise StoppedEarly(
            f"stopped after pair {run.state.pair} of {pairs} ({reasons[0]}); {saved} is complete, the same command goes on from it"
        )
    log.say(f"{run.config.run.dir}: finished {run.state.pair} pairs, {run.state.tokens:,} tokens; {saved}")
    return saved


def _train_on(run: Run, stop: StopRequest, log: RunLog, watchdog: Watchdog, guard: PairGuard, stragglers: Stragglers) -> Decision:
    """Train until the last pair, a request to stop, or a decision to go back: the last pair's."""
    config, state, mesh = run.config, run.state, run.mesh
    clock, decision = _Clock(run), Decision.TRAINED
    validation = Validation(config, mesh, run.engine)
    batches = cast("Generator[PairBatch]", run.loader.iterate(state.pair + state.passed_over, config.data.prefetch))
    with closing(batches):
        while decision is not Decision.ROLL_BACK and state.pair < config.train.pairs and not _asked_to_end(run, stop):
            watchdog.beat(f"pair {state.pair + 1}")
            with stragglers.watching(state.pair + 1):
                batch = clock.wait_for(batches)
                lr = learning_rate(state.pair, config.train.pairs, config.optim)
                sparse, summed = sparse_patterns(config, state.pair), config.train.recipe == "summed"
                result = train_pair(run.engine, batch.micro_batches, sparse, config.patterns, lr, guard.judge(state), summed)
            decision = guard.record(state, result)
            digest = comm.sum_wrapped(batch.digest, mesh.group(DATA), mesh.device)
            _advance(state, batch.tokens, digest)
            metrics = clock.metrics(batch, result, lr)
            if validation.is_due(state.pair):
                metrics |= validation.measure(partial(_alive, log, watchdog, f"validating after pair {state.pair}"))
            log.pair(metrics)
            if decision is not Decision.TRAINED:
                _tell(run, log, "skipped", guard.why)
            stragglers.report(state.pair, metrics["data_wait_s"], metrics["seconds"], partial(_tell, run, log, "slow"))
            if state.pair % config.checkpoint.every == 0:
                mark_safe(state)
                watchdog.beat(f"saving after pair {state.pair}")
                run.save()
    return decision


def _alive(log: RunLog, watchdog: Watchdog, what: str) -> None:
    """A sign of life between two pairs, for all who wait for one."""
    watchdog.beat(what)
    log.alive()


def _go_back(run: Run, log: RunLog, why: str) -> None:
    """Go on from the checkpoint that the guard holds for safe, with the samples that come next now."""
    folder = Path(run.config.run.dir) / CHECKPOINTS
    run.saver.wait()
    left = run.state
    target = folder / folder_name(left.guard["safe"])
    run.load(target, gone_back(left, comm.first_decides(lambda: load_state(target), run.mesh.world)))
    comm.first_decides(lambda: discard_newer(folder, target), run.mesh.world)
    run.saver.go_back_to(target)
    log.rewind(run.state.pair)
    _tell(run, log, "went back", f"from pair {left.pair} to {target}, past {run.state.passed_over} global batches in all: {why}")


def _tell(run: Run, log: RunLog, event: str, why: str) -> None:
    """What a guard did, for whoever watches and for the record."""
    if run.mesh.is_first:
        record_event(Path(run.config.run.dir), event, run.state.pair, why=why)
        log.say(f"pair {run.state.pair}: {event}: {why}")


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


def _advance(state: CheckpointState, tokens: int, digest: int) -> None:
    """Move counters and stream hash past a pair; one that was left out has used its tokens and its place in the schedule, too."""
    state.pair += 1
    state.tokens += tokens
    state.stream_hash = chain(state.stream_hash, digest)


def _enter(run_dir: Path, stack: ExitStack) -> None:
    """The run folder, made if need be and locked by the first rank for as long as the stack lives."""
    make_folder(run_dir, "run.dir")
    with _full_disk(run_dir):
        stack.enter_context(run_lock(run_dir))


def _open_log(run: Run) -> RunLog:
    """The first rank's, which records this start; the others wait until it has, so that a full disk ends them with the same words."""
    run_dir = Path(run.config.run.dir)
    log = RunLog(run_dir, run.config, run.state.pair, enabled=False)

    def record() -> None:
        nonlocal log
        with _full_disk(run_dir):
            record_start(run.config)
            log = RunLog(run_dir, run.config, run.state.pair)

    comm.first_decides(record, run.mesh.world)
    return log


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
    head_dim = config.model.hidden // config.model.heads
    dense = dense_backend(run.mesh.device, run.engine.dtype, config.data.sequence_length, head_dim)
    return (
        f"{config.run.dir}: {parameter_count(config.model) / 1e6:,.1f} M parameters on {run.mesh.device.type}{mesh}, "
        f"{run.engine.precision}, ZeRO {config.parallel.zero}, dense attention by {dense}; "
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
            "skipped": not result.made,
            "skipped_total": len(state.skipped),
            "rollbacks": len(state.guard.get("rollbacks", [])),
        }
