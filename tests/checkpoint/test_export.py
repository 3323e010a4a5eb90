"""``checkpoint export``: what transformers and safetensors themselves read from the folder, and the way back."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import published_oracle
import pytest
import safetensors.torch
import tiny_run
import torch
import transformers

import megarat
from megarat import cli
from megarat.checkpoint import export, load
from megarat.checkpoint import safetensors as own_safetensors
from megarat.checkpoint.convert import import_checkpoint
from megarat.checkpoint.export import export_checkpoint
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import Snapshot, save
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.model import names

LAYERS, HEADS, HEAD_DIM, VOCAB, BASE, LENGTH = 3, 3, 16, 61, 500.0, 40
FILE_PATTERN = (4, 5, 2)
PATTERNS = [
    ("dense", [(1, 0, 0)] * LAYERS),
    ("D=8", [(8, 0, 0)] * LAYERS),
    ("D=4,W=5,I=2", [FILE_PATTERN] * LAYERS),
    ("D=-1,W=6,I=3", [(-1, 6, 3)] * LAYERS),
    (["dense", "D=3,W=2", "D=-1,W=9"], [(1, 0, 0), (3, 2, 0), (-1, 9, 0)]),
]


class Settings(dict):
    """Stands for the class of the config in a published file; it is pickled by name."""


@pytest.fixture(scope="module", autouse=True)
def code_is_cached_apart(tmp_path_factory):
    """transformers copies the code of a folder to a cache and imports it from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"][:VOCAB]
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return folder


@pytest.fixture(scope="module")
def published_task():
    """In the older of the two layouts."""
    return published_oracle.random_task(LAYERS, HEADS, HEAD_DIM, VOCAB, seed=7, separate_gate=True)


@pytest.fixture(scope="module")
def imported(published_task, tokenizer, tmp_path_factory) -> Path:
    """A published file that no repository holds, brought in."""
    folder = tmp_path_factory.mktemp("published")
    cell = Settings(num_head=HEADS, joint_train=False, dilation_size=4, local_size=5, initial_size=2)
    config = Settings(model=Settings(backbone=Settings(seq_cell=cell), embedding=Settings(pe=Settings(base=BASE))))
    torch.save({"task": published_task, "config": config, "step": 77}, folder / "sequence_model_77.pth")
    import_checkpoint(folder / "sequence_model_77.pth", folder / "checkpoint", tokenizer)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(imported, out)
    return out


def from_pretrained(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCAB, (rows, length)))


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype and torch.equal(left[name], tensor), name


# ---- what transformers makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "patterns"), PATTERNS, ids=str)
def test_logits_are_those_of_the_published_formulae(exported, published_task, spec, patterns):
    """From a published file through the checkpoint to transformers. fp32 has 24 bits: of logits about 5 wide 1e-5 is a few roundings a layer."""
    model = from_pretrained(exported)
    model.set_pattern(spec)
    ids = random_ids(1, LENGTH)
    expected = published_oracle.logits(published_task, ids[0].tolist(), patterns, HEADS, BASE)
    assert model.config.pattern == spec and expected.std() > 0.5
    whole = model(ids, use_cache=False).logits
    cached = [model(ids[:, :9], use_cache=True)]
    for piece in ids[:, 9:].split([14, *[1] * (LENGTH - 23)], dim=1):
        cached.append(model(piece, past_key_values=cached[0].past_key_values))
    for logits in (whole, torch.cat([part.logits for part in cached], dim=1)):
        np.testing.assert_allclose(logits[0].detach().numpy(), expected, atol=3e-5)


def test_the_pattern_of_the_file_is_the_default_and_another_can_be_chosen_for_a_call_and_kept(exported, tmp_path):
    model, ids = from_pretrained(exported), random_ids(2, LENGTH)
    assert model.config.pattern == "D=4,W=5,I=2"
    default, dense = model(ids).logits, model(ids, pattern="dense").logits
    assert not torch.allclose(default, dense, atol=1e-2)
    model.set_pattern([["D=4", "dense", "D=-1,W=3"]] * LAYERS)  # one a head
    by_head = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again")(ids).logits, by_head)


@pytest.mark.parametrize("spec", ["dense", "D=4,W=5,I=2"])
def test_generation_equals_megarats_and_padding_on_the_left_changes_nothing(exported, imported, spec):
    model, own = from_pretrained(exported), megarat.load(imported, spec, device="cpu")
    model.set_pattern(spec)
    prompts, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, :padding] = 0
    expected = own.generate(prompts, 20, attention_mask=mask, stop_id=2)
    options = {"max_new_tokens": 20, "do_sample": False}
    found = model.generate(prompts, attention_mask=mask, **options)[:, 12:]
    assert torch.equal(found, expected[:, : found.shape[1]])
    for row in range(3):
        real = prompts[row : row + 1, mask[row].bool()]
        alone = model.generate(real, **options)[0, real.shape[1] :]
        assert torch.equal(found[row, : len(alone)], alone)


def random_pattern(draw: random.Random) -> str:
    window, initial = draw.choice([0, 1, 5, 9, 200]), draw.choice([0, 1, 7, 40, 500])
    return f"D={draw.choice([-1, 1, 2, 5, 16, 64])},W={window},I={initial}"


def test_padding_anywhere_and_any_chunks_give_the_logits_of_the_bare_sequence(exported, imported, monkeypatch):
    """30 seeded draws of patterns, masks with holes and chunks, each row against megarat on its real tokens alone."""
    model, own, draw = from_pretrained(exported), megarat.load(imported, device="cpu"), random.Random(0)
    code = sys.modules[type(model).__module__]
    for case in range(30):
        monkeypatch.setattr(code, "_CHUNK", draw.choice([1, 3, 16, 512]))
        spec = draw.choice([random_pattern(draw), [[random_pattern(draw) for _ in range(HEADS)] for _ in range(LAYERS)]])
        length = draw.randint(2, 80)
        ids, cuts = random_ids(3, length, case), sorted(draw.sample(range(1, length), min(length - 1, draw.randint(0, 4))))
        mask = torch.ones(3, length, dtype=torch.int64)
        mask[0, : draw.randint(0, length - 1)] = 0
        mask[1, draw.randint(1, length) :] = 0
        mask[2, draw.sample(range(length), length // 2)] = 0
        with torch.no_grad():
            found = [model(ids, attention_mask=mask, pattern=spec, use_cache=False).logits]
            cache, parts = None, []
            for start, end in zip([0, *cuts], [*cuts, length], strict=True):
                part = model(ids[:, start:end], mask[:, :end], cache, pattern=spec, use_cache=True)
                cache = part.past_key_values
                parts.append(part.logits)
            found.append(torch.cat(parts, dim=1))
            for row, real in enumerate(mask.bool()):
                expected = own(ids[row : row + 1, real], spec)[0]
                for logits in found:
                    torch.testing.assert_close(logits[row, real], expected, atol=3e-5, rtol=0)


def test_beams_and_a_cache_handed_back_give_what_reading_everything_again_gives(exported):
    model, prompts = from_pretrained(exported), random_ids(2, 9)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        kept = model.generate(prompts, max_new_tokens=12, num_beams=beams, **options)
        anew = model.generate(prompts, max_new_tokens=12, num_beams=beams, use_cache=False, **options)
        assert torch.equal(kept, anew)
    half = model.generate(prompts, max_new_tokens=5, num_beams=1, return_dict_in_generate=True, **options)
    rest = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=7, **options)
    assert torch.equal(rest, model.generate(prompts, max_new_tokens=12, **options))


def test_the_cache_holds_what_the_pattern_can_still_show_and_no_more(exported):
    """Room grows ahead by at most a quarter and 16; and each part has one slot that is never read."""
    model, ids, width = from_pretrained(exported), random_ids(1, 400), HEADS * HEAD_DIM
    for spec, slots in (("dense", 400), ("D=16", 25), ("D=16,W=8,I=4", 37), ("D=-1,W=8,I=4", 12)):
        held = model(ids, pattern=spec, use_cache=True).past_key_values.bytes
        state, slot = 8 * width * LAYERS, 8 * width * LAYERS
        assert state + slot * slots <= held <= state + slot * (1.25 * slots + 3 * 17)


def test_training_through_transformers_moves_the_same_gradients_as_megarat(exported, imported):
    model, own = (
        from_pretrained(exported).train(),
        megarat.load(imported, "D=4,W=5,I=2", device="cpu").lm.train().requires_grad_(True),
    )
    ids = random_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    own(ids, megarat.load(imported, device="cpu").patterns, labels).backward()
    theirs = {name.removeprefix(export.PREFIX): parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in own.named_parameters():
        for piece, gradient in names.split(name, parameter.grad).items():
            torch.testing.assert_close(theirs[piece], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_pattern("D=0"), "needs D >= 1"),
        (lambda m: m.set_pattern(["dense"]), "a list of 1 for 3 layers"),
        (lambda m: m.set_pattern([["dense"]] * LAYERS), "a list of 1 for 3 heads"),
        (lambda m: m.set_pattern(16), "write 'dense'"),
        (lambda m: m(random_ids(1, 4), past_key_values=transformers.DynamicCache()), "is a DynamicCache"),
        (
            lambda m: m(random_ids(1, 4), pattern="D=2", past_key_values=m(random_ids(1, 4)).past_key_values),
            "under another pattern",
        ),
        (lambda m: m(random_ids(1, 4), position_ids=torch.arange(4)[None] + 1), "counts the real tokens"),
        (lambda m: m(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4)), "attention_mask: expected"),
        (lambda m: m(random_ids(1, 4), output_attentions=True), "never formed"),
        (lambda m: m(random_ids(1, 0)), "no tokens"),
    ],
)
def test_what_the_model_does_not_have_is_refused(exported, call, message):
    with pytest.raises(ValueError, match=message):
        call(from_pretrained(exported))


# ---- the files --------------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, tokenizer: Path | None = None, precision: str = "bf16") -> Path:
    """A checkpoint as a bf16 run writes it: fp32 masters and what they are rounded."""
    config = tiny_run.config()
    generator = torch.Generator().manual_seed(3)
    masters = {name: torch.randn(shape, generator=generator) for name, shape in names.logical_shapes(config.model).items()}
    state = CheckpointState("pretrain", 5, 320, config, "dense", precision)
    rounded = {name: tensor.bfloat16() for name, tensor in masters.items()}
    parts = (rounded, masters) if precision == "bf16" else (masters, {})
    return save(folder, Snapshot(state, *parts, moments={"exp_avg": masters, "exp_avg_sq": masters}, tokenizer=tokenizer))


@pytest.mark.parametrize("file_bytes", [10**9, 5000], ids=["one file", "many files"])
@pytest.mark.parametrize(("dtype", "part"), [(None, "weights"), ("bf16", "weights"), ("fp32", "masters")])
def test_the_safetensors_library_reads_the_checkpoints_tensors(tmp_path, monkeypatch, file_bytes, dtype, part):
    monkeypatch.setattr(own_safetensors, "FILE_BYTES", file_bytes)
    checkpoint = write_checkpoint(tmp_path)
    export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype, compare=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    expected = load.load_weights(checkpoint, prefer_masters=part == "masters")
    assert_same_bits({name.removeprefix(export.PREFIX): tensor for name, tensor in found.items()}, expected)
    if file_bytes < 10**9:
        assert len(files) > 3 and max(sum(t.nbytes for t in safetensors.torch.load_file(f).values()) for f in files) <= file_bytes
        index = json.loads((tmp_path / "out" / own_safetensors.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        assert index["weight_map"].keys() == found.keys()
    assert from_pretrained(tmp_path / "out").dtype == next(iter(expected.values())).dtype


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_export_and_import_give_the_same_bits_back(tmp_path, tokenizer, dtype, monkeypatch):
    monkeypatch.setattr(own_safetensors, "FILE_BYTES", 5000)
    checkpoint = write_checkpoint(tmp_path, tokenizer)
    export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype, pattern=["D=8", "D=4,W=2"], compare=False)
    told = import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert told.endswith("RAT+, 2 layers x 16, 2 heads, vocabulary 64")
    expected = load.load_weights(checkpoint, prefer_masters=dtype == "fp32")
    assert_same_bits(load.load_weights(tmp_path / "back"), {name: tensor.float() for name, tensor in expected.items()})
    before, after = load.load_state(checkpoint), load.load_state(tmp_path / "back")
    assert after.config.model == before.config.model and after.pair == before.pair
    assert after.config.attention.pattern == ["D=8", "D=4,W=2"]
    assert after.config.data.sequence_length == before.config.data.sequence_length
    stored = load.tokenizer_folder(tmp_path / "back")
    assert megarat.data.tokenizer.load_tokenizer(stored).encode(["a b"]) == megarat.data.tokenizer.load_tokenizer(
        tokenizer
    ).encode(["a b"])


def test_attention_only_models_go_out_and_come_back(tmp_path):
    task = {name: tensor for name, tensor in published_oracle.random_task(2, 2, 8, 20).items() if "in_proj" not in name}
    for layer in range(2):
        task[f"backbone.layers.{layer}.seq_layer.in_proj.weight"] = torch.randn(64, 16)
    torch.save({"task": task, "config": {"model": {"backbone": {"seq_cell": {"num_head": 2}}}}}, tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "a")
    told = export_checkpoint(tmp_path / "a", tmp_path / "out")
    assert "holds no tokenizer" in told
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert load.load_state(tmp_path / "back").config.model.recurrence is False
    assert_same_bits(load.load_weights(tmp_path / "back"), load.load_weights(tmp_path / "a"))


def test_never_more_than_a_layer_is_on_the_host(tmp_path, monkeypatch):
    """While tensors are written: one. While logits are compared: one layer, embedding and last norm."""
    config = tiny_run.config()
    config.model = ModelConfig(layers=6, hidden=32, heads=2, vocab=40)
    masters = {name: torch.randn(shape) for name, shape in names.logical_shapes(config.model).items()}
    checkpoint = save(tmp_path, Snapshot(CheckpointState("pretrain", 1, 1, config, "dense", "fp32"), masters))
    alive = peak = 0
    read = load.StoredWeights.__getitem__

    def forget(size: int) -> None:
        nonlocal alive
        alive -= size

    def counting(self, name):
        nonlocal alive, peak
        tensor = read(self, name)
        alive += tensor.nbytes
        peak = max(peak, alive)
        weakref.finalize(tensor, forget, tensor.nbytes)
        return tensor

    monkeypatch.setattr(load.StoredWeights, "__getitem__", counting)
    gc.collect()
    export_checkpoint(checkpoint, tmp_path / "out", compare=False)
    assert peak <= 2 * max(tensor.nbytes for tensor in masters.values())
    export_checkpoint(checkpoint, tmp_path / "compared")
    layer = sum(tensor.nbytes for name, tensor in masters.items() if name.startswith("layers.0."))
    assert peak <= 1.5 * layer + masters["embedding.weight"].nbytes + masters["norm.weight"].nbytes


# ---- the card ---------------------------------------------------------------------------------------------------------------


def test_the_card_ends_with_the_measured_difference(tmp_path, tokenizer):
    told = export_checkpoint(write_checkpoint(tmp_path, tokenizer), tmp_path / "out", dtype="bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| the ")]
    assert [(row[0], row[1]) for row in rows] == [
        ("the same weights", "dense"),
        ("the same weights", "D=16,W=32,I=4"),
        ("the fp32 weights before rounding", "dense"),
    ]
    same, _, rounded = (float(row[3]) for row in rows)
    assert 0 < same < 1e-5 < rounded < 0.1
    assert rows[0][2] in told and "Pretrained with 320 tokens" in card and "has the same ids for all" in card


def test_a_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    original = export.names.logical_names
    monkeypatch.setattr(export.names, "logical_names", lambda *a: original(*a)[::-1])  # the rows of the fused matrix, upside down
    with pytest.raises(RuntimeError, match="computes other logits than the checkpoint"):
        export_checkpoint(write_checkpoint(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".staging*"))


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_is_written(tmp_path, tokenizer, monkeypatch):
    checkpoint = write_checkpoint(tmp_path)
    (tmp_path / "there").mkdir()
    large = tmp_path / "large"
    shutil.copytree(tokenizer, large)
    tree = json.loads((large / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {f"{n}": n for n in range(61, 99)}
    (large / "tokenizer.json").write_text(json.dumps(tree))
    for options, message in (
        ({"out": tmp_path / "there"}, "there exists; name a new folder"),
        ({"pattern": "D=x"}, "cannot read 'D=x'"),
        ({"pattern": ["dense"]}, "found 1 entries for 2 layers"),
        ({"tokenizer": tmp_path / "nowhere"}, "nowhere: no such tokenizer"),
        ({"tokenizer": large}, "has 99 entries, but the model's vocabulary has 64"),
    ):
        with pytest.raises(UserError, match=message):
            export_checkpoint(checkpoint, options.pop("out", tmp_path / "out"), **options)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs transformers; pip install"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".staging*"))


@pytest.fixture(scope="module")
def many_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_safetensors, "FILE_BYTES", 5000)
        export_checkpoint(write_checkpoint(folder), folder / "out", compare=False)
    return folder / "out"


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])


def swap(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def change_config(**values):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model-00001-of-.*is damaged or cut|its header tells of"),
        (swap, "files of two models are mixed up"),
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "names 'model-00002-of-.*', which is not there"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"\xff" * 40), "do not hold the header"),
        (lambda f: (f / own_safetensors.INDEX).write_text("{"), "index.json is damaged"),
        (lambda f: (f / own_safetensors.INDEX).unlink(), "neither a .pth file"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("["), "config.json is damaged"),
        (change_config(model_type="llama"), "model_type is 'llama'; only RAT"),
        (change_config(num_hidden_layers=3), "layers.2.mixer.norm.weight is missing"),
        (change_config(num_hidden_layers=1), "layers.1.mixer.norm.weight is .16,.; the model of config.json needs none"),
        (change_config(vocab_size=63), "embedding.weight is .64, 16.; the model of config.json needs .63, 16."),
        (change_config(hidden_size="wide"), "hidden_size is 'wide'; expected int"),
        (change_config(num_attention_heads=16), "heads have an even number of channels"),
        (change_config(pattern=["dense"]), "found 1 entries for 2 layers"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, many_files, damage, message):
    shutil.copytree(many_files, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()


def test_the_command_line_goes_both_ways(tmp_path, tokenizer, capsys):
    write_checkpoint(tmp_path / "run" / "checkpoints", tokenizer)
    out = str(tmp_path / "out")
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), out, "--dtype", "fp32", "--pattern", "D=4,W=2"]) == 0
    assert "fp32, pattern D=4,W=2,I=0\nthe same weights, D=4,W=2,I=0: logits differ by at most" in capsys.readouterr().out
    assert cli.main(["checkpoint", "import", out, str(tmp_path / "back")]) == 0
    assert cli.main(["checkpoint", "show", str(tmp_path / "back")]) == 0
    assert "pattern      D=4,W=2,I=0" in capsys.readouterr().out
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), out]) == 2
    assert capsys.readouterr().err.startswith(f"megarat: error: {out} exists")
