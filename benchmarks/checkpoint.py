"""Saving and loading the checkpoint of a large model: `torchrun --nproc_per_node 2 -m benchmarks.checkpoint --dir /local/disk`.

Builds the engine of a real run (DeepSpeed ZeRO 1, bf16, fp32 masters), makes a pair, and measures: the checkpoint's size, how long an
asynchronous save keeps training waiting, full save and load beside what the disk itself takes and gives (as many files and threads, plain
bytes, synced; read after the page cache was dropped), and each rank's peak memory on the host. What was loaded is compared with what was
saved, bit for bit. Then `--resume` trains a small model through `megarat pretrain` twice, once with a stop and a resume in the middle, with
`train.deterministic`, and compares losses, weights and moments.

The first rank prints one JSON object a part and appends it to `--results`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from benchmarks.train import SIZES, fill_weights, resident_batches, write_tokens
from megarat import comm
from megarat.checkpoint import load as checkpoints
from megarat.checkpoint.background import Moment, Saver
from megarat.checkpoint.manifest import CheckpointState, read_manifest
from megarat.config import Config, from_dict
from megarat.engine import Engine
from megarat.errors import StoppedEarly
from megarat.mesh import Mesh, start
from megarat.model.flops import parameter_count
from megarat.model.lm import local_model
from megarat.model.pattern import describe

GB = 1e9
THREADS = 8  # of a rank, as in megarat.checkpoint.storage


def build_config(options: argparse.Namespace, ranks: int, **changes: Any) -> Config:
    """A run of `--size` whose checkpoints lie in `--dir`."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(options.dir / "run"), "device": options.device},
        "model": dict(SIZES[options.size]),
        "data": {"shards": str(options.dir / "shards"), "sequence_length": options.length},
        "train": {"pairs": 10**6, "micro_batch": 1, "global_batch": 2 * ranks, "precision": "bf16"},
        "parallel": {"zero": options.zero},
        "log": {"progress": False, "tensorboard": False},
    }
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    return from_dict(tree)


def peak_host_gb(mesh: Mesh) -> float:
    """Peak resident memory so far of the rank that has the highest; Linux counts in KiB."""
    return max(comm.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, mesh.world))


def wait_for_device(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()


def timed(mesh: Mesh, work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all have ended."""
    wait_for_device(mesh)
    torch.distributed.barrier()
    began = time.perf_counter()
    work()
    wait_for_device(mesh)
    torch.distributed.barrier()
    return time.perf_counter() - began


# ---- the disk ----------------------------------------------------------------------------------------------------------------------


def disk_rates(folder: Path, rank_bytes: int, mesh: Mesh) -> dict[str, float]:
    """GB/s of all ranks together that the disk takes (until synced) and gives: plain bytes in as many files as threads."""
    own = folder / f"plain-{mesh.rank}"
    own.mkdir(parents=True)
    size = rank_bytes // THREADS
    block = os.urandom(1 << 24)

    def write(number: int) -> None:
        with (own / str(number)).open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            os.fsync(file.fileno())

    def read(number: int) -> None:
        with (own / str(number)).open("rb", buffering=0) as file:
            while file.read(len(block)):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        written = timed(mesh, lambda: list(pool.map(write, range(THREADS))))
        total = sum(comm.gather_objects(sum(file.stat().st_size for file in own.iterdir()), mesh.world))
        drop_from_cache(own)
        taken = timed(mesh, lambda: list(pool.map(read, range(THREADS))))
    shutil.rmtree(own)
    return {"disk_write_gb_s": total / GB / written, "disk_read_gb_s": total / GB / taken}


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the (synced) files of a folder, so that they are read from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_system(folder: Path) -> str:
    """Type of the file system below a folder, and its free space."""
    found = ""
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if str(folder.resolve()).startswith(place) and len(place) >= len(found.partition(" ")[0]):
            found = f"{place} {kind}"
    return f"{found.partition(' ')[2]}, {shutil.disk_usage(folder).free / GB:.0f} GB free"


# ---- saving and loading ------------------------------------------------------------------------------------------------------------


class Trained:
    """An engine that has made a pair, and its next batches."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        with mesh.device:
            model = local_model(config, mesh)
        fill_weights(model, config.model.init_std)
        self.engine = Engine(model, config, mesh)
        self.batches: Iterator[Any] = resident_batches(config, self.engine.micro_batches, mesh.device, seed=mesh.place.data)
        self.pair()

    def pair(self) -> None:
        """A sparse and a dense update, waited for."""
        batch = next(self.batches)
        for patterns in (self.config.sparse_patterns, self.config.patterns):
            assert patterns is not None
            assert self.engine.update(batch, patterns, 1e-4).finite
        wait_for_device(self.mesh)

    def moment(self, pair: int) -> Moment:
        """What a run would save now."""
        description = CheckpointState("pretrain", pair, 0, self.config, describe(self.config.patterns), "bf16")
        return Moment(description, self.engine.state(), self.engine.dtype)

    def boxes(self) -> list[torch.Tensor]:
        """This rank's masters and moments."""
        return [box.tensor for named in self.engine.state().values() for held in named.values() for box in held.boxes]

    def copy(self) -> list[torch.Tensor]:
        """A copy of them, where they are."""
        return [box.clone() for box in self.boxes()]

    def equals(self, copy: list[torch.Tensor]) -> bool:
        """Whether they are the same bit for bit, on all ranks."""
        same = all(torch.equal(box, copied) for box, copied in zip(self.boxes(), copy, strict=True))
        return all(comm.gather_objects(same, self.mesh.world))


def saver(config: Config, mesh: Mesh, asynchronous: bool) -> Saver:
    """As a run makes it."""
    config.checkpoint.asynchronous = asynchronous
    return Saver(Path(config.run.dir) / "checkpoints", config.checkpoint, mesh.device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of saving and loading, on every rank; what is known is told after each part."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    config = build_config(options, ranks)
    mesh = start(options.device, config)
    parameters = parameter_count(config.model)
    row: dict[str, Any] = {"part": "save and load", "ranks": ranks, "size": options.size, "parameters": parameters}
    row |= {"file_system": file_system(options.dir), "zero": options.zero}
    row |= disk_rates(options.dir, int(options.disk_share * 14 * parameters) // ranks, mesh)
    tell(mesh, row)
    trained = Trained(config, mesh)
    row["host_gb_built"] = peak_host_gb(mesh)
    measure_save_and_load(trained, row)
    if not options.only_synchronous:
        measure_asynchronous(trained, row, options.pairs_meanwhile)
    return row


def measure_save_and_load(trained: Trained, row: dict[str, Any]) -> None:
    """A save that training waits for, and loads of it from the disk and from the page cache."""
    mesh, saved, synchronous = trained.mesh, trained.copy(), saver(trained.config, trained.mesh, asynchronous=False)
    row["save_s"] = timed(mesh, lambda: synchronous.begin(trained.moment(1)))
    folder = synchronous.wait()
    assert folder is not None
    entries = read_manifest(folder)
    size = sum(entry.bytes for entry in entries.values())
    row |= {"bytes": size, "bytes_a_parameter": size / row["parameters"], "save_gb_s": size / GB / row["save_s"]}
    row |= {"save_of_disk": row["save_gb_s"] / row["disk_write_gb_s"], "host_gb_saved": peak_host_gb(mesh)}
    tell(mesh, row)

    trained.pair()  # what is loaded now must not be there yet
    assert not trained.equals(saved)
    if mesh.is_first:
        drop_from_cache(folder)
    for name in ("load_s", "load_from_cache_s"):
        row[name] = timed(mesh, lambda: checkpoints.load_optimizer_into(folder, trained.engine.state(), mesh.world))
    row["loaded_equals_saved"] = trained.equals(saved)
    read = sum(entry.bytes for name, entry in entries.items() if not name.startswith("weights/"))
    row |= {"load_gb_s": read / GB / row["load_s"], "host_gb_loaded": peak_host_gb(mesh)}
    row |= {
        "load_of_disk_read": row["load_gb_s"] / row["disk_read_gb_s"],
        "load_of_disk_write": row["load_gb_s"] / row["disk_write_gb_s"],
    }
    tell(mesh, row)


def measure_asynchronous(trained: Trained, row: dict[str, Any], pairs_meanwhile: int) -> None:
    """How long training waits for a save that goes on beside it, and how long that takes."""
    mesh, background = trained.mesh, saver(trained.config, trained.mesh, asynchronous=True)
    row["prepare_s"] = timed(mesh, lambda: (background.prepare(trained.engine.state()), background.join()))
    row["pair_s"] = statistics.median(timed(mesh, trained.pair) for _ in range(3))
    row["blocked_s"] = timed(mesh, lambda: background.begin(trained.moment(2)))
    began = time.perf_counter() - row["blocked_s"]
    row["pair_while_saving_s"] = statistics.median(timed(mesh, trained.pair) for _ in range(pairs_meanwhile))
    background.wait()
    row["save_in_background_s"] = time.perf_counter() - began
    row["host_gb_saved_asynchronously"] = peak_host_gb(mesh)
    tell(mesh, row)


# ---- resuming on a GPU -------------------------------------------------------------------------------------------------------------


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Two runs of eight pairs with `train.deterministic`, one stopped after the fourth and resumed: what differs between them."""
    from megarat.train import loop

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    folders = {name: options.dir / name for name in ("whole", "stopped")}
    changes = {"checkpoint": {"every": 2, "keep": 4}, "guard": {"deviations": 10, "slow_every": 2}}
    tiny = dict(SIZES["tiny"], hidden=256)  # heads of 128, as the kernels take them
    config = build_config(options, ranks, train={"pairs": 8, "deterministic": True}, model=tiny, **changes)
    mesh = start(options.device, config)
    if mesh.is_first:
        write_tokens(options.dir / "shards", config.model.vocab, 64 * 2 * ranks * (options.length + 1))
    torch.distributed.barrier()
    config.run.dir = str(folders["whole"])
    loop.pretrain(config)
    original = loop.train_pair
    calls = []

    def stop_in_fourth(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    config.run.dir = str(folders["stopped"])
    loop.train_pair = stop_in_fourth
    try:
        loop.pretrain(config)
    except StoppedEarly:
        loop.train_pair = original
    loop.pretrain(config, verify_resume=True)
    row = {"part": "deterministic resume", "ranks": ranks, "device": mesh.device.type, "zero": options.zero}
    if mesh.is_first:
        row["stopped_after"] = len(calls)
        row["different_metrics"] = different_metrics(*folders.values())
        row["different_tensors"] = different_tensors(*folders.values())
    return row


def different_metrics(left: Path, right: Path) -> list[str]:
    """Recorded figures, times apart, that are not the same."""
    runs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (left, right)]
    keys = ("tokens", "loss_sparse", "loss_dense", "grad_norm_sparse", "grad_norm_dense", "lr", "stream_hash", "skipped")
    return [
        f"pair {ours['pair']} {key}: {ours[key]} {theirs[key]}"
        for ours, theirs in zip(*runs, strict=True)
        for key in keys
        if ours[key] != theirs[key]
    ]


def different_tensors(left: Path, right: Path) -> list[str]:
    """Masters and moments that are not the same bit for bit."""
    ours, theirs = checkpoints.load_optimizer(left), checkpoints.load_optimizer(right)
    return [f"{kind} {name}" for kind in ours for name in ours[kind] if not torch.equal(ours[kind][name], theirs[kind][name])]


def tell(mesh: Mesh, row: dict[str, Any]) -> None:
    if mesh.is_first:
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="new folder on the disk to measure")
    parser.add_argument("--size", default="1.5b", choices=sorted(SIZES))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only-synchronous", action="store_true", help="leave the asynchronous save out")
    parser.add_argument("--pairs-meanwhile", type=int, default=2, help="pairs trained while the asynchronous save goes on")
    parser.add_argument("--disk-share", type=float, default=1.0, help="plain bytes to write and read, in checkpoints")
    parser.add_argument("--resume", action="store_true", help="measure resuming instead")
    parser.add_argument("--results", type=Path, help="file to append the row to")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    row = resume(options) if options.resume else measure(options)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    row |= environment() if torch.cuda.is_available() else {"torch": torch.__version__, "device": "cpu"}
    print(json.dumps(row, indent=2))
    if options.results:
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
