"""A run folder: what it holds, and whether a command may continue it.

RUN/config.yaml         the resolved config of the last start
RUN/environment.json    one entry a start: versions, hardware, commit and uncommitted changes, command line
RUN/metrics.jsonl  RUN/guard.jsonl  RUN/tensorboard/  RUN/checkpoints/  RUN/stacks/  RUN/lock
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import megarat
from megarat import config as configuration
from megarat.checkpoint.load import CHECKPOINTS, find_latest, load_state
from megarat.checkpoint.manifest import CheckpointState
from megarat.checkpoint.save import remove_leftovers
from megarat.config import Config
from megarat.errors import UserError
from megarat.files import replace_synced
from megarat.log import METRICS, last_recorded_pair

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"

# Keys that change neither the model nor the token stream nor, but for the order of sums, an update: free between two starts of a run.
# ``data.shards`` may move; that its content is the same is checked by the hash of its index. ``train.precision`` may be said in other words:
# what ``auto`` means depends on the machine, so that the precision itself is checked when the run is built. ``train.micro_batch`` must follow
# the memory of the machine; a loss is the mean of micro-batches' means, so that labels weigh a little otherwise where rows have unequal numbers
# of them, much otherwise where only answers are labels (``data.task``).
_FREE_KEYS = frozenset(
    (
        "run.dir run.device data.shards data.max_epochs data.validation data.validation_tokens data.cache data.cache_gb data.prefetch "
        "train.pairs train.micro_batch train.precision train.weight_gradients train.cuda_graphs train.loss_chunk train.wall_clock_minutes "
        "train.validate_every train.max_skipped optim.implementation"
    ).split()
)
_FREE_SECTIONS = ("checkpoint.", "guard.", "log.", "parallel.")
_PACKAGES = ("deepspeed", "triton", "numpy", "webdataset", "tensorboard")


class Resume(NamedTuple):
    """The checkpoint a run goes on from."""

    folder: Path
    state: CheckpointState


def open_run(config: Config, kind: str) -> Resume | None:
    """Enter the run folder and clear what an interrupted save left there; returns what to resume from, None for a new run.

    Raises ``UserError`` when the folder belongs to another run or has lost its checkpoint. The caller holds the run's lock.
    """
    run_dir = Path(config.run.dir)
    remove_leftovers(run_dir / CHECKPOINTS)
    checkpoint = find_latest(run_dir)
    if checkpoint is None:
        _check_nothing_lost(run_dir)
        return None
    state = load_state(checkpoint)
    if state.kind != kind:
        raise UserError(f"run.dir {run_dir} holds a run of megarat {state.kind}, not {kind}; give this run another folder")
    _check_same_run(run_dir, state.config, config)
    return Resume(checkpoint, state)


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys that differ and may not: ``key: before -> now``."""
    return [
        f"{key}: {old!r} -> {new!r}"
        for key in configuration.all_keys()
        if key not in _FREE_KEYS
        and not key.startswith(_FREE_SECTIONS)
        and (old := configuration.get(before, key)) != (new := configuration.get(now, key))
    ]


def record_start(config: Config) -> None:
    """Write the resolved config and add this start to ``environment.json``."""
    run_dir = Path(config.run.dir)
    replace_synced(run_dir / CONFIG, config.to_yaml())
    path = run_dir / ENVIRONMENT
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = []  # a first start, or a record torn by a crash: never a reason not to train
    replace_synced(path, json.dumps({"starts": [*starts, environment()]}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, hardware, code and command line of this process."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": _versions(),
        "git": _git_state(Path(megarat.__file__).parent),
    }


def _check_nothing_lost(run_dir: Path) -> None:
    """A run that once wrote a checkpoint must not silently start again. One that died while its first was being written may."""
    if (run_dir / CONFIG).exists():
        settings = configuration.load(run_dir / CONFIG).checkpoint
        # One that is written in the background is complete when the next begins.
        complete = settings.every * (2 if settings.asynchronous else 1)
        recorded = last_recorded_pair(run_dir / METRICS)
        if recorded > complete:
            raise UserError(
                f"{run_dir / METRICS} records {recorded} pairs, but {run_dir / CHECKPOINTS} holds no checkpoint (one was due after "
                f"{settings.every}); restore it, or delete {run_dir} to start again"
            )


def _check_same_run(run_dir: Path, before: Config, now: Config) -> None:
    changed = changed_keys(before, now)
    if changed:
        raise UserError(
            f"run.dir {run_dir} belongs to a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nset these keys back to continue it, or give this run another run.dir (train.pairs may be raised; checkpoint.*, guard.*, log.*, "
            "parallel.*, train.micro_batch and other switches of speed alone may change)"
        )


def _versions() -> dict[str, str]:
    """Of what a run is made of. Torch says by itself which CUDA it was built for (2.11.0+cu130); its metadata need not."""
    found = {name: version for name in _PACKAGES if (version := _version(name))}
    return {"megarat": megarat.__version__, "torch": str(torch.__version__)} | found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted changes of the code that runs; None when it is no git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", check=True, timeout=20
        ).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD", "--", str(folder))}
    except (OSError, subprocess.SubprocessError):
        return None
