"""``checkpoint show`` tells all there is to know; ``checkpoint verify`` names what is damaged, and how."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat import cli
from megarat.checkpoint import load
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import Snapshot, save
from megarat.errors import UserError
from megarat.model import names


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint of an adaptation, as a mesh of eight ranks describes itself."""
    config = tiny_run.config()
    weights = {name: torch.randn(shape) for name, shape in names.logical_shapes(config.model).items()}
    parent = {"kind": "pretrain", "path": "runs/a", "pair": 9, "tokens": 576, "content": "ab" * 32}
    mesh = {"world_size": 8, "tensor": 2, "context": 1, "data": 2, "pipeline": 2, "zero": 1}
    state = CheckpointState("adapt", 4, 256, config, "D=4,W=2,I=1", "fp32", optimizer_steps=4, parent=parent, mesh=mesh)
    moments = {"exp_avg": weights, "exp_avg_sq": weights}
    return save(tmp_path_factory.mktemp("run"), Snapshot(state, weights, moments=moments))


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def told(capsys, *arguments: object) -> tuple[int, str]:
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out + err


def test_show_prints_all_that_is_known_of_a_checkpoint(checkpoint, capsys):
    code, text = told(capsys, "checkpoint", "show", checkpoint)
    assert code == 0
    for line in (
        "kind         adapt, saved ",
        "pair         4 of 10 (4 optimizer steps",
        "tokens       256",
        "pattern      D=4,W=2,I=1",
        "mesh         world_size 8, tensor 2, context 1, data 2, pipeline 2, zero 1",
        f"parent       kind pretrain, path runs/a, pair 9, tokens 576, content {'ab' * 32}",
    ):
        assert "\n" + line in text
    for name, shape in names.logical_shapes(tiny_run.config().model).items():
        assert any(line.split() == [name, "x".join(map(str, shape)), "float32"] for line in text.splitlines()), name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["weights/__0_0.distcp", "weights/.metadata", "optimizer/__0_0.distcp", "state.json"])
@pytest.mark.parametrize(
    ("damage", "words"), [(flip, "its content has changed"), (shorten, "bytes, expected"), (Path.unlink, "is missing")]
)
def test_verify_names_the_damaged_file_and_the_damage(checkpoint, capsys, name, damage, words):
    assert told(capsys, "checkpoint", "verify", checkpoint)[0] == 0
    damage(checkpoint / name)
    code, text = told(capsys, "checkpoint", "verify", checkpoint)
    [line] = [line for line in text.splitlines() if name in line]
    assert code == 2 and words in line


def test_a_folder_under_the_name_of_another_pair_is_told_and_not_resumed_from(checkpoint, capsys):
    """The newest checkpoint is found by its name."""
    renamed = checkpoint.rename(checkpoint.with_name("pair_00000009"))
    code, text = told(capsys, "checkpoint", "verify", renamed)
    assert code == 2 and "holds pair 4" in text and "name it pair_00000004" in text
    with pytest.raises(UserError, match=r"pair_00000009: holds pair 4"):
        load.load_state(renamed)


def test_a_file_that_cannot_be_read_is_named_with_the_systems_words(checkpoint, capsys, monkeypatch):
    """As of a sector that is gone; the other files are looked at all the same."""
    opened = Path.open

    def fail_on_one(path, *mode, **named):
        if path == checkpoint / "weights" / "__0_0.distcp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *mode, **named)

    monkeypatch.setattr(Path, "open", fail_on_one)
    shorten_state = checkpoint / "state.json"
    shorten_state.write_bytes(shorten_state.read_bytes()[:-1])
    code, text = told(capsys, "checkpoint", "verify", checkpoint)
    assert code == 2 and "weights/__0_0.distcp cannot be read: Input/output error" in text and "state.json has" in text


def test_verify_names_both_of_a_pair_of_files_that_took_each_others_place(checkpoint, capsys):
    pair = [checkpoint / part / ".metadata" for part in ("weights", "optimizer")]
    contents = [path.read_bytes() for path in pair]
    for path, content in zip(pair, reversed(contents), strict=True):
        path.write_bytes(content)
    code, text = told(capsys, "checkpoint", "verify", checkpoint)
    assert code == 2 and all(f"{part}/.metadata " in text for part in ("weights", "optimizer"))
