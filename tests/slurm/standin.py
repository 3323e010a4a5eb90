"""A stand-in for megarat that ends as a test tells it to, and the jobs of it that tests of the supervision look at.

Most of the time of these jobs goes by in Slurm's queue, so all of them are submitted together, before anything else.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from cluster import PATIENCE, Cluster, history, wait_until

ROOT = Path(__file__).resolve().parents[2]

# Each start takes the next line of RUN/script: a pair to record, then an exit code, or "save" (and exit 75), "listen" (for a signal, then
# save), "hang" (deaf to everything).
PROGRAM = """
import json, os, pathlib, re, signal, sys, time
run = pathlib.Path(re.search("'(.*)'", sys.argv[-1])[1].replace("''", "'"))
lines = (run / "script").read_text().split("\\n")
pair, ending = lines[min(int(os.environ.get("SLURM_RESTART_COUNT", 0)), len(lines) - 1)].split()
os.utime(os.environ["MEGARAT_HEARTBEAT"])
def lives(pid):
    try:
        return pathlib.Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not pid  # it is being written
def save(*_):
    time.sleep(2)
    (run / "checkpoints" / f"pair_{int(pair):08d}").mkdir(parents=True, exist_ok=True)
    sys.exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN if ending == "hang" else save)
with open(run / "metrics.jsonl", "a") as file:
    file.write(json.dumps({"pair": int(pair)}) + "\\n")
if ending in ("listen", "hang"):
    (run / f"{ending}ing-{os.environ['SLURM_PROCID']}").write_text(str(os.getpid()))
    while ending == "listen" and all(lives(rank.read_text()) for rank in run.glob("listening-*")):
        os.utime(os.environ["MEGARAT_HEARTBEAT"])  # it goes on as long as all ranks do
        time.sleep(0.5)
    time.sleep(1000)
if ending == "save":
    save()
sys.exit(int(ending))
"""

# A container runtime as far as a job sees it: options, an image, and a command to run. It writes down what it was given.
RUNNER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RUNNER_LOG"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = iter(sys.argv[2:])
for word in words:
    if word == "--bind":
        next(words)
    elif not word.startswith("-"):
        break
command = list(words)
os.execvp(command[0], command)
"""

# pyxis teaches srun options that name an image; here they are written down, and the rest goes to srun.
PYXIS = """#!/usr/bin/env python3
import json, os, sys
images = [word for word in sys.argv[1:] if word.startswith("--container-")]
with open(os.environ["RUNNER_LOG"], "a") as file:
    file.write(json.dumps(images) + "\\n")
os.execv(os.environ["REAL_SRUN"], ["srun", *(word for word in sys.argv[1:] if word not in images)])
"""

APPTAINER = ["exec", "--nv", "--bind", "/data of ours:/data", "image.sif"]
ENROOT = ["--container-image=image.sqsh", "--container-mounts=/data of ours:/data"]


class Submitted(NamedTuple):
    job: str
    run: Path

    @property
    def endings(self) -> list[tuple[str, int]]:
        return [(line["kind"], line["pair"]) for line in history(self.run) if line["event"] == "end"]

    @property
    def log(self) -> str:
        return (self.run / "job.out").read_text()

    def waits(self, ranks: int = 1, how: str = "listening") -> None:
        """Until its ranks listen, or hang."""
        wait_until(lambda: len(list(self.run.glob(f"{how}-*"))) == ranks, PATIENCE, f"{self.run} to be {how}")


CHECKED = {"MEGARAT_HEALTH": "node"}

# What the starts of each run do, and options of its job.
SCENARIOS: dict[str, tuple[list[str], dict[str, str]]] = {
    "dies twice": (["3 1", "5 1", "5 1", "9 0"], {}),
    "dies often": (["1 1", "2 1", "3 1", "4 0"], {"MEGARAT_RETRIES": "2"}),
    "refused": (["0 2", "9 0"], {}),
    "USR1": (["4 listen", "8 0"], {"options": "--nodes=2 --ntasks-per-node=2"}),
    "TERM": (["4 listen", "8 0"], {}),
    "time limit": (["4 listen", "8 0"], {"options": "--time=2 --signal=B:USR1@60"}),
    "preempted": (["4 listen", "8 0"], {"options": "--partition=low --exclusive"}),
    "node lost": (["4 listen", "8 0"], {"options": "--partition=lost"}),
    "cancelled": (["4 listen", "8 0"], {}),
    "unhealthy": (["9 0", "9 0"], {"options": "--nodes=2", **CHECKED, "MEGARAT_HEALTH_COMMAND": 'test "$SLURMD_NODENAME" != n2'}),
    "no image": (["9 0"], {"options": "--nodes=2", **CHECKED, "MEGARAT_CONTAINER": "false", "MEGARAT_RETRIES": "1"}),
    "cut off": (["9 0"], {"options": "--nodes=3 --partition=cut", "MEGARAT_HEALTH": "full", "MEGARAT_HEALTH_SECONDS": "30"}),
    "stalls": (["4 save", "4 save", "4 save", "9 0"], {}),
    "checkpoint gone": (["4 listen", "9 0"], {}),
    "hangs": (["4 hang", "8 0"], {"MEGARAT_HANG": "60"}),
    "step daemon killed": (["4 listen", "8 0"], {"options": "--nodes=2", "MEGARAT_HANG": "40"}),
    "controller away": (["4 listen", "8 0"], {}),
    "script's daemon killed": (["4 listen", "8 0"], {}),
    "apptainer": (["9 0"], {**CHECKED, "MEGARAT_CONTAINER": "apptainer exec --nv --bind '/data of ours:/data' image.sif"}),
    "enroot": (["9 0"], {**CHECKED, "MEGARAT_SRUN_OPTIONS": "--container-image=image.sqsh '--container-mounts=/data of ours:/data'"}),
}  # fmt: skip


# A real image, unprivileged, where Charliecloud is installed: most of this machine bound into an empty root.
CHARLIECLOUD = "ch-run"
IMAGE_MARK = "in-the-image"


def make_image(folder: Path, *needed: Path) -> dict[str, str]:
    """The least that an image can be, and the settings of a job that runs in it: mount points of the system and of what is needed."""
    tops = {Path(path).parts[1] for path in (sys.executable, sys.base_prefix, os.path.realpath(sys.executable), *needed)} | {
        "usr"
    }
    for name in tops | {"dev", "proc", "sys", "tmp", "home", "etc"}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        if name not in tops:
            (folder / name).symlink_to(f"usr/{name}")
    for name in ("hosts", "passwd", "group", "resolv.conf"):  # of the host they are bound over
        (folder / "etc" / name).touch()
    (folder / IMAGE_MARK).touch()
    binds = " ".join(f"--bind=/{name}:/{name}" for name in sorted(tops))
    return {
        **CHECKED,
        "USER": "root",
        "MEGARAT_CONTAINER": f"{CHARLIECLOUD} {binds} --cd={needed[0]} {folder} --",
        "MEGARAT_HEALTH_COMMAND": f"test -e /{IMAGE_MARK}",
        "options": "--nodes=2",
    }


def submit_all(cluster: Cluster, base: Path) -> dict[str, Submitted]:
    """All scenarios as jobs of pretrain.sbatch, from a tree with the repository's slurm folder and the stand-in."""
    shutil.copytree(ROOT / "slurm", base / "tree/slurm")
    (base / "tree/megarat").mkdir()
    (base / "tree/megarat/__main__.py").write_text(PROGRAM)
    for name, program in {"images/apptainer": RUNNER, "images/pyxis/srun": PYXIS}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(program)
        (base / name).chmod(0o755)
    scenarios = dict(SCENARIOS)
    if shutil.which(CHARLIECLOUD):
        scenarios["image"] = (["4 listen", "8 0"], make_image(base / "images/root", base))
    return {name: _submit(cluster, base, name, *scenario) for name, scenario in scenarios.items()}


def _submit(cluster: Cluster, base: Path, name: str, script: list[str], changes: dict[str, str]) -> Submitted:
    run = base / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "script").write_text("\n".join(script))
    images = {"apptainer": f"{base}/images:", "enroot": f"{base}/images/pyxis:"}.get(name, "")
    settings = {
        "MEGARAT_ROOT": f"{base}/tree",
        "MEGARAT_PYTHON": sys.executable,
        "MEGARAT_RANK_WAIT": "30",
        "MEGARAT_HEALTH": "off",  # but where it is what a test is about: its test of memory costs a second of a processor each time
        "RUNNER_LOG": f"{run}/images",
        "REAL_SRUN": str(shutil.which("srun")),
        **changes,
    }
    options = ["--parsable", f"--chdir={base}", f"--output={run}/job.out", *settings.pop("options", "").split()]
    settings["PATH"] = images + cluster.environment["PATH"]
    job = cluster.command("sbatch", *options, str(base / "tree/slurm/pretrain.sbatch"), str(run), "config.yaml", changes=settings)
    return Submitted(job, run)
