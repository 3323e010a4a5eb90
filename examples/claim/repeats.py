"""How much of a text a model could copy from far back in its own context, by kind of text: ``python -m examples.claim repeats DIR``.

A token counts as *copied from afar* when the same three tokens as just before it occurred earlier in the sequence, the last time more than 64
tokens back, and the same token followed there; as *copied from nearby* when that last time was at most 64 tokens back. Attention that
keeps one token of 64 cannot look the first up exactly, and a recurrence must have carried it that long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megarat.data.reader import TokenReader
from megarat.errors import UserError

_CONTEXT = 3  # tokens that must repeat
_NEARBY = 64  # tokens; the dilation of the sparse pass
_LENGTH = 2048  # tokens of a sequence, as in training


class Repeats(NamedTuple):
    """Shares of the tokens that have at least ``_CONTEXT`` before them."""

    tokens: int
    from_afar: float
    from_nearby: float


def count(sequences: Sequence[Sequence[int]]) -> Repeats:
    """Of any number of sequences of token ids, none of which sees another."""
    afar = nearby = tokens = 0
    for ids in sequences:
        last: dict[tuple[int, ...], int] = {}
        for place in range(_CONTEXT, len(ids)):
            context = tuple(ids[place - _CONTEXT : place])
            before = last.get(context)
            last[context] = place
            if before is not None and ids[before] == ids[place]:
                nearby += place - before <= _NEARBY
                afar += place - before > _NEARBY
        tokens += max(0, len(ids) - _CONTEXT)
    return Repeats(tokens, afar / max(1, tokens), nearby / max(1, tokens))


def measure(corpus: Path) -> dict[str, Repeats]:
    """Of the held-out side of the whole corpus and of each kind of text. Raises ``UserError`` where the folder is no corpus."""
    folders = {"all": corpus / "shards"} | {folder.parent.name: folder.parent for folder in corpus.glob("kinds/*/validation")}
    found = {}
    for name, folder in sorted(folders.items()):
        reader = TokenReader(folder / "validation")
        sequences = reader.num_tokens // _LENGTH
        if not sequences:
            raise UserError(f"{folder / 'validation'}: holds less than {_LENGTH} tokens")
        ids_ST = np.asarray(reader.read(0, sequences * _LENGTH)).reshape(sequences, _LENGTH)
        found[name] = count(ids_ST.tolist())
    return found


def write(corpus: Path, path: Path) -> None:
    """The shares as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: row._asdict() for name, row in measure(corpus).items()}, indent=1) + "\n", encoding="utf-8")
