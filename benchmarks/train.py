"""The real training step, timed: `python -m benchmarks.train --size 1.5b --micro-batch 8 --accumulation 4`; under `torchrun` on several GPUs.

One process (a rank) builds the engine of a run (DeepSpeed ZeRO-1, fp32 masters, clipping, guards) and makes pairs of updates, the sparse
pass and the dense pass of each, on resident random tokens or (`--data loader`) through the run's own loader from shards. `--plain`
times the same recipe in plain PyTorch instead (`benchmarks.plain`). The first rank appends one row to benchmarks/train.csv; `--profile`
adds a table of GPU time by class of kernel to benchmarks/profile.csv. `python -m benchmarks.train_report` writes both into
docs/performance.md.

Any key of a run's config can be set: `--set parallel.recompute=selective`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.measure import Ceilings, environment, measure_ceilings
from benchmarks.phases import Stopwatch
from benchmarks.profile import profile_rows
from benchmarks.tables import append
from megarat.config import Config, from_dict
from megarat.data.format import Piece, ShardWriter, TokenizerInfo, token_dtype
from megarat.model.flops import pair_flops_per_token, parameter_count, peak_flops, training_flops_per_token
from megarat.model.pattern import Patterns
from megarat.train.step import sparse_patterns

FOLDER = Path(__file__).parent
COLUMNS = (
    "time", "gpu", "gpus", "driver", "torch", "triton", "deepspeed", "commit", "copy_tb_s", "matmul_tflop_s", "implementation", "size",
    "length", "micro_batch", "accumulation", "mesh", "settings", "data", "pairs", "joint_tokens_s", "sparse_tokens_s", "dense_tokens_s",
    "mfu", "pair_ms", "spread_ms", "sparse_forward_ms", "sparse_backward_ms", "dense_forward_ms", "dense_backward_ms", "update_ms",
    "data_ms", "peak_gb", "first_pair_s", "start_s", "loss_sparse", "loss_dense", "to_first_step_s",
)  # fmt: skip
PROFILE_COLUMNS = (
    "time",
    "gpu",
    "torch",
    "commit",
    "implementation",
    "size",
    "settings",
    "micro_batch",
    "class",
    "ms",
    "percent",
    "kernels",
)

# Published shapes (RAT+, arXiv 2602.18196); the tiny one is for machines without a GPU.
SIZES = {
    "1.5b": {"layers": 24, "hidden": 2048, "heads": 16, "vocab": 32000},
    "2.6b": {"layers": 28, "hidden": 2560, "heads": 20, "vocab": 32000},
    "tiny": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
}
LR = 1e-4


class Trainer(Protocol):
    """What is timed: `update` makes one optimizer update of all micro-batches, `summed_update` one of both passes."""

    def update(self, micro_batches: list[Any], patterns: Patterns, lr: float) -> Any: ...

    def summed_update(self, micro_batches: list[Any], passes: Any, lr: float, accepts: Any) -> Any: ...


def build_config(options: argparse.Namespace, folder: str, ranks: int) -> Config:
    """The run that the options describe."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": folder, "device": options.device},
        "model": dict(SIZES[options.size]),
        "data": {"shards": f"{folder}/shards", "sequence_length": options.length},
        "attention": {"pattern": options.pattern},
        "train": {"pairs": 10**6, "micro_batch": options.micro_batch},
        "parallel": {},
        "log": {"progress": False, "tensorboard": False},
    }
    for override in options.set:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = _plain_value(value)
    parallel = tree["parallel"]
    replicas = ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))
    tree["train"].setdefault("global_batch", options.micro_batch * options.accumulation * replicas)
    return from_dict(tree)


def _plain_value(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def write_tokens(folder: Path, vocab: int, tokens: int) -> None:
    """A corpus of random tokens in documents of 1000, in the format of the loader."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(3, vocab, (tokens,), generator=generator).numpy().astype(token_dtype(vocab))
    ends = list(range(1000, tokens + 1, 1000))
    stream[[end - 1 for end in ends]] = 2
    with ShardWriter(
        folder / "train", vocab_size=vocab, eos_id=2, tokenizer=TokenizerInfo("none", "sentencepiece", "0" * 64)
    ) as writer:
        writer.add(Piece(stream, torch.tensor(ends).numpy()))
        writer.finish({"seed": 0})


def resident_batches(config: Config, count: int, device: torch.device, seed: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For ever the same `count` micro-batches of random tokens, on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (config.train.micro_batch, config.data.sequence_length + 1)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, config.model.vocab, shape, generator=generator, device=device)
        batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    while True:
        yield batches


def fill_weights(model: torch.nn.Module, std: float) -> None:
    """Random matrices made where the model lies: the run's own initialisation takes longer and is timed by `--data loader`."""
    torch.manual_seed(0)  # of all devices: runs of one shape begin with the same weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, std)


def build_megarat(config: Config, options: argparse.Namespace, mesh: Any) -> tuple[Trainer, Iterator[Any]]:
    """The engine of the run and its batches."""
    if options.data == "loader":
        from megarat.train.run import build

        if mesh.is_first:
            write_tokens(
                Path(config.data.primary), config.model.vocab, config.train.global_batch * (config.data.sequence_length + 1) * 4
            )
        torch.distributed.barrier()
        run = build(config, "pretrain", mesh, None, None)
        return run.engine, (batch.micro_batches for batch in run.loader.iterate(0, config.data.prefetch))
    from megarat.engine import Engine
    from megarat.model.lm import local_model

    with torch.device(mesh.device):
        model = local_model(config, mesh)
    fill_weights(model, config.model.init_std)
    engine = Engine(model, config, mesh)
    return engine, resident_batches(config, engine.micro_batches, mesh.device, seed=mesh.place.data)


def watch_engine(engine: Any, watch: Stopwatch) -> None:
    """Times what the engine does, by pass."""
    watch.time(engine, "_forward", "forward")
    watch.time(engine, "_backward", "backward")
    if engine._recorded is not None:
        watch.time(engine._recorded, "loss", "forward")  # a recording is forward and backward in one
    watch.time(engine, "_decide", "update")
    watch.time(engine, "_step", "update")


def process_age() -> float:
    """Seconds since this process was started (Linux), imports and all."""
    started = float(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def train_pairs(
    trainer: Trainer, batches: Iterator[Any], config: Config, watch: Stopwatch, pairs: int
) -> list[tuple[float, Any, Any]]:
    """(seconds, sparse update, dense update) of each pair; the device is waited for at the end of each, as a run's guard does."""
    history = []
    for pair in range(pairs):
        began = time.perf_counter()
        with watch.phase("data"):
            micro_batches = next(batches)
        sparse = None
        if config.train.recipe == "summed":
            sparse, dense = trainer.summed_update(micro_batches, (config.sparse_patterns, config.patterns), LR, (None, None))
        else:
            if sparse_patterns(config, pair) is not None:
                watch.part = "sparse"
                sparse = trainer.update(micro_batches, config.sparse_patterns, LR)
            watch.part = "dense"
            dense = trainer.update(micro_batches, config.patterns, LR)
        watch.part = ""
        watch.settle()
        history.append((time.perf_counter() - began, sparse, dense))
    return history


def figures(
    config: Config, history: list[tuple[float, Any, Any]], watch: Stopwatch, ranks: int, device: torch.device
) -> dict[str, Any]:
    """A row's figures from the timed pairs."""
    times = [pair[0] for pair in history]
    seconds = (
        statistics.median(times) if config.train.sparse_every == 1 else statistics.mean(times)
    )  # pairs differ where some are dense only
    tokens = config.train.global_batch * config.data.sequence_length
    peak = peak_flops(device)
    row: dict[str, Any] = {
        "joint_tokens_s": round(tokens / seconds, 1),
        "mfu": None if peak is None else round(pair_flops_per_token(config) * tokens / seconds / (peak * ranks), 4),
        "pair_ms": round(seconds * 1e3, 1),
        "spread_ms": round((max(p[0] for p in history) - min(p[0] for p in history)) * 1e3, 1),
        "data_ms": watch.median("data", len(history)),
    }
    for part in ("sparse", "dense"):
        forward, backward = (watch.median(f"{part} {phase}", len(history)) for phase in ("forward", "backward"))
        update = watch.median(f"{part} update", len(history))
        row |= {f"{part}_forward_ms": forward, f"{part}_backward_ms": backward}
        if forward and backward:
            row[f"{part}_tokens_s"] = round(tokens / (forward + backward + (update or 0.0)) * 1e3, 1)
    row["update_ms"] = watch.median("dense update", len(history))
    _, sparse, dense = history[-1]
    return row | {"loss_sparse": sparse and round(sparse.loss, 5), "loss_dense": dense and round(dense.loss, 5)}


def describe(row: dict[str, Any], config: Config, ceilings: Ceilings | None) -> str:
    """The result in a few lines for people."""
    length = config.data.sequence_length
    needed = [
        training_flops_per_token(config.model, patterns, length)
        for patterns in (config.sparse_patterns, config.patterns)
        if patterns
    ]
    lines = [
        f"{row['implementation']} {row['size']} ({parameter_count(config.model) / 1e9:.3f} G parameters), T={length}, micro-batch "
        f"{row['micro_batch']} x {row['accumulation']}, {row['gpus']} GPU(s), {row['settings'] or 'defaults'}",
        f"  joint {row['joint_tokens_s']:,} data-tokens/s, MFU {row['mfu']} (causal half), {row['pair_ms']} ms a pair, peak {row['peak_gb']} GB",
        f"  sparse {row.get('sparse_tokens_s')} tokens/s ({row.get('sparse_forward_ms')} + {row.get('sparse_backward_ms')} ms), "
        f"dense {row.get('dense_tokens_s')} tokens/s ({row.get('dense_forward_ms')} + {row.get('dense_backward_ms')} ms), "
        f"update {row['update_ms']} ms, data {row['data_ms']} ms",
        f"  start {row['start_s']} s, first pair {row['first_pair_s']} s, from the start of the process {row['to_first_step_s']} s, "
        f"losses {row['loss_sparse']} {row['loss_dense']}",
    ]
    if ceilings is not None:
        tokens = config.train.global_batch * length / row["gpus"]
        floor_ms = sum(needed) * tokens / ceilings.flop_per_s * 1e3
        lines.append(f"  matrix products alone at this run's {ceilings.flop_per_s / 1e12:.0f} TFLOP/s: {floor_ms:.0f} ms a pair")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences a rank computes at a time")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an update")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--pattern", default="dense", help="pattern of the second pass")
    parser.add_argument("--pairs", type=int, default=3, help="pairs that are timed")
    parser.add_argument("--warm-up", type=int, default=2, help="pairs before them; the first one compiles kernels")
    parser.add_argument("--data", choices=("resident", "loader"), default="resident")
    parser.add_argument("--plain", action="store_true", help="the same recipe in plain PyTorch")
    parser.add_argument("--profile", action="store_true", help="one more pair under the profiler")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the run's config")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--results", type=Path, default=FOLDER / "train.csv")
    parser.add_argument("--profiles", type=Path, default=FOLDER / "profile.csv")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    began = time.perf_counter()
    options = parse(arguments)
    shared = tempfile.gettempdir() if options.data == "loader" and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    with tempfile.TemporaryDirectory() as own:
        folder = f"{shared}/megarat-bench-{os.environ.get('MASTER_PORT')}" if shared else own
        return _measure(options, folder, began)


def _measure(options: argparse.Namespace, folder: str, began: float) -> dict[str, Any]:
    from megarat.mesh import start

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    config = build_config(options, folder, ranks)
    mesh = start(config.run.device, config)
    gpu = mesh.device.type == "cuda"
    watch = Stopwatch(mesh.device)
    if options.plain:
        from benchmarks.plain import PlainTrainer

        trainer: Any = PlainTrainer(config, options.accumulation, mesh.device, watch)
        batches: Iterator[Any] = resident_batches(config, options.accumulation, mesh.device, seed=0)
    else:
        trainer, batches = build_megarat(config, options, mesh)
        watch_engine(trainer, watch)
    start_s = time.perf_counter() - began
    first = train_pairs(trainer, batches, config, watch, 1)[0]
    to_first_step_s = process_age()
    train_pairs(trainer, batches, config, watch, options.warm_up - 1)
    watch.clear()
    history = train_pairs(trainer, batches, config, watch, options.pairs)
    peak_gb = torch.cuda.max_memory_allocated(mesh.device) / 1e9 if gpu else 0.0
    row: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "implementation": "plain PyTorch" if options.plain else "megarat",
        "size": options.size, "length": options.length, "micro_batch": options.micro_batch, "accumulation": options.accumulation,
        "mesh": str(mesh.shape), "gpus": ranks, "settings": " ".join([*options.set, *([] if options.pattern == "dense" else [options.pattern])]),
        "data": options.data, "pairs": options.pairs, "peak_gb": round(peak_gb, 1), "first_pair_s": round(first[0], 1),
        "start_s": round(start_s, 1), "to_first_step_s": round(to_first_step_s, 1), **figures(config, history, watch, ranks, mesh.device),
    }  # fmt: skip
    watch.enabled = False
    kernels = profile_rows(lambda: train_pairs(trainer, batches, config, watch, 1)) if options.profile else []
    if not mesh.is_first:
        return row
    ceilings = _ceilings_after(trainer) if gpu else None
    row |= _versions() | (environment() if gpu else {"gpu": "cpu", "torch": torch.__version__, "commit": "unknown"})
    if ceilings is not None:
        row |= {"copy_tb_s": round(ceilings.bytes_per_s / 1e12, 3), "matmul_tflop_s": round(ceilings.flop_per_s / 1e12, 1)}
    print(describe(row, config, ceilings), flush=True)
    append([row], options.results, COLUMNS)
    for kernel_row in kernels:
        print("   ", *(f"{kernel_row[key]!s:>24}" for key in ("class", "ms", "percent", "kernels")), flush=True)
        append([{key: row.get(key) for key in PROFILE_COLUMNS if key in row} | kernel_row], options.profiles, PROFILE_COLUMNS)
    return row


def _ceilings_after(_trainer: Trainer) -> Ceilings | None:
    """The chip's rates in this run, where the training left the room for measuring them (5 GB)."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return measure_ceilings() if free > 6e9 else None


def _versions() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"deepspeed": importlib.metadata.version("deepspeed")}
    except importlib.metadata.PackageNotFoundError:
        deepspeed: Callable[[], Any] | None = getattr(sys.modules.get("deepspeed"), "__version__", None)
        return {"deepspeed": str(deepspeed)}


if __name__ == "__main__":
    main()
