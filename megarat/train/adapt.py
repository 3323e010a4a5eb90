"""Resolution adaptation: a short training of pretrained weights under another attention pattern.

Weights in, pattern from ``attention.pattern``, everything else fresh: optimizer, schedule, and the data order (uniform random offsets over
the pretraining shards, with replacement; or samples of ``data.task``). One update a batch; the sparse + dense pair of active recurrence
learning goes on only where it is asked for, as fine-tuning for block-sparse retrieval needs it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megarat.checkpoint import load as checkpoints
from megarat.config import Config
from megarat.errors import UserError
from megarat.train.loop import train
from megarat.train.run import Parent


def adapt(config: Config, checkpoint: str | Path, sparse_pass: bool = False, verify_resume: bool = False) -> Path:
    """Adapt ``checkpoint`` (a checkpoint or run folder), or resume such a run from ``config.run.dir``; returns the last checkpoint.

    With ``sparse_pass`` every batch is also trained on under ``attention.train_dilation`` and its fellows, as in pretraining.

    The fp32 masters are taken where the checkpoint has them. Its path, pair, tokens and content hash are recorded as the parent.
    Raises like ``pretrain``; also ``UserError`` when the checkpoint's model is not the config's.
    """
    parent = _parent_that_is_gone(Path(config.run.dir), Path(checkpoint)) or _parent(config, checkpoint)
    attention = config.attention
    if not sparse_pass:
        attention = dataclasses.replace(attention, train_dilation=1, train_window=0, train_initial=0)
    settings = dataclasses.replace(
        config,
        attention=attention,
        data=dataclasses.replace(config.data, order="random_offsets"),
    )
    return train(settings, "adapt", parent, verify_resume)


def _parent(config: Config, checkpoint: str | Path) -> Parent:
    folder = checkpoints.resolve(checkpoint)
    if folder.resolve().is_relative_to(Path(config.run.dir).resolve()):
        raise UserError(f"--from {checkpoint} lies in run.dir {config.run.dir}; give the adaptation a folder of its own")
    state = checkpoints.load_state(folder)
    checkpoints.check_model(folder, state.config.model, config.model)
    provenance = {
        "kind": state.kind,
        "path": str(folder.resolve()),
        "pair": state.pair,
        "tokens": state.tokens,
        "content": checkpoints.identity(folder),
    }
    return Parent(folder, provenance)


def _parent_that_is_gone(run_dir: Path, checkpoint: Path) -> Parent | None:
    """What the run in ``run_dir`` was started from, if that was ``checkpoint`` (or lay in it) and is no longer there.

    A run that has a checkpoint of its own does not need it; the pretraining that wrote it may have gone on and removed it.
    """
    own = checkpoints.find_latest(run_dir)
    recorded = None if own is None else checkpoints.load_state(own).parent
    if recorded is None or Path(recorded["path"]).exists() or not Path(recorded["path"]).is_relative_to(checkpoint.resolve()):
        return None
    return Parent(Path(recorded["path"]), recorded)
