"""The output gate of a RAT+ mixer (arXiv 2602.18196): the attention's output times sigmoid(o), channel by channel.

Shapes: B batch, T length, H heads, K head channels. `dilated_attention` applies the same gate inside of its kernel; this op serves dense
attention, which is torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarat.ops.dispatch import choose_backend


def output_gate_ref(x: Tensor, gate: Tensor) -> Tensor:
    """The formula by torch operations in fp32 (float64 for float64 inputs); the result has x's dtype.

    In bf16 a gate opened by more than 6 would be 1, and its gradient, which holds 1 - sigmoid(gate), 0.
    """
    compute = torch.float64 if torch.float64 in (x.dtype, gate.dtype) else torch.float32
    return (x.to(compute) * torch.sigmoid(gate.to(compute))).to(x.dtype)


def output_gate(x_BTHK: Tensor, gate_BTHK: Tensor, *, backend: str | None = None) -> Tensor:
    """x * sigmoid(gate), both (B, T, H, K) of any float dtype; the result has x's dtype.

    backend: "triton", "reference" or None to choose (see ops.dispatch).
    """
    if x_BTHK.shape != gate_BTHK.shape:
        raise ValueError(f"output_gate: x is {tuple(x_BTHK.shape)} but the gate is {tuple(gate_BTHK.shape)}")
    if choose_backend("output_gate", backend, x_BTHK, _unsupported(x_BTHK, gate_BTHK)) == "reference":
        return output_gate_ref(x_BTHK, gate_BTHK)
    from megarat.ops.kernels.output_gate import OutputGate

    return OutputGate.apply(x_BTHK, gate_BTHK)


def _unsupported(x_BTHK: Tensor, gate_BTHK: Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if torch.float64 in (x_BTHK.dtype, gate_BTHK.dtype):
        return "the inputs are float64"
    if gate_BTHK.dim() != 4 or gate_BTHK.stride(-1) != 1:
        return "the gate is no (B, T, H, K) with contiguous channels"
    if (width := gate_BTHK.shape[2] * gate_BTHK.shape[3]) > 16384:
        return f"{width} channels do not fit one program"
    return None
