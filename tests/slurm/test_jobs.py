"""Real training on a real Slurm, submitted by slurm/submit.py: stopped, killed, refused, and whole lives in one command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_run
from cluster import PATIENCE, alive, history, parent, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarat.config import Config
from megarat.status import read

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ("tokens_per_s", "memory_gb", "data_wait_s", "seconds")
PAIRS = 120
PATTERNS = {"dense": "dense", "D=4,W=0,I=0": "D4-W0-I0", "D=4,W=3,I=2": "D4-W3-I2"}  # pattern -> its run folder
MANY = [f"D={dilation}" for dilation in range(2, 14)]  # enough of them that an evaluation can be met at its work


class Runs(NamedTuple):
    """Folders and jobs of everything that is submitted at the start of the module."""

    base: Path
    jobs: dict[str, str]  # by the names that submit.py gives them


def tiny(base: Path, run: str, **changes) -> Config:
    train = {"pairs": PAIRS, **changes.pop("train", {})}
    return tiny_run.config(run={"dir": str(base / run)}, data={"shards": str(base / "shards")}, train=train, **changes)


def submit(cluster, base: Path, *arguments: str, check: bool = True, health: str = "off") -> str:
    """Standard output and error of submit.py; checks of nodes cost seconds a start, so not all have them."""
    options, dashes, rest = (list(arguments), [], []) if "--" not in arguments else _split(list(arguments))
    command = [sys.executable, str(ROOT / "slurm/submit.py"), *options, "--time=60:00", *dashes, *rest]
    environment = {**cluster.environment, "MEGARAT_HEALTH": health, "MEGARAT_RANK_WAIT": "40"}
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    place = arguments.index("--")
    return arguments[:place], ["--"], arguments[place + 1 :]


def job_of(printed: str) -> dict[str, str]:
    """Job ids by name, from what submit.py printed."""
    return dict(re.findall(r"^(\S+): job (\d+),", printed, re.MULTILINE))


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Runs:
    base = tmp_path_factory.mktemp("life")
    tiny_run.write_shards(base / "shards")
    tiny_run.write_shards(base / "held-out", tokens=6000, seed=1)
    (base / "held-out/train").rename(base / "shards/validation")
    (base / "text.txt").write_text("\n\n".join(f"A paragraph that is number {number}." for number in range(200)))
    tokenizer = write_tokenizer(base / "tiny.model")
    for run in ("stopped", "hurt", "whole"):
        settings = tiny(base, run, checkpoint={"every": 10}, log={"tensorboard": True})
        (base / f"{run}.yaml").write_text(settings.to_yaml())
    short = {"train": {"pairs": 4}}
    (base / "pretrain.yaml").write_text(tiny(base, "pretrain", **short).to_yaml())
    (base / "adapt.yaml").write_text(tiny(base, "adapted", **short).to_yaml())
    submitted: dict[str, str] = {}
    for run in ("hurt", "stopped", "whole"):
        held = [] if run == "whole" else ["--sbatch=--hold"]  # until its test looks at it
        submitted |= job_of(submit(cluster, base, "pretrain", f"{run}.yaml", "--nodes=2", *held))
    patterns = [option for pattern in PATTERNS for option in ("--pattern", pattern)]
    submitted |= job_of(submit(cluster, base, "pretrain", "pretrain.yaml", "--chain", "adapt.yaml", *patterns, health="node"))
    many = [option for pattern in MANY for option in ("--pattern", pattern)]
    after = f"--sbatch=--dependency=afterok:{submitted['pretrain-pretrain']}"
    submitted |= job_of(submit(cluster, base, "eval", "pretrain", *many, "--out", "scores", after, "--sbatch=--hold"))
    submitted |= job_of(
        submit(cluster, base, "data", "corpus", "--", "text.txt", "--tokenizer", str(tokenizer), "--workers", "1")
    )
    return Runs(base, submitted)


@pytest.mark.slow
def test_a_run_killed_at_its_start_in_a_save_and_without_its_step_daemon_goes_on_exactly(cluster, runs):
    run, job = runs.base / "hurt", runs.jobs["pretrain-hurt"]
    cluster.command("scontrol", "release", job)
    os.kill(second_rank(run), signal.SIGKILL)  # as soon as there is one: it has imported next to nothing
    wait_until(lambda: len(starts(run)) == 2, PATIENCE, "the second start")
    rank = second_rank(run)
    wait_until(lambda: recorded(run) > 20 and saves_since(run, 20), PATIENCE, "a checkpoint to be written", poll=0.005)
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: len(starts(run)) == 3, PATIENCE, "the third start")
    rank, killed_at = second_rank(run), recorded(run)
    wait_until(lambda: recorded(run) > killed_at + 10, PATIENCE, "10 more pairs", poll=0.02)
    os.kill(rank, signal.SIGSTOP)  # neither rank gets on
    os.kill(parent(rank), signal.SIGKILL)
    time.sleep(2.5)  # longer than the rank takes between two looks at its parent: it gets no further pair done
    with contextlib.suppress(ProcessLookupError):  # some kernels hang up what is stopped and has nobody left
        os.kill(rank, signal.SIGCONT)
    wait_until(lambda: not alive(rank), PATIENCE, "the rank to end")
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    kinds = [kind for kind, _ in endings(run, job)]
    assert kinds == ["died", "died", "died", "done"], kinds
    cluster.wait_for_state(runs.jobs["pretrain-whole"], "COMPLETED", "FAILED")
    assert endings(runs.base / "whole", runs.jobs["pretrain-whole"]) == [("done", PAIRS)]
    assert pairs_of(run) == pairs_of(runs.base / "whole")  # every loss, norm and hash of the stream, bit for bit


@pytest.mark.slow
def test_stopped_and_killed_a_run_goes_on_exactly_and_a_second_one_is_refused(cluster, runs, monkeypatch):
    run, job = runs.base / "stopped", runs.jobs["pretrain-stopped"]
    cluster.command("scontrol", "release", job)
    wait_until(lambda: recorded(run) > 30, PATIENCE, "30 pairs", poll=0.02)
    first = holder(run)
    os.kill(first, signal.SIGSTOP)  # the run waits until the second one has met it
    second = job_of(submit(cluster, runs.base, "pretrain", "stopped.yaml"))["pretrain-stopped"]
    cluster.wait_for_state(second, "FAILED", "COMPLETED")
    os.kill(first, signal.SIGCONT)
    assert cluster.field(second, "ExitCode") == "2:0" and cluster.field(second, "Restarts") == "0"
    log = next((run / "slurm").glob(f"*-{second}.out")).read_text()
    assert "is in use by process" in log and "not requeued" in log

    cluster.command("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: len(endings(run, job)) == 1, PATIENCE, "the run to stop")
    stopped_at = endings(run, job)[0][1]
    wait_until(lambda: recorded(run) > stopped_at + 20, PATIENCE, "20 more pairs", poll=0.02)
    os.kill(holder(run), signal.SIGSTOP)  # so that it still runs while it is looked at
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    status = read(run)
    os.kill(second_rank(run), signal.SIGKILL)
    os.kill(holder(run), signal.SIGCONT)
    assert status.restarts >= 1 and status.pairs == PAIRS and status.checkpoint
    assert status.jobs[job].startswith("RUNNING on n") and "of its limit left" in status.jobs[job]
    for name in ("stopped", "whole"):
        cluster.wait_for_state(runs.jobs[f"pretrain-{name}"], "COMPLETED", "FAILED")
    assert [kind for kind, _ in endings(run, job)] == ["stopped", "died", "done"]
    assert pairs_of(run) == pairs_of(runs.base / "whole")


@pytest.mark.parametrize("run", ["stopped", "hurt"])
def test_tensorboard_has_each_step_once_in_one_file(cluster, runs, run):
    cluster.wait_for_state(runs.jobs[f"pretrain-{run}"], "COMPLETED", "FAILED")
    assert len(list((runs.base / run / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(runs.base / run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/dense")]
    assert losses == [(line["pair"], pytest.approx(line["loss_dense"], rel=1e-6)) for line in pairs_of(runs.base / run)]
    assert [step for step, _ in losses] == list(range(1, PAIRS + 1))


@pytest.mark.slow
def test_an_evaluation_stopped_and_killed_at_its_work_keeps_what_is_done(cluster, runs):
    scores, job = runs.base / "scores", runs.jobs["eval-scores"]
    cluster.command("scontrol", "release", job)
    for how in (signal.SIGUSR1, signal.SIGKILL):
        before = pieces(scores)
        wait_until(lambda before=before: pieces(scores) > before, PATIENCE, "a piece of work", poll=0.02)
        rank = rank_of("--out", str(scores))
        os.kill(rank, signal.SIGSTOP)  # it cannot come to its end meanwhile
        if how == signal.SIGUSR1:
            cluster.command("scancel", "--signal=USR1", "--batch", job)
            wait_until(lambda: "SIGUSR1" in log_of(scores), PATIENCE, "the supervisor to pass the signal on")
            os.kill(rank, signal.SIGCONT)
            wait_until(lambda: len(endings(scores, job)) == 1, PATIENCE, "the evaluation to stop")
        else:
            os.kill(rank, signal.SIGKILL)
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert [kind for kind, _ in endings(scores, job)] == ["stopped", "died", "done"]
    done = [count for _, count in endings(scores, job)]
    assert 0 < done[0] < done[1] < done[2]
    printed = subprocess.run(
        [sys.executable, "-m", "megarat", "eval", str(runs.base / "pretrain"), "--out", str(runs.base / "again"), "--pattern", MANY[3]],
        check=True, capture_output=True, text=True, cwd=ROOT, env=cluster.environment,
    ).stdout  # fmt: skip
    results = json.loads((scores / "results.json").read_text())["tasks"]["ppl"]
    assert [row["pattern"] for row in results] == [f"{pattern},W=0,I=0" for pattern in MANY]
    assert f"| {results[3]['loss']:.4f} |" in printed


def test_a_corpus_is_built_by_a_job(cluster, runs):
    cluster.wait_for_state(runs.jobs["data-corpus"], "COMPLETED", "FAILED")
    from data_tools.build_shards import Options, build

    build([runs.base / "text.txt"], runs.base / "tiny.model", runs.base / "same", Options(), workers=1, progress=False)
    files = {path.name: path.read_bytes() for path in (runs.base / "corpus/train").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (runs.base / "same/train").iterdir()} and len(files) == 2


def test_one_command_ends_in_a_report_of_all_patterns(cluster, runs):
    cluster.wait_for_state(runs.jobs["report-adapted"], "COMPLETED", "FAILED")
    report = (runs.base / "adapted/report.md").read_text()
    for pattern in PATTERNS:
        assert f"| {pattern} | 4 |" in report
    for folder in PATTERNS.values():
        results = json.loads((runs.base / f"adapted/{folder}/eval/results.json").read_text())
        assert f"{results['tasks']['ppl'][0]['loss']:.4f}" in report
    parent_of = json.loads(next((runs.base / "adapted/D4-W0-I0/checkpoints").glob("pair_*/state.json")).read_text())["parent"]
    assert parent_of["path"].startswith(str(runs.base / "pretrain/checkpoints"))


@pytest.mark.slow
def test_a_checkpoint_is_adapted_evaluated_and_reported_on_without_a_pretraining(cluster, runs):
    cluster.wait_for_state(runs.jobs["pretrain-pretrain"], "COMPLETED", "FAILED")
    job = job_of(
        submit(cluster, runs.base, "adapt", "adapt.yaml", "--set", "run.dir=alone", "--from", "pretrain", "--pattern", "D=8")
    )
    assert cluster.wait_for_state(job["report-alone"], "COMPLETED", "FAILED") == "COMPLETED"
    assert "| D=8,W=0,I=0 | 4 |" in (runs.base / "alone/report.md").read_text()
    assert endings(runs.base / "alone/D8", f"{job['adapt-alone']}_0") == [("done", 4)]


def test_what_a_submission_leaves_in_the_run_folder(runs):
    folder = next(path for path in (runs.base / "pretrain/slurm").iterdir() if path.is_dir())
    assert (folder / "code/megarat/train/loop.py").exists() and (folder / "code/slurm/env.sh").exists()
    assert "pairs: 4" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "submission.json").read_text())["command"][1] == "pretrain"


def test_a_run_that_cannot_be_is_not_submitted(cluster, runs):
    printed = submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--nodes=3", check=False)
    assert printed.startswith("submit: error:") and "train.global_batch is 4" in printed
    printed = submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--set", "train.pears=3", check=False)
    assert "did you mean train.pairs?" in printed
    assert "sbatch: " in submit(cluster, runs.base, "pretrain", "pretrain.yaml", "--sbatch=--partition=none", check=False)


def write_tokenizer(path: Path) -> Path:
    """A SentencePiece model of a few hundred entries, which knows every byte."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a paragraph that has some words"] * 20), model_writer=file, vocab_size=280, model_type="bpe",
            byte_fallback=True, minloglevel=2,
        )  # fmt: skip
    return path


def pairs_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def recorded(run: Path) -> int:
    """Lines of the metrics: pairs done, but for those that a resumed start has dropped."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saves_since(run: Path, pair: int) -> bool:
    """Whether a checkpoint of a later pair is being written, or has been: a look may come too late for one that takes milliseconds."""
    folders = {path.name for path in (run / "checkpoints").iterdir()}
    return any(name.startswith(".staging-") or name > f"pair_{pair:08d}" for name in folders)


def pieces(out: Path) -> int:
    return len(list(out.glob("work/*/*.json")))


def log_of(run: Path) -> str:
    return next((run / "slurm").glob("*.out")).read_text()


def starts(run: Path) -> list[dict]:
    return [line for line in history(run) if line["event"] == "start"]


def holder(run: Path) -> int:
    """The process that holds the run's lock: its first rank."""
    return int(json.loads((run / "lock").read_text())["pid"])


def second_rank(run: Path) -> int:
    """The process of rank 1 of a run, as soon as there is one."""
    return rank_of(f"run.dir='{run}'", rank=1)


def rank_of(*words: str, rank: int = 0) -> int:
    """The process of a rank with these words in its command line, as soon as there is one."""
    found: list[int] = []

    def look() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:  # it has just ended, or is nobody's business
                continue
            is_rank = (
                f"SLURM_PROCID={rank}".encode() in environment and arguments[1:2] and arguments[1].endswith(b"slurm/launch.py")
            )
            if is_rank and all(word.encode() in arguments for word in words):
                found.append(int(process.name))
        return bool(found)

    wait_until(look, PATIENCE, f"rank {rank} of {words[-1]}")
    return found[0]


def endings(run: Path, job: str) -> list[tuple[str, int]]:
    return [(line["kind"], line["pair"]) for line in history(run) if line["event"] == "end" and line["job"] == job]
