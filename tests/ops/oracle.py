"""What the Triton kernels' cases share: where they run, tolerances, poisoned memory.

pytest does not collect the `*_cases.py` beside this file by their names. `tests/ops/test_interpreted_*.py` run them on the CPU, in processes
with TRITON_INTERPRET=1, which must be set before Triton is imported (small shapes, fp32), and `tests/gpu/test_*_kernels.py` on a GPU
(also large shapes and bf16).

Tolerances are relative errors ||x - oracle|| / ||oracle||. fp32: 2e-6, some ten roundings of 2^-24. bf16 (inputs are rounded before the
oracle sees them): 4e-3 for outputs, one rounding of at most 2^-9 = 2e-3 of the result and one of the softmax weights; 1e-2 for
gradients, through which two more rounded intermediates pass. fp16 keeps three bits more: an eighth of both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.bfloat16: (4e-3, 1e-2), torch.float16: (5e-4, 1.25e-3)}  # outputs, gradients
ROOT = Path(__file__).parents[2]


def run_interpreted(*cases: str) -> None:
    """Runs `tests/ops/<case>_cases.py` for each of them in the interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"tests/ops/{case}_cases.py" for case in cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch, request):
    """Fresh floating tensors hold NaN, so an element a kernel does not write is seen. A case has the same numbers in every run."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            x = real(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def relative_error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((x.double() - oracle).norm() / oracle.norm().clamp_min(1e-30))


def assert_close(results, oracles, dtype, outputs, slack=0.0):
    """The first `outputs` results by the tolerance of outputs, the others by that of gradients, all plus `slack`."""
    for index, (x, oracle) in enumerate(zip(results, oracles, strict=True)):
        limit = TOLERANCE[dtype][index >= outputs] + slack
        error = relative_error(x.detach(), oracle.detach())
        assert error <= limit, f"result {index}: relative error {error:.2e} > {limit:.0e}"
