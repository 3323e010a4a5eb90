"""``megarat demo``: the whole life of a RAT+ model on real text, on whatever this machine has.

text -> shards -> pretraining with the sparse + dense pair, stopped half way by a signal and resumed by the same command -> evaluation ->
adaptation to D=16,W=32,I=4 -> evaluation -> text from the sparse cache -> the same of a released model, where there is one -> a report.
Training runs through the same command line a user types, in processes of its own; every stage that is already complete in the folder
is kept, so the demo itself can be interrupted and started again.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import megarat.checkpoint.load as checkpoints
from megarat.checkpoint.convert import import_exported
from megarat.config import ModelConfig
from megarat.data.reader import TokenReader
from megarat.data.tokenizer import load_tokenizer
from megarat.demo import corpus
from megarat.demo.report import Released, Story, write_report
from megarat.engine import resolve_precision
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, UserError
from megarat.eval.runner import EvalSettings, evaluate, table, write_results
from megarat.infer.generate import Sampling
from megarat.infer.load import load
from megarat.infer.text import continue_text, find_tokenizer
from megarat.model.flops import parameter_count
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

ADAPTED = "D=16,W=32,I=4"
HELD_OUT = 0.05  # of the documents: enough tokens to score in seconds, even of a small text
RELEASE = Path(__file__).resolve().parents[2] / "examples" / "claim" / "release"  # an exported model, where somebody has put one
RELEASE_HELD_OUT = 0.01  # the documents that it was not trained on: those that `examples.claim` holds out of the same text
_RELEASE_LENGTH = 512  # tokens of a sequence it is scored on
PATTERNS = ("dense", "D=4", "D=16", "D=64", ADAPTED)
PROMPTS = ("The city is located in", "He was born in 1950 and", "The most important thing about a company is")


@dataclass(frozen=True)
class Scale:
    """How large a demo this machine can do in a few minutes."""

    model: dict[str, Any]
    sequence_length: int
    global_batch: int
    micro_batch: int
    lr: float
    text_mb: int
    pretrain_seconds: float
    most_pairs: int
    eval_tokens: int

    @property
    def tokens_per_pair(self) -> int:
        """Data tokens of one global batch."""
        return self.global_batch * self.sequence_length


CPU_SCALE = Scale(
    model={"layers": 4, "hidden": 128, "heads": 2},
    sequence_length=256,
    global_batch=4,
    micro_batch=4,
    lr=4e-3,
    text_mb=6,
    pretrain_seconds=130,
    most_pairs=600,
    eval_tokens=16384,
)
GPU_SCALE = Scale(
    model={"layers": 12, "hidden": 768, "heads": 6},
    sequence_length=1024,
    global_batch=64,
    micro_batch=32,
    lr=1.5e-3,
    text_mb=60,
    pretrain_seconds=100,
    most_pairs=1200,
    eval_tokens=262144,
)


def demo(
    out: str, texts: Sequence[str] = (), tokenizer: str | None = None, pairs: int | None = None, released: str | None = None
) -> None:
    """Run every stage into the folder ``out`` and print where the report is. Raises ``UserError`` on bad input.

    ``released``: a folder that ``megarat checkpoint export`` wrote, whose model is shown at the end; None: ``RELEASE``, if it is there.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot create {folder}: {error}") from None
    scale = GPU_SCALE if torch.cuda.is_available() else CPU_SCALE
    release = Path(released) if released else RELEASE if RELEASE.is_dir() else None
    stages = _Stages(total=9 if release else 8)
    stages.begin("real text and a real tokenizer")
    documents, tokenizer_path, sources = _fetch(folder, texts, tokenizer, scale)
    stages.begin("shards")
    _build_shards(folder, documents, tokenizer_path, scale)
    stages.begin("how many pairs fit")
    configs = _write_configs(folder, scale, tokenizer_path, pairs)
    stages.begin(f"pretraining, {configs.pairs} sparse + dense pairs, stopped half way and resumed")
    stop = _pretrain_with_a_stop(folder, configs)
    stages.begin("evaluation before adaptation")
    before = _evaluate(folder / "pretrain", folder / "eval-before", scale)
    stages.begin(f"adaptation to {ADAPTED}")
    _megarat("adapt", str(configs.adapt), "--from", str(folder / "pretrain"), "--pattern", ADAPTED)
    stages.begin("evaluation after adaptation")
    after = _evaluate(folder / "adapt", folder / "eval-after", scale)
    stages.begin("text from the sparse cache, and the report")
    samples = _generate(folder / "adapt", ADAPTED)
    shown = None
    if release:
        stages.begin("the released model, on documents that it has not seen")
        shown = _show_release(folder, release, documents, scale)
    story = Story(folder, configs.pairs, configs.parameters, sources, stop, before, after, samples, stages.seconds(), shown)
    print(f"\nThe report: {write_report(story)}")


class _Stages:
    """Numbered headings with the time since the start."""

    def __init__(self, total: int) -> None:
        self.start = time.perf_counter()
        self.total, self.number = total, 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def begin(self, title: str) -> None:
        self.number += 1
        minutes, seconds = divmod(int(self.seconds()), 60)
        print(f"\n[{self.number}/{self.total}] {title}  ({minutes}:{seconds:02d} so far)", flush=True)


def _fetch(folder: Path, texts: Sequence[str], tokenizer: str | None, scale: Scale) -> tuple[list[Path], Path, list[str]]:
    """Documents to read, the tokenizer, and lines that say where they come from."""
    if texts and tokenizer:
        return (
            [Path(text) for text in texts],
            Path(tokenizer),
            [f"text given: {', '.join(texts)}", f"tokenizer given: {tokenizer}"],
        )
    fetched = corpus.fetch(folder / "packages", limit_bytes=scale.text_mb * 1_000_000)
    for line in fetched.licences:
        print(f"  {line}")
    documents = [Path(text) for text in texts] or [fetched.text]
    return documents, Path(tokenizer) if tokenizer else fetched.tokenizer, list(fetched.licences)


def _build_shards(folder: Path, documents: list[Path], tokenizer: Path, scale: Scale) -> None:
    inputs = [str(path) for path in documents]
    shards = folder / "shards"
    options = ["--tokenizer", str(tokenizer), "--output", str(shards), "--held-out", str(HELD_OUT)]
    _run([sys.executable, "-m", "data_tools.build_shards", *inputs, *options])
    for split in ("train", "validation"):
        held = TokenReader(shards / split).num_tokens if (shards / split).is_dir() else 0
        if held <= scale.sequence_length:
            raise UserError(
                f"--text: {split} would hold {held} tokens; the demo needs more than {scale.sequence_length}. Give more text"
            )


@dataclass(frozen=True)
class _Configs:
    pretrain: Path
    adapt: Path
    pairs: int
    parameters: int


def _write_configs(folder: Path, scale: Scale, tokenizer: Path, pairs: int | None) -> _Configs:
    """The two YAML files of the demo; an existing pair of them is kept, so that an interrupted demo goes on with the same run."""
    pretrain, adapt = folder / "pretrain.yaml", folder / "adapt.yaml"
    if not (pretrain.exists() and adapt.exists()) or pairs is not None:
        vocab = _round_up(load_tokenizer(tokenizer).vocab_size, 64)
        model = {**scale.model, "vocab": vocab}
        tree = _pretrain_tree(folder, scale, model, pairs or _pairs_that_fit(scale, vocab))
        pretrain.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        adapt.write_text(yaml.safe_dump(_adapt_tree(folder, tree), sort_keys=False), encoding="utf-8")
    tree = yaml.safe_load(pretrain.read_text(encoding="utf-8"))
    return _Configs(pretrain, adapt, tree["train"]["pairs"], parameter_count(ModelConfig(**tree["model"])))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _pretrain_tree(folder: Path, scale: Scale, model: dict[str, Any], pairs: int) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "pretrain")},
        "model": model,
        "attention": {"pattern": "dense", "train_dilation": 64},
        "data": {"shards": str(folder / "shards"), "sequence_length": scale.sequence_length},
        "train": {"pairs": pairs, "global_batch": scale.global_batch, "micro_batch": scale.micro_batch},
        "optim": {"lr": scale.lr},
        "checkpoint": {"every": max(1, pairs // 4)},
    }


def _adapt_tree(folder: Path, pretrain: dict[str, Any]) -> dict[str, Any]:
    pairs = max(4, pretrain["train"]["pairs"] // 8)
    return {
        **pretrain,
        "run": {"dir": str(folder / "adapt")},
        "attention": {"pattern": ADAPTED},
        "data": {**pretrain["data"], "order": "random_offsets"},
        "train": {**pretrain["train"], "pairs": pairs},
        "optim": {"lr": pretrain["optim"]["lr"] / 10, "warmup": 0},
        "checkpoint": {"every": pairs},
    }


def _pairs_that_fit(scale: Scale, vocab: int) -> int:
    """Time one pair on this machine, and divide the time for pretraining by it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = min(_time_pair(scale, vocab, device) for _ in range(3))
    pairs = int(scale.pretrain_seconds / seconds)
    chosen = max(20, min(scale.most_pairs, pairs))
    print(f"  one pair takes about {seconds:.2f} s here: {chosen} pairs of {scale.tokens_per_pair} tokens")
    return chosen


def _time_pair(scale: Scale, vocab: int, device: str) -> float:
    config = ModelConfig(**scale.model, vocab=vocab)
    dtype = torch.bfloat16 if resolve_precision("auto", torch.device(device)) == "bf16" else torch.float32
    model = RATPlusLM(config).initialise(0).to(device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    ids_BT = torch.randint(vocab, (scale.micro_batch, scale.sequence_length), device=device)
    start = time.perf_counter()
    for pattern in ("D=64", "dense"):
        patterns = resolve(pattern, config.layers, config.heads)
        for _ in range(scale.global_batch // scale.micro_batch):
            model(ids_BT, patterns, ids_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _pretrain_with_a_stop(folder: Path, configs: _Configs) -> str:
    """Pretrain through the command line; SIGTERM at half the pairs, then the same command again. Says what happened."""
    command = [sys.executable, "-m", "megarat", "pretrain", str(configs.pretrain)]
    metrics = folder / "pretrain" / "metrics.jsonl"
    half = configs.pairs // 2
    if _pairs_done(metrics) >= half:
        _run(command)
        return "resumed from an earlier demo in the same folder"
    process = subprocess.Popen(command)
    while process.poll() is None and _pairs_done(metrics) < half:
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    stopped_at = _pairs_done(metrics)
    if code not in (EXIT_OK, EXIT_STOPPED):
        raise _failed(command, code)
    print(f"  stopped by SIGTERM after pair {stopped_at} with exit code {code}; the same command again:", flush=True)
    _run(command)
    return f"SIGTERM after pair {stopped_at} of {configs.pairs}: exit code {code} with a checkpoint; the same command finished the rest"


def _pairs_done(metrics: Path) -> int:
    try:
        return sum(1 for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    except FileNotFoundError:
        return 0


def _evaluate(run: Path, out: Path, scale: Scale) -> dict[str, Any]:
    with warnings.catch_warnings():  # to read the adapted weights under other patterns is the point here
        warnings.filterwarnings("ignore", ".* was adapted to", UserWarning)
        results = evaluate(run, EvalSettings(patterns=PATTERNS, limit_tokens=scale.eval_tokens, micro_batch=8))
    write_results(results, out)
    print(table(results))
    return results


def _show_release(folder: Path, release: Path, documents: list[Path], scale: Scale) -> Released:
    """A trained model as it comes out of ``megarat checkpoint export``: its loss under every pattern, and text from a cache of 1/16."""
    checkpoint, shards = folder / "released", folder / "released-shards"
    shutil.rmtree(checkpoint, ignore_errors=True)
    print(f"  {import_exported(release, checkpoint)}")
    tokenizer = checkpoints.tokenizer_folder(checkpoint)
    if tokenizer is None:
        raise UserError(f"{release}: holds no tokenizer; export the model again with --tokenizer")
    options = ["--tokenizer", str(tokenizer), "--output", str(shards), "--held-out", str(RELEASE_HELD_OUT)]
    _run([sys.executable, "-m", "data_tools.build_shards", *map(str, documents), *options])
    unseen = TokenReader(shards / "validation").num_tokens if (shards / "validation").is_dir() else 0
    if unseen < 2:
        raise UserError(f"--text: none of it is held out for {release}; give more text")
    settings = EvalSettings(
        patterns=PATTERNS,
        shards=str(shards),
        sequence_length=min(_RELEASE_LENGTH, unseen - 1),
        limit_tokens=scale.eval_tokens,
        micro_batch=8,
    )
    results = evaluate(checkpoint, settings)
    write_results(results, folder / "eval-released")
    print(table(results))
    return Released(release, results, _generate(checkpoint, "D=16"))


def _generate(run: Path, pattern: str) -> list[tuple[str, str]]:
    """A few continuations from the sparse cache of a pattern, printed as they grow."""
    model = load(run, pattern)
    tokenizer = find_tokenizer(model, None)
    samples = []
    for prompt in PROMPTS:
        text = io.StringIO()
        with redirect_stdout(text):
            continue_text(model, tokenizer, prompt, 32, Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2), sys.stdout)
        samples.append((prompt, text.getvalue()))
        print(f"  {prompt}{text.getvalue()!r}")
    return samples


def _megarat(*arguments: str) -> None:
    _run([sys.executable, "-m", "megarat", *arguments])


def _run(command: list[str]) -> None:
    print(f"  $ {shlex.join(['megarat' if part == 'megarat' else part for part in command[2:]])}", flush=True)
    code = subprocess.run(command, env=_environment(), check=False).returncode
    if code != EXIT_OK:
        raise _failed(command, code)


def _environment() -> dict[str, str]:
    """This process' environment, with the folder megarat was imported from on the path (it may run from a checkout)."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _failed(command: list[str], code: int) -> Exception:
    text = f"the demo's step '{shlex.join(command[1:])}' ended with exit code {code}; its message is above"
    return UserError(text) if code == EXIT_BAD_INPUT else RuntimeError(text)
