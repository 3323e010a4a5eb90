"""What each switch is worth, in one process: `python -m benchmarks.levers [--size 1.5b] [--only LEVER …]`, and what `benchmarks.train` takes.

One engine is built as `benchmarks.train` builds it. A lever is set on that engine while it lives (as a config would have set it when it was
built) and taken back again; pairs with it and pairs without it take turns, so that clocks and temperatures are the same for both. The first
pair with a lever is not timed: kernels are compiled in it. Rows go to benchmarks/levers.csv, `python -m benchmarks.train_report` makes
the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from benchmarks.measure import commit, environment
from benchmarks.phases import Stopwatch
from benchmarks.tables import append
from benchmarks.train import build_config, build_megarat, parse, resident_batches, train_pairs
from megarat.config import Config
from megarat.cuda_graphs import Record, RecordedMicroBatches
from megarat.engine import Engine, make_adamw
from megarat.errors import UserError
from megarat.mesh import start
from megarat.ops import fp8_linear

FOLDER = Path(__file__).parent
COLUMNS = (
    "time", "gpu", "driver", "torch", "triton", "commit", "size", "length", "micro_batch", "accumulation", "lever", "base", "pairs", "base_ms",
    "lever_ms", "change", "spread", "base_gb", "lever_gb", "note",
)  # fmt: skip


class Bench(NamedTuple):
    """What is measured on."""

    engine: Engine
    config: Config
    record: Record | None = None  # of an engine that was built for recordings


Hold = Callable[[Bench], contextlib.AbstractContextManager[Config]]


class Lever(NamedTuple):
    """A switch; ``hold`` sets it for the length of a block, and yields the config to train under."""

    hold: Hold
    on_gpu: bool = False  # needs one
    base: str = ""  # the lever that it is measured against, the defaults by default


@contextlib.contextmanager
def attributes(objects: Any, **values: Any) -> Iterator[None]:
    """Attributes of some objects, for the length of a block."""
    before = [{name: getattr(item, name) for name in values} for item in objects]
    try:
        for item in objects:
            for name, value in values.items():
                setattr(item, name, value)
        yield
    finally:
        for item, old in zip(objects, before, strict=True):
            for name, value in old.items():
                setattr(item, name, value)


def linears(bench: Bench) -> list[Any]:
    return [linear for block in bench.engine.model.blocks for linear in block.linears]


@contextlib.contextmanager
def recompute_selective(bench: Bench) -> Iterator[Config]:
    parts = [part for block in bench.engine.model.blocks for part in (block.mixer, block.ffn)]
    with attributes(parts, recompute=True):
        yield bench.config


@contextlib.contextmanager
def recompute_full(bench: Bench) -> Iterator[Config]:
    with attributes([bench.engine.model], recompute=True):
        yield bench.config


@contextlib.contextmanager
def compiled(bench: Bench) -> Iterator[Config]:
    with attributes(bench.engine.model.blocks, compiled=True):
        yield bench.config


@contextlib.contextmanager
def bf16_residual(bench: Bench) -> Iterator[Config]:
    with attributes([bench.engine.model.config], residual_dtype="compute"):
        yield bench.config


@contextlib.contextmanager
def fp8(bench: Bench) -> Iterator[Config]:
    with attributes(linears(bench), product=fp8_linear):
        yield bench.config


@contextlib.contextmanager
def fp8_full(bench: Bench) -> Iterator[Config]:
    with fp8(bench), recompute_full(bench):
        yield bench.config


def weight_gradients(how: str) -> Hold:
    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        with attributes(linears(bench), product=functional.linear):  # remembers what to go back to
            bench.engine._sum_in_products(how)
            yield bench.config

    return hold


def loss_chunk(tokens: int) -> Hold:
    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        with attributes([bench.engine.model.embedding], loss_chunk=tokens):
            yield bench.config

    return hold


def plain_form(operation: str) -> Hold:
    """One operation by its torch reference: what the project's own form of it is worth, with the sign turned."""

    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        os.environ["MEGARAT_OPS"] = f"reference:{operation}"
        try:
            yield bench.config
        finally:
            del os.environ["MEGARAT_OPS"]

    return hold


def training(**values: Any) -> Hold:
    """Keys of the section `train` that the loop looks at, not the engine."""

    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        yield dataclasses.replace(bench.config, train=dataclasses.replace(bench.config.train, **values))

    return hold


@contextlib.contextmanager
def apex_adam(bench: Bench) -> Iterator[Config]:
    """FusedAdam on the same masters and moments."""
    engine, before = bench.engine, bench.engine._adamw
    optim = dataclasses.replace(bench.config.optim, implementation="apex")
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in before.param_groups]
    fused = make_adamw(groups, optim, engine.mesh.device)
    for group in fused.param_groups:
        group["step"] = engine.steps
    for master, state in before.state.items():
        fused.state[master] = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    with attributes([engine], _adamw=fused), attributes([engine._optimizer], optimizer=fused):
        yield bench.config


def micro_batch(rows: int) -> Hold:
    """The tokens of a pair in micro-batches of so many sequences."""

    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        train = dataclasses.replace(bench.config.train, micro_batch=rows)
        with accumulating(bench.engine, train.global_batch // rows):
            yield dataclasses.replace(bench.config, train=train)

    return hold


@contextlib.contextmanager
def accumulating(engine: Engine, micro_batches: int) -> Iterator[None]:
    """As if the engine had been built for so many micro-batches an update."""
    inner = engine._engine
    before = inner.gradient_accumulation_steps()
    inner._config.gradient_accumulation_steps = micro_batches
    try:
        with attributes([engine], micro_batches=micro_batches):
            yield
    finally:
        inner._config.gradient_accumulation_steps = before


def small(hold: Hold) -> Hold:
    """A lever at micro-batches of two sequences."""

    @contextlib.contextmanager
    def both(bench: Bench) -> Iterator[Config]:
        with micro_batch(2)(bench) as config, hold(bench):
            yield config

    return both


def graphs() -> Hold:
    recorded: list[RecordedMicroBatches] = []  # once: its memory stays

    @contextlib.contextmanager
    def hold(bench: Bench) -> Iterator[Config]:
        if bench.record is None:
            raise UserError("the engine was not built for recordings; give --set train.cuda_graphs=true")
        if not recorded:
            recorded.append(RecordedMicroBatches(bench.engine.model, bench.engine.micro_batches, bench.record))
        with attributes([bench.engine], _recorded=recorded[0]):
            yield bench.config

    return hold


SMALL = "train.micro_batch=2"
LEVERS = {
    "parallel.recompute=selective": Lever(recompute_selective),
    "parallel.recompute=full": Lever(recompute_full),
    "model.residual_dtype=compute": Lever(bf16_residual),
    "train.fp8=true": Lever(fp8),
    "train.fp8=true parallel.recompute=full": Lever(fp8_full),
    "train.weight_gradients=product": Lever(weight_gradients("product")),
    "train.weight_gradients=apex": Lever(weight_gradients("apex"), on_gpu=True),
    "optim.implementation=apex": Lever(apex_adam, on_gpu=True),
    "train.loss_chunk=2048": Lever(loss_chunk(2048)),
    "train.loss_chunk=131072": Lever(loss_chunk(131072)),
    "MEGARAT_OPS=reference:linear_cross_entropy": Lever(plain_form("linear_cross_entropy")),
    "MEGARAT_OPS=reference:parts": Lever(plain_form("parts")),
    "MEGARAT_OPS=reference:accumulate_": Lever(plain_form("accumulate_")),
    "MEGARAT_OPS=reference:apply_rotary": Lever(plain_form("apply_rotary")),
    "MEGARAT_OPS=reference:output_gate": Lever(plain_form("output_gate")),
    "MEGARAT_OPS=reference:rms_norm": Lever(plain_form("rms_norm")),
    "train.recipe=summed": Lever(training(recipe="summed")),
    "train.sparse_every=2": Lever(training(sparse_every=2)),
    "train.sparse_every=4": Lever(training(sparse_every=4)),
    "train.micro_batch=8": Lever(micro_batch(8)),
    SMALL: Lever(micro_batch(2)),
    f"{SMALL} train.weight_gradients=product": Lever(small(weight_gradients("product")), base=SMALL),
    "train.compile=true": Lever(compiled),
    f"{SMALL} train.cuda_graphs=true": Lever(small(graphs()), on_gpu=True, base=SMALL),
}  # fmt: skip


class Turns:
    """Pairs in turn with and without a lever."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._watch = Stopwatch(bench.engine.mesh.device)
        self._watch.enabled = False
        self._gpu = bench.engine.mesh.device.type == "cuda"

    def pairs(self, config: Config, count: int) -> tuple[list[float], float]:
        """Seconds of each pair, and the largest memory in 10^9 bytes."""
        engine = self.bench.engine
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        batches = resident_batches(config, engine.micro_batches, engine.mesh.device, seed=0)
        seconds = [pair[0] for pair in train_pairs(engine, batches, config, self._watch, count)]
        return seconds, torch.cuda.max_memory_allocated() / 1e9 if self._gpu else 0.0

    def compare(self, lever: Lever, rounds: int) -> dict[str, Any]:
        """Figures of the lever and of what it is compared with."""
        base = LEVERS[lever.base].hold if lever.base else training()
        held, plain = [], []
        for turn in range(rounds):
            for hold, into in ((lever.hold, held), (base, plain)):
                with hold(self.bench) as config:
                    if turn == 0:
                        self.pairs(config, 1)
                    into.append(self.pairs(config, config.train.sparse_every))  # a whole round of a recipe that leaves passes out
        with_it, without = ([statistics.mean(seconds) for seconds, _ in turns] for turns in (held, plain))
        lever_s, base_s = statistics.median(with_it), statistics.median(without)
        return {
            "base_ms": round(base_s * 1e3, 1), "lever_ms": round(lever_s * 1e3, 1), "change": round(base_s / lever_s - 1, 4),
            "spread": round(max((max(times) - min(times)) / min(times) for times in (with_it, without)), 4),
            "base_gb": round(max(gb for _, gb in plain), 1), "lever_gb": round(max(gb for _, gb in held), 1),
        }  # fmt: skip


def measure(turns: Turns, name: str, rounds: int) -> dict[str, Any]:
    """A row's figures, or a note where the lever cannot be pulled here."""
    lever = LEVERS[name]
    if lever.on_gpu and turns.bench.engine.mesh.device.type != "cuda":
        return {"note": "needs a GPU"}
    try:
        return turns.compare(lever, rounds)
    except (UserError, RuntimeError) as error:  # out of memory, or a compiler or a recording that failed
        return {"note": str(error).splitlines()[0]}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=LEVERS, metavar="LEVER", help=f"one of {', '.join(LEVERS)}; all by default"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--results", type=Path, default=FOLDER / "levers.csv")
    options, of_run = parser.parse_known_args(arguments)
    rows = []
    run = parse(of_run)
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(run, folder, 1)
        mesh = start(config.run.device, config)
        engine, _ = build_megarat(config, run, mesh)
    assert isinstance(engine, Engine)
    recorded, engine._recorded = engine._recorded, None
    turns = Turns(Bench(engine, config, recorded and recorded.record))
    for name in options.only or LEVERS:
        row = {
            "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            **(environment() if mesh.device.type == "cuda" else {"gpu": "cpu", "torch": torch.__version__, "commit": commit()}),
            "size": run.size, "length": run.length, "micro_batch": run.micro_batch, "accumulation": run.accumulation, "lever": name,
            "base": LEVERS[name].base, "pairs": options.rounds, **measure(turns, name, options.rounds),
        }  # fmt: skip
        print(", ".join(f"{key} {row.get(key, '')}" for key in COLUMNS[10:]), flush=True)
        append([row], options.results, COLUMNS)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
