"""lm-evaluation-harness driven from outside, on an exported folder through its own Hugging Face backend, scores as ``megarat eval`` does.

Needs the harness and accelerate, which the tests' environment does not have; what it printed at a larger size is in docs/evaluation.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import published_oracle
import pytest
import torch

from data_tools import train_tokenizer
from data_tools.prepare_eval import SOURCES, override
from megarat.checkpoint.convert import import_upstream
from megarat.checkpoint.export import export_checkpoint
from megarat.eval import harness

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate", "transformers")),
    reason="lm-evaluation-harness with its Hugging Face backend is not installed",
)

VOCAB, LENGTH, PATTERN = 300, 64, "D=8,W=4,I=1"
WORDS = "a cat and its dog sat on seven mats near one old house while many small birds flew over them".split()
PIQA = [{"goal": " ".join(WORDS[n:]), "sol1": " ".join(WORDS[: n + 1]), "sol2": WORDS[n], "label": n % 2} for n in range(12)]
LAMBADA = [{"text": " ".join(WORDS[n:] + WORDS[:n] * (n + 1))} for n in range(1, 9)]  # some are longer than the model's sequences
ROWS = {"piqa": PIQA, "lambada_openai": LAMBADA}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A tiny model whose choices are sharp, its tokenizer, its export, and the data of two tasks."""
    base = tmp_path_factory.mktemp("harness")
    (base / "a.txt").write_text(" ".join(WORDS * 30), encoding="utf-8")
    train_tokenizer.train([base / "a.txt"], base / "tok", vocab_size=VOCAB, progress=False)
    task = published_oracle.random_task(2, 2, 16, VOCAB, seed=5)
    config = {"model": {"backbone": {"seq_cell": {"num_head": 2}}}}
    torch.save({"task": task, "config": config}, base / "model.pth")
    import_upstream(base / "model.pth", base / "checkpoint", base / "tok")
    export_checkpoint(base / "checkpoint", base / "exported", pattern=PATTERN)
    tree = json.loads((base / "exported" / "config.json").read_text())
    (base / "exported" / "config.json").write_text(json.dumps(tree | {"max_position_embeddings": LENGTH}))
    for folder in ("data", "tasks"):
        (base / "eval" / folder).mkdir(parents=True)
    for name, rows in ROWS.items():
        (base / "eval" / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (base / "eval" / "tasks" / f"{name}.yaml").write_text(override(name, SOURCES[name]))
    return {"checkpoint": base / "checkpoint", "exported": base / "exported", "eval": base / "eval", "base": base}


def from_outside(places: dict[str, Path]) -> dict[str, dict[str, float]]:
    """The harness's own call, as its command line makes it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    work = places["base"] / "filled"
    work.mkdir()
    harness._fill_definitions(places["eval"], list(ROWS), Path(lm_eval.__file__).parent, work)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(places["exported"]), "trust_remote_code": True, "dtype": "float32"},
        tasks=list(ROWS),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(work / "tasks"), include_defaults=False),
    )
    return {
        task: {
            key.partition(",")[0]: value for key, value in found["results"][task].items() if "," in key and "stderr" not in key
        }
        for task in ROWS
    }


def by_megarat(places: dict[str, Path], processes: int) -> dict[str, dict[str, float]]:
    """``megarat eval`` by one process, or by several at once as a launcher starts them."""
    out = places["base"] / f"by-{processes}"
    command = [sys.executable, "-m", "megarat", "eval", str(places["checkpoint"]), "--pattern", PATTERN, "--out", str(out)]
    command += ["--tasks", "harness:" + ",".join(ROWS), "--eval-data", str(places["eval"]), "--sequence-length", str(LENGTH)]
    command += ["--micro-batch", "4", "--device", "cpu", "--precision", "fp32"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} for rank in range(processes)]
    started = [
        subprocess.Popen(command, env=os.environ | (rank if processes > 1 else {}), stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    for process in started:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    rows = json.loads((out / "results.json").read_text())["tasks"]["harness"]
    return {row["task"]: row["metrics"] for row in rows}


def test_the_harness_from_outside_scores_as_megarat_does_on_one_process_and_on_two(places, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(places["base"] / "modules"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    outside = from_outside(places)
    one, two = by_megarat(places, 1), by_megarat(places, 2)
    assert one == two and 0 < one["piqa"]["acc"] < 1
    for task, metrics in outside.items():
        assert metrics.keys() - {"alias"} == one[task].keys()
        for name, value in metrics.items():
            assert one[task][name] == pytest.approx(value, rel=1e-5), (
                task,
                name,
            )  # accuracies are shares of items: equal or far apart
