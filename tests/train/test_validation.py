"""What is measured while a run trains: which tokens, from where, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny_run
import torch

from megarat.data.format import Piece, ShardWriter, TokenizerInfo
from megarat.engine import Engine
from megarat.errors import UserError
from megarat.mesh import Mesh
from megarat.train.validation import Validation

LENGTH = tiny_run.LENGTH
MESH = Mesh(0, 1, 0, torch.device("cpu"))


class Recorder:
    """An engine that keeps the inputs it is given, and finds a loss of 1 nat a token."""

    micro_batches = 2

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def evaluate(self, micro_batches: Sequence[tuple[torch.Tensor, ...]], patterns: object) -> tuple[float, int]:
        self.inputs += [inputs for inputs, *_ in micro_batches]
        tokens = sum(int((labels != -100).sum()) for _, labels, *_ in micro_batches)
        return float(tokens), tokens


def write_side(folder: Path, side: str, sha256: str = "0" * 64, eos_id: int = 2) -> np.ndarray:
    """400 tokens under ``folder/side``; returns them."""
    stream = np.random.default_rng(len(side)).integers(3, tiny_run.VOCAB, 400).astype("<u2")
    stream[-1] = eos_id
    made_by = TokenizerInfo("test.model", "sentencepiece", sha256)
    with ShardWriter(folder / side, vocab_size=tiny_run.VOCAB, eos_id=eos_id, tokenizer=made_by) as writer:
        writer.add(Piece(stream, np.array([len(stream)])))
        writer.finish({})
    return stream


def measured(folder: str, **data: Any) -> list[int]:
    """The tokens that one measurement reads."""
    config = tiny_run.config(
        data={"shards": folder, **data}, train={"validate_every": 1, "micro_batch": 2}, attention={"train_dilation": 1}
    )
    engine = Recorder()
    assert Validation(config, MESH, cast(Engine, engine)).measure(lambda: None)["validation_dense"] == 1.0
    return torch.cat(engine.inputs).flatten().tolist()


@pytest.mark.parametrize(("limit", "sequences"), [(0, 24), (10 * LENGTH, 10), (11 * LENGTH + 3, 10), (10**6, 24)])
def test_the_limit_says_how_much_is_read(tmp_path: Path, limit: int, sequences: int) -> None:
    write_side(tmp_path, "train")
    stream = write_side(tmp_path, "validation")
    assert measured(str(tmp_path), validation_tokens=limit) == stream[: sequences * LENGTH].tolist()


def test_a_limit_below_one_micro_batch_is_refused_and_is_not_all(tmp_path: Path) -> None:
    write_side(tmp_path, "train")
    write_side(tmp_path, "validation")
    for limit in (1, LENGTH - 1, LENGTH, 2 * LENGTH - 1):
        with pytest.raises(UserError, match=r"validation \(or data\.validation_tokens\) holds less than one micro-batch"):
            measured(str(tmp_path), validation_tokens=limit)


def test_a_remote_held_out_side_is_cached_where_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_side(tmp_path / "c", "train")
    stream = write_side(tmp_path / "c", "validation")
    remote = f"pipe:cat {tmp_path / 'c'}/{{}}"
    assert measured(remote, cache=str(tmp_path / "cache")) == stream[: 24 * LENGTH].tolist()
    assert list((tmp_path / "cache").rglob("*.tar")) and not (tmp_path / "home").exists()


@pytest.mark.parametrize("other", [{"sha256": "1" * 64}, {"eos_id": 7}])
def test_a_held_out_side_of_another_tokenizer_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    write_side(tmp_path / "a", "train")
    write_side(tmp_path / "b", "validation", **other)
    with pytest.raises(UserError, match=r"data\.validation: .*b/validation.*a/train with .*loss on other ids would mean nothing"):
        measured(str(tmp_path / "a"), validation=str(tmp_path / "b"))
