"""``megarat doctor``: what is installed, which fast paths are on, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

OK, MISSING, NOTE = "ok", "missing", "note"


class Finding(NamedTuple):
    """One line of the report; ``remedy`` is empty when nothing needs doing."""

    status: str
    what: str
    found: str
    remedy: str = ""


def report() -> str:
    """The findings as an aligned table."""
    findings = examine()
    width = max(len(finding.what) for finding in findings)
    lines = [f"{finding.status:<8}{finding.what:<{width}}  {finding.found}" for finding in findings]
    remedies = [f"  {finding.what}: {finding.remedy}" for finding in findings if finding.remedy]
    if remedies:
        lines += ["", "To do, where you want it:", *remedies]
    return "\n".join(lines)


def examine() -> list[Finding]:
    """Look at this machine and this Python."""
    findings = [_python()]
    findings += [_package(*row) for row in _PACKAGES]
    checks: list[Callable[[], Finding]] = [_gpu, _cpu_precision, _kernels, _dense_attention, _apex, _mpi, _compiler]
    return findings + [check() for check in checks]


# distribution, lowest version, what it serves, how to get it
_PACKAGES = [
    ("torch", "2.11", "everything", "pip install torch==2.13.0"),
    ("deepspeed", "0.19.4", "training", "pip install deepspeed==0.19.8"),
    (
        "triton",
        "3.6",
        "the fused kernels (GPU)",
        "comes with a CUDA torch; beside a CPU torch: pip install triton==3.6.0 'numpy<2.4'",
    ),
    ("webdataset", "1.0.2", "streaming shards", "pip install webdataset==1.0.2"),
    ("tensorboard", "2.0", "event files", "pip install tensorboard"),
    ("sentencepiece", "0.2", "SentencePiece tokenizers", "pip install sentencepiece"),
    ("tokenizers", "0.20", "Hugging Face tokenizers", "pip install tokenizers"),
    ("matplotlib", "3.5", "plots of the demo's report", "pip install matplotlib"),
    ("pyarrow", "10", "building shards from .parquet", "pip install pyarrow"),
    ("zstandard", "0.20", "building shards from .jsonl.zst", "pip install zstandard"),
    ("transformers", "4.57", "comparing logits at the end of checkpoint export", "pip install transformers"),
]


def _python() -> Finding:
    return Finding(OK, "python", f"{platform.python_version()} ({sys.executable})")


def _package(name: str, lowest: str, serves: str, remedy: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(MISSING, name, f"not installed; needed for {serves}", remedy)
    if _numbers(version) < _numbers(lowest):
        return Finding(MISSING, name, f"{version}, too old for {serves} (>= {lowest})", remedy)
    return Finding(OK, name, version)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdigit())


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(MISSING, "GPU", "unknown without torch", "install torch first")
    import torch

    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return Finding(NOTE, "GPU", f"none usable ({build}); everything runs on the CPU with the reference ops")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(OK, "GPU", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")


def _cpu_precision() -> Finding:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        return Finding(OK, "CPU arithmetic", f"{capability}, bf16 matrix units (AMX): precision 'auto' trains in bf16 on the CPU")
    return Finding(OK, "CPU arithmetic", f"{capability}: precision 'auto' trains in fp32 on the CPU")


def _kernels() -> Finding:
    from megarat.ops.dispatch import ops_mode, triton_missing

    mode = ops_mode()
    if mode != "auto":
        which = mode.partition(":")[2] or "everywhere"
        return Finding(NOTE, "ops", f"torch references {which} (MEGARAT_OPS={mode})", "unset MEGARAT_OPS to use the kernels")
    import torch

    missing = triton_missing()
    if missing:
        return Finding(MISSING, "ops", f"torch references: {missing}", "pip install triton (comes with a CUDA torch)")
    if not torch.cuda.is_available():
        return Finding(NOTE, "ops", "torch references on the CPU; Triton kernels run on GPUs")
    from megarat.ops.dispatch import gpu_unsupported, tiles_are_timed

    device = torch.device("cuda", torch.cuda.current_device())
    unsupported = gpu_unsupported(device)
    if unsupported:
        return Finding(NOTE, "ops", f"torch references: {unsupported}")
    tiles = "tiles timed on an H200" if tiles_are_timed(device) else "tiles timed on an H200, not on this kind of GPU"
    return Finding(OK, "ops", f"Triton kernels, {tiles}; the reference, with one warning, serves {_NOT_SERVED}")


# what the `_unsupported` functions of megarat.ops turn away
_NOT_SERVED = (
    "float64, attention heads other than 16, 32, 64 or 128 wide, recurrent heads no multiple of 16, norms wider than 16384"
)


def _dense_attention() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(NOTE, "dense attention", "torch's, on the CPU")
    from megarat.ops.dilated_attention import dense_backend

    device = torch.device("cuda", torch.cuda.current_device())
    backend = dense_backend(device, torch.bfloat16, 4096, 128)
    found = f"{backend}, chosen by torch for bf16 heads of 128 at 4096 tokens"
    if backend in ("efficient", "math"):
        return Finding(
            NOTE, "dense attention", found, "a torch built with cuDNN or FlashAttention for this GPU is several times faster"
        )
    return Finding(OK, "dense attention", found)


def _apex() -> Finding:
    from megarat.engine import apex_fused_adam

    if apex_fused_adam() is not None:
        return Finding(OK, "apex", "NVIDIA's; optim.implementation=apex and train.weight_gradients=apex can use it")
    if importlib.util.find_spec("apex") is not None:
        return Finding(
            NOTE, "apex", "a package of that name is installed, but it is not NVIDIA's; it is ignored", "pip uninstall apex"
        )
    return Finding(NOTE, "apex", "not installed; torch's fused AdamW is used, which is as fast")


def _mpi() -> Finding:
    if importlib.util.find_spec("mpi4py") is None:
        return Finding(NOTE, "MPI", "mpi4py is not installed; needed only to start under mpirun", "pip install mpi4py mpich")
    if shutil.which("mpirun") is None and shutil.which("mpiexec") is None:
        return Finding(NOTE, "MPI", "mpi4py, but no mpirun", "pip install mpich, or load your cluster's MPI module")
    return Finding(OK, "MPI", f"mpi4py {importlib.metadata.version('mpi4py')}")


def _compiler() -> Finding:
    compiler = os.environ.get("CC") or next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    if compiler is None:
        return Finding(NOTE, "C compiler", "none; Triton needs one on GPUs to build its launchers", "install gcc")
    return Finding(OK, "C compiler", compiler)
