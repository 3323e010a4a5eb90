"""``--verify-resume``: before a resumed run goes on, it trains one recorded pair again and compares the numbers.

The pair is the one after the newest checkpoint for which ``metrics.jsonl`` has it: of a run that was killed, the one resumed from; of a
run that stopped right after a save, an older one. Its batch is read, both updates are made, and losses and gradient norms are compared with
what was recorded; the second update's depend on the first one's moments and step. Then the run is put back to where it resumes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from megarat import comm
from megarat.checkpoint.load import CHECKPOINTS, load_state
from megarat.checkpoint.manifest import CheckpointState, pair_of
from megarat.errors import UserError
from megarat.log import METRICS
from megarat.train.run import Run
from megarat.train.step import PairResult, sparse_patterns, train_pair

FIGURES = ("loss_sparse", "loss_dense", "grad_norm_sparse", "grad_norm_dense")

# Relative. The record does not say which mesh made it. On another one, and on GPUs, sums are taken in another order: in fp32 some units of
# 2^-24 that an update of Adam magnifies; in bf16 half a unit of 2^-8 of each term at most, of a loss much less, since it is a mean. Gradients
# near 0 differ by more than losses do.
_TOLERANCES = {"fp32": {"loss": 1e-5, "grad_norm": 1e-4}, "bf16": {"loss": 2e-3, "grad_norm": 2e-2}}


def verify(run: Run) -> None:
    """Compare, and tell the result; all ranks call it. Nothing to do for a new run.

    Raises ``UserError`` when the numbers differ, or when no pair after a checkpoint of the run is recorded.
    """
    if run.resumed_from is None:
        return
    resumed_from, resumed = run.resumed_from, run.state
    folder, state, recorded = comm.first_decides(lambda: _recorded_pair(run), run.mesh.world)
    if folder != resumed_from:
        run.load(folder, state)
    figures = replay(run, recorded["lr"])
    comm.first_decides(lambda: _compare(run, folder, recorded, figures), run.mesh.world)
    run.load(resumed_from, resumed)


def replay(run: Run, lr: float) -> dict[str, float | None]:
    """Train the pair that comes next, with the recorded rate (``train.pairs`` may have been raised since); its figures as they are recorded."""
    config, state = run.config, run.state
    batch = run.loader.pair(state.pair + state.passed_over)
    sparse, summed = sparse_patterns(config, state.pair), config.train.recipe == "summed"
    return figures_of(train_pair(run.engine, batch.micro_batches, sparse, config.patterns, lr, summed=summed))


def figures_of(result: PairResult) -> dict[str, float | None]:
    """Losses and gradient norms; None for a pass that was not made, and for what is not finite."""
    values = {
        "loss_sparse": result.sparse and result.sparse.loss,
        "loss_dense": result.dense and result.dense.loss,
        "grad_norm_sparse": result.sparse and result.sparse.grad_norm,
        "grad_norm_dense": result.dense and result.dense.grad_norm,
    }
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def _recorded_pair(run: Run) -> tuple[Path, CheckpointState, dict[str, Any]]:
    """The newest checkpoint whose next pair was recorded and trained on the samples that come next there, its state, and the record."""
    run_dir = Path(run.config.run.dir)
    lines = {line["pair"]: line for line in _lines(run_dir / METRICS)}
    newest = run.state.pair
    found = {pair: folder for folder in (run_dir / CHECKPOINTS).iterdir() if (pair := pair_of(folder)) is not None}
    for pair in sorted(found, reverse=True):
        line = lines.get(pair + 1)
        if pair <= newest and line is not None and not line.get("skipped"):
            state = run.state if pair == newest else load_state(found[pair])
            # Trained after going back to this checkpoint, which knows nothing of that: then on other samples than would come here.
            if line.get("rollbacks", 0) == len(state.guard.get("rollbacks", [])):
                return found[pair], state, line
    raise UserError(
        f"--verify-resume: {run_dir / METRICS} records no pair that follows a checkpoint (there are {', '.join(map(str, sorted(found)))}), or "
        "only pairs that were trained on other samples, after going back; so none can be trained again: start without --verify-resume, or "
        "keep more checkpoints (checkpoint.keep) and records (log.every)"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of ``metrics.jsonl``."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:  # torn by a crash
            continue
    return [line for line in found if isinstance(line, dict) and "pair" in line]


def _compare(run: Run, folder: Path, recorded: dict[str, Any], figures: dict[str, float | None]) -> None:
    """Raises ``UserError`` with all differences; else says what was compared."""
    tolerances = _TOLERANCES[run.engine.precision]
    differences = [
        f"{name} was {recorded.get(name)}, is {figures[name]}"
        for name in FIGURES
        if not _near(recorded.get(name), figures[name], tolerances[name.rpartition("_")[0]])
    ]
    pair = f"pair {recorded['pair']}, trained again from {folder}"
    if differences:
        raise UserError(
            f"--verify-resume: {pair}, is not what {Path(run.config.run.dir) / METRICS} recorded: {'; '.join(differences)} (allowed: "
            f"{tolerances['loss']:g} of a loss, {tolerances['grad_norm']:g} of a norm). Nothing was changed; find what differs between the two "
            "starts (environment.json has versions, hardware and code of each)"
        )
    same = all(recorded.get(name) == figures[name] for name in FIGURES)
    how = "bit for bit" if same else f"within {tolerances['loss']:g} (losses) and {tolerances['grad_norm']:g} (norms)"
    print(f"--verify-resume: {pair}, has the recorded losses and gradient norms, {how}", file=sys.stderr)


def _near(recorded: float | None, found: float | None, tolerance: float) -> bool:
    if recorded is None or found is None:
        return recorded is found
    return abs(found - recorded) <= tolerance * abs(recorded)
