from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import yaml

from megarat import config
from megarat.config import Config, ModelConfig, from_dict, load
from megarat.errors import UserError
from megarat.model.pattern import Pattern

MINIMAL = {"run": {"dir": "runs/x"}, "data": {"shards": "shards"}}


def tree(**sections) -> dict:
    result = copy.deepcopy(MINIMAL)
    for section, values in sections.items():
        result.setdefault(section, {}).update(values)
    return result


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- what is accepted -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_15b_recipe():
    settings = from_dict(MINIMAL)
    assert (settings.model.layers, settings.model.hidden, settings.model.head_dim, settings.model.vocab) == (24, 2048, 128, 32000)
    assert (settings.optim.lr, settings.optim.min_lr, settings.optim.warmup, settings.optim.weight_decay) == (
        8e-4,
        1e-6,
        0.05,
        0.1,
    )
    assert (settings.train.global_batch, settings.data.sequence_length, settings.train.seed) == (512, 4096, 1005)
    assert settings.sparse_patterns[0].per_head == (Pattern(64),) * 16
    assert settings.patterns[23].per_head == (Pattern(),) * 16


def test_a_tree_written_as_yaml_reads_back_equal(tmp_path):
    settings = from_dict(
        tree(model={"layers": 2, "heads": 2}, attention={"pattern": ["dense", ["D=4,W=3", "D=-1,I=2"]]}, optim={"min_lr": 3e-7})
    )
    assert load(write(tmp_path, settings.to_yaml())) == settings
    assert from_dict(settings.to_dict()) == settings
    assert yaml.safe_load(settings.to_yaml()) == settings.to_dict()


def test_two_trees_share_no_mutable_value():
    one, other = from_dict(MINIMAL), from_dict(MINIMAL)
    for section in dataclasses.fields(Config):
        assert getattr(one, section.name) is not getattr(other, section.name)


@pytest.mark.parametrize("text", ["8e-4", "8.0e-4", "0.0008", "'8e-4'"])
def test_every_way_to_write_a_number_is_read(tmp_path, text):
    path = write(tmp_path, f"run: {{dir: x}}\ndata: {{shards: y}}\noptim: {{lr: {text}}}\n")
    assert load(path).optim.lr == 8e-4
    assert load(path, [f"optim.lr={text}"]).optim.lr == 8e-4


def test_merge_keys_are_read(tmp_path):
    path = write(tmp_path, "run: {dir: x}\ndata: {shards: y}\nlog: {<<: {every: 2, progress: true}, progress: false}\n")
    assert (load(path).log.every, load(path).log.progress) == (2, False)


def test_an_integral_float_serves_as_an_integer():
    assert from_dict(tree(train={"pairs": 1e3})).train.pairs == 1000


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.pairs=7", "train.pairs", 7),
        (" train.pairs = 7", "train.pairs", 7),
        ("attention.pattern=D=16,W=32,I=4", "attention.pattern", "D=16,W=32,I=4"),
        ('attention.pattern=[dense, "D=4,W=1"]', "attention.pattern", ["dense", "D=4,W=1"]),
        ("log.progress=false", "log.progress", False),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
    ],
)
def test_set_overrides_the_file(tmp_path, override, key, value):
    path = write(tmp_path, "run: {dir: x}\ndata: {shards: y}\nmodel: {layers: 2}\nattention:\n")  # a section may stand empty
    assert config.get(load(path, [override]), key) == value


def test_the_last_set_of_a_key_wins(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    assert load(path, ["train.pairs=7", "train.pairs=9"]).train.pairs == 9


def test_set_supplies_required_keys(tmp_path):
    settings = load(write(tmp_path, ""), ["run.dir=x", "data.shards=y"])
    assert (settings.run.dir, settings.data.shards) == ("x", "y")


def test_active_recurrence_learning_is_off_at_dilation_one():
    assert from_dict(tree(attention={"train_dilation": 1})).sparse_patterns is None
    sparse = from_dict(tree(attention={"train_dilation": -1, "train_window": 9, "train_initial": 2})).sparse_patterns
    assert sparse[0].per_head[0] == Pattern(-1, 9, 2)


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # unknown keys, with the nearest known one
        ({"model": {"hiden": 8}}, "unknown key model.hiden; did you mean model.hidden?"),
        ({"train": {"learning_rate": 1}}, "unknown key train.learning_rate"),
        ({"train": {"lr": 1e-3}}, "unknown key train.lr; did you mean optim.lr?"),
        ({"model": {"pattern": "dense"}}, "unknown key model.pattern; did you mean attention.pattern?"),
        ({"modle": {"layers": 2}}, "unknown key modle; did you mean model?"),
        ({"pairs": {}}, "unknown key pairs; did you mean train.pairs?"),
        ({"optim": {"qqqqqq": 1}}, "unknown key optim.qqqqqq; known keys here: beta1, beta2"),
        # types
        ({"train": {"pairs": "many"}}, "train.pairs is 'many'; it must be an integer"),
        ({"train": {"pairs": 2.5}}, "train.pairs is 2.5; it must be an integer"),
        ({"train": {"pairs": True}}, "train.pairs is True; it must be an integer"),
        ({"train": {"pairs": None}}, "train.pairs is None; it must be an integer"),
        ({"train": {"pairs": [3]}}, "train.pairs is [3]; it must be an integer"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; it must be a finite number"),
        ({"optim": {"lr": True}}, "optim.lr is True; it must be a finite number"),
        ({"optim": {"lr": [1e-3]}}, "optim.lr is [0.001]; it must be a finite number"),
        ({"optim": {"clip": float("nan")}}, "optim.clip is nan; it must be a finite number"),
        ({"optim": {"weight_decay": float("inf")}}, "optim.weight_decay is inf; it must be a finite number"),
        ({"optim": {"lr": 10**400}}, "it must be a finite number"),
        ({"model": {"recurrence": 1}}, "model.recurrence is 1; it must be true or false"),
        ({"model": {"recurrence": "no"}}, "model.recurrence is 'no'; it must be true or false"),
        ({"run": {"dir": 7}}, "run.dir is 7; it must be a string"),
        ({"train": {"precision": "fp16"}}, "train.precision is 'fp16'; it must be one of auto, bf16, fp32"),
        ({"data": {"order": ["shuffled"]}}, "data.order is ['shuffled']; it must be one of shuffled, random_offsets"),
        # ranges
        ({"train": {"pairs": 0}}, "train.pairs is 0; it must be greater than 0"),
        ({"model": {"layers": -1}}, "model.layers is -1; it must be greater than 0"),
        ({"optim": {"lr": 0}}, "optim.lr is 0.0; it must be greater than 0"),
        ({"optim": {"clip": -1}}, "optim.clip is -1.0; it must not be negative"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2 is 1.0; it must lie in [0, 1)"),
        ({"optim": {"lr": 1e-7}}, "optim.min_lr = 1e-06 is above the peak optim.lr = 1e-07"),
        # shapes
        ({"model": {"hidden": 100}}, "model.hidden is 100, not a multiple of model.heads = 16"),
        ({"model": {"hidden": 48}}, "model.hidden / model.heads = 3; rotary positions need an even head size"),
        ({"train": {"global_batch": 6, "micro_batch": 4}}, "train.global_batch = 6 is not a multiple of train.micro_batch = 4"),
        # patterns
        ({"attention": {"pattern": "D=0"}}, "attention: pattern D=0,W=0,I=0: the dilation D must be 1 (dense) or more, or -1"),
        ({"attention": {"pattern": "D=4,W=-1"}}, "must not be negative"),
        ({"attention": {"pattern": ["dense"]}}, "attention: pattern list: found 1 entries for 24 layers"),
        ({"attention": {"pattern": [["dense"]] * 24}}, "pattern of layer 0: found 1 entries for 16 heads"),
        ({"attention": {"pattern": 64}}, "attention.pattern: found 64; write 'dense', 'D=16,W=256,I=4'"),
        ({"attention": {"pattern": [1, 64]}}, "attention.pattern: found 1; write 'dense'"),
        ({"attention": {"pattern": None}}, "attention.pattern: found None; write 'dense'"),
        ({"attention": {"train_dilation": 0}}, "attention: pattern D=0,W=0,I=0: the dilation D must be"),
        ({"attention": {"train_window": -2}}, "the window W and the initial tokens I must not be negative"),
        # the mesh
        ({"parallel": {"zero": 0}}, "parallel.zero is 0; use 1, 2 or 3 (stage 0 takes another optimizer in bf16"),
        ({"parallel": {"zero": 4}}, "parallel.zero is 4; use 1, 2 or 3 (DeepSpeed has stages 1, 2 and 3)"),
        # corpora
        ({"data": {"shards": {}}}, "data.shards"),
        ({"data": {"shards": ["a", "b"]}}, "data.shards: found ['a', 'b']; write a folder or URL, or a mapping"),
        ({"data": {"shards": {"a": 1, "b": 0}}}, "data.shards.b is 0.0; a weight must be greater than 0"),
        ({"data": {"shards": {"a": "much"}}}, "data.shards.a is 'much'; it must be a finite number"),
        ({"data": {"max_epochs": -1}}, "data.max_epochs is -1.0; it must not be negative"),
        # what is missing or no section
        ({"run": {"dir": ""}}, "run.dir is missing: Run folder"),
        ({"data": {"shards": ""}}, "data.shards is missing: Folder written by data_tools/build_shards.py"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_bad_values_are_refused_by_key_with_what_would_be_right(sections, expected):
    message = refusal(lambda: from_dict(tree(**sections), "my.yaml"))
    assert message.startswith("my.yaml: ") and expected in message


@pytest.mark.parametrize("value", [3, [], "x", False, [1, 2]])
def test_a_section_that_is_no_mapping_is_refused(value):
    assert refusal(lambda: from_dict({**MINIMAL, "model": value})) == f"config: model must be a mapping, found {value!r}"


def test_leaving_out_a_required_key_is_refused():
    assert "run.dir is missing" in refusal(lambda: from_dict({}))
    assert "data.shards is missing" in refusal(lambda: from_dict({"run": {"dir": "x"}}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1,", "is not valid YAML: while parsing"),
        ("train:\n  pairs: 3\n  micro_batch: 1\n  pairs: 4\n", "the key 'pairs' appears twice (line 4)"),
        ("train: {}\ntrain: {}\n", "the key 'train' appears twice (line 2)"),
        ("? [1, 2]\n: 3\n", "unhashable key"),
        ("run: !!python/object/apply:os.system [ls]\n", "is not valid YAML: could not determine a constructor"),
        ("- 1\n", "expected a mapping of sections such as 'model:' and 'train:', found list"),
        ("[]\n", "expected a mapping of sections such as 'model:' and 'train:', found list"),
        ("just text", "found str"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, expected):
    path = write(tmp_path, text)
    message = refusal(lambda: load(path))
    assert str(path) in message and expected in message


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    assert "absent.yaml" in refusal(lambda: load(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refusal(lambda: load(tmp_path))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run: {dir: caf\xe9}")
    assert "latin.yaml" in refusal(lambda: load(latin))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.pairs", "write section.key=value"),
        ("pairs=3", "write section.key=value"),
        ("train.=3", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("train.pairs=[1,", "the value is not valid YAML"),
        ("train.pears=3", "unknown key train.pears; did you mean train.pairs?"),
        ("a.b.c=3", "unknown key a"),
        ("train.pairs=", "train.pairs is None; it must be an integer"),
    ],
)
def test_a_malformed_set_is_refused(tmp_path, override, expected):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    assert expected in refusal(lambda: load(path, [override]))


def test_set_into_something_that_is_no_section_is_refused(tmp_path):
    path = write(tmp_path, "run: {dir: x}\ntrain: 5\n")
    assert "'train' is not a section" in refusal(lambda: load(path, ["train.pairs=3"]))


# ---- the reference ----------------------------------------------------------------------------------------------------------


def test_the_reference_documents_every_key():
    rows = [line.split("`")[1] for line in config.reference().splitlines() if line.startswith("| `")]
    assert rows == config.all_keys()
    assert (
        len(rows) == len(set(rows)) == sum(len(dataclasses.fields(getattr(Config(), s.name))) for s in dataclasses.fields(Config))
    )


def test_the_committed_reference_is_up_to_date():
    committed = Path(__file__).parents[1] / "docs" / "config.md"
    assert committed.read_text(encoding="utf-8") == config.reference()


def test_the_head_size_follows_from_width_and_heads():
    assert ModelConfig(hidden=384, heads=3).head_dim == 128
