"""``megarat plan``: what a run will need, before it is queued: memory by part, time, pipeline bubble, checkpoints, better meshes.

Everything is arithmetic on the config; nothing is started. Bytes of a parameter and of an activation are counted from what the model and
DeepSpeed's optimizers keep (below). Speed is made of the rates measured on one such GPU (``megarat.rates``: the benchmark table), part by
part; where there are none, or with ``--measured RUN``, it is the counted arithmetic (``megarat.model.flops``) at an efficiency: an estimate,
or that run's. Communication is not hidden behind arithmetic: that is how DeepSpeed's bf16 optimizer works. ``docs/scaling.md`` holds
what was measured against what is calculated here.

Letters: P parameters, L layers, C width, N tokens of a micro-batch on one rank, V vocabulary; p, d, c, t ranks along pipeline, data,
context and tensor. GB is 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarat import mesh, rates
from megarat.config import Config, ModelConfig, from_dict
from megarat.errors import UserError
from megarat.log import METRICS
from megarat.mesh import Shape
from megarat.model.flops import pair_flops_per_token, parameter_count, training_flops_per_token, visible_pairs
from megarat.model.pattern import Patterns
from megarat.rates import Rates

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Rates are the vendors': dense bf16 FLOP/s; bytes/s of one GPU in one direction over NVLink and over the network."""

    memory: float  # bytes a process can have; the driver keeps some
    flops: float
    nvlink: float = 450e9
    network: float = 50e9  # one 400 Gbit/s adapter a GPU
    per_node: int = 8


GPUS = {
    "H200": Gpu(memory=139e9, flops=989.4e12),
    "H100": Gpu(memory=79e9, flops=989.4e12),
    "A100": Gpu(memory=79e9, flops=312e12, nvlink=300e9, network=25e9),
}
CPU = "cpu"

EFFICIENCY = 0.45  # of the peak, for one GPU alone: an estimate; the published code reaches 0.42 on an H200
_LINK_EFFICIENCY = 0.8  # of a link's rate that collectives of large tensors get
_BUCKET = 500_000_000  # elements that ZeRO 2 and 3 reduce or gather at a time, as in ``megarat.engine``
_LOGITS_BYTES = 768 << 20  # a chunk of logits without train.loss_chunk, as in ``megarat.ops.cross_entropy``
_DISK = 2e9  # bytes/s into a shared file system, all ranks together

# Bytes that one token keeps for the backward in one layer, in units of C, in bf16. Not split by tensor parallelism: both inputs of the
# norms (residual, fp32: 8) and their outputs (4). Split: o q k v g (10), rotated q (2), recurred k and v (4), attention's output, the
# product with its gate (4), FFN before and after GELU (4 x ffn_multiple).
_WHOLE, _SPLIT_MIXER = 12, 20

# What a step does beside products, attention and scan, taken from a profile of the 1.5B model on an H200 (benchmarks/profile.csv): bytes that
# norms, GELU, gates, rotary and copies move for each token, layer, channel and pass; those of adding one weight's gradient to its fp32 sum;
# those of its clipping and AdamW; and the seconds that the GPU waits for the next kernel, for each layer, pass and micro-batch.
_ELEMENTWISE_BYTES, _ADD_BYTES, _UPDATE_BYTES, _WAIT_S = 215.0, 18.0, 34.0, 0.2e-3
_SELECTIVE_BYTES = 40.0  # that parallel.recompute=selective adds to the first

# Seconds in which the host can start one layer, forward and backward: the GPU waits for it where there is less to compute. Seen where steps of
# less work took no less time, and varied most (benchmarks/mesh.csv, 1.5B: context 307 ms for 24 layers on two GPUs and 306 on four, ZeRO 3
# 402; tensor ranks 188 and 226). Without these, the host was faster than any step that was timed.
_HOST_TENSOR_S, _HOST_CONTEXT_S, _HOST_ZERO_3_S = 8.5e-3, 12.8e-3, 16.7e-3


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU, by part."""

    weights: float
    masters: float
    moments: float
    gradients: float
    activations: float
    logits: float
    workspace: float

    @property
    def total(self) -> float:
        """The peak."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """One config on one number of GPUs."""

    config: Config
    shape: Shape
    gpu: Gpu | None  # None: CPUs, of which neither memory nor speed is predicted
    memory: Memory
    efficiency: float  # of the peak, where there are no rates
    speed_source: str
    rates: Rates | None = None

    @property
    def fits(self) -> bool:
        """Whether the peak is below what the GPU has."""
        return self.gpu is None or self.memory.total <= self.gpu.memory

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each data rank accumulates in one update."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.shape.data)

    @property
    def bubble(self) -> float:
        """Share of an update that a pipeline's stages wait: (p - 1) / (m + p - 1)."""
        return (self.shape.pipeline - 1) / (self.micro_batches + self.shape.pipeline - 1)

    @property
    def tokens_per_pair(self) -> int:
        """Data tokens of a global batch."""
        return self.config.train.global_batch * self.config.data.sequence_length

    def compute_seconds(self, gpu: Gpu) -> float:
        """Work of a pair on the GPUs themselves, the bubble included."""
        return sum(self.compute_parts(gpu).values()) / (1 - self.bubble)

    def compute_parts(self, gpu: Gpu) -> dict[str, float]:
        """Seconds of a pair, by what is done, without the bubble."""
        if self.rates is not None:
            return step_seconds(self.config, self.shape, self.rates)
        rate = self.shape.size * gpu.flops * self.efficiency
        if self.config.parallel.recompute == "full":
            rate *= 3 / 4  # another forward beside forward and backward (twice as much)
        return {"arithmetic": self.tokens_per_pair * pair_flops_per_token(self.config) / rate}

    def communication_seconds(self, gpu: Gpu) -> dict[str, float]:
        """Seconds of a pair on the links, by what travels."""
        return communication_seconds(self.config, self.shape, gpu)

    def busy_seconds(self, gpu: Gpu) -> float:
        """Seconds of a pair in which GPUs or links work, the bubble included."""
        return self.compute_seconds(gpu) + sum(self.communication_seconds(gpu).values())

    def pair_seconds(self, gpu: Gpu) -> float:
        """A pair: both updates. It takes at least as long as a host needs to start it."""
        return max(self.busy_seconds(gpu), host_seconds(self.config, self.shape))

    def tokens_per_second(self, gpu: Gpu) -> float:
        """Data tokens of all GPUs together."""
        return self.tokens_per_pair / self.pair_seconds(gpu)


def make_plan(config: Config, gpus: int, gpu: str = "H200", measured: str | Path | None = None) -> Plan:
    """Plan ``config`` on ``gpus`` GPUs of the named kind (or "cpu"). Raises ``UserError`` when the mesh is not legal on so many."""
    if gpu != CPU and gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: known are {', '.join(GPUS)} and {CPU}")
    shape = mesh.check(config, gpus)
    known = rates.measured(gpu) if measured is None and config.train.precision != "fp32" else None
    efficiency = EFFICIENCY if measured is None else measured_mfu(Path(measured))
    source = known.source if known else "estimate" if measured is None else f"measured: {measured}"
    if config.train.fp8 and measured is None:
        source += ", FP8 products taken to be as slow as bf16"
    return Plan(config, shape, GPUS.get(gpu), memory(config, shape), efficiency, source, known)


# ---- memory ------------------------------------------------------------------------------------------------------------------------


def memory(config: Config, shape: Shape) -> Memory:
    """Memory of the first pipeline stage, which holds the embedding and the most micro-batches in flight."""
    parameters = stage_parameters(config.model, shape)
    data = shape.data * shape.context  # ranks over which ZeRO splits its state
    zero, wide = config.parallel.zero, config.train.precision == "fp32"
    width = 4 if wide else 2
    # Sums in fp32; each of the model's own goes as soon as it is added, but under pipelines.
    gradients = ((4 if zero == 1 else 4 / data) + width * (shape.pipeline > 1)) * parameters
    buckets = 0 if zero == 1 else min(parameters, _BUCKET) * width * 2
    return Memory(
        weights=width * parameters / (data if zero == 3 else 1),
        masters=0 if wide and zero == 1 and data == 1 else 4 * parameters / data,
        moments=8 * parameters / data,
        gradients=gradients,
        activations=activation_bytes(config, shape),
        logits=loss_bytes(config, shape),
        workspace=buckets + _layer_workspace(config, shape),
    )


def stage_parameters(model: ModelConfig, shape: Shape) -> float:
    """Parameters of the first stage's rank: its layers, the embedding (the last stage, with head and norm, is as large)."""
    embedding = model.vocab * model.hidden
    layers = -(-model.layers // shape.pipeline)
    in_layers = (parameter_count(model) - embedding - model.hidden) * layers / model.layers
    return (in_layers + embedding + model.hidden) / shape.tensor


def activation_bytes(config: Config, shape: Shape) -> float:
    """What the forward keeps for the backward: all layers of the stage, for each micro-batch in flight."""
    model = config.model
    layers = -(-model.layers // shape.pipeline)
    in_flight = min(shape.pipeline, max(1, config.train.global_batch // (config.train.micro_batch * shape.data)))
    split = _SPLIT_MIXER + 4 * model.ffn_multiple
    whole = _WHOLE / (shape.tensor if config.parallel.sequence else 1)
    if config.parallel.recompute == "selective":  # without the outputs of norms and GELU
        split, whole = split - 2 * model.ffn_multiple, whole * (_WHOLE - 4) / _WHOLE
    scale = 2.0 if config.train.precision == "fp32" else 1.0
    one_layer = scale * (whole + split / shape.tensor) * model.hidden * _tokens(config, shape)
    if config.parallel.recompute != "full":
        return one_layer * layers * in_flight
    return (
        one_layer + 6.0 * model.hidden * _tokens(config, shape) * layers * in_flight
    )  # what enters each layer: the fp32 residual and a branch to be added; and one layer anew


def loss_bytes(config: Config, shape: Shape) -> float:
    """A chunk of logits, the gradient of the hidden states, and that of the head in fp32 with its bf16 copy."""
    model = config.model
    vocab = model.vocab / shape.tensor
    all_logits = 2.0 * _tokens(config, shape) * vocab
    chunk = min(all_logits, 2.0 * config.train.loss_chunk * vocab if config.train.loss_chunk else _LOGITS_BYTES)
    return 2 * chunk + 2.0 * _tokens(config, shape) * model.hidden + 6.0 * vocab * model.hidden


def _layer_workspace(config: Config, shape: Shape) -> float:
    """Gradients alive inside one layer's backward: those of its widest tensors, in and out, and of the residual."""
    model = config.model
    widest = max(5, model.ffn_multiple) / shape.tensor
    return (2 * 2 * widest + 8) * model.hidden * _tokens(config, shape)


def _tokens(config: Config, shape: Shape) -> float:
    return config.train.micro_batch * config.data.sequence_length / shape.context


def checkpoint_bytes(config: Config) -> float:
    """Weights, masters and moments of one checkpoint: 14 bytes a parameter in bf16, 12 in fp32."""
    return parameter_count(config.model) * (12 if config.train.precision == "fp32" else 14)


# ---- time --------------------------------------------------------------------------------------------------------------------------


def step_seconds(config: Config, shape: Shape, known: Rates) -> dict[str, float]:
    """Seconds of a pair on one rank, by what is done, at measured rates. The ranks of a group share a layer's work evenly."""
    model, length = config.model, config.data.sequence_length
    seen = _passes(config)
    passes = sum(share for _, share in seen)
    tokens = float(config.train.global_batch * length)
    share = tokens / shape.size  # of all the work on tokens
    micro_batches = _micro_batches(config, shape)
    weights = stage_parameters(model, shape)
    matrices = passes * training_flops_per_token(model, (), length)  # no layer's pattern: without attention
    attention = sum(
        how_often * len(group.heads) * model.head_dim
        * (known.attention_s + known.visible_s * visible_pairs(group.pattern, length) / length)
        for patterns, how_often in seen for layer in patterns for group in layer
    )  # fmt: skip
    channels = passes * model.layers * model.hidden
    moved = _ELEMENTWISE_BYTES + (_SELECTIVE_BYTES if config.parallel.recompute == "selective" else 0)
    again = 4 / 3 if config.parallel.recompute == "full" else 1.0
    return {
        "matrix products": again * share * matrices / known.matmul,
        "attention": again * share * attention,
        "scan": again * share * channels * known.scan_s * model.recurrence,
        "elementwise": again * share * channels * moved / known.copy,
        "adding gradients": micro_batches * weights * _ADD_BYTES / known.copy,
        "optimizer": _updates(config) * weights * _UPDATE_BYTES / (shape.data * shape.context) / known.copy,
        "launches": again * micro_batches * _WAIT_S * -(-model.layers // shape.pipeline),
    }


def host_seconds(config: Config, shape: Shape) -> float:
    """Seconds in which a rank's host can start all that a pair launches; 0 where that has never been what a step waited for."""
    slowest = max(
        _HOST_TENSOR_S * (shape.tensor > 1),
        _HOST_CONTEXT_S * (shape.context > 1),
        _HOST_ZERO_3_S * (config.parallel.zero == 3 and shape.data > 1),
    )
    return _micro_batches(config, shape) * -(-config.model.layers // shape.pipeline) * slowest


def communication_seconds(config: Config, shape: Shape, gpu: Gpu) -> dict[str, float]:
    """Seconds of a pair by axis, each over the slowest link that its ranks span (tensor ranks are neighbours, then context, then data)."""
    micro_batches = _micro_batches(config, shape)
    width = 4.0 if config.train.precision == "fp32" else 2.0
    hidden = width * config.model.hidden * _tokens(config, shape)  # bytes of one (N, C)
    layers = -(-config.model.layers // shape.pipeline)
    again = 2 if config.parallel.recompute == "full" else 0  # of the forward's collectives, two a layer on either axis
    data = shape.data * shape.context
    shared = stage_parameters(config.model, shape) * (data - 1) / data
    volumes = {
        "tensor": ((4 + again) * layers * micro_batches * hidden * 2 * (shape.tensor - 1) / shape.tensor, shape.tensor),
        "context": (
            (6 + again) * layers * micro_batches * hidden * (shape.context - 1) / shape.tensor,
            shape.tensor * shape.context,
        ),
        "gradients and weights": (_zero_bytes(config, width, micro_batches) * shared, shape.size // shape.pipeline),
        "pipeline": (2.0 * micro_batches * hidden * (shape.pipeline > 1), shape.size),
    }
    return {
        name: volume / (_LINK_EFFICIENCY * (gpu.nvlink if span <= gpu.per_node else gpu.network))
        for name, (volume, span) in volumes.items()
        if volume
    }


def _zero_bytes(config: Config, width: float, micro_batches: float) -> float:
    """Bytes of one parameter that ZeRO sends in a pair: gradients up, weights down.

    ZeRO 1: an all-reduce in fp32 and one gather of the weights, an update; ZeRO 2: a reduce-scatter a micro-batch, and that gather; ZeRO 3:
    a reduce-scatter and two gathers, for forward and backward, a micro-batch.
    """
    if config.parallel.zero == 1:
        return (8.0 + width) * _updates(config)
    if config.parallel.zero == 2:
        return width * (micro_batches + _updates(config))
    return 3 * width * micro_batches


def _micro_batches(config: Config, shape: Shape) -> float:
    """Micro-batches of a pair on one data rank, each counted for every pass that is made over it."""
    return sum(share for _, share in _passes(config)) * (config.train.global_batch // (config.train.micro_batch * shape.data))


def _passes(config: Config) -> list[tuple[Patterns, float]]:
    """What the passes of a pair see, and how often each is made on average over pairs."""
    main = [(config.patterns, 1.0)]
    return main if config.sparse_patterns is None else [(config.sparse_patterns, 1 / config.train.sparse_every), *main]


def _updates(config: Config) -> float:
    """Optimizer updates of a pair, on average over pairs."""
    return 1.0 if config.train.recipe == "summed" else sum(share for _, share in _passes(config))


def measured_mfu(run_dir: Path) -> float:
    """The median model FLOPs utilisation of a run. Raises ``UserError`` when the run recorded none."""
    path = run_dir / METRICS
    try:
        values = [json.loads(line)["mfu"] for line in path.read_text(encoding="utf-8").splitlines()[3:]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--measured {run_dir}: cannot read {path}: {error}") from None
    known = [value for value in values if value]
    if not known:
        raise UserError(
            f"--measured {run_dir}: {path} has no mfu beyond its first three pairs; name a run of several pairs on a GPU"
        )
    return statistics.median(known)


# ---- alternatives ------------------------------------------------------------------------------------------------------------------


def alternatives(plan: Plan, gpu: Gpu, count: int = 5) -> list[Plan]:
    """The fastest legal ways to run the same training on as many GPUs that fit into their memory, the best first."""
    found = [
        dataclasses.replace(plan, config=config, shape=shape, memory=memory(config, shape))
        for config in _variants(plan.config)
        if (shape := _legal_shape(config, plan.shape.size)) is not None
    ]
    fitting = [other for other in found if other.fits]
    ranked = sorted(fitting, key=lambda other: (-round(other.tokens_per_second(gpu)), other.memory.total))
    return list(itertools.islice((other for other in ranked if _is_valid(other.config)), count))


def _variants(config: Config) -> Iterator[Config]:
    degrees = (1, 2, 4, 8)
    for tensor, pipeline, context, zero, micro in itertools.product(degrees, degrees, degrees, (1, 2, 3), (1, 2, 4, 8, 16)):
        parallel = dataclasses.replace(config.parallel, tensor=tensor, pipeline=pipeline, context=context, zero=zero)
        yield dataclasses.replace(config, parallel=parallel, train=dataclasses.replace(config.train, micro_batch=micro))


def _is_valid(config: Config) -> bool:
    """Whether the keys go together, such as ``train.fp8`` with these degrees."""
    try:
        from_dict(config.to_dict())
    except UserError:
        return False
    return True


def _legal_shape(config: Config, gpus: int) -> Shape | None:
    try:
        return mesh.check(config, gpus)
    except UserError:
        return None


# ---- report ------------------------------------------------------------------------------------------------------------------------


def report(plan: Plan, tokens: float | None = None) -> str:
    """The plan as text; ``tokens`` is the length of the training, by default what the config trains."""
    lines = [_headline(plan), "", *_memory_lines(plan)]
    if plan.gpu is not None:
        lines += ["", *_time_lines(plan, plan.gpu, tokens)]
    size = checkpoint_bytes(plan.config)
    lines += ["", f"checkpoint: {size / GB:.3g} GB, {size / _DISK:.0f} s at {_DISK / GB:g} GB/s (assumed)"]
    if plan.gpu is not None:
        lines += ["", *_alternative_lines(plan, plan.gpu)]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """What programs read: ``slurm/submit.py`` does."""
    values: dict[str, Any] = {
        "gpus": plan.shape.size,
        "mesh": plan.shape._asdict(),
        "fits": plan.fits,
        "memory_bytes": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "bubble": plan.bubble,
        "checkpoint_bytes": checkpoint_bytes(plan.config),
        "config": plan.config.to_dict(),
        "config_yaml": plan.config.to_yaml(),
    }
    if plan.gpu is not None:
        values |= {"pair_seconds": plan.pair_seconds(plan.gpu), "tokens_per_s": plan.tokens_per_second(plan.gpu)}
        done = pair_flops_per_token(plan.config) * plan.tokens_per_second(plan.gpu)
        values["efficiency"] = {"mfu": done / (plan.shape.size * plan.gpu.flops), "source": plan.speed_source}
    return values


def refuse_if_too_large(plan: Plan) -> None:
    """Raises ``UserError`` with the best mesh that fits, when this one does not."""
    if plan.fits or plan.gpu is None:
        return
    better = alternatives(plan, plan.gpu, 1)
    advice = f"this fits: {_keys(better[0])}" if better else "no legal mesh of so many GPUs fits; take more GPUs"
    raise UserError(
        f"the run needs {plan.memory.total / GB:.1f} GB a GPU, of which there are {plan.gpu.memory / GB:.0f}; {advice}"
    )


def _headline(plan: Plan) -> str:
    config = plan.config
    return (
        f"{parameter_count(config.model) / 1e9:.3g} B parameters, {config.train.global_batch} x {config.data.sequence_length} tokens a pair, "
        f"on {plan.shape.size} ranks ({plan.shape}), ZeRO {config.parallel.zero}, micro-batch {config.train.micro_batch}"
    )


def _memory_lines(plan: Plan) -> list[str]:
    rows = [f"  {name:<12} {value / GB:8.2f} GB" for name, value in dataclasses.asdict(plan.memory).items()]
    have = "" if plan.gpu is None else f" of {plan.gpu.memory / GB:.0f}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    return ["memory of the fullest rank (calculated):", *rows, f"  {'peak':<12} {plan.memory.total / GB:8.2f} GB{have}"]


def _time_lines(plan: Plan, gpu: Gpu, tokens: float | None) -> list[str]:
    rate = plan.tokens_per_second(gpu)
    total = tokens or float(plan.config.train.pairs * plan.tokens_per_pair)
    work = plan.compute_parts(gpu)
    bubble = plan.compute_seconds(gpu) - sum(work.values())
    host = plan.pair_seconds(gpu) - plan.busy_seconds(gpu)
    parts = {**work, "waiting in the bubble": bubble, **plan.communication_seconds(gpu), "waiting for the host": host}
    rows = [f"  {name:<22} {seconds:8.3f} s" for name, seconds in parts.items() if seconds > 0]
    how = "rates" if plan.rates else f"arithmetic at {plan.efficiency:.0%} of the peak"
    return [
        f"a pair, both passes ({how}: {plan.speed_source}; links calculated):",
        *rows,
        f"  {'pair':<22} {plan.pair_seconds(gpu):8.3f} s, pipeline bubble {plan.bubble:.1%}",
        f"  {rate:,.0f} tokens/s, {rate / plan.shape.size:,.0f} a GPU; {total:.3g} tokens take {total / rate / 86400:.3g} days",
    ]


def _alternative_lines(plan: Plan, gpu: Gpu) -> list[str]:
    rows = [
        f"  {other.tokens_per_second(gpu):12,.0f} tokens/s {other.memory.total / GB:7.1f} GB   {_keys(other)}"
        for other in alternatives(plan, gpu)
    ]
    return ["legal alternatives that fit, the fastest first:", *(rows or ["  none"])]


def _keys(plan: Plan) -> str:
    parallel = plan.config.parallel
    axes = " ".join(f"parallel.{axis}={getattr(parallel, axis)}" for axis in ("tensor", "pipeline", "context", "zero"))
    return f"{axes} train.micro_batch={plan.config.train.micro_batch}"
