"""Triton kernels of the output gate: x * sigmoid(gate) and both gradients, each in one pass. A program owns one token, all heads."""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.parts import GradientPlace


@triton.jit
def _output_gate_forward_kernel(x_ptr, gate_ptr, out_ptr, T, C, gate_b, gate_t, gate_h, K: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate_ptr += (row // T) * gate_b + (row % T) * gate_t
    gate = tl.load(gate_ptr + (c // K) * gate_h + c % K, mask=c < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + c, (x * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _output_gate_backward_kernel(
    x_ptr, gate_ptr, dout_ptr, dx_ptr, dgate_ptr, dgate_t, T, C, gate_b, gate_t, gate_h, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate_ptr += (row // T) * gate_b + (row % T) * gate_t
    gate = tl.load(gate_ptr + (c // K) * gate_h + c % K, mask=c < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    tl.store(dx_ptr + row * C + c, (dout * opened).to(dx_ptr.dtype.element_ty), mask=c < C)
    dgate = dout * x * opened * (1.0 - opened)
    tl.store(dgate_ptr + row * dgate_t + c, dgate.to(dgate_ptr.dtype.element_ty), mask=c < C)


def _launch_arguments(gate_BTHK: Tensor) -> tuple[tuple[int], dict[str, int]]:
    batch, length, heads, channels = gate_BTHK.shape
    width = heads * channels
    block = triton.next_power_of_2(width)
    strides = dict(zip(("gate_b", "gate_t", "gate_h"), gate_BTHK.stride()[:3], strict=True))
    options = {"T": length, "C": width, "K": channels, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
    return (batch * length,), {**strides, **options}


class OutputGate(torch.autograd.Function):
    """Autograd around the launches; the gate may be a slice of a projection, with contiguous channels."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, gate_BTHK: Tensor) -> Tensor:
        """Launches the forward and keeps its inputs."""
        x_BTHK = x_BTHK.contiguous()
        out_BTHK = torch.empty_like(x_BTHK)
        grid, arguments = _launch_arguments(gate_BTHK)
        _output_gate_forward_kernel[grid](x_BTHK, gate_BTHK, out_BTHK, **arguments)
        ctx.save_for_backward(x_BTHK, gate_BTHK)
        return out_BTHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Launches the backward."""
        x_BTHK, gate_BTHK = ctx.saved_tensors
        dx = torch.empty_like(x_BTHK)
        place = GradientPlace.of(gate_BTHK).claimed()
        dgate = place.empty()
        grid, arguments = _launch_arguments(gate_BTHK)
        _output_gate_backward_kernel[grid](x_BTHK, gate_BTHK, dout_BTHK.contiguous(), dx, dgate, place.row_stride, **arguments)
        return dx, dgate
