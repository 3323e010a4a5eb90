"""Tasks of lm-evaluation-harness on a megarat checkpoint, by the harness's own code and task definitions, on local data alone.

The harness is an optional extra (`pip install megarat[eval]`) and imported only here. Tasks are those of a folder that
``data_tools/prepare_eval.py`` wrote: for each a YAML that lays the place of its data over the harness's own definition.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megarat.data.format import file_sha256
from megarat.errors import UserError
from megarat.eval.likelihood import Scorer

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ONE_PROCESS = "DISABLE_MULTIPROC"  # else the harness forks this process, whose threads hold locks, to resample a standard error; that can hang
_DEFAULT_TOKENS = 256  # of generated answers whose task gives no limit


@dataclass(frozen=True)
class HarnessScore:
    """One row of the results table; the fields are the schema of ``results.json``."""

    pattern: str
    task: str
    metrics: dict[str, float]  # by the harness's names, such as acc, acc_norm, perplexity
    stderr: dict[str, float]
    samples: int
    version: float | str  # of the task's definition
    seconds: float
    cache_bytes_per_sequence: int = 0  # bf16, for a sequence of the longest length; told by who knows the model

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def check_tasks(folder: str | Path | None, tasks: Sequence[str]) -> Path:
    """The prepared folder, once it is known to hold every task. Raises ``UserError`` that says which files are missing, and where."""
    how = "write it with: python -m data_tools.prepare_eval WHEEL --output DIR, and give --eval-data DIR"
    if folder is None:
        raise UserError(f"--tasks harness: needs local data; {how}")
    missing = [str(path) for task in tasks for path in _files(Path(folder), task) if not path.is_file()]
    if missing:
        known = ", ".join(sorted(path.stem for path in (Path(folder) / "tasks").glob("*.yaml"))) or "no task"
        raise UserError(f"--tasks harness: {missing[0]} is missing (found in {folder}: {known}); {how}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks harness: lm-evaluation-harness is not installed; pip install 'lm-eval>=0.4.9' (or megarat[eval])"
        )
    return Path(folder)


def task_content(folder: Path, task: str) -> str:
    """What names a task's definition and items, wherever they lie: the hashes of its two files."""
    return "/".join(file_sha256(file) for file in _files(folder, task))


def _files(folder: Path, task: str) -> tuple[Path, Path]:
    return folder / "tasks" / f"{task}.yaml", folder / "data" / f"{task}.jsonl"


def run_harness(scorer: Scorer, pattern: str, tasks: Sequence[str], folder: Path, limit: int | None = None) -> list[HarnessScore]:
    """One row a task, zero-shot unless its definition says otherwise; at most ``limit`` items of each."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="megarat-harness-") as work:
        for name in (*_OFFLINE, _ONE_PROCESS):
            os.environ[name] = "1"
        import lm_eval
        from lm_eval.tasks import TaskManager

        _fill_definitions(folder, tasks, Path(lm_eval.__file__).parent, Path(work))
        with _without_ranks():
            found = lm_eval.simple_evaluate(
                model=_as_harness_model(scorer),
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                task_manager=TaskManager(include_path=str(Path(work) / "tasks"), include_defaults=False),
            )
    seconds = (time.perf_counter() - start) / len(tasks)
    return [_row(pattern, task, found, seconds) for task in tasks]


@contextlib.contextmanager
def _without_ranks() -> Iterator[None]:
    """The harness gives its results to the first of a launcher's processes only; here each process has a task of its own."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _fill_definitions(folder: Path, tasks: Sequence[str], lm_eval: Path, work: Path) -> None:
    """``work/tasks`` with the tasks' YAML, the folders of this machine in them; converted data go to ``work`` too."""
    places = {"{lm_eval}": lm_eval, "{data}": (folder / "data").resolve(), "{cache}": work / "cache"}
    target = work / "tasks"
    target.mkdir()
    for task in tasks:
        text = (folder / "tasks" / f"{task}.yaml").read_text(encoding="utf-8")
        for name, place in places.items():
            text = text.replace(name, str(place))
        (target / f"{task}.yaml").write_text(text, encoding="utf-8")


def _row(pattern: str, task: str, found: dict[str, Any], seconds: float) -> HarnessScore:
    numbers = {  # "acc,none" is metric and filter; other filters keep their name, for a task may read an answer by several
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][task].items()
        if "," in name and isinstance(value, (int, float))  # no stderr reads "N/A"
    }
    return HarnessScore(
        pattern=pattern,
        task=task,
        metrics={name: value for name, value in numbers.items() if "_stderr" not in name},
        stderr={name.replace("_stderr", ""): value for name, value in numbers.items() if "_stderr" in name},
        samples=found["n-samples"][task]["effective"],
        version=found["versions"][task],
        seconds=seconds,
    )


def _as_harness_model(scorer: Scorer) -> Any:
    """The scorer with the harness's face."""
    from lm_eval.api.model import LM

    class MegaratLM(LM):
        """Requests in, numbers out; everything is done by the scorer."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(total, greedy) for total, greedy in scorer.continuations([request.args for request in requests])]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return scorer.texts([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return scorer.until([_generation(*request.args) for request in requests])

    return MegaratLM()


def _generation(prompt: str, options: dict[str, Any]) -> tuple[str, list[str], int]:
    """(prompt, stops, tokens) of a request. Raises ``UserError`` for a task that does not generate greedily."""
    if options.get("do_sample") or options.get("temperature", 0.0) > 0:
        raise UserError(f"--tasks harness: a task asks for sampling ({options}); only greedy generation is offered")
    stops = options.get("until") or []
    return prompt, [stops] if isinstance(stops, str) else list(stops), int(options.get("max_gen_toks", _DEFAULT_TOKENS))
