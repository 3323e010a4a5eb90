"""The recurrence of RAT+ (arXiv 2602.18196): a gated elementwise average of keys and values along time.

    gate_t = sigmoid(g_t)                         one gate per channel, shared by k and v
    s_t    = gate_t * s_{t-1} + (1 - gate_t) * x_t      for x = k and x = v, state in fp32
    k_out  = rotary(s^k_t),  v_out = s^v_t              the state itself is never rotated

Shapes: B batch, T length, H heads, K head channels, R = K/2 rotary pairs. Everywhere below the update is written with the
*input weight* u_t = 1 - gate_t = sigmoid(-g_t), as s + u (x - s): near gate 1 the small number u keeps its full precision, where
1 - sigmoid(g) in fp32 would have lost it, and u = 0 holds the state bit for bit.

The backward uses, with S_t the whole gradient reaching s_t (S_t = e_t + gate_{t+1} S_{t+1}, e_t from the output):

    dx_t = u_t S_t,    dg_t = -u_t (1 - u_t) (x_t - s_{t-1}) S_t   summed over k and v

so no division by a gate ever happens. Only the inputs and one fp32 state per chunk are kept for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.dispatch import choose_backend, refuse_gradients
from megarat.ops.rotary import apply_rotary, check_tables


class ScanState(NamedTuple):
    """The running averages before rotary: fp32, or float64 when the inputs are float64."""

    k_BHK: Tensor
    v_BHK: Tensor


def state_dtype(inputs: torch.dtype) -> torch.dtype:
    """The dtype in which the state is kept for inputs of this dtype."""
    return torch.float64 if inputs == torch.float64 else torch.float32


def gated_scan_ref(
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTHK: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    initial_state: ScanState | None = None,
    document_starts_BT: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, ScanState]:
    """The definition, one step at a time, differentiated by autograd: the oracle of every other implementation."""
    compute = state_dtype(k_BTHK.dtype)
    k_BTHK_, v_BTHK_ = k_BTHK.to(compute), v_BTHK.to(compute)
    u_BTHK = torch.sigmoid(-g_BTHK.to(compute))
    state_k, state_v = _start(k_BTHK_, initial_state)
    keys, values = [], []
    for t in range(k_BTHK.shape[1]):
        if document_starts_BT is not None:
            keep_B11 = (~document_starts_BT[:, t]).to(compute)[:, None, None]
            state_k, state_v = state_k * keep_B11, state_v * keep_B11
        state_k = state_k + u_BTHK[:, t] * (k_BTHK_[:, t] - state_k)
        state_v = state_v + u_BTHK[:, t] * (v_BTHK_[:, t] - state_v)
        keys.append(state_k)
        values.append(state_v)
    k_out, v_out = torch.stack(keys, dim=1), torch.stack(values, dim=1)
    if cos is not None and sin is not None:
        k_out = apply_rotary(k_out, cos, sin)
    out_dtype = out_dtype or k_BTHK.dtype
    return k_out.to(out_dtype), v_out.to(out_dtype), ScanState(state_k, state_v)


def _start(k_BTHK: Tensor, initial_state: ScanState | None) -> ScanState:
    if initial_state is not None:
        return initial_state
    zeros = torch.zeros_like(k_BTHK[:, 0])
    return ScanState(zeros, zeros)


# --- the chunked torch form ---------------------------------------------------------------------------------------------------
# T steps are cut into N chunks of L ~ sqrt(T) steps. Chunks advance together, so a pass costs L vectorised operations instead of
# T; their boundary states are then joined by N steps of s <- A s + H, A being the chunk's product of gates. Letters: X = 2 (the k
# and the v stream), L steps of a chunk, N chunks, C = H K. Layouts begin with L, so that one step is one contiguous slab.


def _to_chunks(x_BTHK: Tensor, compute: torch.dtype, padding: float) -> Tensor:
    """(B, T, H, K) -> (L, B, N, C) in `compute`, T padded with `padding` to whole chunks."""
    batch, length = x_BTHK.shape[:2]
    steps = max(1, math.isqrt(length))
    chunks = -(-length // steps)
    x_BTC = x_BTHK.to(compute).flatten(2)
    x_BTC = torch.nn.functional.pad(x_BTC, (0, 0, 0, chunks * steps - length), value=padding)
    return x_BTC.view(batch, chunks, steps, -1).permute(2, 0, 1, 3).contiguous()


def _from_chunks(x_LBNC: Tensor, like_BTHK: Tensor) -> Tensor:
    """(L, B, N, C) -> (B, T, H, K), the padding cut off."""
    steps, batch, chunks, channels = x_LBNC.shape
    x_BTC = x_LBNC.permute(1, 2, 0, 3).reshape(batch, chunks * steps, channels)
    return x_BTC[:, : like_BTHK.shape[1]].reshape(like_BTHK.shape)


def _chunk_inputs(
    k_BTHK: Tensor, v_BTHK: Tensor, g_BTHK: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stacked inputs x_LXBNC, input weights u_LBNC (0 in the padding: it holds the state), keep factors (L, B, N, 1) or None."""
    compute = state_dtype(k_BTHK.dtype)
    x_LXBNC = torch.stack((_to_chunks(k_BTHK, compute, 0.0), _to_chunks(v_BTHK, compute, 0.0)), dim=1)
    u_LBNC = _to_chunks(g_BTHK, compute, math.inf).neg_().sigmoid_()
    if starts_BT is None:
        return x_LXBNC, u_LBNC, None
    return x_LXBNC, u_LBNC, _to_chunks((~starts_BT)[..., None, None], compute, 1.0)


def _advance(state_XBNC: Tensor, x_LXBNC: Tensor, u_LBNC: Tensor, keep_LBN1: Tensor | None, out_LXBNC: Tensor | None) -> Tensor:
    """Runs all chunks through their L steps from `state`; writes every state to `out` if given; returns the last one."""
    for step in range(u_LBNC.shape[0]):
        if keep_LBN1 is not None:
            state_XBNC = state_XBNC * keep_LBN1[step]
        target = None if out_LXBNC is None else out_LXBNC[step]
        state_XBNC = torch.lerp(state_XBNC, x_LXBNC[step], u_LBNC[step], out=target)
    return state_XBNC


def _chunk_decay(u_LBNC: Tensor, keep_LBN1: Tensor | None) -> Tensor:
    """The factor by which a chunk carries its first state into its last: the product of its gates, 0 after a reset."""
    decay_LBNC = 1.0 - u_LBNC
    if keep_LBN1 is not None:
        decay_LBNC *= keep_LBN1
    return decay_LBNC.prod(dim=0)


def _carry(decay_BNC: Tensor, local_XBNC: Tensor, start_XBC: Tensor) -> tuple[Tensor, Tensor]:
    """Joins the chunks in order: the state in front of each chunk (X, B, N, C), and the one after the last (X, B, C)."""
    before_XBNC, state_XBC = torch.empty_like(local_XBNC), start_XBC
    for chunk in range(local_XBNC.shape[2]):
        before_XBNC[:, :, chunk] = state_XBC
        state_XBC = decay_BNC[:, chunk] * state_XBC + local_XBNC[:, :, chunk]
    return before_XBNC, state_XBC


class _ChunkedScan(torch.autograd.Function):
    """The chunked form with its analytic backward; returns the unrotated averages in the compute dtype and both final states."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        g_BTHK: Tensor,
        start_k_BHK: Tensor,
        start_v_BHK: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x_LXBNC, u_LBNC, keep_LBN1 = _chunk_inputs(k_BTHK, v_BTHK, g_BTHK, starts_BT)
        start_XBC = torch.stack((start_k_BHK, start_v_BHK)).flatten(2)
        local_XBNC = _advance(torch.zeros_like(x_LXBNC[0]), x_LXBNC, u_LBNC, keep_LBN1, None)
        before_XBNC, last_XBC = _carry(_chunk_decay(u_LBNC, keep_LBN1), local_XBNC, start_XBC)
        out_LXBNC = torch.empty_like(x_LXBNC)
        _advance(before_XBNC, x_LXBNC, u_LBNC, keep_LBN1, out_LXBNC)
        ctx.save_for_backward(k_BTHK, v_BTHK, g_BTHK, starts_BT, before_XBNC)
        outputs = [_from_chunks(out_LXBNC[:, stream], k_BTHK) for stream in range(2)]
        return (*outputs, *(state.view_as(start_k_BHK).clone() for state in last_XBC))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dk_out_BTHK: Tensor, dv_out_BTHK: Tensor, dlast_k_BHK: Tensor, dlast_v_BHK: Tensor
    ) -> tuple[Tensor | None, ...]:
        k_BTHK, v_BTHK, g_BTHK, starts_BT, before_XBNC = ctx.saved_tensors
        x_LXBNC, u_LBNC, keep_LBN1 = _chunk_inputs(k_BTHK, v_BTHK, g_BTHK, starts_BT)
        e_LXBNC = torch.stack([_to_chunks(d, x_LXBNC.dtype, 0.0) for d in (dk_out_BTHK, dv_out_BTHK)], dim=1)
        dlast_XBC = torch.stack((dlast_k_BHK, dlast_v_BHK)).flatten(2)
        decay_LBNC = 1.0 - u_LBNC if keep_LBN1 is None else (1.0 - u_LBNC) * keep_LBN1
        total_LXBNC, dstart_XBC = _reverse(e_LXBNC, decay_LBNC, dlast_XBC)
        previous_LXBNC = _previous_states(x_LXBNC, u_LBNC, keep_LBN1, before_XBNC)
        dg_LBNC = -u_LBNC * (1.0 - u_LBNC) * ((x_LXBNC - previous_LXBNC) * total_LXBNC).sum(dim=1)
        dx_LXBNC = total_LXBNC.mul_(u_LBNC[:, None])
        dk, dv = (_from_chunks(dx_LXBNC[:, stream], k_BTHK).to(k_BTHK.dtype) for stream in range(2))
        dstart_k, dstart_v = (d.view_as(dlast_k_BHK) for d in dstart_XBC)
        return dk, dv.to(v_BTHK.dtype), _from_chunks(dg_LBNC, g_BTHK).to(g_BTHK.dtype), dstart_k, dstart_v, None


def _previous_states(x_LXBNC: Tensor, u_LBNC: Tensor, keep_LBN1: Tensor | None, before_XBNC: Tensor) -> Tensor:
    """s_{t-1} as step t sees it (0 behind a document start), recomputed from the states in front of the chunks."""
    previous_LXBNC = torch.empty_like(x_LXBNC)
    previous_LXBNC[0] = before_XBNC
    _advance(before_XBNC, x_LXBNC[:-1], u_LBNC[:-1], None if keep_LBN1 is None else keep_LBN1[:-1], previous_LXBNC[1:])
    return previous_LXBNC if keep_LBN1 is None else previous_LXBNC.mul_(keep_LBN1[:, None])


def _reverse(e_LXBNC: Tensor, decay_LBNC: Tensor, dlast_XBC: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = e_t + gate_{t+1} S_{t+1} for all t, and the gradient reaching the initial state.

    What crosses a chunk's left edge is P_t = gate_t S_t; it joins right to left with the same products of gates as the forward.
    """
    steps, _, _, chunks, _ = e_LXBNC.shape
    passed_XBNC = torch.zeros_like(e_LXBNC[0])
    for step in reversed(range(steps)):
        passed_XBNC = (e_LXBNC[step] + passed_XBNC).mul_(decay_LBNC[step])
    decay_BNC, incoming_XBNC, arriving_XBC = decay_LBNC.prod(dim=0), torch.empty_like(passed_XBNC), dlast_XBC
    for chunk in reversed(range(chunks)):
        incoming_XBNC[:, :, chunk] = arriving_XBC
        arriving_XBC = decay_BNC[:, chunk] * arriving_XBC + passed_XBNC[:, :, chunk]
    total_LXBNC = torch.empty_like(e_LXBNC)
    for step in reversed(range(steps)):
        torch.add(e_LXBNC[step], incoming_XBNC, out=total_LXBNC[step])
        incoming_XBNC = total_LXBNC[step] * decay_LBNC[step]
    return total_LXBNC, arriving_XBC


def _gated_scan_chunked(
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTHK: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    initial_state: ScanState | None,
    document_starts_BT: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, ScanState]:
    compute = state_dtype(k_BTHK.dtype)
    start = _start(k_BTHK.to(compute), initial_state)
    k_out, v_out, last_k, last_v = _ChunkedScan.apply(k_BTHK, v_BTHK, g_BTHK, start.k_BHK, start.v_BHK, document_starts_BT)
    if cos is not None and sin is not None:
        k_out = apply_rotary(k_out, cos, sin)
    return k_out.to(out_dtype), v_out.to(out_dtype), ScanState(last_k, last_v)


def gated_scan(
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTHK: Tensor,
    cos_TR: Tensor | None = None,
    sin_TR: Tensor | None = None,
    *,
    initial_state: ScanState | None = None,
    document_starts_BT: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, ScanState]:
    """Gated running averages of k and v along T, the averaged k rotated by its position.

    k, v, g: (B, T, H, K), bf16, fp16, fp32 or float64; the last dimension contiguous, the others with any strides (slices of one
    fused projection). g holds gate *logits*; g = +inf holds the state exactly (right padding), with zero gradients.
    cos, sin: fp32 rotary tables, (T, R) or (B, T, R); without them k is not rotated.
    initial_state: the averages before the first token, (B, H, K), as returned for the previous segment; zeros by default.
    document_starts_BT: bool; True clears the state in front of that token.
    out_dtype: dtype of both outputs, k's by default. backend: "triton", "reference", or None to choose (see ops.dispatch).

    Returns (k_out, v_out, final state). State and gate are fp32, float64 for float64 inputs. Gradients flow to k, v, g and the
    initial state, from the outputs and from the final state; there is no second derivative.
    """
    _check(k_BTHK, v_BTHK, g_BTHK, cos_TR, sin_TR)
    _check_state(k_BTHK, initial_state, document_starts_BT)
    out_dtype = out_dtype or k_BTHK.dtype
    if initial_state is not None:
        initial_state = ScanState(*(s.to(state_dtype(k_BTHK.dtype)) for s in initial_state))
    if choose_backend("gated_scan", backend, k_BTHK, _unsupported(k_BTHK, v_BTHK, g_BTHK)) == "reference":
        return _gated_scan_chunked(k_BTHK, v_BTHK, g_BTHK, cos_TR, sin_TR, initial_state, document_starts_BT, out_dtype)
    from megarat.ops.kernels.gated_scan import GatedScan

    refuse_gradients("the rotary table of gated_scan", cos_TR, sin_TR)
    start_k, start_v = initial_state or (None, None)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k_BTHK, v_BTHK, g_BTHK, start_k, start_v))
    starts_BT = None if document_starts_BT is None else document_starts_BT.contiguous()
    k_out, v_out, last_k, last_v = GatedScan.apply(
        k_BTHK, v_BTHK, g_BTHK, cos_TR, sin_TR, start_k, start_v, starts_BT, out_dtype, save
    )
    return k_out, v_out, ScanState(last_k, last_v)


def _unsupported(k_BTHK: Tensor, v_BTHK: Tensor, g_BTHK: Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if torch.float64 in (k_BTHK.dtype, v_BTHK.dtype, g_BTHK.dtype):
        return "inputs are float64"
    if k_BTHK.shape[-1] % 16:
        return f"head size {k_BTHK.shape[-1]} is no multiple of 16"
    if any(x.stride(-1) != 1 for x in (k_BTHK, v_BTHK, g_BTHK)):
        return "the channels of an input are not contiguous"
    return None


def _check(k_BTHK: Tensor, v_BTHK: Tensor, g_BTHK: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if not k_BTHK.shape == v_BTHK.shape == g_BTHK.shape or k_BTHK.dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (k_BTHK, v_BTHK, g_BTHK))
        raise ValueError(f"gated_scan: k, v and g must share one shape (B, T, H, K); got {shapes}")
    if k_BTHK.shape[1] == 0:
        raise ValueError("gated_scan: the sequence is empty (T = 0)")
    if (cos is None) != (sin is None):
        raise ValueError("gated_scan: cos and sin come together or not at all")
    if cos is not None and sin is not None:
        check_tables("gated_scan", cos, sin, k_BTHK)


def _check_state(k_BTHK: Tensor, state: ScanState | None, starts_BT: Tensor | None) -> None:
    batch, length, heads, channels = k_BTHK.shape
    for part in state or ():
        if part.shape != (batch, heads, channels):
            raise ValueError(f"gated_scan: an initial state of shape {tuple(part.shape)} for inputs {tuple(k_BTHK.shape)}")
    if starts_BT is not None and (starts_BT.shape != (batch, length) or starts_BT.dtype != torch.bool):
        raise ValueError(
            f"gated_scan: document_starts_BT is {starts_BT.dtype} {tuple(starts_BT.shape)}, not bool {(batch, length)}"
        )
