"""Bring foreign checkpoints into the canonical form."""

from __future__ import annotations

from pathlib import Path

from megarat.checkpoint.save import save_imported
from megarat.checkpoint.upstream import read_upstream
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError


def import_upstream(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> str:
    """Convert a ``.pth`` of the published code into a checkpoint folder ``out``; returns one line that says what was read.

    Only weights are taken (fp32 as stored). Raises ``UserError`` for files that are no such checkpoint and for an ``out`` that exists.
    """
    model, weights, told = read_upstream(source)
    if tokenizer is not None and (entries := load_tokenizer(tokenizer).vocab_size) > model.vocab:
        raise UserError(f"--tokenizer {tokenizer}: has {entries} entries, but the model's vocabulary has {model.vocab}")
    folder = save_imported(
        Path(out), model, weights, source=Path(source), told=told, tokenizer=None if tokenizer is None else Path(tokenizer)
    )
    kind = "RAT+" if model.recurrence else "attention-only"
    return f"{source} -> {folder}: {kind}, {model.layers} layers x {model.hidden}, {model.heads} heads, vocabulary {model.vocab}"
