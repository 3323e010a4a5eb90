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
    parent = checkpoints.resolve(checkpoint)
    if parent.resolve().is_relative_to(Path(config.run.dir).resolve()):
        raise UserError(f"--from {checkpoint} lies in run.dir {config.run.dir}; give the adaptation a folder of its own")
    attention = config.attention
    if not sparse_pass:
        attention = dataclasses.replace(attention, train_dilation=1, train_window=0, train_initial=0)
    settings = dataclasses.replace(
        config,
        attention=attention,
        data=dataclasses.replace(config.data, order="random_offsets"),
    )
    state = checkpoints.load_state(parent)
    checkpoints.check_model(parent, state.config.model, config.model)
    provenance = {
        "kind": state.kind,
        "path": str(parent.resolve()),
        "pair": state.pair,
        "tokens": state.tokens,
        "content": checkpoints.identity(parent),
    }

    return train(settings, "adapt", Parent(parent, provenance), verify_resume)
