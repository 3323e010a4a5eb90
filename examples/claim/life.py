"""The life of one arm in one process: pretraining, scores, adaptations, needles; its results are one JSON file that grows with each stage.

Training and evaluation are megarat's own entry points, called as the command line calls them.

Shapes: B sequences, T tokens, H heads, K head channels, C = H K.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.claim import arms
from megarat.config import Config
from megarat.data.reader import TokenReader
from megarat.data.store import join
from megarat.demo.report import read_metrics
from megarat.eval.perplexity import HeldOut
from megarat.eval.runner import EvalSettings, evaluate
from megarat.infer.load import load
from megarat.model.flops import pair_flops_per_token, parameter_count
from megarat.model.lm import RATPlusLM
from megarat.train.adapt import adapt
from megarat.train.loop import pretrain
from megarat.train.run_folder import environment

CURVE_POINTS = 100
_TOPK_TOKENS = 65536  # the plain top-k attention computes every score
_GATE_SEQUENCES = 4
_GATE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Results:
    """What is known of an arm so far; every change is on the disk at once."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content
        self._started = time.perf_counter()

    def put(self, key: str, value: Any) -> None:
        """Set a key, write the file, and say so."""
        self._content[key] = value
        self._content["seconds"] = round(time.perf_counter() - self._started, 1)
        staging = self._path.with_suffix(".partial")
        staging.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        staging.replace(self._path)
        print(f"{self._content['seconds']:7.1f} s  {self._path.stem}  {key}", flush=True)


class Extras(NamedTuple):
    """What is measured beyond losses of the whole corpus."""

    kinds: Path | None = None  # folder of one corpus a kind of text
    needles: arms.NeedleTuning | None = None
    keep: bool = False  # the runs of adaptations and fine-tunings


def live(path: str, arm: str, out: Path, overrides: tuple[str, ...] = (), extras: Extras = Extras()) -> Path:  # noqa: B008 (frozen)
    """Train, score and adapt an arm of the config at ``path``; returns the file of its results, ``out/ARM-SEED.json``.

    Raises ``UserError``.
    """
    config = arms.pretraining(path, arm, overrides)
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{arm}-{config.train.seed}.json"
    results = Results(target, {"arm": arm, "seed": config.train.seed, "config": config.to_dict(), "environment": _environment()})
    results.put("parameters", parameter_count(config.model))
    results.put("flops_per_token", pair_flops_per_token(config))
    pretrain(config)
    _free()
    run = Path(config.run.dir)
    results.put("pretraining", training_record(run))
    results.put("scores", score(run, arms.READINGS))
    if extras.kinds is not None:
        folders = sorted(path.parent for path in extras.kinds.glob("*/validation"))
        results.put("kinds", {folder.name: score(run, arms.KIND_READINGS, shards=folder) for folder in folders})
    _adapt_to_all(config, extras, results)
    if config.model.recurrence:
        results.put("gates", gate_statistics(config, run))
    results.put("topk", score(run, arms.TOPK, limit_tokens=_TOPK_TOKENS))
    if extras.needles is not None:
        _tune_on_needles(config, extras.needles, results)
    if not extras.keep:
        for folder in (f"{run}-adapted", f"{run}-needle"):
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _adapt_to_all(config: Config, extras: Extras, results: Results) -> None:
    """Every adaptation; of their runs, only those that needles start from are left."""
    rows: list[dict[str, Any]] = []
    for pattern, share in arms.ADAPTATIONS:
        rows.append(adapted(config, pattern, share))
        results.put("adaptations", rows)
        needed = extras.needles is not None and share == arms.LONG and pattern in arms.NEEDLE_READINGS
        if not extras.keep and not needed:
            shutil.rmtree(arms.adaptation(config, pattern, share).run.dir)


def _tune_on_needles(config: Config, tuning: arms.NeedleTuning, results: Results) -> None:
    rows: list[dict[str, Any]] = []
    for reading in (*arms.NEEDLE_READINGS, None):
        rows.append(tuned(config, reading, tuning))
        results.put("needles", rows)


def training_record(run: Path) -> dict[str, Any]:
    """Loss curve (means of at most CURVE_POINTS stretches), tokens, time and speed of a run, from its metrics."""
    rows = read_metrics(run)
    points = min(CURVE_POINTS, len(rows))
    edges = [point * len(rows) // points for point in range(points + 1)]
    parts = [rows[first:end] for first, end in pairwise(edges)]
    speeds = sorted(row["tokens_per_s"] for row in rows)
    return {
        "pairs": rows[-1]["pair"],
        "tokens": rows[-1]["tokens"],
        "stream_hash": rows[-1]["stream_hash"],
        "skipped": sum(row["skipped"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "median_tokens_per_s": speeds[len(speeds) // 2],
        "memory_gb": rows[-1]["memory_gb"],
        "curve": [
            {"tokens": part[-1]["tokens"]} | {name: _mean([row[name] for row in part]) for name in ("loss_sparse", "loss_dense")}
            for part in parts
        ],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def score(
    run: Path, readings: Sequence[str], limit_tokens: int | None = None, shards: Path | None = None
) -> list[dict[str, Any]]:
    """Rows of the perplexity table of ``megarat eval``, on the run's own held-out text or that of ``shards``."""
    with warnings.catch_warnings():  # to read weights under other patterns than their own is the point here
        warnings.filterwarnings("ignore", ".* was adapted to", UserWarning)
        place = None if shards is None else str(shards)
        settings = EvalSettings(patterns=readings, shards=place, limit_tokens=limit_tokens, micro_batch=16, progress=False)
        rows: list[dict[str, Any]] = evaluate(run, settings)["tasks"]["ppl"]
    _free()
    return rows


def adapted(config: Config, pattern: str, share: float) -> dict[str, Any]:
    """Adapt the arm to a pattern, and its score under it."""
    settings = arms.adaptation(config, pattern, share)
    run = Path(settings.run.dir)
    adapt(settings, config.run.dir)
    _free()
    rows = read_metrics(run)
    return {
        "pattern": pattern,
        "batches": settings.train.pairs,
        "tokens": rows[-1]["tokens"],
        "loss_first": rows[0]["loss_dense"],
        "score": score(run, (pattern,))[0],
    }


def tuned(config: Config, pattern: str | None, tuning: arms.NeedleTuning) -> dict[str, Any]:
    """Fine-tune on needle tasks under ``pattern``, from the weights adapted to it; None: by pairs from the pretrained ones, read by top-k."""
    settings = arms.needle_tuning(config, pattern or "dense", tuning, sparse_pass=pattern is None)
    start = config.run.dir if pattern is None else arms.adaptation(config, pattern, arms.LONG).run.dir
    run = Path(settings.run.dir)
    adapt(settings, start, sparse_pass=pattern is None)
    _free()
    readings = ("dense", *arms.TOPK) if pattern is None else (pattern,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was adapted to", UserWarning)
        tasks = f"needle:{arms.NEEDLE_TASKS}".split(",")
        rows = evaluate(
            run, EvalSettings(patterns=readings, tasks=tasks, samples=tuning.samples, micro_batch=100, progress=False)
        )
    _free()
    return {
        "trained": pattern or "pair",
        "batches": settings.train.pairs,
        "curve": training_record(run)["curve"],
        "scores": rows["tasks"]["needle"],
    }


@torch.no_grad()
def gate_statistics(config: Config, run: Path) -> list[dict[str, Any]]:
    """For each layer, of held-out text: mean and quantiles of the gates, and of the channels' effective memory.

    The effective memory of a channel is 1 + the mean age of what its state holds: the state is a weighted mean of all inputs so far with
    weights (1 - G_j) G_{j+1} ... G_t, so its mean age follows a_t = G_t (a_{t-1} + 1). Averaged over the second half of the positions.
    """
    model = load(run)
    reader = TokenReader(join(config.data.validation or config.data.primary, "validation"))
    ids_BT, _ = HeldOut(reader, config.data.sequence_length, None).batch(range(_GATE_SEQUENCES))
    return [_summarise(gate_BTC) for gate_BTC in gates(model.lm, ids_BT.to(model.device))]


def gates(model: RATPlusLM, ids_BT: Tensor) -> list[Tensor]:
    """Every layer's gates of a dense forward, (B, T, C) fp32 each."""
    found: list[Tensor] = []

    def see(module: nn.Module, inputs: Any, fused: Tensor) -> None:
        """The gates' logits are the last of the five projections."""
        found.append(torch.sigmoid(fused.chunk(5, dim=-1)[-1].float()))

    hooks = [block.mixer.in_proj.register_forward_hook(see) for block in model.blocks]
    model.hidden(ids_BT)
    for hook in hooks:
        hook.remove()
    return found


def mean_age(gate_BTC: Tensor) -> Tensor:
    """Mean age (tokens) of what the state holds after each token, (B, T, C)."""
    ages = torch.empty_like(gate_BTC)
    age_BC = torch.zeros_like(gate_BTC[:, 0])
    for position in range(gate_BTC.shape[1]):
        age_BC = gate_BTC[:, position] * (age_BC + 1)
        ages[:, position] = age_BC
    return ages


def _summarise(gate_BTC: Tensor) -> dict[str, Any]:
    memory_C = 1 + mean_age(gate_BTC)[:, gate_BTC.shape[1] // 2 :].mean(dim=(0, 1))
    return {"gate": _distribution(gate_BTC.flatten()), "memory": _distribution(memory_C)}


def _distribution(values: Tensor) -> dict[str, float]:
    at = torch.tensor(_GATE_QUANTILES, dtype=torch.float32)
    ordered = values.float().cpu().sort().values
    quantiles = ordered[(at * (len(ordered) - 1)).round().long()]
    return {"mean": float(ordered.mean())} | {f"q{100 * q:g}": float(v) for q, v in zip(_GATE_QUANTILES, quantiles, strict=True)}


def _free() -> None:
    """Give back the memory of an engine that has ended: another one, or another process, is waiting for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _environment() -> dict[str, Any]:
    """What ran: versions, GPU, and the commit, from git or the variable MEGARAT_COMMIT where the source is no checkout."""
    found = environment()
    git = found["git"] or {}
    return {
        "time": found["time"],
        "gpus": found["gpus"],
        "packages": found["packages"],
        "commit": git.get("commit") or os.environ.get("MEGARAT_COMMIT"),
        "uncommitted_changes": bool(git.get("diff")),
    }
