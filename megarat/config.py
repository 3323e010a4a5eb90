"""One typed tree describes a run.

It is read from YAML, changed by ``--set key=value``, validated once, printed and stored with the run. Unknown keys are refused
with the nearest known one. ``docs/config.md`` is generated from this file (``python -m megarat.config``).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from megarat import mesh
from megarat.errors import UserError
from megarat.model.pattern import Pattern, Patterns, PatternSpec, resolve

PatternSetting = Union[str, list[Union[str, list[str]]]]
ShardsSetting = Union[str, dict[str, float]]


def setting(default: Any, doc: str) -> Any:
    """A field with its documentation; mutable defaults are copied per instance."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def required(doc: str) -> Any:
    """A field without a default: leaving it out is an error that names it."""
    return field(default=None, metadata={"doc": doc, "required": True})


@dataclass
class RunConfig:
    """Where a run lives."""

    dir: str = required("Run folder: resolved config, environment, logs and checkpoints. A run resumes by itself from it.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to train; `auto` takes the GPU when there is one.")


@dataclass
class ModelConfig:
    """Shape of the model."""

    layers: int = setting(24, "Blocks (mixer + FFN).")
    hidden: int = setting(2048, "Model width C; a multiple of `heads`.")
    heads: int = setting(16, "Attention heads H; the head size C/H must be even (the published models use 128).")
    vocab: int = setting(32000, "Rows of the tied embedding; at least the tokenizer's vocabulary.")
    ffn_multiple: int = setting(4, "FFN width as a multiple of `hidden`.")
    recurrence: bool = setting(True, "The gated recurrence of RAT+; false gives the attention-only baseline.")
    rope_base: float = setting(10000.0, "Base of the rotary positions.")
    norm_eps: float = setting(1e-6, "Epsilon of RMSNorm.")
    init_std: float = setting(0.02, "Standard deviation of all initial matrices.")
    residual_dtype: Literal["fp32", "compute"] = setting(
        "fp32", "Residual stream: fp32 as published, or the dtype of the matrices."
    )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads


@dataclass
class AttentionConfig:
    """Which keys are visible (see the README's table of patterns)."""

    pattern: PatternSetting = setting(
        "dense", "Pattern of the (second) pass: `dense`, `D=16,W=256,I=4`, a list a layer, or lists a head."
    )
    train_dilation: int = setting(
        64, "Dilation of the sparse pass of each pair in pretraining; 1 switches active recurrence learning off."
    )
    train_window: int = setting(0, "Window W of the sparse pass.")
    train_initial: int = setting(0, "Initial tokens I of the sparse pass.")


@dataclass
class DataConfig:
    """The token stream."""

    shards: ShardsSetting = required(
        "Folder written by data_tools/build_shards.py (train/, validation/, tokenizer/), its URL, or a blend: a mapping of such corpora "
        "to weights by tokens; the first one's tokenizer and validation side are the run's."
    )
    sequence_length: int = setting(4096, "Tokens T of a training sequence.")
    order: Literal["shuffled", "random_offsets"] = setting(
        "shuffled", "`shuffled`: every sequence once an epoch; `random_offsets`: uniform starts with replacement (adaptation)."
    )
    shuffle_run: int = setting(16, "Neighbouring sequences that are read together; 1 shuffles the corpus sequence by sequence.")
    shuffle_window: int = setting(2048, "Runs that are mixed at a time, taken from all over the corpus.")
    documents: Literal["packed", "separate"] = setting(
        "packed", "`packed`: attention and recurrence run on over the ends of documents, as published; `separate`: they do not."
    )
    limit_tokens: int = setting(0, "Train on the first so many tokens of each corpus only; 0 = all of them.")
    max_epochs: float = setting(0.0, "Refuse to train for more epochs of any corpus than this; 0 = no limit.")
    validation: str = setting(
        "", "Corpus whose held-out side `megarat eval` scores; empty = the one of `data.shards`, of a blend the first."
    )
    validation_tokens: int = setting(0, "Tokens of it that are scored; 0 = all.")
    cache: str = setting("", "Folder for what is fetched of remote corpora; empty = megarat in the user's cache folder.")
    cache_gb: float = setting(20.0, "Bound of that folder, in 10^9 bytes.")
    prefetch: int = setting(2, "Global batches read ahead of the step.")
    task: str = setting(
        "",
        "Train on made-up samples of a task, loss on the answer alone, instead of the corpus: `needle` (or `sft`), or `needle:single_1,multikey_2`.",
    )
    task_text: str = setting("", "UTF-8 text in which the task hides its needles; empty = made-up sentences.")

    @property
    def primary(self) -> str:
        """The corpus, or the first of a blend: whose tokenizer and validation side are the run's."""
        return self.shards if isinstance(self.shards, str) else next(iter(self.shards))


@dataclass
class TrainConfig:
    """Length and arithmetic of the training."""

    pairs: int = setting(
        1000, "Global batches; each makes two optimizer updates (sparse, dense) in pretraining, one in adaptation."
    )
    global_batch: int = setting(512, "Sequences of a global batch.")
    micro_batch: int = setting(2, "Sequences one rank computes at a time; the rest is gradient accumulation.")
    recipe: Literal["two_updates", "summed"] = setting(
        "two_updates",
        "`two_updates` of a pair, as published; `summed` is a variant: one update by the sum of the losses of both passes.",
    )
    sparse_every: int = setting(1, "Make the sparse pass for every so many-th pair only; 1 is as published, more is a variant.")
    seed: int = setting(1005, "Seed of initial weights and data order.")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "bf16 keeps fp32 masters; `auto` is bf16 on GPUs and on CPUs with bf16 matrix units."
    )
    compile: bool = setting(
        False,
        "Residual sums, norms, products and GELU of the layers through torch.compile (see docs/performance.md for what it is worth).",
    )
    fp8: bool = setting(
        False,
        "Matrix products of the layers in FP8 with one scale a tensor (needs an H100 or newer); weights, moments and the rest stay.",
    )
    fused_gelu: bool = setting(
        False,
        "Do not keep the output of GELU, the largest activation of a layer: the backward makes it again in one pass with its gradient.",
    )
    weight_gradients: Literal["separate", "product", "apex"] = setting(
        "separate",
        "How weight gradients of the layers reach their fp32 sums: `separate` adds what a product wrote in bf16; `product`: the product adds "
        "it itself, unrounded; `apex`: the same by NVIDIA apex's wgrad_gemm_accum_fp32.",
    )
    cuda_graphs: bool = setting(
        False,
        "Replay forward and backward of all micro-batches of an update but the last as one recording; activations are held twice.",
    )
    loss_chunk: int = setting(0, "Tokens whose logits exist at a time; 0 = as many as 768 MB of them hold.")
    deterministic: bool = setting(
        False,
        "Only kernels whose results repeat bit for bit, also on a GPU: a resumed run then equals the uninterrupted one exactly.",
    )
    wall_clock_minutes: float = setting(0.0, "Stop early (exit 75, with a checkpoint) after this time; 0 = no limit.")
    validate_every: int = setting(
        0, "Pairs between measurements of the loss on the held-out side (`data.validation_tokens` of it); 0 = never."
    )
    max_skipped: int = setting(
        3, "Consecutive bad pairs (not finite, or spikes) after which the run ends with an error, where it cannot go back."
    )


@dataclass
class OptimConfig:
    """AdamW and its schedule, counted in pairs."""

    lr: float = setting(8e-4, "Peak learning rate.")
    min_lr: float = setting(1e-6, "Final learning rate of the cosine.")
    warmup: float = setting(0.05, "Linear warm-up: a fraction of the pairs when below 1, else a number of pairs.")
    schedule: Literal["cosine", "constant"] = setting("cosine", "Shape after the warm-up.")
    beta1: float = setting(0.9, "AdamW beta 1.")
    beta2: float = setting(0.95, "AdamW beta 2.")
    eps: float = setting(1e-8, "AdamW epsilon.")
    implementation: Literal["torch", "apex"] = setting(
        "torch", "Who steps: torch's AdamW (its fused kernel on GPUs), or FusedAdam of NVIDIA's apex where that is installed."
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay.")
    no_decay: Literal["nothing", "norms", "norms_and_embedding"] = setting(
        "nothing", "What weight decay leaves out (the recipe decays everything)."
    )
    clip: float = setting(1.0, "Maximal global gradient norm; 0 = no clipping.")


@dataclass
class ParallelConfig:
    """The mesh."""

    tensor: int = setting(1, "Ranks that share each layer's heads.")
    pipeline: int = setting(1, "Pipeline stages.")
    context: int = setting(1, "Ranks that share each sequence.")
    zero: int = setting(1, "DeepSpeed ZeRO stage 1, 2 or 3.")
    recompute: Literal["off", "selective", "full"] = setting(
        "off",
        "In the backward, `selective` computes norms and GELU once more, a quarter of the activations; `full` whole layers: a third more "
        "arithmetic, one residual stream and one branch a layer kept.",
    )
    sequence: bool = setting(
        False,
        "Norms and residual stream on 1/`tensor` of each sequence (Megatron's sequence parallelism): less memory, the same traffic.",
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = setting(500, "Pairs between checkpoints; one is always written at the end and on a stop.")
    keep: int = setting(2, "Newest checkpoints kept.")
    keep_every: int = setting(0, "Also keep every checkpoint whose pair is a multiple of this; 0 = none.")
    asynchronous: bool = setting(
        True,
        "Write from a copy in host memory (12 bytes a parameter over all ranks) while training goes on; false stops training meanwhile.",
    )


@dataclass
class GuardConfig:
    """What a run does when a pair goes wrong, or nothing goes on at all."""

    deviations: float = setting(
        0.0,
        "Leave a pair out whose loss, or logarithm of the gradient norm, is so many deviations above the running median (10 is cautious); "
        "0 = only what is not finite.",
    )
    window: int = setting(128, "Good pairs that median and deviation are taken over; they count from half as many on.")
    rollback_after: int = setting(
        3,
        "Bad pairs in a row after which the run goes back to its last regular checkpoint and leaves all samples since out; 0 = never.",
    )
    max_rollbacks: int = setting(3, "How often it goes back to the same checkpoint.")
    hang_minutes: float = setting(
        30.0,
        "A rank where nothing goes on for so long (a pair, a start, a save) writes its stacks to RUN/stacks and ends; 0 = never.",
    )
    slow_every: int = setting(50, "Pairs between looks for ranks that are slower than the others; 0 = never.")


@dataclass
class LogConfig:
    """What a run prints and records."""

    every: int = setting(1, "Pairs between lines of metrics.jsonl and TensorBoard points.")
    progress: bool = setting(True, "Progress bar with tokens/s and time left.")
    tensorboard: bool = setting(True, "Write TensorBoard events into RUN/tensorboard.")


@dataclass
class Config:
    """A run of megarat."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def patterns(self) -> Patterns:
        """Pattern of the main pass, resolved to every layer and head."""
        return resolve(self.attention.pattern, self.model.layers, self.model.heads)

    @property
    def sparse_patterns(self) -> Patterns | None:
        """Pattern of the sparse pass of each pair; None when active recurrence learning is off."""
        attention = self.attention
        if attention.train_dilation == 1:
            return None
        sparse = Pattern(attention.train_dilation, attention.train_window, attention.train_initial)
        return resolve(sparse, self.model.layers, self.model.heads)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to ``config.yaml``."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The YAML that reads back to this tree."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a run's YAML, apply ``key=value`` overrides, validate. Raises ``UserError`` naming the file and key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections such as 'model:' and 'train:', found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return from_dict(tree, str(path))


def from_dict(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Build and validate a tree from nested plain values; ``source`` is named in errors."""
    config: Config = _build(Config, tree, source, "")
    validate(config, source)
    return config


def validate(config: Config, source: str = "config") -> None:
    """Check everything that can be checked without touching files or devices. Raises ``UserError``."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for item in dataclasses.fields(values):
            if item.metadata.get("required") and not getattr(values, item.name):
                raise UserError(f"{source}: {section.name}.{item.name} is missing: {item.metadata['doc']}")
    for key in _POSITIVE:
        if not get(config, key) > 0:
            raise UserError(f"{source}: {key} is {get(config, key)}; it must be greater than 0")
    for key in _NOT_NEGATIVE:
        if get(config, key) < 0:
            raise UserError(f"{source}: {key} is {get(config, key)}; it must not be negative")
    _validate_shape(config.model, source)
    _validate_batches(config, source)
    _validate_optimizer(config.optim, source)
    if config.train.recipe == "summed" and config.parallel.pipeline > 1:
        raise UserError(
            f"{source}: train.recipe = summed with parallel.pipeline = {config.parallel.pipeline}: a pipeline makes one pass an update; set "
            "parallel.pipeline=1 or train.recipe=two_updates"
        )
    if config.train.fp8:
        _validate_fp8(config, source)
    if config.train.compile:
        _validate_compile(config, source)
    if config.train.fused_gelu:
        _validate_fused_gelu(config, source)
    if config.train.weight_gradients != "separate":
        _validate_weight_gradients(config, source)
    if config.train.cuda_graphs:
        _validate_cuda_graphs(config, source)
    mesh.check(config, source=source)
    try:
        _ = config.patterns, config.sparse_patterns
    except UserError as error:
        raise UserError(f"{source}: attention: {error}") from None


_POSITIVE = (
    "model.layers model.hidden model.heads model.vocab model.ffn_multiple model.rope_base model.norm_eps model.init_std "
    "data.sequence_length data.shuffle_run data.shuffle_window data.cache_gb data.prefetch train.pairs train.global_batch "
    "train.micro_batch train.sparse_every train.max_skipped optim.lr optim.eps "
    "parallel.tensor parallel.pipeline parallel.context checkpoint.every checkpoint.keep guard.window log.every"
).split()
_NOT_NEGATIVE = (
    "train.loss_chunk data.limit_tokens data.max_epochs data.validation_tokens optim.min_lr optim.warmup optim.weight_decay optim.clip "
    "checkpoint.keep_every train.wall_clock_minutes train.validate_every train.seed guard.deviations guard.rollback_after guard.max_rollbacks "
    "guard.hang_minutes guard.slow_every"
).split()


def _validate_shape(model: ModelConfig, source: str) -> None:
    if model.hidden % model.heads:
        raise UserError(
            f"{source}: model.hidden is {model.hidden}, not a multiple of model.heads = {model.heads}; every head has hidden/heads channels"
        )
    if model.head_dim % 2:
        raise UserError(
            f"{source}: model.hidden / model.heads = {model.head_dim}; rotary positions need an even head size (128 in the published models)"
        )


def _validate_batches(config: Config, source: str) -> None:
    train = config.train
    if train.global_batch % train.micro_batch:
        raise UserError(
            f"{source}: train.global_batch = {train.global_batch} is not a multiple of train.micro_batch = {train.micro_batch}"
        )


def _validate_fp8(config: Config, source: str) -> None:
    if config.model.hidden % 16 or config.train.micro_batch * config.data.sequence_length % 16:
        raise UserError(
            f"{source}: train.fp8: model.hidden = {config.model.hidden} and train.micro_batch * data.sequence_length = "
            f"{config.train.micro_batch * config.data.sequence_length} must be multiples of 16, which FP8 matrix units take"
        )
    if config.parallel.tensor > 1:
        raise UserError(
            f"{source}: train.fp8 with parallel.tensor = {config.parallel.tensor}: set parallel.tensor=1 or train.fp8=false"
        )
    if config.parallel.recompute == "selective":
        raise UserError(
            f"{source}: train.fp8 with parallel.recompute = selective: FP8 layers keep no inputs that it could leave out; set it to off or full"
        )


def _validate_compile(config: Config, source: str) -> None:
    for key, legal, reason in (
        ("parallel.tensor", 1, "ranks that share layers overlap their messages with products by hand"),
        ("parallel.zero", (1, 2), "ZeRO 3 gathers weights by hooks that compiled code does not call"),
        ("parallel.recompute", ("off", "full"), "the compiler itself decides what is kept and what is made again"),
        ("train.fp8", False, "FP8 layers replace the products that would be compiled"),
    ):
        _refuse(config, source, "train.compile", "false", key, legal if isinstance(legal, tuple) else (legal,), reason)


def _validate_fused_gelu(config: Config, source: str) -> None:
    for key, legal, reason in (
        ("train.fp8", (False,), "FP8 layers keep a copy of GELU's output in FP8"),
        ("train.compile", (False,), "the compiler itself decides what is kept and what is made again"),
        ("train.weight_gradients", ("separate",), "it replaces the product that would add to fp32 sums"),
    ):
        _refuse(config, source, "train.fused_gelu", "false", key, legal, reason)


def _validate_weight_gradients(config: Config, source: str) -> None:
    for key, legal, reason in (
        ("parallel.zero", (1,), "ZeRO 2 and 3 hand gradients on as they are made and keep no sums of whole matrices"),
        ("parallel.pipeline", (1,), "a pipeline's sums are DeepSpeed's own"),
        ("parallel.tensor", (1,), "ranks that share layers overlap these products with messages"),
        ("train.fp8", (False,), "FP8 products cannot add to fp32 sums"),
        ("train.compile", (False,), "compiled layers make their products themselves"),
        ("train.precision", ("auto", "bf16"), "gradients in fp32 are already added without rounding"),
    ):
        _refuse(config, source, f"train.weight_gradients = {config.train.weight_gradients}", "separate", key, legal, reason)


def _validate_cuda_graphs(config: Config, source: str) -> None:
    for key, legal, reason in (
        ("parallel.zero", (1,), "ZeRO 2 and 3 communicate in every micro-batch"),
        ("parallel.pipeline", (1,), "a pipeline has an order of its own"),
        ("parallel.tensor", (1,), "ranks that share layers communicate inside of them"),
        ("parallel.context", (1,), "ranks that share sequences communicate inside of layers"),
        ("data.documents", ("packed",), "how documents lie changes from batch to batch, and with it what is launched"),
        ("train.precision", ("auto", "bf16"), "gradients need a place that never moves, which fp32 sums of bf16 gradients have"),
    ):
        _refuse(config, source, "train.cuda_graphs", "false", key, legal, reason)


def _refuse(config: Config, source: str, switch: str, off: str, key: str, legal: tuple[Any, ...], reason: str) -> None:
    """Refuses a switch that does not go with the value of ``key``."""
    if get(config, key) not in legal:
        name = switch.partition(" ")[0]
        raise UserError(f"{source}: {switch} with {key} = {get(config, key)}: {reason}; set {name}={off}")


def _validate_optimizer(optim: OptimConfig, source: str) -> None:
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optim, key) < 1:
            raise UserError(f"{source}: optim.{key} is {getattr(optim, key)}; it must lie in [0, 1)")
    if optim.schedule == "cosine" and optim.min_lr > optim.lr:
        raise UserError(f"{source}: optim.min_lr = {optim.min_lr} is above the peak optim.lr = {optim.lr}")


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, such as ``train.pairs``."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.append(key)
        return dict(super().construct_mapping(node, deep=deep))


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise UserError(f"--set {override!r}: write section.key=value, for example --set train.pairs=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    if tree.get(section) is None:  # absent, or a section without keys
        tree[section] = {}
    branch = tree[section]
    if not isinstance(branch, dict):
        raise UserError(f"--set {override!r}: {section!r} is not a section")
    branch[name] = value


def _build(kind: type, tree: Any, source: str, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must be a mapping, found {tree!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    values = {}
    for name, value in tree.items():
        if name not in known:
            raise UserError(f"{source}: unknown key {prefix}{name}{_nearest(str(name), prefix, known)}")
        nested = dataclasses.is_dataclass(hints[name])
        values[name] = (
            _build(hints[name], {} if value is None else value, source, f"{prefix}{name}.")
            if nested
            else _coerce(value, hints[name], source, prefix + name)
        )
    return kind(**values)


def _nearest(name: str, prefix: str, known: Iterable[str]) -> str:
    """The same name in another section, else the most similar name in this one, else all names of this one."""
    elsewhere = [key for key in all_keys() if key.endswith("." + name)]
    similar = [prefix + match for match in difflib.get_close_matches(name, known, n=1)]
    best = elsewhere or similar
    return f"; did you mean {best[0]}?" if best else f"; known keys here: {', '.join(sorted(known))}"


def all_keys() -> list[str]:
    """Every dotted key of the tree, in order."""
    sections = typing.get_type_hints(Config)
    return [f"{section}.{item.name}" for section, kind in sections.items() for item in dataclasses.fields(kind)]


def _coerce(value: Any, hint: Any, source: str, key: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise UserError(f"{source}: {key} is {value!r}; it must be one of {', '.join(map(str, options))}")
        return value
    if hint == ShardsSetting:
        return _coerce_shards(value, source, key)
    if origin in (Union, types.UnionType):  # attention.pattern: a string, or nested lists of strings
        return _coerce_pattern(value, source, key)
    if hint is float:
        return _coerce_number(value, source, key)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{source}: {key} is {value!r}; it must be {_TYPE_NAMES[hint]}")
    return value


def _coerce_shards(value: Any, source: str, key: str) -> ShardsSetting:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not value or not all(isinstance(location, str) for location in value):
        raise UserError(f"{source}: {key}: found {value!r}; write a folder or URL, or a mapping of several to weights by tokens")
    weights = {location: _coerce_number(weight, source, f"{key}.{location}") for location, weight in value.items()}
    for location, weight in weights.items():
        if weight <= 0:
            raise UserError(f"{source}: {key}.{location} is {weight}; a weight must be greater than 0")
    return weights


def _coerce_number(value: Any, source: str, key: str) -> float:
    """A finite float; text is tried because YAML 1.1 reads 8e-4, without a dot, as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{source}: {key} is {value!r}; it must be a finite number")
    return number


_TYPE_NAMES = {int: "an integer", bool: "true or false", str: "a string"}


def _coerce_pattern(value: PatternSpec, source: str, key: str) -> PatternSpec:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_coerce_pattern(item, source, key) for item in value]  # type: ignore[misc,return-value,arg-type]
    raise UserError(f"{source}: {key}: found {value!r}; write 'dense', 'D=16,W=256,I=4', a list a layer or lists a head")


def reference() -> str:
    """The config reference as Markdown (``docs/config.md``)."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from `megarat/config.py` by `python -m megarat.config`; do not edit.",
        "Every key can be written by `--set section.key=value`. Unknown keys are refused.",
    ]
    sections = typing.get_type_hints(Config)
    for section, kind in sections.items():
        hints = typing.get_type_hints(kind)
        lines += [
            "",
            f"## {section}",
            "",
            (kind.__doc__ or "").strip(),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for item in dataclasses.fields(kind):
            default = "required" if item.metadata.get("required") else f"`{item.default}`"
            lines.append(f"| `{section}.{item.name}` | {_type_text(hints[item.name])} | {default} | {item.metadata['doc']} |")
    return "\n".join(lines) + "\n"


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{option}`" for option in typing.get_args(hint))
    if hint == ShardsSetting:
        return "str, or str: float"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return "pattern or lists"
    return str(hint.__name__)


if __name__ == "__main__":
    print(reference(), end="")
