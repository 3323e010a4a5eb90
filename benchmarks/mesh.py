"""One training on one GPU and on meshes of several: the same losses, tokens/s, peak memory, beside what `megarat plan` says.

    python -m benchmarks.mesh one one-rounded-1                                  runs of one GPU
    torchrun --nproc_per_node 2 -m benchmarks.mesh --links zero1 tensor pipeline      runs of two, and what their link carries
    python -m benchmarks.mesh --report                                           the tables of docs/parallelism.md

Each run builds the engine of a real run (DeepSpeed, fp32 masters, clipping, joint pairs) with the same initial weights and trains the same
made-up tokens, at bf16. A row goes to benchmarks/mesh.csv as soon as its run has ended.

How far bf16 alone moves the losses is measured, not assumed: runs of one GPU start from weights that were moved by less than bf16
resolves (each by a random relative amount below 2^-9, half a unit in its last place) and take their micro-batches in other sizes. Rounding
the products of a training is equivalent to such changes of its weights.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from benchmarks.measure import ROOT, environment
from benchmarks.tables import append
from megarat import comm, plan
from megarat.config import Config, from_dict
from megarat.engine import MASTER, Engine
from megarat.mesh import Mesh, start
from megarat.model.lm import local_model
from megarat.train.schedule import learning_rate
from megarat.train.step import PairResult, train_pair

FOLDER = Path(__file__).parent
COLUMNS = (
    "time", "gpu", "gpus", "driver", "torch", "triton", "commit", "size", "run", "mesh", "micro_batch", "accumulation", "pairs", "tokens_s",
    "pair_ms", "spread_ms", "peak_gb", "planned_gb", "planned_tokens_s", "start_s", "loss_sparse", "loss_dense",
)  # fmt: skip
LINK_COLUMNS = ("time", "gpu", "gpus", "driver", "torch", "triton", "commit", "collective", "megabytes", "ms", "bus_gb_s")

SIZES = {
    "1.5b": {"layers": 24, "hidden": 2048, "heads": 16, "vocab": 32000},
    "2.6b": {"layers": 28, "hidden": 2560, "heads": 20, "vocab": 32000},
    "tiny": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
}
GLOBAL_BATCH = 8
SETTLED = 3  # pairs that are not timed: kernels are compiled, memory grows
ROUNDING = 2.0**-9


class Run(NamedTuple):
    """A mesh and its micro-batches. A GPU computes half of each sequence, or of each layer, in twice as many: equal work at a time."""

    parallel: dict[str, Any]
    micro_batch: int
    rounding: int | None = None  # seed of the change of the initial weights


RUNS = {
    "one": Run({}, 2),
    "one-rounded-1": Run({}, 4, 1),
    "one-rounded-2": Run({}, 1, 2),
    "one-rounded-3": Run({}, 2, 3),
    "zero1": Run({"zero": 1}, 2),
    "zero2": Run({"zero": 2}, 2),
    "zero3": Run({"zero": 3}, 2),
    "tensor": Run({"tensor": 2}, 4),
    "tensor-sequence": Run({"tensor": 2, "sequence": True}, 4),
    "pipeline": Run({"pipeline": 2}, 1),
    "context": Run({"context": 2}, 4),
    "context-tensor": Run(
        {"context": 2, "tensor": 2, "sequence": True}, 8
    ),  # of four GPUs; on those, others have twice the data ranks
}


def build_config(run: Run, options: argparse.Namespace) -> Config:
    """The config of a run."""
    return from_dict(
        {
            "run": {"dir": "none", "device": options.device},
            "model": dict(SIZES[options.size]),
            "data": {"shards": "none", "sequence_length": options.length},
            "train": {"pairs": 1000, "global_batch": GLOBAL_BATCH, "micro_batch": run.micro_batch},
            "optim": {"warmup": 20},
            "parallel": run.parallel,
        }
    )


def tokens_of(config: Config, pair: int) -> Tensor:
    """A global batch (8, T + 1): every token follows from the one before it half of the time, else it is a frequent one."""
    generator = torch.Generator().manual_seed(pair)
    vocab, shape = config.model.vocab, (config.data.sequence_length + 1, GLOBAL_BATCH)
    fresh_TB = (vocab ** torch.rand(shape, generator=generator)).long() % vocab  # density ~ 1 / id
    follows_TB = torch.rand(shape, generator=generator) < 0.5
    rows = [fresh_TB[0]]
    for fresh_B, follows_B in zip(fresh_TB[1:], follows_TB[1:], strict=True):
        rows.append(torch.where(follows_B, (rows[-1] * 31 + 7) % vocab, fresh_B))
    return torch.stack(rows, dim=1)


def own_share(tokens: Tensor, config: Config, mesh: Mesh) -> list[tuple[Tensor, Tensor]]:
    """This data rank's micro-batches of a global batch."""
    size = config.train.micro_batch
    starts = range(mesh.place.data * size, GLOBAL_BATCH, size * mesh.shape.data)
    rows = [tokens[start : start + size].to(mesh.device) for start in starts]
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def move_weights(engine: Engine, seed: int) -> None:
    """Change each weight by less than bf16 resolves."""
    generator = torch.Generator(engine.mesh.device).manual_seed(seed)
    for fragments in engine.state()[MASTER].values():
        for _, box in fragments.boxes:
            noise = torch.rand(box.shape, generator=generator, device=box.device) * 2 - 1
            box.mul_(1 + ROUNDING * noise)
    engine.adopt(0)


def release(engine: Engine) -> None:
    """Give the engine's memory back. DeepSpeed's gradient hooks are held by autograd, and keep all of it for as long as the process runs."""
    optimizer = engine._optimizer
    for tensor in _tensors(
        [vars(optimizer), optimizer.optimizer.state, optimizer.optimizer.param_groups, list(engine.model.parameters())]
    ):
        tensor.grad = None
        tensor.untyped_storage().resize_(0)


def _tensors(found: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple, dict)):
        for item in found.values() if isinstance(found, dict) else found:
            yield from _tensors(item)


def train(config: Config, mesh: Mesh, run: Run, pairs: int) -> tuple[list[float], list[PairResult], float, float]:
    """Seconds and result of each pair, peak memory of this rank in 10^9 bytes, seconds until the first pair began."""
    began = time.perf_counter()
    engine = Engine(local_model(config, mesh).initialise(config.train.seed), config, mesh)
    if run.rounding is not None:
        move_weights(engine, run.rounding)
    on_gpu = mesh.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start_s, seconds, results = time.perf_counter() - began, [], []
    assert config.sparse_patterns is not None
    for pair in range(pairs):
        micro_batches = own_share(tokens_of(config, pair), config, mesh)
        lr = learning_rate(pair, config.train.pairs, config.optim)
        distributed.barrier()
        began = time.perf_counter()
        results.append(train_pair(engine, micro_batches, config.sparse_patterns, config.patterns, lr))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak_gb = engine.memory_gb()
    release(engine)
    return seconds, results, peak_gb, start_s


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a run, on every rank."""
    run = RUNS[name]
    config = build_config(run, options)
    mesh = start(options.device, config)
    seconds, results, peak_gb, start_s = train(config, mesh, run, options.pairs)
    timed = seconds[SETTLED:] or seconds
    planned = plan.make_plan(config, mesh.world_size)
    assert planned.gpu is not None
    return {
        "gpus": mesh.world_size, "size": options.size, "run": name, "mesh": str(mesh.shape) + (", sequence" if config.parallel.sequence else "")
        + f", ZeRO {config.parallel.zero}", "micro_batch": run.micro_batch,
        "accumulation": GLOBAL_BATCH // (run.micro_batch * mesh.shape.data), "pairs": options.pairs,
        "tokens_s": round(GLOBAL_BATCH * options.length / statistics.median(timed), 1), "pair_ms": round(statistics.median(timed) * 1e3, 1),
        "spread_ms": round((max(timed) - min(timed)) * 1e3, 1), "peak_gb": round(max(comm.gather_objects(peak_gb, mesh.world)), 2),
        "planned_gb": round(planned.memory.total / plan.GB, 2), "planned_tokens_s": round(planned.tokens_per_second(planned.gpu), 1),
        "start_s": round(start_s, 1), "loss_sparse": _losses(result.sparse for result in results),
        "loss_dense": _losses(result.dense for result in results),
    }  # fmt: skip


def _losses(updates: Iterator[Any]) -> str:
    return " ".join(f"{update.loss:.6f}" for update in updates)


# ---- what the link carries -------------------------------------------------------------------------------------------------------

# Bytes that a rank sends, in units of the whole tensor and (n - 1) / n: what makes rates of different collectives comparable.
TRAVELS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


def link_rows(mesh: Mesh) -> list[dict[str, Any]]:
    """Time and rate of the collectives that training uses, in bf16, on all ranks."""
    rows = []
    for megabytes in (1, 16, 64, 256, 1024) if mesh.device.type == "cuda" else (1,):
        whole = torch.ones(megabytes * 500_000, dtype=torch.bfloat16, device=mesh.device)
        part = torch.ones(len(whole) // mesh.world_size, dtype=torch.bfloat16, device=mesh.device)
        calls: dict[str, Callable[[], object]] = {
            "all-reduce": lambda x=whole: distributed.all_reduce(x, group=mesh.world),
            "all-gather": lambda x=whole, y=part: distributed.all_gather_into_tensor(x, y, group=mesh.world),
            "reduce-scatter": lambda x=whole, y=part: distributed.reduce_scatter_tensor(y, x, group=mesh.world),
        }
        for collective, call in calls.items():
            seconds = _seconds(call, mesh)
            sent = TRAVELS[collective] * 1e6 * megabytes * (mesh.world_size - 1) / mesh.world_size
            rows.append(
                {"gpus": mesh.world_size, "collective": collective, "megabytes": megabytes, "ms": round(seconds * 1e3, 4),
                 "bus_gb_s": round(sent / seconds / 1e9, 1)}
            )  # fmt: skip
    return rows


def _seconds(call: Callable[[], object], mesh: Mesh, count: int = 20) -> float:
    def repeat(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    repeat(5)
    return repeat(count) / count


# ---- files -----------------------------------------------------------------------------------------------------------------------


def stamp(device: torch.device) -> dict[str, str]:
    """When, where and with what a row was measured."""
    where = (
        environment()
        if device.type == "cuda"
        else {"gpu": "cpu", "driver": "", "torch": torch.__version__, "triton": "", "commit": ""}
    )
    return {"time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"), **where}


def write_plans(path: Path, options: argparse.Namespace) -> None:
    """What `megarat plan` says about every run on as few GPUs as it takes, as JSON."""
    plans = {}
    for name, run in RUNS.items():
        config = build_config(run, options)
        ranks = (
            1
            if name.startswith("one")
            else max(2, math.prod(getattr(config.parallel, axis) for axis in ("tensor", "pipeline", "context")))
        )
        told = plan.as_json(plan.make_plan(config, ranks))
        plans[name] = {key: value for key, value in told.items() if not key.startswith("config")}
    path.write_text(json.dumps(plans, indent=1))


def main() -> None:
    """Measure the named runs one after the other in this world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--links", action="store_true", help="time all-reduce, all-gather and reduce-scatter first")
    parser.add_argument("--plans", type=Path, help="write what `megarat plan` says to this JSON file")
    parser.add_argument("--results", type=Path, default=FOLDER / "mesh.csv")
    parser.add_argument("--link-results", type=Path, default=FOLDER / "links.csv")
    parser.add_argument("--report", action="store_true", help="write the tables of docs/parallelism.md from the results")
    options = parser.parse_args()
    if unknown := set(options.runs) - RUNS.keys():
        parser.error(f"unknown runs: {', '.join(sorted(unknown))}")
    if options.plans:
        write_plans(options.plans, options)
    if options.report:
        from benchmarks.mesh_report import write

        write(ROOT / "docs" / "parallelism.md", options.results, options.link_results)
    if options.links:
        mesh = start(options.device)
        rows = link_rows(mesh)
        if mesh.is_first:
            append([{**stamp(mesh.device), **row} for row in rows], options.link_results, LINK_COLUMNS)
    for name in options.runs:
        row = measure(name, options)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if not distributed.get_rank():
            append([{**stamp(torch.device(options.device)), **row}], options.results, COLUMNS)
            print({key: value for key, value in row.items() if not key.startswith("loss")}, flush=True)


if __name__ == "__main__":
    main()
