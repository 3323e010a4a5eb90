"""Published checkpoints: both layouts, odd but whole files, and files that are damaged, hostile or something else."""

from __future__ import annotations

import collections
import copy
import os
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarat.checkpoint.upstream import read_upstream
from megarat.config import ModelConfig
from megarat.errors import UserError

LAYERS, WIDTH, HEADS, VOCAB = 3, 12, 2, 17
PROJECTIONS = "oqkvg"


def random_weights(seed: int = 0, recurrence: bool = True) -> dict[str, Tensor]:
    """Every logical tensor of a small model, all different."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"embedding.weight": draw(VOCAB, WIDTH), "norm.weight": draw(WIDTH)}
    for layer in range(LAYERS):
        mixer, ffn = f"layers.{layer}.mixer", f"layers.{layer}.ffn"
        for letter in PROJECTIONS if recurrence else PROJECTIONS[:-1]:
            weights[f"{mixer}.{letter}.weight"] = draw(WIDTH, WIDTH)
        weights |= {f"{mixer}.norm.weight": draw(WIDTH), f"{mixer}.out.weight": draw(WIDTH, WIDTH)}
        weights |= {f"{ffn}.norm.weight": draw(WIDTH), f"{ffn}.up.weight": draw(4 * WIDTH, WIDTH)}
        weights[f"{ffn}.down.weight"] = draw(WIDTH, 4 * WIDTH)
    return weights


def published_task(weights: dict[str, Tensor], *, separate_gate: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """The state dict as the published code names it; the older layout keeps the forget gate apart."""
    task = {"embedding.wte.weight": weights["embedding.weight"]}
    for layer in range(LAYERS):
        old, mixer, ffn = f"{prefix}backbone.layers.{layer}.", f"layers.{layer}.mixer", f"layers.{layer}.ffn"
        letters = [letter for letter in PROJECTIONS if f"{mixer}.{letter}.weight" in weights]
        if separate_gate:
            letters.remove("g")
            task[f"{old}seq_layer.fgate_proj.weight"] = weights[f"{mixer}.g.weight"]
        task[f"{old}seq_layer.in_proj.weight"] = torch.cat([weights[f"{mixer}.{letter}.weight"] for letter in letters])
        task[f"{old}seq_layer.input_norm.weight"] = weights[f"{mixer}.norm.weight"]
        task[f"{old}seq_layer.out_proj.weight"] = weights[f"{mixer}.out.weight"]
        task[f"{old}hidden_layer.fc1.weight"] = weights[f"{ffn}.up.weight"]
        task[f"{old}hidden_layer.fc2.weight"] = weights[f"{ffn}.down.weight"]
        task[f"{old}hidden_layer.ln.weight"] = weights[f"{ffn}.norm.weight"]
    task[f"{prefix}backbone.ln.weight"] = weights["norm.weight"]
    task["head.lm_head.weight"] = task["embedding.wte.weight"]
    return task


def published_config(**mixer) -> dict:
    cell = {"num_head": HEADS, "joint_train": True, "dilation_size": 64, "local_size": 0, "initial_size": 0, **mixer}
    return {"model": {"backbone": {"seq_cell": cell}, "embedding": {"pe": {"base": 5000}}}}


def write(path: Path, task: dict[str, Tensor], **extra) -> Path:
    torch.save({"task": task, "config": published_config(), "step": 9, **extra}, path)
    return path


def assert_holds(path: Path, weights: dict[str, Tensor]) -> ModelConfig:
    config, found, _ = read_upstream(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
    return config


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_upstream(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


# ---- whole files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def golden_task(golden_pth, monkeypatch) -> dict[str, Tensor]:
    """The weights of the golden file as torch itself unpickles them; its config needs a class of the package easydict."""
    monkeypatch.setitem(sys.modules, "easydict", types.SimpleNamespace(EasyDict=type("EasyDict", (dict,), {})))
    return torch.load(golden_pth, map_location="cpu", weights_only=False)["task"]


def test_the_published_file_gives_the_tensors_torch_reads(golden_pth, golden_task):
    config, weights, told = read_upstream(golden_pth)
    assert (config.layers, config.hidden, config.heads, config.vocab, config.recurrence) == (2, 256, 2, 512, True)
    assert told == {"step": 12, "pattern": "dense"}
    for layer in range(2):
        fused = golden_task[f"backbone.layers.{layer}.seq_layer.in_proj.weight"]
        for index, letter in enumerate(PROJECTIONS):
            assert torch.equal(weights[f"layers.{layer}.mixer.{letter}.weight"], fused[256 * index : 256 * (index + 1)])
    assert torch.equal(weights["embedding.weight"], golden_task["embedding.wte.weight"])
    assert torch.equal(weights["layers.1.ffn.down.weight"], golden_task["backbone.layers.1.hidden_layer.fc2.weight"])


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("separate_gate", [False, True])
def test_both_layouts_and_compiled_names_give_the_same_weights(tmp_path, separate_gate, prefix):
    weights = random_weights()
    path = write(tmp_path / "model.pth", published_task(weights, separate_gate=separate_gate, prefix=prefix))
    assert assert_holds(path, weights) == ModelConfig(
        layers=LAYERS, hidden=WIDTH, heads=HEADS, vocab=VOCAB, ffn_multiple=4, recurrence=True, rope_base=5000.0
    )


def test_a_file_without_the_recurrence_is_the_attention_only_model(tmp_path):
    weights = random_weights(recurrence=False)
    config = assert_holds(write(tmp_path / "model.pth", published_task(weights)), weights)
    assert config.recurrence is False


def test_optimizer_states_and_foreign_objects_beside_the_weights_are_passed_over(tmp_path):
    weights = random_weights()
    task = published_task(weights)
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)} for i in range(3)}
    foreign = [
        Path("x"),
        {1, 2},
        collections.deque([1]),
        collections.defaultdict(list, a=[1]),
        torch.float32,
        torch.Size([2]),
        range(3),
    ]
    path = write(tmp_path / "model.pth", task, optimizer={"state": moments, "param_groups": [{"lr": 1.0}]}, resume_kwargs=foreign)
    assert_holds(path, weights)


def test_strided_shared_and_half_precision_tensors_are_read_as_saved(tmp_path):
    weights = random_weights()
    task = published_task(weights)
    for name in list(task):
        if name.endswith("fc1.weight"):
            task[name] = task[name].T.contiguous().T  # column-major
        if name.endswith("out_proj.weight"):
            task[name] = torch.stack([torch.zeros(WIDTH, WIDTH), task[name]])[1]  # behind an offset
    assert_holds(write(tmp_path / "a.pth", task), weights)
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert_holds(write(tmp_path / "b.pth", published_task(halves)), halves)
    assert_holds(write(tmp_path / "c.pth", {name: torch.nn.Parameter(t) for name, t in published_task(weights).items()}), weights)


def test_heads_of_128_are_assumed_when_the_file_does_not_tell(tmp_path, golden_task):
    torch.save({"task": golden_task}, tmp_path / "bare.pth")
    config, _, told = read_upstream(tmp_path / "bare.pth")
    assert (config.heads, config.rope_base, told) == (2, 10000.0, {"step": None, "pattern": "dense"})


@pytest.mark.parametrize(
    ("mixer", "pattern"),
    [
        ({}, "dense"),  # joint training ends with the dense pass
        ({"joint_train": False, "dilation_size": 16, "local_size": 256, "initial_size": 4}, "D=16,W=256,I=4"),
        ({"joint_train": False, "dilation_size": 1}, "dense"),
        ({"joint_train": False, "dilation_size": -1, "local_size": 8}, "D=-1,W=8,I=0"),
        ({"joint_train": False, "dilation_size": [1, 64, 16]}, ["dense", "D=64,W=0,I=0", "D=16,W=0,I=0"]),
        ({"joint_train": False, "dilation_size": [1, 64] * 3, "local_size": (0, 1, 2)}, ["dense", "D=64,W=1,I=0", "D=1,W=2,I=0"]),
        ({"joint_train": False, "dilation_size": [8, 8, 8]}, "D=8,W=0,I=0"),
    ],
)
def test_the_pattern_of_the_file_is_told(tmp_path, mixer, pattern):
    path = tmp_path / "model.pth"
    torch.save({"task": published_task(random_weights()), "config": published_config(**mixer)}, path)
    assert read_upstream(path)[2]["pattern"] == pattern


# ---- damaged and wrong files ------------------------------------------------------------------------------------------------


def changed(edit) -> dict[str, Tensor]:
    task = copy.deepcopy(published_task(random_weights()))
    edit(task)
    return task


@pytest.mark.parametrize("name", [name for name in published_task(random_weights()) if name != "head.lm_head.weight"])
def test_every_missing_weight_is_refused(tmp_path, name):
    path = write(tmp_path / "model.pth", changed(lambda task: task.pop(name)))
    assert "missing" in refusal(path)


@pytest.mark.parametrize(
    "name", [name for name in published_task(random_weights(), separate_gate=True) if ".1." in name or "layers" not in name]
)
@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t.flatten()[0]])
def test_every_wrong_shape_is_refused(tmp_path, name, damage):
    task = published_task(random_weights(), separate_gate=True)
    task[name] = damage(task[name])
    refusal(write(tmp_path / "model.pth", task))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "weights that no RAT+ model has: extra.weight"),
        (
            lambda t: t.update({"head.lm_head.weight": torch.zeros(VOCAB, WIDTH)}),
            "head.lm_head.weight differs from embedding.wte.weight",
        ),
        (
            lambda t: t.update({"backbone.layers.1.seq_layer.out_proj.weight": torch.zeros(WIDTH, WIDTH + 1)}),
            "layers.1.mixer.out.weight is (12, 13)",
        ),
        (
            lambda t: t.update({"backbone.layers.2.seq_layer.in_proj.weight": torch.zeros(4 * WIDTH, WIDTH)}),
            "layers.0.mixer.g.weight",
        ),
        (lambda t: [t.pop(name) for name in list(t) if ".layers." in name], "no backbone.layers.N weights"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, edit, expected):
    assert expected in refusal(write(tmp_path / "model.pth", changed(edit)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (published_config(num_head=5), "cannot tell the number of heads of width 12 (found num_head = 5)"),
        (published_config(num_head="two"), "found num_head = 'two'"),
        (published_config(num_head=4), "found num_head = 4"),  # heads of 3 channels have no rotary pairs
        ({}, "found num_head = None"),
        ({"model": {"backbone": {"seq_cell": [1]}}}, "found num_head = None"),
        (
            published_config(joint_train=False, dilation_size=[1, 64]),
            "dilation_size in its config is [1, 64]; expected an integer or one for each of 3",
        ),
        (published_config(joint_train=False, local_size="wide"), "local_size in its config is 'wide'"),
        (
            {"model": {"backbone": {"seq_cell": {"num_head": 2}}, "embedding": {"pe": {"base": "x"}}}},
            "the rotary base in its config is 'x'",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, expected):
    path = tmp_path / "model.pth"
    torch.save({"task": published_task(random_weights()), "config": config}, path)
    assert expected in refusal(path)


@pytest.mark.parametrize("content", [[1], {"model": {}}, {"task": 3}, {"task": {}}, "text"])
def test_other_things_saved_by_torch_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    refusal(tmp_path / "model.pth")


def test_a_file_that_is_no_zip_or_absent_or_a_folder_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    refusal(tmp_path)
    for name, content in (("empty.pth", b""), ("text.pth", b"hello"), ("pickle.pth", pickle.dumps({"task": {}}))):
        (tmp_path / name).write_bytes(content)
        assert "not a whole torch.save file" in refusal(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme", "x")
    assert "no data.pkl inside" in refusal(tmp_path / "other.pth")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.pth", published_task(random_weights())).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(0, len(whole) - 1, len(whole) // 40):
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_a_flipped_byte_in_a_weight_is_refused(tmp_path):
    path = write(tmp_path / "model.pth", published_task(random_weights()))
    content = bytearray(path.read_bytes())
    needle = random_weights()["layers.1.mixer.out.weight"].numpy().tobytes()
    content[content.index(needle) + 5] ^= 1
    path.write_bytes(content)
    assert "damaged weights" in refusal(path)


def rewritten(source: Path, target: Path, edit) -> Path:
    """The same zip, with valid checksums, after ``edit(member name, bytes) -> bytes``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return target


def test_a_storage_too_short_for_its_tensor_is_refused(tmp_path):
    whole = write(tmp_path / "whole.pth", published_task(random_weights()))
    for keep in (0, 1, 4, 40):
        short = rewritten(whole, tmp_path / "short.pth", lambda name, data, keep=keep: data[:keep] if "/data/" in name else data)
        assert "the file is damaged" in refusal(short)


def test_any_damage_to_the_description_is_refused_or_harmless(tmp_path):
    """200 seeded corruptions with valid checksums: never another exception than a UserError that names the file."""
    whole = write(tmp_path / "whole.pth", published_task(random_weights()))
    random_ = random.Random(0)

    def corrupt(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        damaged = bytearray(data)
        for _ in range(random_.choice((1, 3))):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        return bytes(damaged)

    refused = 0
    for _ in range(200):
        path = rewritten(whole, tmp_path / "damaged.pth", corrupt)
        try:
            read_upstream(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


# ---- hostile files ----------------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_pickled_calls_are_never_made(tmp_path):
    trace = tmp_path / "trace"
    harmful = [
        Calls(os.system, f"touch {trace}"),
        Calls(eval, f"open({str(trace)!r}, 'w')"),
        Calls(open, str(trace), "w"),
        Calls(getattr, Calls(Path, str(trace)), "touch"),
    ]
    weights = random_weights()
    path = write(tmp_path / "model.pth", published_task(weights), harmful=harmful)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does harm where it is trusted
    trace.unlink()
    assert_holds(path, weights)
    assert not trace.exists()


def test_a_call_in_place_of_a_weight_is_not_made_and_the_weight_is_missed(tmp_path):
    trace = tmp_path / "trace"
    task = published_task(random_weights())
    task["backbone.ln.weight"] = Calls(os.system, f"touch {trace}")
    assert "backbone.ln.weight is missing" in refusal(write(tmp_path / "model.pth", task))
    assert not trace.exists()


def test_a_storage_name_cannot_leave_the_file(tmp_path):
    whole = write(tmp_path / "whole.pth", published_task(random_weights()))
    target = b"X\x01\x00\x00\x000"  # storage key "0" as protocol 2 writes it
    swap = b"X\x04\x00\x00\x00../0"
    path = rewritten(
        whole, tmp_path / "model.pth", lambda name, data: data.replace(target, swap) if name.endswith("data.pkl") else data
    )
    assert "unknown reference" in refusal(path)
