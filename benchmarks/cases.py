"""What is measured: operations at the shapes of the 1.5B model, their floors, their targets, and what else could do the work.

A case builds its tensors on demand and yields implementations, ours first. Floors are counted, not measured: the bytes that must cross
memory (each input once, each output once) and the FLOPs on the visible pairs, over the ceilings measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megarat.model.flops import visible_pairs
from megarat.model.pattern import Pattern
from megarat.ops import (
    ScanState,
    add_rms_norm,
    apply_rotary,
    cache_slots,
    decode_step,
    dilated_attention,
    gated_scan,
    gelu_and_gradient,
    linear_cross_entropy,
    output_gate,
    rms_norm,
    rotary_tables,
)
from megarat.ops.cross_entropy import linear_cross_entropy_ref
from megarat.ops.dilated_attention import far_positions
from megarat.ops.output_gate import output_gate_ref
from megarat.ops.rotary import apply_rotary_ref

HEADS, CHANNELS = 16, 128
BF16 = 2  # bytes


@dataclass
class Case:
    """One line of the table. `build` returns named implementations; each returns what `error` compares with the oracle."""

    op: str
    shape: str
    bytes_moved: float
    flop: float
    build: Callable[[], dict[str, Callable[[], object]]]
    accept_ms: float | None = None
    aim_ms: float | None = None
    error: Callable[[], float] | None = None
    tags: set[str] = field(default_factory=set)


def relative_error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    return float(((x.double() - oracle).norm() / oracle.norm()).detach())


def pattern_label(pattern: tuple[int, int, int]) -> str:
    dilation, window, initial = pattern
    return "dense" if pattern == (1, 0, 0) else f"D={dilation},W={window},I={initial}"


def projections(count: int, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, length, count, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16).unbind(2)


# --- gated scan ---------------------------------------------------------------------------------------------------------------


def scan_case(batch: int, length: int, backward: bool, accept: float | None, aim: float | None) -> Case:
    elements = batch * length * HEADS * CHANNELS
    name = "gated_scan backward" if backward else "gated_scan forward"

    def build() -> dict[str, Callable[[], object]]:
        k, v, g = projections(3, batch, length)
        cos, sin = rotary_tables(torch.arange(length, device="cuda"), CHANNELS)
        if not backward:
            peer = compiled_associative_scan()
            return {
                "megarat": lambda: gated_scan(k, v, g, cos, sin),
                "torch associative_scan, compiled": lambda: peer(k, v, g, cos, sin),
                **recurrences_of_fla(k, v, g, None),
            }
        inputs = [x.detach().requires_grad_() for x in (k, v, g)]
        outputs = gated_scan(*inputs, cos, sin)[:2]
        grads = [torch.randn_like(x) for x in outputs]
        return {
            "megarat": lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True),
            **recurrences_of_fla(k, v, g, grads),
        }

    return Case(
        name, f"B={batch} T={length} C=2048", elements * (16 if backward else 10), 0.0, build, accept, aim,
        lambda: scan_error(batch, length), {"scan"},
    )  # fmt: skip


def scan_error(batch: int, length: int) -> float:
    """Worst relative error of outputs (over 4e-3) and gradients (over 1e-2) against float64, on one row and two heads."""
    k, v, g = (x[:1, :, :2].detach().requires_grad_() for x in projections(3, batch, length))
    wide = [x.detach().double().requires_grad_() for x in (k, v, g)]
    cos, sin = rotary_tables(torch.arange(length, device="cuda"), CHANNELS)
    found, expected = gated_scan(k, v, g, cos, sin)[:2], gated_scan(*wide, cos, sin, backend="reference")[:2]
    grads = [torch.randn_like(x) for x in found]
    found_d = torch.autograd.grad(found, (k, v, g), grads)
    expected_d = torch.autograd.grad(expected, wide, [x.double() for x in grads])
    return worst(found, expected, found_d, expected_d)


def worst(found, expected, found_d, expected_d) -> float:
    """Largest error in units of its tolerance: 4e-3 for outputs, 1e-2 for gradients; at most 1 passes."""
    outputs = max(relative_error(x, y) for x, y in zip(found, expected, strict=True)) / 4e-3
    return max(outputs, max(relative_error(x, y) for x, y in zip(found_d, expected_d, strict=True)) / 1e-2)


def compiled_associative_scan() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The same scan as torch composes it: fp32 gate, (1 - gate) x for k and v side by side, associative_scan, rotary, casts."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(k, v, g, cos, sin):
        gate = torch.sigmoid(g.float())
        x = (1 - gate).repeat(1, 1, 1, 2) * torch.cat((k, v), dim=-1).float()
        _, state = associative_scan(combine, (gate.repeat(1, 1, 1, 2), x), dim=1, combine_mode="pointwise")
        k_out, v_out = state.chunk(2, dim=-1)
        return apply_rotary_ref(k_out, cos, sin).to(k.dtype), v_out.to(v.dtype)

    return torch.compile(scan, dynamic=False)


def recurrences_of_fla(k, v, g, grads: list[torch.Tensor] | None) -> dict[str, Callable[[], object]]:
    """flash-linear-attention's HGRN kernels on both streams, if they are installed; gate, (1 - gate) x and rotary are not counted.

    With `grads`, the gradients of the two outputs, only the backward.
    """
    try:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
    except ImportError:
        return {}
    batch, length = k.shape[:2]
    log_gate = F.logsigmoid(g.float()).to(k.dtype).view(batch, length, -1)
    streams = [(torch.sigmoid(-g.float()) * x.float()).to(k.dtype).view(batch, length, -1) for x in (k, v)]
    douts = [torch.empty(0)] if grads is None else [d.reshape(batch, length, -1) for d in grads]

    def call(recurrence) -> Callable[[], object]:
        def run(first, second, log_gate):
            return recurrence(first, log_gate)[0], recurrence(second, log_gate)[0]

        return differentiated_tuple(run, (*streams, log_gate), douts, grads is not None)

    return {
        f"fla {recurrence.__name__}, two calls, the recurrence alone": call(recurrence)
        for recurrence in (chunk_hgrn, fused_recurrent_hgrn)
    }


# --- dilated attention --------------------------------------------------------------------------------------------------------


def attention_case(
    batch: int, length: int, pattern: tuple[int, int, int], backward: bool, accept: float | None, aim: float | None
) -> Case:
    elements = batch * length * HEADS * CHANNELS
    flop = 4.0 * CHANNELS * HEADS * batch * visible_pairs(Pattern(*pattern), length)
    label = pattern_label(pattern)
    name = f"dilated_attention {'backward' if backward else 'forward'}"

    def build() -> dict[str, Callable[[], object]]:
        q, k, v, dout = projections(4, batch, length)
        implementations = {"megarat": lambda q, k, v: dilated_attention(q, k, v, pattern)}
        implementations.update(attention_peers(length, pattern))
        return {name: differentiated(run, q, k, v, dout, backward) for name, run in implementations.items()}

    return Case(
        name, f"B={batch} T={length} {label}", elements * BF16 * (8 if backward else 4), flop * (2.5 if backward else 1.0), build,
        accept, aim, lambda: attention_error(length, pattern, with_gradients=length <= 4096), {"attention"},
    )  # fmt: skip


def differentiated(run, q, k, v, dout, backward: bool) -> Callable[[], object]:
    """The forward of an attention, or its backward alone; the forward is made on first use."""
    if not backward:
        return lambda: run(q, k, v)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    made: list[torch.Tensor] = []

    def call() -> object:
        if not made:
            made.append(run(*inputs))
        return torch.autograd.grad(made[0], inputs, dout, retain_graph=True)

    return call


def attention_error(length: int, pattern: tuple[int, int, int], with_gradients: bool) -> float:
    """Worst error in units of tolerance against float64, on one row and one head."""
    q, k, v = (x[:, :, :1].detach().requires_grad_(with_gradients) for x in projections(3, 1, length))
    wide = [x.detach().double().requires_grad_(with_gradients) for x in (q, k, v)]
    found = dilated_attention(q, k, v, pattern)
    expected = dilated_attention(*wide, pattern, backend="reference")
    if not with_gradients:
        return relative_error(found, expected) / 4e-3
    dout = torch.randn_like(found)
    found_d = torch.autograd.grad(found, (q, k, v), dout)
    return worst([found], [expected], found_d, torch.autograd.grad(expected, wide, dout.double()))


def attention_peers(length: int, pattern: tuple[int, int, int]) -> dict[str, Callable[..., torch.Tensor]]:
    """Dense attention by torch's backends, and flex_attention with the same mask in one call, or two calls merged."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def dense(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

        return run

    peers = {"cuDNN SDPA, dense": dense(SDPBackend.CUDNN_ATTENTION)}
    if length <= 4096:
        peers["Flash SDPA, dense"] = dense(SDPBackend.FLASH_ATTENTION)
        if pattern != (1, 0, 0):
            peers["flex_attention, one masked call"] = flex_whole(length, pattern)
            peers["flex_attention, two calls merged"] = flex_merged(length, pattern)
    return peers


def flex_whole(length: int, pattern: tuple[int, int, int]) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dilation, window, initial = pattern

    def mask(b, h, i, j):
        return (j <= i) & ((i - j <= window) | (j < initial) | ((j + 1) % dilation == 0))

    blocks = create_block_mask(mask, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks).transpose(1, 2)


def flex_merged(length: int, pattern: tuple[int, int, int]) -> Callable[..., torch.Tensor]:
    """Far keys gathered into their own call, window and own key in another, joined by their log-sum-exps; masks made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, window, _ = pattern
    far = far_positions(length, pattern, "cuda")
    far_blocks = create_block_mask(lambda b, h, i, j: far[j] < i - window, None, None, length, len(far), device="cuda")
    near_blocks = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j <= window), None, None, length, length, device="cuda")

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out_far, lse_far = flex_attention(q, k[:, :, far], v[:, :, far], block_mask=far_blocks, return_lse=True)
        out_near, lse_near = flex_attention(q, k, v, block_mask=near_blocks, return_lse=True)
        weight = torch.sigmoid(lse_near - lse_far)[..., None].to(q.dtype)
        return (out_far * (1 - weight) + out_near * weight).transpose(1, 2)

    return torch.compile(run, dynamic=False)


def gated_attention_case(batch: int, length: int, pattern: tuple[int, int, int], backward: bool) -> Case:
    """Attention and output gate in one, as the model calls it: the gate is a slice of the fused projection, q, k and v are not."""
    elements = batch * length * HEADS * CHANNELS
    flop = 4.0 * CHANNELS * HEADS * batch * visible_pairs(Pattern(*pattern), length)
    name = f"dilated_attention with output gate, {'backward' if backward else 'forward'}"

    def fused(q, k, v, gate):
        return dilated_attention(q, k, v, pattern, output_gate_BTHK=gate)

    def apart(q, k, v, gate):
        return output_gate(dilated_attention(q, k, v, pattern), gate)

    def build() -> dict[str, Callable[[], object]]:
        q, k, v, gate, dout = (x if i == 3 else x.contiguous() for i, x in enumerate(projections(5, batch, length)))
        runs = {"megarat": fused, "megarat, the gate in a launch of its own": apart}
        return {label: differentiated_tuple(run, (q, k, v, gate), [dout], backward) for label, run in runs.items()}

    def error() -> float:
        q, k, v, gate = (x[:, :, :1].detach().requires_grad_() for x in projections(4, 1, length))
        wide = [x.detach().double().requires_grad_() for x in (q, k, v, gate)]
        found = fused(q, k, v, gate)
        expected = dilated_attention(*wide[:3], pattern, output_gate_BTHK=wide[3], backend="reference")
        dout = torch.randn_like(found)
        found_d = torch.autograd.grad(found, (q, k, v, gate), dout)
        return worst([found], [expected], found_d, torch.autograd.grad(expected, wide, dout.double()))

    return Case(
        name, f"B={batch} T={length} {pattern_label(pattern)}", elements * BF16 * (10 if backward else 5),
        flop * (2.5 if backward else 1.0), build, error=error,
    )  # fmt: skip


# --- decode -------------------------------------------------------------------------------------------------------------------


def decode_case(batch: int, length: int, pattern: tuple[int, int, int], accept: float | None, aim: float | None) -> Case:
    """One whole decode step of the 1.5B model (24 layers, vocabulary 32000) replayed as a CUDA graph."""
    layers, hidden, vocabulary = 24, HEADS * CHANNELS, 32000
    dilation, window, initial = pattern
    seen = initial + window + length // dilation
    parameters = layers * 14 * hidden**2 + vocabulary * hidden
    moved = BF16 * parameters + layers * batch * hidden * (2 * BF16 * seen + 16)
    label = pattern_label(pattern)
    return Case(
        "decode step, 1.5B", f"B={batch} T={length} {label}", moved, 2.0 * parameters * batch,
        lambda: {"megarat": decode_graph(layers, hidden, vocabulary, batch, length, pattern)}, accept, aim,
        lambda: decode_error(pattern), {"decode"},
    )  # fmt: skip


def decode_graph(
    layers: int, hidden: int, vocabulary: int, batch: int, length: int, pattern: tuple[int, int, int]
) -> Callable[[], object]:
    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02

    slots = cache_slots(pattern, length)
    cos, sin = rotary_tables(torch.arange(length, device="cuda"), CHANNELS)
    lengths = torch.full((batch,), length - 1, device="cuda")
    ones = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    embedding, ids = weight(vocabulary, hidden), torch.randint(0, vocabulary, (batch,), device="cuda")
    stack = [
        (
            weight(5 * hidden, hidden), weight(hidden, hidden), weight(4 * hidden, hidden), weight(hidden, 4 * hidden),
            ScanState(*torch.randn(2, batch, HEADS, CHANNELS, device="cuda")),
            torch.empty(2, batch, HEADS, slots, CHANNELS, device="cuda", dtype=torch.bfloat16).normal_(),
        )
        for _ in range(layers)
    ]  # fmt: skip

    def step() -> torch.Tensor:
        x = F.embedding(ids, embedding)
        normal = rms_norm(x, ones)
        for in_proj, out_proj, up, down, state, cache in stack:
            o, q, k, v, g = F.linear(normal, in_proj).view(batch, 5, HEADS, CHANNELS).unbind(1)
            mixed = decode_step(q, k, v, g, cos, sin, state, cache[0], cache[1], lengths, pattern, output_gate_BHK=o)
            normal, x = add_rms_norm(x, F.linear(mixed.flatten(1), out_proj), ones)
            normal, x = add_rms_norm(x, F.linear(F.gelu(F.linear(normal, up)), down), ones)
        return F.linear(normal, embedding).argmax(dim=-1)

    with torch.no_grad():
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def decode_error(pattern: tuple[int, int, int]) -> float:
    """One step after 1000 random tokens in the cache, against float64, in units of 4e-3."""
    batch, length = 3, 1001
    q, k, v, g = torch.randn(4, batch, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16)
    cos, sin = rotary_tables(torch.arange(length, device="cuda"), CHANNELS)
    state = ScanState(*torch.randn(2, batch, HEADS, CHANNELS, device="cuda"))
    caches = torch.randn(2, batch, HEADS, cache_slots(pattern, length), CHANNELS, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([1000, 17, 640], device="cuda")
    wide_state = ScanState(*(x.double() for x in state))
    wide = decode_step(
        *(x.double() for x in (q, k, v, g)), cos, sin, wide_state, *caches.double(), lengths, pattern, backend="reference"
    )
    return relative_error(decode_step(q, k, v, g, cos, sin, state, *caches, lengths, pattern), wide) / 4e-3


# --- cross entropy and norm ---------------------------------------------------------------------------------------------------


def cross_entropy_case(rows: int, entries: int, accept: float, aim: float) -> Case:
    hidden = HEADS * CHANNELS

    def build() -> dict[str, Callable[[], object]]:
        x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (0.02 * torch.randn(entries, hidden, device="cuda", dtype=torch.bfloat16)).requires_grad_()
        labels = torch.randint(0, entries, (rows,), device="cuda")
        return {
            "megarat": lambda: torch.autograd.grad(linear_cross_entropy(x, weight, labels)[0], (x, weight)),
            "torch, float logits": lambda: torch.autograd.grad(F.cross_entropy((x @ weight.T).float(), labels), (x, weight)),
        }

    moved = BF16 * (2 * rows * hidden + 2 * entries * hidden)
    return Case(
        "linear + cross entropy, both ways", f"N={rows} C={hidden} V={entries}", moved, 6.0 * rows * hidden * entries, build, accept,
        aim, lambda: cross_entropy_error(entries), {"loss", "memory"},
    )  # fmt: skip


def cross_entropy_error(entries: int) -> float:
    x = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(entries, 256, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    labels = torch.randint(0, entries, (4096,), device="cuda")
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    found, expected = linear_cross_entropy(x, weight, labels)[0], linear_cross_entropy_ref(*wide, labels)
    return worst([found], [expected], torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, wide))


def rms_norm_case(rows: int) -> Case:
    hidden = HEADS * CHANNELS

    def build() -> dict[str, Callable[[], object]]:
        x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        return {"megarat": lambda: rms_norm(x, weight), "torch rms_norm": lambda: F.rms_norm(x, (hidden,), weight, 1e-6)}

    return Case("rms_norm forward", f"N={rows} C={hidden}", 2.0 * BF16 * rows * hidden, 0.0, build, tags={"norm"})


def composed_add_norm(residual, branch, weight):
    """A residual sum and its norm by torch operations, for `torch.compile`."""
    total = residual + branch
    return F.rms_norm(total, total.shape[-1:], weight.to(total.dtype), 1e-6).to(branch.dtype), total


def add_norm_case(rows: int, residual_dtype: torch.dtype, backward: bool) -> Case:
    """The sum of a residual and a bf16 branch, and its norm, as every block of the model makes it twice."""
    hidden = HEADS * CHANNELS
    wide = residual_dtype.itemsize
    # forward: residual and branch in, sum and norm out; backward: sum, both gradients in, both gradients out
    moved = (2 * wide + 2 * BF16 if not backward else 3 * wide + BF16 + (BF16 if wide > BF16 else 0)) * rows * hidden

    def build() -> dict[str, Callable[[], object]]:
        residual = torch.randn(rows, hidden, device="cuda", dtype=residual_dtype)
        branch = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        grads = [torch.randn_like(branch), torch.randn_like(residual)]
        compiled = torch.compile(composed_add_norm, dynamic=False)
        return {
            "megarat": differentiated_tuple(add_rms_norm, (residual, branch, weight), grads, backward),
            "torch.compile": differentiated_tuple(compiled, (residual, branch, weight), grads, backward),
        }

    label = f"N={rows} C={hidden} {str(residual_dtype).removeprefix('torch.')} residual"
    return Case(
        f"add + rms_norm {'backward' if backward else 'forward'}", label, float(moved), 0.0, build,
        error=lambda: elementwise_error(add_rms_norm, composed_add_norm, (residual_dtype, torch.bfloat16), (HEADS * CHANNELS,)),
    )  # fmt: skip


def differentiated_tuple(run, inputs, grads, backward: bool) -> Callable[[], object]:
    """A call of `run`, or of its backward alone; the forward is then made on first use."""
    if not backward:
        return lambda: run(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    made: list[tuple[torch.Tensor, ...]] = []

    def call() -> object:
        if not made:
            outputs = run(*leaves)
            made.append(outputs if isinstance(outputs, tuple) else (outputs,))
        return torch.autograd.grad(made[0], leaves, grads, retain_graph=True)

    return call


def elementwise_error(run, oracle, dtypes: tuple[torch.dtype, ...], extra: tuple[int, ...] = ()) -> float:
    """Worst error in units of tolerance of outputs and gradients against the oracle in float64; `extra`: the shape of a last bf16 input."""
    inputs = [torch.randn(2, 256, HEADS, CHANNELS, device="cuda").to(dtype) for dtype in dtypes]
    if extra:
        inputs = [x.flatten(2) for x in inputs] + [torch.randn(extra, device="cuda").to(torch.bfloat16)]
    narrow, wide = [x.clone().requires_grad_() for x in inputs], [x.double().requires_grad_() for x in inputs]
    found, expected = run(*narrow), oracle(*wide)
    found, expected = (y if isinstance(y, tuple) else (y,) for y in (found, expected))
    douts = [torch.randn_like(y) for y in found]
    found_d = torch.autograd.grad(found, narrow, douts)
    return worst(found, expected, found_d, torch.autograd.grad(expected, wide, [d.double() for d in douts]))


def elementwise_case(name: str, batch: int, length: int, backward: bool) -> Case:
    """The output gate of dense attention, or the queries' rotary, on slices of a fused projection."""
    elements = batch * length * HEADS * CHANNELS
    gate = name == "output_gate"
    tensors = (5 if backward else 3) if gate else 2  # in and out; the gradient of a rotation needs neither input

    def build() -> dict[str, Callable[[], object]]:
        x, other, dout = (t.contiguous() if i != 1 else t for i, t in enumerate(projections(3, batch, length)))
        cos, sin = rotary_tables(torch.arange(length, device="cuda"), CHANNELS)
        if gate:
            runs = {"megarat": output_gate, "torch.compile": torch.compile(output_gate_ref, dynamic=False)}
            return {label: differentiated_tuple(run, (x, other), [dout], backward) for label, run in runs.items()}
        runs = {"megarat": apply_rotary, "torch.compile": torch.compile(apply_rotary_ref, dynamic=False)}
        return {
            label: differentiated_tuple(lambda x, run=run: run(x, cos, sin), (other,), [dout], backward)
            for label, run in runs.items()
        }

    label = f"{name} {'backward' if backward else 'forward'}"

    def error() -> float:
        if gate:
            return elementwise_error(output_gate, output_gate_ref, (torch.bfloat16, torch.bfloat16))
        cos, sin = rotary_tables(torch.arange(256, device="cuda"), CHANNELS)
        return elementwise_error(lambda x: apply_rotary(x, cos, sin), lambda x: apply_rotary_ref(x, cos, sin), (torch.bfloat16,))

    shape = f"B={batch} T={length} C={HEADS * CHANNELS}"
    return Case(label, shape, float(BF16 * tensors * elements), 0.0, build, error=error)


def gelu_case(rows: int) -> Case:
    """GELU's output made again in the backward, beside its gradient."""
    shape = (rows, 4 * HEADS * CHANNELS)

    def build() -> dict[str, Callable[[], object]]:
        x, dy = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        return {
            "megarat": lambda: gelu_and_gradient(x, dy),
            "torch, two passes": lambda: (F.gelu(x), torch.ops.aten.gelu_backward(dy, x)),
        }

    def error() -> float:
        x, dy = torch.randn(2, 256, shape[1], device="cuda", dtype=torch.bfloat16)
        wide = x.double().requires_grad_()
        expected = F.gelu(wide)
        found, found_d = gelu_and_gradient(x, dy)
        return worst([found], [expected], [found_d], torch.autograd.grad(expected, wide, dy.double()))

    return Case("gelu and its gradient", f"N={rows} F={shape[1]}", 4.0 * BF16 * rows * shape[1], 0.0, build, error=error)


def all_cases() -> Iterator[Case]:
    """The table of the README, in order."""
    yield scan_case(8, 4096, False, 0.226, 0.187)
    yield scan_case(8, 4096, True, 0.375, 0.312)
    yield scan_case(1, 131072, False, 1.0, 0.78)
    for pattern, accept, aim in (((64, 0, 0), (0.20, 0.45), (0.162, 0.35)), ((16, 256, 4), (0.40, 1.6), (0.30, 1.1))):
        yield attention_case(8, 4096, pattern, False, accept[0], aim[0])
        yield attention_case(8, 4096, pattern, True, accept[1], aim[1])
    yield attention_case(8, 4096, (16, 0, 0), False, None, None)
    yield attention_case(8, 4096, (16, 0, 0), True, None, None)
    yield attention_case(8, 4096, (1, 0, 0), False, None, None)
    for pattern in ((64, 0, 0), (16, 256, 4)):
        yield gated_attention_case(8, 4096, pattern, False)
        yield gated_attention_case(8, 4096, pattern, True)
    yield attention_case(1, 131072, (16, 0, 0), False, 14.0, 11.0)
    yield attention_case(1, 131072, (64, 0, 0), False, 6.0, 3.5)
    yield decode_case(64, 4096, (1, 0, 0), 17.0, 15.0)
    yield decode_case(64, 4096, (16, 256, 0), 4.4, 3.4)
    yield decode_case(64, 4096, (64, 0, 0), 1.8, 1.4)
    yield cross_entropy_case(32768, 32000, 21.5, 19.5)
    yield rms_norm_case(32768)
    for residual_dtype in (torch.float32, torch.bfloat16):
        yield add_norm_case(32768, residual_dtype, False)
        yield add_norm_case(32768, residual_dtype, True)
    yield gelu_case(32768)
    for name in ("output_gate", "apply_rotary"):
        yield elementwise_case(name, 8, 4096, False)
        yield elementwise_case(name, 8, 4096, True)
