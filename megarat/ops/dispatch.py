"""Which implementation of an op runs: the Triton kernels or the plain torch reference.

`MEGARAT_OPS=auto` (the default) takes the kernels on CUDA tensors whenever they serve the call, and falls back to the reference
with one warning per op and reason. `MEGARAT_OPS=reference` forces the reference everywhere. A caller that passes `backend=`
explicitly gets exactly that backend or a `ValueError`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from megarat.errors import UserError

BACKENDS = ("triton", "reference")
_warned: set[tuple[str, str]] = set()


def ops_mode() -> str:
    """The process-wide switch: "auto" or "reference"."""
    mode = os.environ.get("MEGARAT_OPS", "auto")
    if mode not in ("auto", "reference"):
        raise UserError(f"MEGARAT_OPS={mode!r} in the environment is neither 'auto' nor 'reference'")
    return mode


@functools.cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot run in this process at all, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


def choose_backend(op: str, requested: str | None, tensor: torch.Tensor, unsupported: str | None) -> str:
    """Decides the backend of one call.

    op: name for messages. requested: the caller's `backend=`. tensor: any input, for its device.
    unsupported: why the kernels do not serve this call, or None. Returns "triton" or "reference".
    """
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"{op}: backend={requested!r}, expected one of {BACKENDS} or None")
    unsupported = triton_missing() or unsupported
    if requested == "triton" and unsupported:
        raise ValueError(f"{op}: backend='triton' was asked for, but {unsupported}")
    if requested is not None:
        return requested
    if ops_mode() == "reference" or not tensor.is_cuda:
        return "reference"
    if unsupported:
        _warn_once(op, unsupported)
        return "reference"
    return "triton"


def _warn_once(op: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op} runs its slow torch reference: {reason}", RuntimeWarning, stacklevel=3)
