"""``megarat eval``: one checkpoint, several patterns, a table and ``results.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import megarat
from megarat.checkpoint import load as checkpoints
from megarat.data.format import Index, file_sha256
from megarat.data.reader import TokenReader, check_vocabulary
from megarat.data.store import join
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError
from megarat.eval.answers import Answerer
from megarat.eval.harness import HarnessScore, check_tasks, run_harness, task_content
from megarat.eval.likelihood import Scorer
from megarat.eval.longbench import LONGBENCH_AVERAGE, LongBenchRun, LongBenchScore, check_files
from megarat.eval.needle import ANSWER_TOKENS, NeedleMaker, read_essay
from megarat.eval.perplexity import HeldOut, PatternScore, combine, perplexity_items
from megarat.eval.queue import PIECE, Item, Work, short_hash
from megarat.eval.retrieval import NeedleRun, NeedleScore
from megarat.eval.speed import speed_items
from megarat.eval.tasks import parse_tasks
from megarat.eval.together import Together
from megarat.files import replace_synced
from megarat.heartbeat import beat
from megarat.infer.cache import cache_bytes
from megarat.infer.load import LoadedModel, join_ranks, load
from megarat.infer.reading import Reading, ReadingSpec
from megarat.infer.text import find_tokenizer
from megarat.mesh import identify
from megarat.model.pattern import PatternSpec
from megarat.train.guard import StopRequest

RESULTS_SCHEMA = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class EvalSettings:
    """What ``megarat eval`` was asked for; None means: as in the checkpoint's own run."""

    patterns: Sequence[PatternSpec | ReadingSpec]
    tasks: Sequence[str] = ("ppl",)
    shards: str | None = None
    split: str = "validation"
    sequence_length: int | None = None
    micro_batch: int = 8
    limit_tokens: int | None = None
    samples: int = 100  # of each needle task
    seed: int = 0  # of the needle tasks
    needle_text: str | None = None  # a text whose sentences are the haystack; None: made-up ones
    eval_data: str | None = None  # the folder data_tools/prepare_eval.py wrote
    longbench_data: str | None = None  # the folder of LongBench's jsonl files
    limit: int | None = None  # items of each harness or LongBench task
    tokenizer: str | None = None
    device: str | None = None
    precision: str | None = None
    progress: bool = True
    tensor: int = 1  # ranks that share the model


def evaluate(
    checkpoint: str | Path, settings: EvalSettings, out: str | Path | None = None, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Results of every task and pattern as plain values (the schema is in ``docs/evaluation.md``).

    With ``out`` the work is shared with every other process that evaluates the same there, and goes on where an earlier one ended.
    Raises ``StoppedEarly`` when ``stop`` asks for it before the end.
    """
    tasks = parse_tasks(settings.tasks)
    if "harness" in tasks:
        check_tasks(settings.eval_data, tasks["harness"])
    if "longbench" in tasks:
        check_files(settings.longbench_data, tasks["longbench"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[settings.precision]
    device, ranks = join_ranks(settings.tensor, settings.device)
    model = load(checkpoint, None, device or _own_device(settings.device), dtype, ranks)
    readings = [model.reading(pattern) for pattern in settings.patterns or ["dense"]]
    state = checkpoints.load_state(model.checkpoint)
    length = settings.sequence_length or state.config.data.sequence_length
    folder = None if out is None else Path(out) / "work" / _name_of_work(model, length, settings)
    work = Together(Work(folder, stop), ranks.group)
    rows: dict[str, Sequence[PatternScore | NeedleScore | LongBenchScore | HarnessScore]] = {}
    if "ppl" in tasks:
        data = state.config.data
        shards = settings.shards or data.validation or data.primary
        settings = replace(settings, limit_tokens=settings.limit_tokens or data.validation_tokens or None)
        rows["ppl"] = _perplexity(model, readings, shards, length, settings, work)
    if "needle" in tasks:
        rows["needle"] = _needle(model, readings, tasks["needle"], length, settings, work)
    if "longbench" in tasks:
        rows["longbench"] = _longbench(model, readings, tasks["longbench"], length, settings, work)
    if "harness" in tasks:
        rows["harness"] = _harness(model, readings, tasks["harness"], length, settings, work)
    return {
        "schema": RESULTS_SCHEMA,
        "megarat": megarat.__version__,
        "checkpoint": {
            "path": str(model.checkpoint),
            "pair": state.pair,
            "tokens": state.tokens,
            "content": checkpoints.identity(model.checkpoint),
        },
        "model": {"layers": model.config.layers, "hidden": model.config.hidden, "heads": model.config.heads},
        "device": model.device.type,
        "dtype": str(model.lm.embedding.weight.dtype).removeprefix("torch."),
        "sequence_length": length,
        "tasks": {task: [row.to_dict() for row in task_rows] for task, task_rows in rows.items()},
        "speed": _speed(model, readings, length, settings, work),
    }


def _perplexity(
    model: LoadedModel, readings: list[Reading], shards: str, length: int, settings: EvalSettings, work: Together
) -> list[PatternScore]:
    if settings.split not in SPLITS:
        raise UserError(f"--split: {settings.split!r}; expected {' or '.join(SPLITS)}")
    reader = TokenReader(join(shards, settings.split))
    check_vocabulary(reader.index, model.config.vocab)
    _check_tokenizer(model, reader.index, settings.tokenizer)
    separate = checkpoints.load_state(model.checkpoint).config.data.documents == "separate"
    corpus = HeldOut(reader, length, settings.limit_tokens, separate)
    items = perplexity_items(model.lm, readings, corpus, settings.micro_batch)
    return combine(model.lm, readings, _run(work, items, "perplexity", "tok", settings), length)


def _check_tokenizer(model: LoadedModel, index: Index, given: str | None) -> None:
    """Refuse shards whose ids do not mean what the model's do, where a tokenizer is stored with it or given."""
    if given is None and checkpoints.tokenizer_folder(model.checkpoint) is None:
        return
    own, made_by = find_tokenizer(model, given), index.tokenizer
    if own.sha256 != made_by.sha256:
        raise UserError(
            f"--shards: {index.location} was made with {made_by.name} (SHA-256 {made_by.sha256}), not with {own.file} (SHA-256 {own.sha256}); the "
            "loss on other ids would mean nothing: name shards of that tokenizer, or with --tokenizer the shards' own if both give the same ids"
        )


def _answerer(model: LoadedModel, length: int, settings: EvalSettings) -> Answerer:
    return Answerer(model.lm, find_tokenizer(model, settings.tokenizer), batch=settings.micro_batch, capacity=length)


def _needle(
    model: LoadedModel, readings: list[Reading], tasks: Sequence[str], length: int, settings: EvalSettings, work: Together
) -> list[NeedleScore]:
    answerer = _answerer(model, length, settings)
    essay = read_essay(settings.needle_text) if settings.needle_text else None
    maker = NeedleMaker(answerer.tokenizer, length - ANSWER_TOKENS, seed=settings.seed, essay=essay)
    for task in tasks:
        maker.sample(task, "validation", 0)  # sequences too short for a task are refused before hours go into the others
    run = NeedleRun(answerer, maker, samples=settings.samples, piece=max(PIECE, settings.micro_batch))
    return _by_task(run, tasks, readings, "needle", settings, work)


def _longbench(
    model: LoadedModel, readings: list[Reading], tasks: Sequence[str], length: int, settings: EvalSettings, work: Together
) -> list[LongBenchScore]:
    folder = check_files(settings.longbench_data, tasks)
    piece = max(PIECE, settings.micro_batch)
    run = LongBenchRun(_answerer(model, length, settings), folder, length=length, limit=settings.limit, piece=piece)
    return _by_task(run, tasks, readings, "longbench", settings, work)


def _by_task(
    run: Any, tasks: Sequence[str], readings: list[Reading], name: str, settings: EvalSettings, work: Together
) -> list[Any]:
    """A row a task and reading, computed reading by reading, so that an engine serves all tasks."""
    groups = [(task, reading, run.items(task, reading)) for reading in readings for task in tasks]
    results = iter(_run(work, [item for _, _, items in groups for item in items], name, "prompt", settings))
    rows = [run.combine(task, reading, [next(results) for _ in items]) for task, reading, items in groups]
    return [row for task in tasks for row in rows if row.task == task]


def _speed(
    model: LoadedModel, readings: list[Reading], length: int, settings: EvalSettings, work: Together
) -> list[dict[str, Any]]:
    """Prefill and decode of every reading, measured once, by whichever process comes to it."""
    return _run(work, speed_items(model.lm, readings, length, settings.micro_batch), "speed", "pattern", settings)


def _harness(
    model: LoadedModel, readings: list[Reading], tasks: Sequence[str], length: int, settings: EvalSettings, work: Together
) -> list[HarnessScore]:
    folder = check_tasks(settings.eval_data, tasks)
    tokenizer = find_tokenizer(model, settings.tokenizer)

    def score(reading: Reading, task: str) -> dict[str, Any]:
        scorer = Scorer(model.lm, reading, tokenizer, batch=settings.micro_batch, max_length=length)
        scorer.on_answers = lambda _: beat()  # a whole task can take longer than a job may be silent
        [row] = run_harness(scorer, str(reading), [task], folder, settings.limit)
        return replace(row, cache_bytes_per_sequence=cache_bytes(model.config, reading, length)).to_dict()

    content = {task: task_content(folder, task) for task in tasks}
    items = [
        Item(f"harness-{task}-{short_hash(f'{content[task]}/{reading}')}", 1, partial(score, reading, task))
        for reading in readings
        for task in tasks
    ]
    return [HarnessScore(**row) for row in _run(work, items, "harness", "task", settings)]


def _run(work: Together, items: list[Item], name: str, unit: str, settings: EvalSettings) -> list[dict[str, Any]]:
    """All items' results, with a progress bar on the first process."""
    hidden = not settings.progress or identify(os.environ).rank > 0
    with tqdm(total=sum(item.size for item in items), desc=name, unit=unit, unit_scale=True, disable=hidden) as bar:
        return work.run(items, bar.update)


def _name_of_work(model: LoadedModel, length: int, settings: EvalSettings) -> str:
    """A name that is the same for processes and runs that may share results: what can change one goes into it, or into the items' names."""
    free = {"patterns", "tasks", "device", "progress"}
    chosen = {name: value for name, value in asdict(settings).items() if name not in free}
    if settings.tokenizer is not None:  # another one may come to lie at its path; the checkpoint's own is part of its identity
        chosen["tokenizer"] = [file_sha256(file) for file in load_tokenizer(settings.tokenizer).files]
    computed = (str(model.lm.embedding.weight.dtype), model.device.type)
    named = (megarat.__version__, checkpoints.identity(model.checkpoint), computed, length, chosen)
    return short_hash(repr(named))


def _own_device(device: str | None) -> str | None:
    """This process's GPU where several processes of a host each take one."""
    if device == "cpu" or not torch.cuda.is_available():
        return device
    return f"cuda:{identify(os.environ).local_rank % torch.cuda.device_count()}"


def write_results(results: dict[str, Any], folder: str | Path) -> Path:
    """Write ``results.json`` into ``folder``, and beside it what differs from run to run, ``speed.json``; returns the path of the first."""
    path = Path(folder) / "results.json"
    scores = {name: part for name, part in results.items() if name != "speed"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(path, json.dumps(scores, indent=2) + "\n")
        replace_synced(path.with_name("speed.json"), json.dumps(results["speed"], indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error}") from None
    return path


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown, one table a task."""
    tables = {
        "ppl": _perplexity_table,
        "needle": _needle_table,
        "longbench": _longbench_table,
        "harness": _harness_table,
    }
    parts = [tables[task](_in_cells(rows)) for task, rows in results["tasks"].items()]
    return "\n\n".join([*parts, *([_speed_table(_in_cells(results["speed"]))] if results.get("speed") else [])])


def _in_cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers that differ are separated by the sign that separates cells."""
    return [row | {"pattern": row["pattern"].replace("|", "\\|")} for row in rows]


def _perplexity_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| pattern | loss (nats) | perplexity | tokens | KV cache per sequence |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['pattern']} | {row['loss']:.4f} | {row['perplexity']:.2f} | {row['tokens']:,} | {human_bytes(row['cache_bytes_per_sequence'])} |"
        for row in rows
    ]
    return "\n".join(lines)


def _needle_table(rows: list[dict[str, Any]]) -> str:
    """A line a pattern, a column a task: accuracy in percent by RULER's metric / by the exact one."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["pattern"], row["task"]): f"{100 * row['ruler']:.1f} / {100 * row['exact']:.1f}" for row in rows}
    caches = {row["pattern"]: human_bytes(row["cache_bytes_per_sequence"]) for row in rows}
    lines = [f"| needle, % (RULER / exact) | {' | '.join(tasks)} | KV cache per sequence |", "|---|" + "---:|" * (len(tasks) + 1)]
    lines += [f"| {pattern} | {' | '.join(cells[pattern, task] for task in tasks)} | {caches[pattern]} |" for pattern in caches]
    return "\n".join(lines)


def _longbench_table(rows: list[dict[str, Any]]) -> str:
    """A line a pattern, a column a task, and the mean over those of RAT+'s eleven that are there."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    scores = {(row["pattern"], row["task"]): 100 * row["score"] for row in rows}
    averaged = [task for task in tasks if task in LONGBENCH_AVERAGE] or tasks
    lines = [f"| LongBench, % | {' | '.join(tasks)} | mean of {len(averaged)} |", "|---|" + "---:|" * (len(tasks) + 1)]
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        cells = [f"{scores[pattern, task]:.1f}" for task in tasks]
        mean = sum(scores[pattern, task] for task in averaged) / len(averaged)
        lines.append(f"| {pattern} | {' | '.join(cells)} | {mean:.1f} |")
    return "\n".join(lines)


def _speed_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| pattern | prefill, tokens/s | decode, tokens/s | sequences | prompt |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['pattern']} | {row['prefill_tokens_per_s']:,.0f} | {row['decode_tokens_per_s']:,.0f} | {row['sequences']} | {row['prompt_tokens']:,} |"
        for row in rows
    ]
    return "\n".join(lines)


def _harness_table(rows: list[dict[str, Any]]) -> str:
    """A line a pattern, a column a task: its metrics in the harness's own names, with their standard errors."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    cells = {(row["pattern"], row["task"]): _metrics(row) for row in rows}
    lines = [f"| harness | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    lines += [f"| {pattern} | {' | '.join(cells[pattern, task] for task in tasks)} |" for pattern in patterns]
    return "\n".join(lines)


def _metrics(row: dict[str, Any]) -> str:
    errors = {name: f" ± {error:.2g}" for name, error in row["stderr"].items()}
    return ", ".join(f"{name} {value:.4g}{errors.get(name, '')}" for name, value in row["metrics"].items())


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
