"""Which implementation of an op runs: the Triton kernels or the plain torch reference.

`MEGARAT_OPS=auto` (the default) takes the kernels on CUDA tensors whenever they serve the call and the GPU, and falls back to the
reference with one warning per op and reason. `MEGARAT_OPS=reference` forces the reference everywhere, `MEGARAT_OPS=reference:parts,rms_norm`
that of the named operations. A caller that passes `backend=` explicitly gets exactly that backend or a `ValueError`.

Tiles come from the tables at the top of each kernel module, never from tuning at run time: no training step stalls, and all ranks make
equal choices, also where their GPUs differ. The tables were timed on an H200. An H100 is the same processor with slower memory; other
GPUs run the same tiles untimed, all of which fit 99 KB of shared memory.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch

from megarat.errors import UserError

BACKENDS = ("triton", "reference")
OPERATIONS = (
    "accumulate_", "apply_rotary", "decode_step", "dilated_attention", "fp8_linear", "gated_scan", "gelu_and_gradient",
    "linear_cross_entropy", "output_gate", "parts", "rms_norm",
)  # fmt: skip
LEAST_CAPABILITY = (8, 0)  # bf16 matrix units and asynchronous copies
TIMED_CAPABILITY = (9, 0)  # H100, H200, GH200
_warned: set[tuple[str, str]] = set()
_missing = None if importlib.util.find_spec("triton") is not None else "the triton package is not installed"
_gpu_reasons: dict[torch.device, str | None] = {}


def ops_mode() -> str:
    """The process-wide switch: "auto", "reference", or "reference:" and names of operations."""
    mode = os.environ.get("MEGARAT_OPS", "auto")
    kind, colon, names = mode.partition(":")
    unknown = set(names.split(",")) - set(OPERATIONS) if colon else set()
    if kind not in ("auto", "reference") or (colon and kind == "auto") or unknown:
        raise UserError(
            f"MEGARAT_OPS={mode!r} in the environment: write 'auto', 'reference', or 'reference:' and some of {', '.join(OPERATIONS)}"
        )
    return mode


def _wants_reference(op: str) -> bool:
    kind, colon, names = ops_mode().partition(":")
    return kind == "reference" and (not colon or op in names.split(","))


def triton_missing() -> str | None:
    """Why Triton kernels cannot run in this process at all, or None when they can."""
    return _missing


def gpu_unsupported(device: torch.device) -> str | None:
    """Why the kernels do not serve this GPU, or None."""
    if device not in _gpu_reasons:
        _gpu_reasons[device] = _examine_gpu(device)
    return _gpu_reasons[device]


def _examine_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def tiles_are_timed(device: torch.device) -> bool:
    """Whether the kernels' tables were made for this GPU's processor."""
    return torch.cuda.get_device_capability(device) == TIMED_CAPABILITY


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
    if _wants_reference(op) or not tensor.is_cuda:
        return "reference"
    unsupported = unsupported or gpu_unsupported(tensor.device)
    if unsupported:
        _warn_once(op, unsupported)
        return "reference"
    return "triton"


def refuse_gradients(what: str, *tensors: torch.Tensor | None) -> None:
    """Raises where autograd would ask for a gradient that does not exist, instead of leaving it out in silence."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            f"{what} has no backward, but an input requires a gradient; call it under torch.no_grad() or detach the input"
        )


def _warn_once(op: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op} runs its slow torch reference: {reason}", RuntimeWarning, stacklevel=3)
