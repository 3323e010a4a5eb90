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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.claim import arms
from megarat import config as configuration
from megarat.checkpoint.load import load_state
from megarat.config import Config
from megarat.data.reader import TokenReader
from megarat.data.store import join
from megarat.demo.report import read_metrics
from megarat.errors import StoppedEarly, UserError
from megarat.eval.answers import Answerer
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker
from megarat.eval.perplexity import HeldOut, combine, perplexity_items
from megarat.eval.retrieval import NeedleRun
from megarat.files import make_folder
from megarat.infer.load import LoadedModel, load
from megarat.infer.reading import Reading
from megarat.infer.text import find_tokenizer
from megarat.model.flops import pair_flops_per_token, parameter_count
from megarat.model.lm import RATPlusLM
from megarat.train.adapt import adapt
from megarat.train.guard import StopRequest
from megarat.train.loop import pretrain
from megarat.train.run_folder import changed_keys, environment

CURVE_POINTS = 100
_EVAL_SEQUENCES = 16  # scored at a time
_TOPK_TOKENS = 65536  # the plain top-k attention computes every score
_GATE_SEQUENCES = 4
_GATE_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Stage(NamedTuple):
    """A part of an arm's life: the key of its result; where that key holds a list, what tells its row from the others; what makes it."""

    key: str
    row: dict[str, Any] | None
    make: Callable[[], Any]


class Results:
    """What is known of an arm so far; every change is on the disk at once."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content
        self._started = time.perf_counter() - content.get("seconds", 0.0)

    @classmethod
    def open(cls, path: Path, arm: str, config: Config) -> Results:
        """Those at ``path``, or new ones. Raises ``UserError`` when the file is damaged or of another config."""
        if not path.exists():
            return cls(path, {"arm": arm, "seed": config.train.seed, "config": _published(config), "environment": _environment()})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before = configuration.from_dict(content["config"], str(path))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no results of an arm ({error!r}); move it away or give another --out") from None
        changed = changed_keys(before, config)
        if before.train.pairs != config.train.pairs:
            changed.append(f"train.pairs: {before.train.pairs} -> {config.train.pairs}")
        if changed:
            raise UserError(f"{path} holds results of another config: {'; '.join(changed)}. Give another --out")
        return cls(path, content)

    def has(self, stage: Stage) -> bool:
        """Whether a stage is done."""
        if stage.row is None:
            return stage.key in self._content
        return any(stage.row.items() <= row.items() for row in self._content.get(stage.key, []))

    def resume(self) -> None:
        """Note that another process, perhaps of another commit, goes on with results that an earlier one began."""
        if "pretraining" in self._content:
            self._content.setdefault("resumed", []).append(_environment())

    def take(self, stage: Stage) -> None:
        """Do a stage, write its result, and say so."""
        result = stage.make()
        if stage.row is None:
            self._content[stage.key] = result
        else:
            self._content.setdefault(stage.key, []).append(result)
        self._content["seconds"] = round(time.perf_counter() - self._started, 1)
        staging = self._path.with_suffix(".partial")
        staging.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
        staging.replace(self._path)
        which = "" if stage.row is None else ", ".join(str(value) for value in stage.row.values())
        print(f"{self._content['seconds']:7.1f} s  {self._path.stem}  {stage.key} {which}", flush=True)


class Extras(NamedTuple):
    """What is measured beyond losses of the whole corpus."""

    kinds: Path | None = None  # folder of one corpus a kind of text
    needles: arms.NeedleTuning | None = None
    adaptations: str = "full"  # of ``arms.ADAPTATIONS``
    keep: bool = False  # the runs of adaptations and fine-tunings


def live(
    path: str,
    arm: str,
    out: Path,
    overrides: tuple[str, ...] = (),
    extras: Extras = Extras(),  # noqa: B008 (frozen)
    stop: StopRequest | None = None,
) -> Path:
    """Train, score and adapt an arm of the config at ``path``; returns the file of its results, ``out/ARM-SEED.json``.

    What that file holds is not done again; a stopped training goes on from its checkpoint. Raises ``UserError``, and ``StoppedEarly``
    when ``stop`` or a signal asked for it.
    """
    config = arms.pretraining(path, arm, overrides)
    make_folder(out, "--out")
    target = out / f"{arm}-{config.train.seed}.json"
    results = Results.open(target, arm, config)
    left = [stage for stage in _stages(config, extras) if not results.has(stage)]
    if left:
        results.resume()
        pretrain(config)
        _free()
    for stage in left:
        if stop is not None and stop.reason is not None:
            raise StoppedEarly(
                f"stopped ({stop.reason}) before {stage.key}; {target} holds what is done, the same command goes on"
            )
        results.take(stage)
    if not extras.keep:
        for folder in (f"{config.run.dir}-adapted", f"{config.run.dir}-needle"):
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _stages(config: Config, extras: Extras) -> Iterator[Stage]:
    """All stages behind the training, the most valuable first."""
    run = Path(config.run.dir)
    yield Stage("parameters", None, partial(parameter_count, config.model))
    yield Stage("flops_per_token", None, partial(pair_flops_per_token, config))
    yield Stage("pretraining", None, partial(training_record, run))
    yield Stage("scores", None, partial(score, config, run, arms.READINGS))
    adaptations = [
        Stage("adaptations", _adaptation_row(config, pattern, share), partial(_adapt_and_clear, config, pattern, share, extras))
        for pattern, share in arms.ADAPTATIONS[extras.adaptations]
    ]
    headline = len(arms.ADAPTATIONS["brief"])
    if config.checkpoint.keep_every:
        yield Stage("milestones", None, partial(milestones, config, run))
    yield from adaptations[:headline]
    if config.model.recurrence:
        yield Stage("gates", None, partial(gate_statistics, config, run))
    yield Stage("topk", None, partial(score, config, run, arms.TOPK, limit_tokens=_TOPK_TOKENS))
    if extras.kinds is not None:
        yield Stage("kinds", None, partial(_score_kinds, config, run, extras.kinds))
    yield from adaptations[headline:]
    if extras.needles is not None:
        for reading in extras.needles.readings:
            yield Stage("needles", {"trained": reading}, partial(tuned, config, reading, extras.needles))


def _adaptation_row(config: Config, pattern: str, share: float) -> dict[str, Any]:
    return {"pattern": pattern, "batches": arms.batches_of(share, config.train.pairs)}


def _score_kinds(config: Config, run: Path, kinds: Path) -> dict[str, list[dict[str, Any]]]:
    """Scores by kind of text."""
    folders = sorted(path.parent for path in kinds.glob("*/validation"))
    return {folder.name: score(config, run, arms.KIND_READINGS, shards=str(folder)) for folder in folders}


def _adapt_and_clear(config: Config, pattern: str, share: float, extras: Extras) -> dict[str, Any]:
    """An adaptation; of their runs, only those that needles start from are left."""
    row = adapted(config, pattern, share)
    needed = extras.needles is not None and share == arms.LONG and pattern in extras.needles.readings
    if not extras.keep and not needed:
        shutil.rmtree(arms.adaptation(config, pattern, share).run.dir)
    return row


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
    config: Config, run: Path, readings: Sequence[str], limit_tokens: int | None = None, shards: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the perplexity table of ``megarat eval`` on the arm's held-out text or that of ``shards``, without its measurements of speed."""
    data = config.data
    corpus = HeldOut(
        TokenReader(join(shards or data.validation or data.primary, "validation")), data.sequence_length, limit_tokens
    )
    model, read = _load(run, readings)
    items = perplexity_items(model.lm, read, corpus, _EVAL_SEQUENCES)
    rows = combine(model.lm, read, [item.run() for item in items], corpus.length)
    del model, items
    _free()
    return [row.to_dict() for row in rows]


def milestones(config: Config, run: Path) -> list[dict[str, Any]]:
    """Scores of the checkpoints kept on the way (``checkpoint.keep_every``), the last one among them."""
    folders = sorted((run / "checkpoints").glob("pair_*"))
    return [{"tokens": load_state(folder).tokens, "scores": score(config, folder, arms.MILESTONE_READINGS)} for folder in folders]


def _load(run: Path, readings: Sequence[str]) -> tuple[LoadedModel, list[Reading]]:
    """A run's last weights and how they are to be read."""
    model = load(run)
    with warnings.catch_warnings():  # to read weights under other patterns than their own is the point here
        warnings.filterwarnings("ignore", ".* was adapted to", UserWarning)
        return model, [model.reading(reading) for reading in readings]


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
        "score": score(config, run, (pattern,))[0],
    }


def tuned(config: Config, pattern: str, tuning: arms.NeedleTuning) -> dict[str, Any]:
    """Fine-tune on needle tasks under ``pattern``, from the weights adapted to it; PAIR: by pairs from the pretrained ones, read by top-k."""
    by_pairs = pattern == arms.PAIR
    settings = arms.needle_tuning(config, "dense" if by_pairs else pattern, tuning, sparse_pass=by_pairs)
    start = config.run.dir
    if not by_pairs:
        parent = arms.adaptation(config, pattern, arms.LONG)
        adapt(parent, config.run.dir)  # nothing is done where it is done
        _free()
        start = parent.run.dir
    run = Path(settings.run.dir)
    adapt(settings, start, sparse_pass=by_pairs)
    _free()
    return {
        "trained": pattern,
        "batches": settings.train.pairs,
        "curve": training_record(run)["curve"],
        "scores": needle_scores(run, ("dense", *arms.TOPK) if by_pairs else (pattern,), tuning),
    }


def needle_scores(run: Path, readings: Sequence[str], tuning: arms.NeedleTuning) -> list[dict[str, Any]]:
    """Rows of the needle table of ``megarat eval``."""
    model, read = _load(run, readings)
    answerer = Answerer(model.lm, find_tokenizer(model, None), batch=tuning.samples, capacity=tuning.length)
    maker = NeedleMaker(answerer.tokenizer, tuning.length - ANSWER_TOKENS, seed=0)
    needles = NeedleRun(answerer, maker, samples=tuning.samples, piece=tuning.samples)
    tasks = [(task, reading) for reading in read for task in arms.NEEDLE_TASKS.split(",")]
    rows = [needles.combine(task, reading, [item.run() for item in needles.items(task, reading)]) for task, reading in tasks]
    del model, answerer, needles
    _free()
    return [row.to_dict() for row in rows]


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


def _published(config: Config) -> dict[str, Any]:
    """The config with the names alone of the folders of this machine; which they are does not matter to a later call."""
    tree = config.to_dict()
    for section, key in (("run", "dir"), ("data", "shards"), ("data", "validation")):
        tree[section][key] = Path(tree[section][key]).name
    return tree


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
