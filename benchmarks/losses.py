"""Do switches change what is learnt? The same tokens trained under several of them: `python -m benchmarks.losses [--pairs 500 [--schedule 5000]] [ARM …]`.

A model of 12 layers learns to predict the bytes of Python's own standard library (present wherever this runs), in pairs of updates as in
pretraining. The first arm is the default; each other one changes what its name says. How far two equal runs lie apart is shown by the arm
that sums the same gradients in another order, and by another seed of the initial weights. Rows go to benchmarks/losses.csv: mean losses of
both passes over the last tenth of the pairs, the distance from the first arm, pair by pair over that stretch (of the dense losses mean and root
mean square, of the sparse ones the mean over the pairs that both arms made a sparse pass for), and the time.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import commit, environment
from benchmarks.tables import append
from megarat.config import Config, from_dict
from megarat.engine import Engine
from megarat.mesh import start
from megarat.model.lm import local_model
from megarat.train.schedule import learning_rate
from megarat.train.step import sparse_patterns, train_pair

FOLDER = Path(__file__).parent
COLUMNS = (
    "time", "gpu", "driver", "torch", "triton", "commit", "arm", "layers", "hidden", "length", "batch", "pairs", "loss_sparse",
    "loss_dense", "mean_distance", "rms_distance", "largest_distance", "seconds", "schedule", "sparse_distance",
)  # fmt: skip
BYTES = 256


class Arm(NamedTuple):
    """Settings laid over the default run."""

    settings: dict[str, dict[str, Any]]
    reference: bool = False  # all operations by their plain torch form
    reverse: bool = False  # the sequences of each batch the other way round: the same arithmetic, summed in another order


ARMS = {
    "default": Arm({}),
    "fp8": Arm({"train": {"fp8": True}}),
    "rows in another order": Arm({}, reverse=True),
    "another seed": Arm({"train": {"seed": 1}}),
    "another seed, fp8": Arm({"train": {"seed": 1, "fp8": True}}),
    "reference operations": Arm({}, reference=True),
    "weight gradients summed by products": Arm({"train": {"weight_gradients": "product"}}),
    "compiled": Arm({"train": {"compile": True}}),
    "bf16 residual": Arm({"model": {"residual_dtype": "compute"}}),
    "one summed update": Arm({"train": {"recipe": "summed"}}),
    "sparse pass every 2nd pair": Arm({"train": {"sparse_every": 2}}),
    "sparse pass every 4th pair": Arm({"train": {"sparse_every": 4}}),
}


def corpus(limit: int) -> Tensor:
    """Source bytes of the standard library, at most `limit` of them, uint8."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    text = bytearray()
    for file in files:
        if "site-packages" not in file.parts and "test" not in file.parts:
            text += file.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def config_of(arm: Arm, options: argparse.Namespace) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused", "device": options.device},
        "model": {"layers": options.layers, "hidden": options.hidden, "heads": options.hidden // options.head, "vocab": BYTES},
        "data": {"shards": "unused", "sequence_length": options.length},
        "train": {"pairs": options.pairs, "global_batch": options.batch, "micro_batch": options.batch, "seed": 0},
        "optim": {"lr": 6e-4, "min_lr": 6e-5},
    }
    for section, values in arm.settings.items():
        tree.setdefault(section, {}).update(values)
    return from_dict(tree)


def batch_of(data: Tensor, pair: int, options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The micro-batch of a pair: a pure function of its number."""
    generator = torch.Generator().manual_seed(pair)
    starts = torch.randint(0, data.numel() - options.length - 1, (options.batch, 1), generator=generator)
    tokens = data[starts + torch.arange(options.length + 1)].long().to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(name: str, data: Tensor, options: argparse.Namespace) -> tuple[list[tuple[float, float]], float]:
    """(sparse loss, dense loss) of every pair, and seconds; a pass that was left out counts with NaN."""
    arm = ARMS[name]
    config = config_of(arm, options)
    os.environ["MEGARAT_OPS"] = "reference" if arm.reference else "auto"
    mesh = start(config.run.device, config)
    engine = Engine(local_model(config, mesh).initialise(config.train.seed), config, mesh)
    losses, began = [], time.perf_counter()
    for pair in range(options.pairs):
        ids_BT, labels_BT = batch_of(data, pair, options, mesh.device)
        micro_batch = (ids_BT.flip(0), labels_BT.flip(0)) if arm.reverse else (ids_BT, labels_BT)
        lr = learning_rate(pair, options.schedule, config.optim)
        summed = config.train.recipe == "summed"
        result = train_pair(engine, [micro_batch], sparse_patterns(config, pair), config.patterns, lr, None, summed)
        losses.append(tuple(math.nan if update is None else update.loss for update in (result.sparse, result.dense)))
    os.environ["MEGARAT_OPS"] = "auto"
    return losses, time.perf_counter() - began  # type: ignore[return-value]


def compare(losses: list[tuple[float, float]], first: list[tuple[float, float]]) -> dict[str, float]:
    """Mean losses over the last tenth, and their distances from another arm's there."""
    last = slice(-max(1, len(losses) // 10), None)
    sparse = [loss for loss, _ in losses[last] if not math.isnan(loss)]
    dense = [loss for _, loss in losses[last]]
    distances = [ours - theirs for ours, (_, theirs) in zip(dense, first[last], strict=True)]
    of_sparse = [ours - theirs for (ours, _), (theirs, _) in zip(losses[last], first[last], strict=True)]
    of_sparse = [distance for distance in of_sparse if not math.isnan(distance)]
    return {
        "loss_sparse": round(statistics.mean(sparse), 5) if sparse else math.nan,
        "loss_dense": round(statistics.mean(dense), 5),
        "mean_distance": round(statistics.mean(distances), 5),
        "rms_distance": round(math.sqrt(statistics.mean(d * d for d in distances)), 5),
        "largest_distance": round(max(abs(ours[1] - theirs[1]) for ours, theirs in zip(losses, first, strict=True)), 5),
        "sparse_distance": round(statistics.mean(of_sparse), 5) if of_sparse else math.nan,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}; all by default")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument(
        "--schedule", type=int, help="pairs that the learning rate is laid out for; by default as many as are run"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--head", type=int, default=128, help="channels of a head")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--results", type=Path, default=FOLDER / "losses.csv")
    parser.add_argument("--curves", type=Path, help="file for the loss of every pair and arm")
    options = parser.parse_args(arguments)
    options.schedule = options.schedule or options.pairs
    data = corpus(20_000_000)
    rows, first = [], None
    for name in options.arms or ARMS:
        losses, seconds = train(name, data, options)
        first = losses if first is None else first
        row = {
            "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            **(environment() if torch.cuda.is_available() else {"gpu": "cpu", "torch": torch.__version__, "commit": commit()}),
            "arm": name, "layers": options.layers, "hidden": options.hidden, "length": options.length, "batch": options.batch,
            "pairs": options.pairs, "schedule": options.schedule, **compare(losses, first), "seconds": round(seconds, 1),
        }  # fmt: skip
        print(", ".join(f"{key} {row[key]}" for key in COLUMNS[6:]), flush=True)
        append([row], options.results, COLUMNS)
        rows.append(row)
        if options.curves:
            with options.curves.open("a") as file:
                file.writelines(f"{name},{pair},{sparse:.5f},{dense:.5f}\n" for pair, (sparse, dense) in enumerate(losses))
    return rows


if __name__ == "__main__":
    main()
