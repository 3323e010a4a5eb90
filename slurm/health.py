"""Is this node fit to train? Prints one line of JSON: ``{"node": …, "faults": […]}``. Run on every node before each start.

Looked at: as many GPUs as the job was given, none with uncorrected memory errors; memory that keeps what is written to it; room on the
node's own disk; and whatever ``MEGARAT_HEALTH_COMMAND`` finds. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile

_PATTERNS = (0x00, 0xFF, 0x55, 0xAA)
_CHUNK = 1 << 20


def main() -> None:
    """Check this node and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be visible")
    parser.add_argument("--memory-mb", type=int, default=256, help="host memory to write and read back")
    parser.add_argument("--disk-mb", type=int, default=512, help="room that the node's own disk must have")
    arguments = parser.parse_args()
    faults = [
        *gpu_faults(arguments.gpus),
        *memory_faults(arguments.memory_mb),
        *disk_faults(tempfile.gettempdir(), arguments.disk_mb),
        *command_faults(os.environ.get("MEGARAT_HEALTH_COMMAND", "")),
    ]
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(json.dumps({"node": node, "faults": faults}), flush=True)


def gpu_faults(wanted: int) -> list[str]:
    """GPUs missing, or with memory errors that the hardware could not correct."""
    if not wanted:
        return []
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not run: {error}"]
    if done.returncode:
        return [f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:200]}"]
    rows = [row.split(",") for row in done.stdout.splitlines() if row.strip()]
    faults = [f"{len(rows)} of {wanted} GPUs are visible"] if len(rows) < wanted else []
    broken = [index.strip() for index, errors in rows if errors.strip().isdigit() and int(errors)]
    return faults + [f"GPU {index} has uncorrected memory errors" for index in broken]


def memory_faults(megabytes: int) -> list[str]:
    """Write patterns into host memory and read them back."""
    try:
        memory = bytearray(megabytes * _CHUNK)
        for pattern in _PATTERNS:
            expected = bytes([pattern]) * _CHUNK
            for start in range(0, len(memory), _CHUNK):
                memory[start : start + _CHUNK] = expected
            if any(memory[start : start + _CHUNK] != expected for start in range(0, len(memory), _CHUNK)):
                return [f"host memory does not keep the pattern 0x{pattern:02x}"]
    except MemoryError:
        return [f"{megabytes} MB of host memory are not free"]
    return []


def disk_faults(folder: str, megabytes: int) -> list[str]:
    """Whether the node's own disk can be written and has room for caches."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * _CHUNK)
    except OSError as error:
        return [f"{folder} cannot be written: {error.strerror}"]
    free = shutil.disk_usage(folder).free // _CHUNK
    return [f"{folder} has {free} MB free, fewer than {megabytes}"] if free < megabytes else []


def command_faults(command: str) -> list[str]:
    """What the site's own check says."""
    if not command:
        return []
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    return [f"'{command}' failed: {(done.stdout + done.stderr).strip()[-200:]}"] if done.returncode else []


if __name__ == "__main__":
    main()
