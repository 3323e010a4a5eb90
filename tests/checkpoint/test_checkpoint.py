"""Saving, finding, proving and loading checkpoints."""

from __future__ import annotations

import enum
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.checkpoint import load
from megarat.checkpoint.manifest import MANIFEST, CheckpointState, read_manifest
from megarat.checkpoint.save import Snapshot, prune, save, save_imported
from megarat.checkpoint.storage import Reader
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.model import names

CONFIG = tiny_run.config()


def snapshot(pair: int = 3, precision: str = "bf16", seed: int = 0) -> Snapshot:
    """Random tensors of the tiny model; two snapshots of different seeds share no value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = names.logical_shapes(CONFIG.model)

    def tensors():
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    masters = tensors()
    in_bf16 = {name: tensor.bfloat16() for name, tensor in masters.items()}
    state = CheckpointState(
        "pretrain", pair, 64 * pair, CONFIG, "dense", precision, stream_hash="ab" * 8, optimizer_steps=2 * pair, skipped=[1]
    )
    return Snapshot(
        state,
        weights=in_bf16 if precision == "bf16" else masters,
        masters=masters if precision == "bf16" else {},
        moments={"exp_avg": tensors(), "exp_avg_sq": tensors()},
    )


def assert_equal(left, right) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype and torch.equal(left[name], tensor), name


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path / "run" / "checkpoints", snapshot())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_saved_is_loaded_bit_for_bit(tmp_path, precision):
    saved = snapshot(precision=precision)
    folder = save(tmp_path, saved)
    assert folder == tmp_path / "pair_00000003" and (tmp_path / "latest").read_text() == "pair_00000003\n"
    assert_equal(load.load_weights(folder, prefer_masters=False), dict(saved.weights))
    assert_equal(load.load_weights(folder), dict(saved.masters or saved.weights))
    state = load.load_optimizer(folder)
    for kind, tensors in {"master": saved.masters or saved.weights, **saved.moments}.items():
        assert_equal(state[kind], dict(tensors))
    assert load.load_state(folder) == saved.state


def test_size_on_disk_is_fourteen_bytes_a_parameter(tmp_path):
    """bf16 weights, fp32 masters and two fp32 moments: 2 + 12."""
    model = ModelConfig(layers=1, hidden=256, heads=2, vocab=2048)
    shapes = names.logical_shapes(model)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    fp32 = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights = {name: tensor.bfloat16() for name, tensor in fp32.items()}
    state = CheckpointState("pretrain", 1, 1, CONFIG, "dense", "bf16")
    folder = save(tmp_path, Snapshot(state, weights, fp32, {"exp_avg": fp32, "exp_avg_sq": fp32}))
    stored = sum(entry.bytes for entry in read_manifest(folder).values())
    assert 14 * parameters < stored < 14 * parameters * 1.05


def test_loading_weights_opens_no_other_tensors(checkpoint):
    for part, prefer_masters in (("masters", True), ("weights", False)):
        others = {"weights", "masters", "optimizer"} - {part}
        hidden = [(checkpoint / other).rename(checkpoint / f"{other}.away") for other in others]
        assert load.load_weights(checkpoint, prefer_masters).keys() == names.logical_shapes(CONFIG.model).keys()
        for folder in hidden:
            folder.rename(folder.with_suffix(""))


def test_a_checkpoint_is_found_by_every_path_that_means_it(checkpoint):
    run = checkpoint.parent.parent
    save(checkpoint.parent, snapshot(pair=10))
    newest = checkpoint.parent / "pair_00000010"
    for path in (run, run / "checkpoints", run / "checkpoints" / "latest", newest, str(run)):
        assert load.resolve(path) == newest
    assert load.resolve(checkpoint) == checkpoint
    assert load.find_latest(run) == newest and load.find_latest(run / "nothing") is None


def test_a_crash_between_rename_and_latest_loses_nothing(checkpoint):
    save(checkpoint.parent, snapshot(pair=10))
    (checkpoint.parent / "latest").write_text("pair_00000003\n")
    assert load.resolve(checkpoint.parent).name == "pair_00000010"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such folder; expected a run folder or a checkpoint"),
        (lambda path: path.mkdir(), "holds no checkpoint; expected a run folder"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "holds no checkpoint"),
    ],
)
def test_a_path_without_a_checkpoint_is_explained(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        load.resolve(tmp_path / "run")


def test_latest_without_its_folder_is_an_error_that_lists_what_is_there(checkpoint):
    (checkpoint.parent / "latest").write_text("pair_00000099\n")
    with pytest.raises(UserError, match=r"latest names 'pair_00000099', which is not there \(found: pair_00000003\)"):
        load.resolve(checkpoint.parent)


def test_the_checkpoint_that_a_refusal_tells_to_write_into_latest_is_the_one_that_is_used_then(checkpoint):
    pointer = checkpoint.parent / "latest"
    save(checkpoint.parent, snapshot(pair=10))
    pointer.write_text("pair_00000099\n")
    with pytest.raises(UserError) as raised:
        load.resolve(checkpoint.parent)
    (told,) = re.findall(r"; restore it, or write (\S+) into", str(raised.value))
    pointer.write_text(told + "\n")
    assert load.resolve(checkpoint.parent).name == told == "pair_00000010"


@pytest.mark.parametrize("after", ["iterdir", "read_text"])
def test_a_run_that_saves_and_prunes_while_its_newest_checkpoint_is_looked_for_is_no_lost_one(checkpoint, monkeypatch, after):
    """Whether the next checkpoint comes after the folders were listed, or after ``latest`` was read."""
    original, pairs, saving = getattr(Path, after), iter([10, 20]), []

    def meanwhile(self, *arguments, **keywords):
        seen = original(self, *arguments, **keywords)
        seen = iter(list(seen)) if after == "iterdir" else seen
        if not saving and self in (checkpoint.parent, checkpoint.parent / "latest") and (pair := next(pairs, None)):
            saving.append(pair)
            save(checkpoint.parent, snapshot(pair=pair))
            prune(checkpoint.parent, keep=1, keep_every=0)
            saving.clear()
        return seen

    monkeypatch.setattr(Path, after, meanwhile)
    found = load.resolve(checkpoint.parent)
    assert found.name == "pair_00000020" and "good" in load.verify(found)


def test_verify_praises_a_good_checkpoint(checkpoint):
    assert re.search(r"good; 7 files, \d+ bytes", load.verify(checkpoint))


def every_file(checkpoint: Path) -> list[str]:
    return [
        "state.json",
        MANIFEST,
        *(f"{part}/{file}" for part in ("weights", "masters", "optimizer") for file in (".metadata", "__0_0.distcp")),
    ]


def read_all(checkpoint: Path) -> None:
    """What a resume and an inference together read."""
    load.load_state(checkpoint)
    load.load_optimizer(checkpoint)
    load.load_weights(checkpoint, prefer_masters=False)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 100])


@pytest.mark.parametrize("file", every_file(Path()))
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_any_damage_to_any_file_is_refused_by_name(checkpoint, damage, file):
    damage(checkpoint / file)
    with pytest.raises(UserError, match=re.escape(file)):
        load.verify(checkpoint)
    with pytest.raises(UserError, match=re.escape(file)):
        read_all(checkpoint)


def test_damage_says_what_was_expected(checkpoint):
    file = checkpoint / "weights" / "__0_0.distcp"
    size = file.stat().st_size
    truncate(file)
    with pytest.raises(UserError, match=f"weights/__0_0.distcp has {size - 100} bytes, expected {size}"):
        load.load_weights(checkpoint, prefer_masters=False)
    file.unlink()
    with pytest.raises(UserError, match=rf"weights/__0_0.distcp is missing \(expected {size} bytes\)"):
        load.verify(checkpoint)


def test_verify_lists_all_damage_and_strangers_at_once(checkpoint):
    flip(checkpoint / "optimizer" / "__0_0.distcp")
    (checkpoint / "state.json").unlink()
    (checkpoint / "weights" / "extra").write_text("?")
    with pytest.raises(UserError) as error:
        load.verify(checkpoint)
    for line in ("optimizer/__0_0.distcp has SHA-256", "state.json is missing", "weights/extra is not in the manifest"):
        assert line in str(error.value)


def test_shards_of_two_checkpoints_mixed_up_are_noticed(checkpoint):
    other = save(checkpoint.parent, snapshot(pair=4, seed=1))
    shutil.copy(other / "masters" / "__0_0.distcp", checkpoint / "masters" / "__0_0.distcp")
    with pytest.raises(UserError, match=r"masters/__0_0.distcp has SHA-256"):
        load.load_weights(checkpoint)


def test_a_lost_folder_of_masters_is_damage_not_a_reason_to_take_the_rounded_weights(checkpoint):
    shutil.rmtree(checkpoint / "masters")
    with pytest.raises(UserError, match=r"masters/\.metadata is missing"):
        load.load_weights(checkpoint)


def test_a_manifest_that_was_edited_is_refused(checkpoint):
    tree = json.loads((checkpoint / MANIFEST).read_text())
    tree["files"]["state.json"]["bytes"] += 1
    (checkpoint / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"manifest.json is damaged: its own hash"):
        load.load_state(checkpoint)


class _Payload:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_pickle_that_would_run_code_is_refused(checkpoint, capsys):
    with pytest.raises(UserError, match=r"names builtins.print, which no checkpoint needs"):
        (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(_Payload()))
        Reader(checkpoint / "weights").read_metadata()
    assert "never run" not in capsys.readouterr().out


class _AsEarlyPython311(pickle.Pickler):
    """Writes members of enums as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, obj):
        """By ``getattr`` of the class, where later Pythons call it with the value."""
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_a_checkpoint_of_an_early_python_3_11_is_read(checkpoint):
    path = checkpoint / "weights" / ".metadata"
    before = Reader(checkpoint / "weights").read_metadata()
    metadata = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        _AsEarlyPython311(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    after = Reader(checkpoint / "weights").read_metadata()
    assert after.state_dict_metadata == before.state_dict_metadata and after.storage_data == before.storage_data


@pytest.mark.parametrize("kind", ["Metadata", "TensorProperties"])
def test_getattr_of_anything_but_an_enum_is_refused(checkpoint, kind):
    stream = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n" + kind.encode() + b"\nV__init__\ntR."
    (checkpoint / "weights" / ".metadata").write_bytes(stream)
    with pytest.raises(UserError, match=r"names builtins.getattr, which no checkpoint needs but for an enum"):
        Reader(checkpoint / "weights").read_metadata()


def test_show_tells_where_a_checkpoint_stands(checkpoint):
    text = load.show(checkpoint)
    for expected in (
        "pair         3 of 10 (6 optimizer steps, 1 pairs skipped)",
        "tokens       192",
        "2 layers x 16",
        "bf16",
        "pattern      dense",
    ):
        assert expected in text
    assert re.search(r"layers.1.ffn.up.weight +64x16 +bfloat16", text)
    parameters = sum(parameter.numel() for parameter in tiny_run.model(CONFIG).parameters())
    assert f"{parameters} parameters" in text


def test_keeping_the_newest_and_the_milestones(tmp_path):
    for pair in range(1, 8):
        save(tmp_path, snapshot(pair, "fp32"))
    removed = prune(tmp_path, keep=2, keep_every=3)
    assert [folder.name[-1] for folder in removed] == ["1", "2", "4", "5"]
    assert sorted(folder.name for folder in tmp_path.glob("*_*")) == [f"pair_0000000{pair}" for pair in (3, 6, 7)]


def test_a_checkpoint_that_somebody_else_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """As a script does that clears up the disk while runs go on."""
    for pair in range(1, 5):
        save(tmp_path, snapshot(pair, "fp32"))
    rename = Path.rename

    def too_late(self, target):
        if self.name == "pair_00000001":
            shutil.rmtree(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", too_late)
    prune(tmp_path, keep=2, keep_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "pair_00000003", "pair_00000004"]


TOLD = {"step": 41, "pattern": "D=8,W=2,I=1"}


def test_imported_weights_make_a_checkpoint_without_an_optimizer(tmp_path):
    weights = dict(snapshot().masters)
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"tokens")
    out = save_imported(tmp_path / "out", CONFIG.model, weights, source=tmp_path / "old.pth", told=TOLD, tokenizer=tokenizer)
    assert_equal(load.load_weights(out), weights)
    state = load.load_state(out)
    assert (state.kind, state.pair, state.config.model, state.pattern) == ("import", 41, CONFIG.model, "D=8,W=2,I=1")
    assert state.parent == {"kind": "import", "path": str(tmp_path / "old.pth"), **TOLD}
    assert (load.tokenizer_folder(out) / "tokenizer.model").read_bytes() == b"tokens"
    assert "good" in load.verify(out) and "weights only" in load.show(out)
    with pytest.raises(UserError, match="holds weights only, no optimizer to resume from"):
        load.load_optimizer(out)
    with pytest.raises(UserError, match="exists; name a new folder"):
        save_imported(out, CONFIG.model, weights, source=tmp_path / "old.pth", told=TOLD)
    with pytest.raises(UserError, match=r"--tokenizer .*nowhere: no such file"):
        save_imported(
            tmp_path / "other", CONFIG.model, weights, source=tmp_path / "old.pth", told=TOLD, tokenizer=tmp_path / "nowhere"
        )


def test_a_tokenizer_folder_is_copied(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    saved = snapshot()
    saved.tokenizer = tmp_path / "tok"
    folder = save(tmp_path / "checkpoints", saved)
    assert (load.tokenizer_folder(folder) / "tokenizer.json").read_text() == "{}"
    assert "tokenizer/tokenizer.json" in read_manifest(folder)


def test_a_checkpoint_may_be_written_below_its_tokenizers_folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"tokens")
    out = tmp_path / "models" / "imported"
    save_imported(out, CONFIG.model, dict(snapshot().masters), source=tmp_path / "old.pth", told=TOLD, tokenizer=tmp_path)
    assert [file.name for file in load.tokenizer_folder(out).iterdir()] == ["tokenizer.model"]
    assert "good" in load.verify(out)
