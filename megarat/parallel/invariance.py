"""The invariance gate: the mesh must not change the mathematics.

    python -m megarat.parallel.invariance                            worlds of 1, 2 and 4 CPU processes on this host
    torchrun --nproc_per_node 8 -m megarat.parallel.invariance       every legal mesh of these 8 ranks (or under srun, mpirun)

A tiny model trains three sparse + dense pairs in fp32 under every legal mesh. Each parameter's gradient of both passes (before clipping),
the gradient norms, the losses and the weights afterwards must equal, to 1e-5, those of one process training by plain PyTorch, without
DeepSpeed and without any of the code that spreads a model over ranks.

The error of a tensor is ||a - b|| / ||b||. Every row of the data has one label left out, at a place of its own, so that all micro-batches
count equally many and their plain mean does not depend on how they are cut.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarat import mesh as meshes
from megarat.config import Config, from_dict
from megarat.engine import Engine, MicroBatch
from megarat.errors import UserError
from megarat.mesh import Mesh, Shape
from megarat.model import names
from megarat.model.lm import RATPlusLM, local_model
from megarat.model.pattern import Patterns
from megarat.parallel import worlds

TOLERANCE = 1e-5
PAIRS, LR = 3, 1e-2
EPS = (
    1e-3  # of AdamW: well above the rounding of a gradient's element, or the update of a tiny one would be noise divided by noise
)
WORLD_SIZES = (1, 2, 4)
_ROWS = 8
_HEAD_CHANNELS = 16  # the fewest that the GPU kernels take

Sabotage = Callable[[Engine], None]


class Case(NamedTuple):
    """One way to cut the same training."""

    shape: Shape
    sequence: bool
    zero: int
    micro_batch: int
    compile: bool = False

    @property
    def multiple(self) -> int:
        """Heads, widths, lengths and batches are those for 1, 2 and 4 ranks times this: what their number is divisible by beside powers of two."""
        return self.shape.size // (self.shape.size & -self.shape.size)

    @property
    def global_batch(self) -> int:
        """Sequences of a pair."""
        return _ROWS * self.multiple

    @property
    def layers(self) -> int:
        """At least one a stage."""
        return max(2, self.shape.pipeline)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a data rank."""
        return self.global_batch // (self.micro_batch * self.shape.data)

    @property
    def recompute(self) -> str:
        """How activations are made again in the backward, which changes nothing: all ways in turn."""
        way = (self.zero + self.micro_batch) % 3
        return ("off", "full", "full")[way] if self.compile else ("off", "selective", "full")[way]

    def __str__(self) -> str:
        sequence = ", sequence" if self.sequence else ""
        recompute = "" if self.recompute == "off" else f", recompute {self.recompute}"
        compiled = ", compiled" if self.compile else ""
        return (
            f"{self.shape}{sequence}, ZeRO {self.zero}, {self.accumulation} x {self.micro_batch} sequences{recompute}{compiled}"
        )


class Findings(NamedTuple):
    """What must not depend on the case."""

    gradients: dict[str, Tensor]  # of the first pair, "sparse NAME" and "dense NAME"
    losses: Tensor  # (pairs, 2) fp64: sparse, dense
    norms: Tensor  # likewise, before clipping
    evaluated: Tensor  # (1, 2) fp64: the losses of the first pair before any update, without gradients
    weights: dict[str, Tensor]  # after the last pair


class Verdict(NamedTuple):
    """The worst error of each kind, and where."""

    gradients: float
    norms: float
    losses: float
    weights: float
    where: str

    @property
    def holds(self) -> bool:
        """Whether all are within the tolerance (NaN is not)."""
        return all(error <= TOLERANCE for error in self[:4])

    def __str__(self) -> str:
        kinds = " ".join(f"{kind} {error:.0e}" for kind, error in zip(("grad", "norm", "loss", "weight"), self[:4], strict=True))
        return f"{'ok  ' if self.holds else 'FAIL'} {kinds}" + ("" if self.holds else f" ({self.where})")


def settings(case: Case, seed: int = 0, device: str = "cpu") -> Config:
    """The run of a case."""
    shape = case.shape
    parallel = {
        "tensor": shape.tensor,
        "pipeline": shape.pipeline,
        "context": shape.context,
        "zero": case.zero,
        "sequence": case.sequence,
        "recompute": case.recompute,
    }
    train = {"micro_batch": case.micro_batch, "compile": case.compile}
    return _config(case.layers, case.multiple, seed, device, train, parallel)


def _config(layers: int, multiple: int, seed: int, device: str, train: dict[str, Any], parallel: dict[str, Any]) -> Config:
    """Heads of two layers under different patterns, of one of them all sparse; clipping on."""
    mixed, sparse = ["dense", "D=4", "D=2,W=3", "D=-1,W=5,I=2"], ["D=4,W=1,I=2", "D=2,W=3", "D=-1,W=5,I=2", "D=2,W=3"]
    heads = len(mixed) * multiple
    return from_dict(
        {
            "run": {"dir": "none", "device": device},
            "model": {
                "layers": layers,
                "hidden": _HEAD_CHANNELS * heads,
                "heads": heads,
                "vocab": 64 * multiple,
                "init_std": 0.1,
            },
            "attention": {
                "pattern": [mixed * multiple, sparse * multiple] + ["dense"] * (layers - 2),
                "train_dilation": 4,
                "train_window": 2,
                "train_initial": 1,
            },
            "data": {"shards": "none", "sequence_length": 32 * multiple},
            "train": {"global_batch": _ROWS * multiple, "seed": seed, "precision": "fp32", **train},
            "optim": {"lr": LR, "clip": 0.5, "eps": EPS},
            "parallel": parallel,
        }
    )


def cases(world_size: int, compiled: bool = False) -> Iterator[Case]:
    """Every legal mesh of ``world_size`` ranks, with every ZeRO stage, with and without sequence parallelism, in micro-batches of 1, 2 and 4."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for pipeline, context, tensor in itertools.product(divisors, repeat=3):
        data, rest = divmod(world_size, pipeline * context * tensor)
        for sequence, zero, micro_batch in itertools.product((False, True), (1, 2, 3), (4, 2, 1)):
            case = Case(Shape(pipeline, data, context, tensor), sequence, zero, micro_batch, compiled)
            if rest == 0 and not (sequence and tensor == 1) and _is_legal(case, world_size):
                yield case


def _is_legal(case: Case, world_size: int) -> bool:
    try:
        meshes.check(settings(case), world_size)
    except UserError:
        return False
    return True


def batch(config: Config, seed: int, pair: int) -> tuple[Tensor, Tensor]:
    """The global batch of a pair: inputs and labels (B, T)."""
    generator = torch.Generator().manual_seed(1000 * seed + pair)
    rows, length = config.train.global_batch, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    left_out = torch.randint(0, length, (rows, 1), generator=generator)
    return tokens[:, :-1].contiguous(), labels.scatter_(1, left_out, -100)


def reference(case: Case, seed: int) -> Findings:
    """One process, the whole batch at once, plain PyTorch."""
    return _reference(case.layers, case.multiple, seed)


@functools.cache
def _reference(layers: int, multiple: int, seed: int) -> Findings:
    config = _config(layers, multiple, seed, "cpu", {"micro_batch": 1}, {})
    model = RATPlusLM(config.model).initialise(seed)
    optim = config.optim
    adamw = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    gradients: dict[str, Tensor] = {}
    losses, norms, evaluated = [], [], []
    for pair in range(PAIRS):
        ids, labels = batch(config, seed, pair)
        for name, patterns in _passes(config):
            if pair == 0:
                adamw.zero_grad()
                evaluated.append((loss := model(ids, patterns, labels)).item())
                loss.backward()
                gradients |= {f"{name} {key}": value.clone() for key, value in _logical(model, lambda p: p.grad).items()}
        for _, patterns in _passes(config):
            adamw.zero_grad()
            loss = model(ids, patterns, labels)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip).item())
            adamw.step()
            losses.append(loss.item())
    return Findings(gradients, _by_pair(losses), _by_pair(norms), _by_pair(evaluated), _logical(model, lambda p: p.detach()))


def _logical(model: RATPlusLM, of: Callable[[torch.nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = of(parameter)
        assert tensor is not None
        tensors |= names.split(name, tensor)
    return tensors


def _passes(config: Config) -> list[tuple[str, Patterns]]:
    assert config.sparse_patterns is not None
    return [("sparse", config.sparse_patterns), ("dense", config.patterns)]


def _by_pair(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 2)


def measure(case: Case, seed: int = 0, device: str = "cpu", sabotage: Sabotage | None = None) -> Findings:
    """The same training by this world's engine under ``case``; ``sabotage`` plants a bug in it."""
    config = settings(case, seed, device)
    torch.backends.cuda.matmul.allow_tf32 = False  # some containers switch it on: products to three digits
    if case.compile:
        torch._dynamo.reset()  # of one function it takes eight shapes, which all cases together exceed
    mesh = meshes.start(device, config)
    model = local_model(config, mesh).initialise(seed)
    engine = Engine(model, config, mesh)
    if sabotage is not None:
        sabotage(engine)
    gradients: dict[str, Tensor] = {}
    losses, norms, evaluated = [], [], []
    for pair in range(PAIRS):
        own = _own_share(batch(config, seed, pair), case, mesh)
        for name, patterns in _passes(config):
            if pair == 0:
                nats, tokens = engine.evaluate(own, patterns)
                evaluated.append(nats / tokens)
                found = engine.gradients(own, patterns)
                gradients |= {f"{name} {key}": value for key, value in found.items()}
        for _, patterns in _passes(config):
            update = engine.update(own, patterns, LR)
            losses.append(update.loss)
            norms.append(update.grad_norm)
    state, _ = engine.named_state()
    return Findings(gradients, _by_pair(losses), _by_pair(norms), _by_pair(evaluated), state["master"])


def _own_share(whole: tuple[Tensor, Tensor], case: Case, mesh: Mesh) -> list[MicroBatch]:
    """This data rank's micro-batches, cut as the loader cuts them."""
    step = case.micro_batch * case.shape.data
    first = mesh.place.data * case.micro_batch
    starts = range(first, case.global_batch, step)
    return [(whole[0][start : start + case.micro_batch], whole[1][start : start + case.micro_batch]) for start in starts]


def compare(found: Findings, expected: Findings) -> Verdict:
    """The worst errors of ``found``."""
    gradients = _errors(found.gradients, expected.gradients)
    weights = _errors(found.weights, expected.weights)
    norms = _worst((found.norms - expected.norms).abs() / expected.norms)
    losses = max(
        _worst((found.losses - expected.losses).abs() / expected.losses),
        _worst((found.evaluated - expected.evaluated).abs() / expected.evaluated),
    )
    worst_gradient, worst_weight = max(gradients, key=gradients.__getitem__), max(weights, key=weights.__getitem__)
    where = f"worst gradient: {worst_gradient}, worst weight: {worst_weight}"
    return Verdict(gradients[worst_gradient], norms, losses, weights[worst_weight], where)


def _errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise ValueError(f"different tensors: {sorted(found.keys() ^ expected.keys())}")
    return {name: _worst((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}


def _worst(errors: Tensor) -> float:
    """The largest, infinite where one is not a number (so that it is found)."""
    return float(errors.nan_to_num(math.inf, math.inf).max())


def judge(chosen: Sequence[Case], seed: int, device: str = "cpu", sabotage: Sabotage | None = None) -> list[Verdict]:
    """The verdicts of cases that this world can run, on every rank."""
    return [compare(measure(case, seed, device, sabotage), reference(case, seed)) for case in chosen]


def main() -> int:
    """Run the gate; prints a line a case and returns 1 when one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m megarat.parallel.invariance", description="The same gradients on every mesh."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of weights and data")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=WORLD_SIZES, help="without a launcher: CPU processes to start here"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="with train.compile, on the meshes that take it")
    arguments = parser.parse_args()
    process = meshes.identify(os.environ)
    sizes = [process.world_size] if process.world_size > 1 else arguments.worlds
    failed = 0
    for size, seed in itertools.product(sizes, arguments.seeds):
        chosen = list(cases(size, arguments.compile))
        for case, verdict in _verdicts(chosen, size, seed, arguments.device, here=process.world_size > 1 or size == 1):
            failed += not verdict.holds
            if process.rank == 0:
                print(f"{verdict}  {case}, seed {seed}", flush=True)
    if process.rank == 0:
        print(f"{failed} failed" if failed else "every mesh computes the same")
    return int(failed > 0)


def _verdicts(chosen: list[Case], world_size: int, seed: int, device: str, here: bool) -> Iterator[tuple[Case, Verdict]]:
    """Each case of a world and its verdict: this world, one by one as they are found, or a world of CPU processes started for it."""
    if here:
        yield from ((case, judge([case], seed, device)[0]) for case in chosen)
    else:
        yield from zip(chosen, worlds.run(world_size, judge, chosen, seed, timeout_s=60.0 * len(chosen))[0], strict=True)


if __name__ == "__main__":
    sys.exit(main())
