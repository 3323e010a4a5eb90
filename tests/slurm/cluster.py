"""A private Slurm on this machine: munged, slurmctld and one slurmd a virtual node, all in one folder.

Why the odd lines are there:
- munge refuses a socket below a folder that only root may enter, so key and socket lie in different folders;
- ``config_overrides`` lets a node declare more cores and memory than this machine has; nothing is enforced, scripts for large nodes run as they are;
- a requeued job waits ``cred_expire`` + 1 s: little enough for tests, enough for a step to start on a busy machine;
- each slurmd has its own host name and its own ``/etc/hosts``, so that ``n1`` means the first node inside jobs;
- ports and job numbers (from which jobs make their ports) differ between clusters: each xdist worker may have its own on this machine.

Nothing here depends on how fast the machine is: Slurm finds no node dead by its own clock (``SlurmdTimeout``), and gives jobs all the time they
need to end (``KillWait``); tests that need either say so to Slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge slurm-wlm-basic-plugins"
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _LAST_PORT, _JOBS = 17000, 20000, 300  # a block of ports has so many job numbers

CONF = """\
ClusterName=tests
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=8
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
DefMemPerCPU=100
ReturnToService=2
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
SlurmctldPort={port}
SlurmdTimeout=3600
SlurmctldTimeout=3600
MessageTimeout=60
KillWait=30
UnkillableStepTimeout=120
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT MaxTime=INFINITE State=UP PriorityTier=1
"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Weight={weight} CPUs=32 Boards=1 SocketsPerBoard=1 CoresPerSocket=32 "
    "ThreadsPerCore=1 RealMemory=32000 State=UNKNOWN\n"
)
NODES = 6

# Partition -> its nodes (those of low number are taken first) and options. Each of the last four has a node that something happens to.
PARTITIONS = {
    "debug": ("n[1-2],n6", "Default=YES"),
    "lost": ("n[3,6]", ""),
    "low": ("n4", ""),
    "high": ("n4", "PriorityTier=10 PreemptMode=OFF"),
    "cut": ("n[1-2],n5", ""),
}
PATIENCE = 900  # seconds that anything may take: the difference between a busy machine and a fault
CUT = "n5"  # the node whose name service leads nowhere: its ranks reach nobody, themselves included


def reason_against() -> str | None:
    """Why no Slurm can be started here; None when one can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not found; {INSTALL}"
    if os.geteuid() != 0:
        return "slurmd and its namespaces need root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this machine lets nobody make namespaces"
    return None


class Cluster:
    """A running Slurm; ``environment`` is that of its clients."""

    def __init__(self, base: Path) -> None:
        self.base = base
        # A job inherits the environment of whoever submits it, and this process may have started a mesh of one rank before.
        inherited = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
        self.environment = {
            **inherited,
            "SLURM_CONF": str(base / "etc/slurm.conf"),
            "PATH": _path(),
            "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed asks for a compiler that CPU ranks never use: its import takes seconds at each start
        }
        self._namespaces: dict[str, str | None] = {}  # of each node's host name, by which its processes are known
        self._ports = contextlib.ExitStack()  # what keeps other clusters away from this one's

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("etc", "key", "run", "log", "state", "spool"):
            (self.base / name).mkdir(parents=True)
        self.base.chmod(0o755)  # munge wants its socket reachable
        (self.base / "key").chmod(0o700)
        self._write("key/munge.key", os.urandom(1024)).chmod(0o400)
        nodes = [f"n{number}" for number in range(1, NODES + 1)]
        self._write("etc/slurm.conf", self._configuration(nodes).encode())
        for file, address in (("hosts", "127.0.0.1"), ("hosts-cut", "192.0.2.1")):  # of the latter nobody answers, by RFC 5737
            names = "".join(f"{address} {node}\n" for node in nodes)
            self._write(f"etc/{file}", (Path("/etc/hosts").read_text() + names).encode())
        run, key, log = self.base / "run", self.base / "key", self.base / "log"
        self._daemon(
            "munged", f"--key-file={key}/munge.key", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={key}/munged.seed",
        )  # fmt: skip
        self._daemon("slurmctld")
        for node in nodes:
            self._start_node(node)
        wait_until(lambda: self._idle_nodes() == set(nodes), 120, "the nodes of the test cluster to be idle")

    def _configuration(self, nodes: list[str]) -> str:
        port, host = self._ports.enter_context(_block_of_ports(len(nodes) + 2)), socket.gethostname().partition(".")[0]
        text = CONF.format(host=host, base=self.base, port=port, first_job=1 + (port - _FIRST_PORT) // (len(nodes) + 2) * _JOBS)
        for number, node in enumerate(nodes, 1):
            text += NODE.format(name=node, host=host, port=port + number, weight=number)
        for name, (members, options) in PARTITIONS.items():
            text += f"PartitionName={name} Nodes={members} {options}\n"
        return text

    def _start_node(self, name: str) -> None:
        """Start the slurmd of one virtual node, in its own host name and ``/etc/hosts``."""
        hosts = self.base / ("etc/hosts-cut" if name == CUT else "etc/hosts")
        script = f"hostname {name} && mount --bind {hosts} /etc/hosts && exec slurmd -N {name}"
        self._daemon("unshare", "--uts", "--mount", "bash", "-c", script)
        file = self.base / f"run/slurmd-{name}.pid"
        wait_until(lambda: file.exists() and file.read_text().strip(), PATIENCE, f"slurmd of {name} to start")
        self._namespaces[name] = _host_namespace(Path("/proc") / file.read_text().strip())

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """A block in which nobody answers to Slurm's commands."""
        _end([int((self.base / "run/slurmctld.pid").read_text())])
        yield
        self._daemon("slurmctld")

    def lose_node(self, node: str) -> None:
        """Kill everything on a virtual node at once, as a power failure does: all that shares its slurmd's host name."""
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another one die
            for pid in self.processes(node):
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
        self.command(
            "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"
        )  # as Slurm does when it gives up waiting

    def processes(self, node: str) -> list[int]:
        """All processes of a virtual node."""
        own = self._namespaces[node]
        return [int(process.name) for process in Path("/proc").glob("[0-9]*") if _host_namespace(process) == own]

    def script_daemon(self, job: str) -> int:
        """The slurmstepd that started a running job's script."""
        node = self.field(job, "BatchHost")
        titles = {pid: _title(pid) for pid in self.processes(node)}
        found = [pid for pid, title in titles.items() if title.startswith(f"slurmstepd: [{job}.batch]")]
        assert len(found) == 1, f"script daemons of job {job} on {node}: {found} of {titles}"
        return found[0]

    def stop(self) -> None:
        """Cancel what runs, then end the daemons by their pid files and wait until they are gone."""
        if (self.base / "run/slurmctld.pid").exists():
            self.command("scancel", "--user=root", "--full", "--signal=KILL", check=False)  # not as patient as a cancelled job is
            self.command("scancel", "--user=root", check=False)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not self.command("squeue", "-h", check=False), 30, "all jobs to end")
        for pattern in ("slurmd-*.pid", "slurmctld.pid", "munged.pid"):
            _end([int(path.read_text()) for path in (self.base / "run").glob(pattern)])
        self._ports.close()

    def command(self, *arguments: str, check: bool = True, changes: Mapping[str, str] = MappingProxyType({})) -> str:
        """Standard output of a Slurm command, with ``changes`` to its environment."""
        done = subprocess.run(arguments, env={**self.environment, **changes}, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING or COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        pairs = [item.partition("=") for item in self.command("scontrol", "-o", "show", "job", job).split()]
        return next((value for key, _, value in pairs if key == name), "")

    def wait_for_state(self, job: str, *states: str, seconds: float = PATIENCE) -> str:
        """Wait until a job is in one of ``states``."""
        what = f"job {job} to be {' or '.join(states)}"
        wait_until(
            lambda: self.state(job) in states, seconds, what, lambda: self.command("scontrol", "show", "job", job), poll=0.5
        )
        return self.state(job)

    def _idle_nodes(self) -> set[str]:
        return set(self.command("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def _daemon(self, *arguments: str) -> None:
        subprocess.run(arguments, env=self.environment, check=True, timeout=60, stdout=subprocess.DEVNULL)

    def _write(self, name: str, content: bytes) -> Path:
        path = self.base / name
        path.write_bytes(content)
        return path


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster for the length of the block, in a folder of its own (munge refuses those of pytest, which only root may enter)."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as base:
        cluster = Cluster(Path(base))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def wait_until(
    condition: Callable[[], object], seconds: float, what: str, explain: Callable[[], str] = str, poll: float = 0.2
) -> None:
    """Look every ``poll`` seconds until ``condition`` holds. Raises ``TimeoutError`` that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}\n{explain()}")
        time.sleep(poll)


def _title(pid: int) -> str:
    """How a process calls itself; nothing of one that has just ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def parent(pid: int) -> int:
    """Who started a process."""
    return int(_stat(pid)[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait long for its parent to look at it."""
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """State, parent, and what follows."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def history(run_dir: Path) -> list[dict]:
    """What the supervisor of a run recorded."""
    path = run_dir / "slurm/history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _host_namespace(process: Path) -> str | None:
    try:
        return os.readlink(process / "ns/uts")
    except OSError:  # it has just ended
        return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def _block_of_ports(count: int) -> Iterator[int]:
    """The first of ``count - 1`` neighbouring ports that nobody listens on; a socket on one more, before them, makes the block ours."""
    for first in range(_FIRST_PORT, _LAST_PORT - count, count):
        with contextlib.ExitStack() as stack, socket.socket() as mark:
            try:
                mark.bind(("127.0.0.1", first))
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            stack.close()
            yield first + 1
            return
    raise OSError(f"no free ports between {_FIRST_PORT} and {_LAST_PORT}")


def _end(pids: list[int]) -> None:
    """End daemons: asked first, killed when they have not gone after twenty seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(alive(pid) for pid in pids), 20, f"processes {pids} to end")
            return
