"""Checks a run, copies code and config into its folder, and queues it. Imports nothing of megarat; runs ``megarat plan`` to check.

    slurm/submit.py pretrain CONFIG --nodes 8 --gpus-per-node 8 --time 24:00:00
    slurm/submit.py adapt CONFIG --from CHECKPOINT --pattern D=16 --pattern D=64,W=256,I=4 --nodes 1 --gpus-per-node 8 --time 4:00:00
    slurm/submit.py eval RUN --pattern dense --pattern D=16 --out DIR --nodes 1 --gpus-per-node 1 --time 1:00:00
    slurm/submit.py data OUT_DIR --nodes 1 --cpus-per-task 32 --time 4:00:00 -- INPUT … --tokenizer FILE

The whole life in one command: pretraining, then for each pattern an adaptation and its evaluation (arrays), then a report:

    slurm/submit.py pretrain CONFIG --chain ADAPT_CONFIG --pattern D=16 --pattern D=64 --nodes 8 --gpus-per-node 8 --time 24:00:00

Into RUN_DIR/slurm/<time>/ go config.yaml (resolved), code/ (what the job runs, whatever happens to the checkout) and submission.json. Options
that sbatch knows and this does not: --sbatch=--partition=gpu --sbatch=--account=x. Without --gpus-per-node the job is one of CPU ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE = ("megarat", "data_tools", "slurm")
_DISK = 1e9  # bytes/s at which a checkpoint is written at worst
_SHORTEST_NOTICE, _USUAL_NOTICE = 30, 300  # seconds before the time limit


class Refused(Exception):
    """What is wrong with the request, for the person who made it."""


@dataclass
class Site:
    """What all jobs of one submission share."""

    arguments: argparse.Namespace
    code: Path

    def sbatch(self, script: str, parameters: Sequence[str], name: str, output: Path, **options: str) -> str:
        """Queue one of the scripts; returns the job id."""
        arguments = self.arguments
        command = [
            "sbatch", "--parsable", f"--job-name={name}", f"--nodes={arguments.nodes}", f"--ntasks-per-node={arguments.ranks}",
            f"--time={arguments.time}", f"--chdir={Path.cwd()}", f"--output={output}",
        ]  # fmt: skip
        command += [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
        command += [f"--cpus-per-task={arguments.cpus_per_task}"] if arguments.cpus_per_task else []
        command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value]
        command += [*arguments.sbatch, str(self.code / "slurm" / script), *parameters]
        if arguments.dry_run:
            print(f"  {shlex.join(command)}")
            return "JOB"
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"sbatch: {done.stderr.strip()}")
        job = done.stdout.strip().partition(";")[0]
        print(f"{name}: job {job}, log {str(output).replace('%x', name).replace('%j', job).replace('%A', job)}")
        return job

    def _environment(self) -> dict[str, str]:
        own = {"MEGARAT_ROOT": str(self.code), "MEGARAT_PYTHON": sys.executable, "MEGARAT_RETRIES": str(self.arguments.retries)}
        patterns = {"MEGARAT_PATTERNS": str(self.code.parent / "patterns.txt")}
        return {**os.environ, **own, **patterns}


def main() -> int:
    """Submit what the command line asks for; 2 and one message when it cannot be."""
    arguments = _arguments()
    try:
        {"pretrain": pretrain, "adapt": adapt, "eval": evaluate, "data": build_data}[arguments.kind](arguments)
    except Refused as refusal:
        print(f"submit: error: {refusal}", file=sys.stderr)
        return 2
    return 0


def pretrain(arguments: argparse.Namespace) -> None:
    """Pretraining, and what ``--chain`` hangs behind it."""
    plan = checked_plan(arguments, arguments.target)
    adaptation = checked_plan(arguments, arguments.chain) if arguments.chain else None
    if adaptation and not arguments.pattern:
        raise Refused("--chain needs at least one --pattern to adapt to")
    run_dir = run_folder(plan)
    site, config = prepare(arguments, run_dir, plan)
    job = site.sbatch(
        "pretrain.sbatch", [str(run_dir), str(config)], f"pretrain-{run_dir.name}", run_dir / "slurm/%x-%j.out", signal=notice(arguments, plan)
    )  # fmt: skip
    record(site, run_dir, job)
    if adaptation:
        _adapt_and_evaluate(site, adaptation, run_dir, job)
    print(f"look at it: megarat status {run_dir}")


def adapt(arguments: argparse.Namespace) -> None:
    """Adaptations of a checkpoint to one or more patterns, each evaluated, and a report."""
    if not arguments.parent or not arguments.pattern:
        raise Refused("adapt needs --from CHECKPOINT and at least one --pattern")
    plan = checked_plan(arguments, arguments.target)
    site, _ = prepare(arguments, run_folder(plan), plan)
    _adapt_and_evaluate(site, plan, Path(arguments.parent), after="")


def evaluate(arguments: argparse.Namespace) -> None:
    """One evaluation under all patterns."""
    if not arguments.out:
        raise Refused("eval needs --out DIR")
    out = Path(arguments.out).absolute()
    site, _ = prepare(arguments, out, None)
    patterns = [option for pattern in arguments.pattern for option in ("--pattern", pattern)]
    parameters = [str(out), arguments.target, *patterns, "--tasks", arguments.tasks]
    record(site, out, site.sbatch("eval.sbatch", parameters, f"eval-{out.name}", out / "slurm/%x-%j.out"))


def build_data(arguments: argparse.Namespace) -> None:
    """Text to shards; inputs and options of data_tools.build_shards follow after ``--``."""
    if not arguments.rest:
        raise Refused("data needs inputs and options of data_tools.build_shards after --, such as: -- text/ --tokenizer FILE")
    out = Path(arguments.target).absolute()
    site, _ = prepare(arguments, Path(f"{out}-build"), None)
    build = Path(f"{out}-build")
    record(site, build, site.sbatch("data.sbatch", [str(out), *arguments.rest], f"data-{out.name}", build / "slurm/%x-%j.out"))


def _adapt_and_evaluate(site: Site, plan: dict[str, Any], parent: Path, after: str) -> None:
    """An array with one adaptation a pattern, an array that evaluates each when it is done, and the report."""
    arguments, base = site.arguments, run_folder(plan)
    logs = base / "slurm"
    config = site.code.parent / "adapt.yaml"
    (site.code.parent / "patterns.txt").write_text("".join(f"{pattern}\n" for pattern in arguments.pattern), encoding="utf-8")
    config.write_text(plan["config_yaml"], encoding="utf-8")
    logs.mkdir(parents=True, exist_ok=True)
    common = {"array": f"0-{len(arguments.pattern) - 1}", "kill_on_invalid_dep": "yes"}
    adaptation = site.sbatch(
        "adapt.sbatch", [str(base), str(config), "--from", str(parent)], f"adapt-{base.name}", logs / "%x-%A_%a.out",
        signal=notice(arguments, plan), dependency=f"afterok:{after}" if after else "", **common,
    )  # fmt: skip
    evaluation = site.sbatch(
        "eval.sbatch", [str(base), "--tasks", arguments.tasks], f"eval-{base.name}", logs / "%x-%A_%a.out",
        dependency=f"aftercorr:{adaptation}", **common,
    )  # fmt: skip
    end = site.sbatch(
        "report.sbatch", [str(base)], f"report-{base.name}", logs / "%x-%j.out", dependency=f"afterany:{evaluation}"
    )
    for job in (adaptation, evaluation, end):
        record(site, base, job)
    print(f"look at it: megarat status {base}; the report will be {base / 'report.md'}")


def record(site: Site, run_dir: Path, job: str) -> None:
    """Let ``megarat status`` know of a job that waits for its first start."""
    if site.arguments.dry_run:
        return
    with (run_dir / "slurm/history.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"event": "submitted", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "job": job}) + "\n"
        )


# ---- checks ------------------------------------------------------------------------------------------------------------------------


def checked_plan(arguments: argparse.Namespace, config: str) -> dict[str, Any]:
    """What ``megarat plan`` says of this config on so many ranks. Raises ``Refused`` with its message when the run cannot be."""
    gpu = arguments.gpu if arguments.gpus_per_node else "cpu"
    command = [sys.executable, str(ROOT / "slurm/launch.py"), "megarat", "plan", config]
    command += ["--gpus", str(arguments.nodes * arguments.ranks), "--gpu", gpu, "--json"]
    command += [option for override in arguments.overrides for option in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip().removeprefix("megarat: error: "))
    plan: dict[str, Any] = json.loads(done.stdout)
    memory, size = plan["memory_bytes"]["total"] / 1e9, plan["checkpoint_bytes"] / 1e9
    print(f"{config}: {plan['gpus']} ranks, {memory:.1f} GB each (calculated), checkpoints of {size:.3g} GB")
    return plan


def run_folder(plan: dict[str, Any]) -> Path:
    """The absolute ``run.dir`` of a plan's config."""
    return Path(plan["config"]["run"]["dir"]).absolute()


def notice(arguments: argparse.Namespace, plan: dict[str, Any]) -> str:
    """Slurm's --signal: how long before the time limit the run is told to stop. Two pairs must fit in, and the checkpoint of the stop.

    Where checkpoints are written while training goes on, the one before may just have been begun: the stop waits for it first.
    """
    seconds = arguments.notice
    if seconds is None:
        saves = 2 if plan["config"]["checkpoint"]["asynchronous"] else 1
        needed = 2 * plan.get("pair_seconds", 0) + saves * plan["checkpoint_bytes"] / _DISK
        limit = _seconds(arguments.time)
        usual = _USUAL_NOTICE if limit is None else min(_USUAL_NOTICE, limit / 4)
        seconds = int(max(_SHORTEST_NOTICE, usual, needed))
        if limit is not None and seconds >= limit:
            raise Refused(
                f"--time {arguments.time}: two pairs and {'a checkpoint' if saves == 1 else 'two checkpoints'} alone take {needed:.0f} s; "
                "give the job more time"
            )
    return f"B:USR1@{seconds}"


def _seconds(limit: str) -> float | None:
    """Slurm's time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None when there is none."""
    days, dash, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if dash:
            return int(days) * 86400 + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    except ValueError:
        return None
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}.get(len(parts))
    if units is None:
        return None
    return sum(part * unit for part, unit in zip(parts, units, strict=True)) or None  # 0 asks sbatch for no limit


# ---- the copy of code and config ------------------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace, run_dir: Path, plan: dict[str, Any] | None) -> tuple[Site, Path]:
    """Copy code and resolved config into a new folder of the run; returns what jobs need, and the config."""
    folder = run_dir / "slurm" / time.strftime("%Y%m%dT%H%M%S")
    while folder.exists():
        folder = folder.with_name(folder.name + "b")
    code = folder / "code"
    for name in tracked_files():
        target = code / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    config = folder / "config.yaml"
    if plan:
        config.write_text(plan["config_yaml"], encoding="utf-8")
    record = {
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD", "--", *CODE),
    }
    (folder / "submission.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Site(arguments, code), config


def tracked_files() -> list[str]:
    """Files that jobs need, as they are in the checkout now; all files of these folders where there is no git."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "--", *CODE)
    if listed:
        return [name for name in listed.splitlines() if (ROOT / name).is_file()]
    found = (path for folder in CODE for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [str(path.relative_to(ROOT)) for path in found]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("pretrain", "adapt", "eval", "data"))
    parser.add_argument("target", help="config of the run; for eval a checkpoint or run folder; for data the folder to write")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable"
    )
    parser.add_argument("--chain", metavar="ADAPT_CONFIG", help="after pretraining, adapt to each --pattern, evaluate, report")
    parser.add_argument("--from", dest="parent", metavar="CHECKPOINT", help="what adapt starts from")
    parser.add_argument("--pattern", action="append", default=[], metavar="SPEC", help="repeatable")
    parser.add_argument("--tasks", default="ppl", help="of the evaluation (default: ppl)")
    parser.add_argument("--out", metavar="DIR", help="where eval writes")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0, help="0: CPU ranks")
    parser.add_argument("--tasks-per-node", dest="ranks", type=int, help="ranks of a node (default: one a GPU)")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--gpu", default="H200", help="kind of GPU, for the check of memory (default: H200)")
    parser.add_argument(
        "--time", required=True, help="time limit of a job, as sbatch takes it; the run is requeued as often as it needs"
    )
    parser.add_argument("--notice", type=int, metavar="SECONDS", help="how long before the limit the run is told to stop")
    parser.add_argument("--retries", type=int, default=5, help="failures that a job may have (default: 5)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="passed on to sbatch; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="check, copy, and print the sbatch commands without running them")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)  # argparse does not take what follows options for one more argument
    arguments = parser.parse_args(given[:end])
    arguments.rest = given[end + 1 :]
    arguments.ranks = arguments.ranks or arguments.gpus_per_node or 1
    return arguments


if __name__ == "__main__":
    sys.exit(main())
