"""The Triton kernels against float64 oracles, on whatever runs them: the interpreter (small shapes, fp32) or a GPU (also bf16).

pytest does not collect this file by its name. `tests/ops/test_interpreter.py` runs it in a process with TRITON_INTERPRET=1, which must
be set before Triton is imported, and `tests/gpu/test_kernels.py` runs it on a GPU.

Tolerances are relative errors ||x - oracle|| / ||oracle||. fp32: 2e-6, some ten roundings of 2^-24. bf16 (inputs are rounded before the
oracle sees them): 4e-3 for outputs, one rounding of at most 2^-9 = 2e-3 of the result and one of the softmax weights; 1e-2 for
gradients, through which two more rounded intermediates pass. fp16 keeps three bits more: an eighth of both.
"""

from __future__ import annotations

import os

import pytest
import torch

from megarat.ops import (
    ScanState,
    Statistics,
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
from megarat.ops.dilated_attention import dilated_attention_ref
from megarat.ops.gated_scan import gated_scan_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.bfloat16: (4e-3, 1e-2), torch.float16: (5e-4, 1.25e-3)}  # outputs, gradients


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh floating tensors hold NaN, so an element a kernel does not write is seen."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **kwargs):
            x = real(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
    torch.manual_seed(torch.seed() % 2**31)


def relative_error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((x.double() - oracle).norm() / oracle.norm().clamp_min(1e-30))


def assert_close(results, oracles, dtype, outputs, slack=0.0):
    """The first `outputs` results by the tolerance of outputs, the others by that of gradients, all plus `slack`."""
    for index, (x, oracle) in enumerate(zip(results, oracles, strict=True)):
        limit = TOLERANCE[dtype][index >= outputs] + slack
        error = relative_error(x.detach(), oracle.detach())
        assert error <= limit, f"result {index}: relative error {error:.2e} > {limit:.0e}"


# --- gated scan ---------------------------------------------------------------------------------------------------------------
# B, T, H, K, initial state, document starts, rotary, gate logits: T = 1, one block, several blocks with a ragged end, whole blocks;
# "mixed" gates are N(0, 3^2), the others the extremes.
SCAN_SMALL = [
    (1, 1, 1, 16, False, False, True, "mixed"),
    (2, 37, 2, 16, True, True, True, "mixed"),
    (1, 150, 1, 32, True, False, True, "mixed"),
    (1, 64, 1, 16, False, False, False, "closed"),
    (1, 40, 1, 16, True, False, True, "open"),
    (1, 40, 1, 16, True, False, True, "slow"),
]
SCAN_LARGE = [
    (2, 1000, 3, 128, True, True, True, "mixed"),
    (3, 4096, 2, 64, False, False, True, "mixed"),
    (1, 20011, 2, 128, True, False, True, "slow"),
    (2, 777, 1, 128, True, False, False, "closed"),
    (2, 777, 1, 128, True, False, True, "open"),
]
GATE_LOGIT = {"closed": -30.0, "open": 30.0, "slow": 16.118}  # gates 1e-13, 1 - 1e-13, 1 - 1e-7


def scan_inputs(case, dtype):
    batch, length, heads, channels, initial, documents, rotary, gates = case
    projection = torch.randn(batch, length, 3, heads, channels, device=DEVICE)
    projection[:, :, 2] = GATE_LOGIT[gates] if gates in GATE_LOGIT else 3 * projection[:, :, 2]
    state = torch.randn(2, batch, heads, channels, device=DEVICE) if initial else None
    starts = torch.rand(batch, length, device=DEVICE) < 0.05 if documents else None
    tables = rotary_tables(torch.arange(length, device=DEVICE), channels) if rotary else (None, None)
    return projection.to(dtype), state, starts, tables


def run_scan(scan, dtype, projection, state, starts, tables, weights, **options):
    """Outputs, final states and every gradient of a random weighting of them all; k, v and g are slices of one tensor."""
    projection = projection.to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    initial = None if state is None else ScanState(*(s.to(wide).requires_grad_() for s in state))
    k, v, last = scan(*projection.unbind(2), *tables, initial_state=initial, document_starts_BT=starts, **options)
    outputs = (k, v, *last)
    loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, (projection, *(initial or ())))
    return (*outputs, *gradients[0].unbind(2), *gradients[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("many", [True] if INTERPRETED else [False, True], ids=str)
@pytest.mark.parametrize("case", SCAN_SMALL + ([] if INTERPRETED else SCAN_LARGE), ids=str)
def test_gated_scan_and_all_its_gradients_match_float64(case, many, dtype, monkeypatch):
    monkeypatch.setattr("megarat.ops.kernels.gated_scan.MANY_CHANNELS", 1 if many else 1 << 30)
    batch, length, heads, channels, *_, gates = case
    inputs = scan_inputs(case, dtype)
    shapes = [(batch, length, heads, channels)] * 2 + [(batch, heads, channels)] * 2
    weights = [torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype).double() for shape in shapes]
    oracle = gated_scan_ref if length <= 200 else lambda *a, **o: gated_scan(*a, **o, backend="reference")
    expected = run_scan(oracle, torch.float64, *inputs, weights)
    found = run_scan(gated_scan, dtype, *inputs, weights, backend="triton")
    if gates == "closed":
        # what a closed gate passes on, and its own gradient, are 1e-13: below the rounding of fp32, in which 1 - u is taken
        found, expected = found[:6], expected[:6]
    # fp32 rounds a gate of 1 - 1e-7 by up to 2^-25, and the state has decayed by that error once per step
    drift = length * 2**-25 if gates == "slow" else 0.0
    assert_close(found, expected, dtype, outputs=4, slack=drift)


@pytest.mark.parametrize("back", [3] if INTERPRETED else [1, 2, 3])
def test_blocks_that_take_their_state_from_further_in_front_find_the_same(back, monkeypatch):
    """Four blocks of 8 steps: fewer of them in front than a link looks back, as many, and more."""
    tile = (8, 4, 2, 1, 128, back)
    monkeypatch.setattr("megarat.ops.kernels.gated_scan._tiles", lambda k: (tile, tile))
    case = (1, 27, 1, 16, True, True, True, "mixed")
    weights = [torch.randn(1, 27, 1, 16, device=DEVICE).double() for _ in range(2)]
    weights += [torch.randn(1, 1, 16, device=DEVICE).double() for _ in range(2)]
    inputs = scan_inputs(case, torch.float32)
    found = run_scan(gated_scan, torch.float32, *inputs, weights, backend="triton")
    assert_close(found, run_scan(gated_scan_ref, torch.float64, *inputs, weights), torch.float32, outputs=4)


def test_two_halves_with_carried_state_equal_one_scan():
    k, v, g = torch.randn(1, 100, 3, 1, 32, device=DEVICE).unbind(2)
    cos, sin = rotary_tables(torch.arange(100, device=DEVICE), 32)
    whole_k, whole_v, whole_state = gated_scan(k, v, g, cos, sin, backend="triton")
    first_k, first_v, state = gated_scan(k[:, :41], v[:, :41], g[:, :41], cos[:41], sin[:41], backend="triton")
    second_k, second_v, state = gated_scan(
        k[:, 41:], v[:, 41:], g[:, 41:], cos[41:], sin[41:], initial_state=state, backend="triton"
    )
    halves = (torch.cat((first_k, second_k), 1), torch.cat((first_v, second_v), 1), *state)
    assert_close(halves, [x.double() for x in (whole_k, whole_v, *whole_state)], torch.float32, outputs=4)


def test_infinite_gates_hold_the_state_bit_for_bit_with_finite_gradients():
    k, v, g = (x.clone() for x in torch.randn(1, 90, 3, 1, 16, device=DEVICE).unbind(2))
    g[:, 40:] = float("inf")
    k, v, g = (x.requires_grad_() for x in (k, v, g))
    k_out, v_out, state = gated_scan(k, v, g, backend="triton")
    unpadded = gated_scan(k[:, :40], v[:, :40], g[:, :40], backend="triton")
    assert torch.equal(state.k_BHK, unpadded[2].k_BHK)
    assert torch.equal(state.v_BHK, unpadded[2].v_BHK)
    torch.testing.assert_close(v_out[:, 40:], v_out[:, 39:40].expand(-1, 50, -1, -1), rtol=0, atol=1e-6)
    for gradient in torch.autograd.grad((k_out + v_out).sum(), (k, v, g)):
        assert gradient.isfinite().all()
        assert (gradient[:, 40:] == 0).all()


def test_row_tables_rotate_each_row_by_its_own_positions():
    k, v, g = torch.randn(2, 20, 3, 1, 16, device=DEVICE).unbind(2)
    positions = torch.stack((torch.arange(20), torch.arange(20) + 1000)).to(DEVICE)
    cos, sin = rotary_tables(positions, 16)
    found = gated_scan(k, v, g, cos, sin, backend="triton")[0]
    expected = gated_scan_ref(k.double(), v.double(), g.double(), cos.double(), sin.double())[0]
    assert relative_error(found, expected) < 2e-6


# --- dilated attention --------------------------------------------------------------------------------------------------------
# B, T, H, K, pattern, gated, documents. Dilation, window and initial part each absent, each alone, each larger than the sequence, and
# together; documents shorter than a tile and longer than several.
ATTENTION_SMALL = [
    (1, 1, 1, 16, (4, 0, 0), False, False),
    (2, 70, 2, 16, (4, 0, 0), True, False),
    (1, 150, 1, 32, (5, 20, 7), True, False),
    (1, 150, 1, 16, (-1, 20, 7), False, False),
    (1, 100, 1, 16, (64, 3, 0), False, False),
    (1, 100, 1, 16, (1, 0, 0), False, False),
    (1, 100, 1, 16, (200, 0, 150), False, False),
    (1, 100, 1, 16, (3, 150, 40), False, False),
    (1, 150, 1, 16, (4, 0, 9), True, True),
    (2, 90, 1, 16, (5, 20, 7), False, True),
    (1, 100, 1, 16, (1, 0, 0), False, True),
]
ATTENTION_LARGE = [
    (2, 1000, 3, 128, (64, 0, 0), True, False),
    (2, 1000, 3, 128, (16, 0, 0), False, False),
    (1, 1511, 2, 128, (16, 256, 4), True, False),
    (1, 1511, 2, 64, (16, 100, 130), False, False),
    (1, 2048, 1, 128, (-1, 300, 4), False, False),
    (1, 1024, 2, 64, (4096, 0, 0), False, False),
    (1, 1024, 2, 128, (1, 0, 0), False, False),
    (2, 1511, 2, 128, (16, 256, 4), True, True),
    (2, 2048, 2, 128, (64, 0, 0), True, True),
    (2, 1511, 2, 128, (1, 0, 0), False, True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_SMALL + ([] if INTERPRETED else ATTENTION_LARGE), ids=str)
def test_dilated_attention_and_all_its_gradients_match_float64(case, dtype):
    batch, length, heads, channels, pattern, gated, documents = case
    projection = torch.randn(batch, length, 4, heads, channels, device=DEVICE).to(dtype)
    dout = torch.randn(batch, length, heads, channels, device=DEVICE).to(dtype).double()
    dlse = torch.randn(batch, length, heads, device=DEVICE, dtype=torch.float64)
    ids = (torch.rand(batch, length, device=DEVICE) < 6 / length).cumsum(1) if documents else None

    def run(compute):
        inputs = projection.to(compute).requires_grad_()
        q, k, v, gate = inputs.unbind(2)
        if compute == torch.float64:
            out, lse = dilated_attention_ref(q, k, v, pattern, document_ids_BT=ids)
            out = out * torch.sigmoid(gate) if gated else out
        else:
            options = {"output_gate_BTHK": gate if gated else None, "document_ids_BT": ids}
            out, lse = dilated_attention(q, k, v, pattern, return_lse=True, backend="triton", **options)
        (gradient,) = torch.autograd.grad((out.double() * dout).sum() + (lse.double() * dlse).sum(), inputs)
        return (out, lse, *gradient.unbind(2))

    assert_close(run(dtype), run(torch.float64), dtype, outputs=2)


def test_scores_that_rise_from_tile_to_tile_are_carried_over():
    """Keys that grow along the sequence: each tile's largest score lies far above all before it, and far above the own one's."""
    q, k, v = torch.randn(1, 110, 3, 1, 16, device=DEVICE).unbind(2)
    k = k * torch.linspace(0.1, 60.0, 110, device=DEVICE)[None, :, None, None]
    for pattern in ((1, 0, 0), (3, 50, 5)):
        out, lse = dilated_attention(q, k, v, pattern, return_lse=True, backend="triton")
        expected = dilated_attention_ref(q.double(), k.double(), v.double(), pattern)
        # scores of up to 500 are rounded by 2^-24 of themselves, and so are the weights, whose logarithms they are
        assert relative_error(out, expected[0]) < 500 * 2**-23
        assert relative_error(lse, expected[1]) < 2e-6


def test_heads_of_different_patterns_are_attended_apart_and_put_back_in_order():
    q, k, v = torch.randn(1, 60, 3, 4, 16, device=DEVICE).unbind(2)
    patterns = [(4, 0, 0), (1, 0, 0), (4, 0, 0), (-1, 5, 2)]
    out, lse = dilated_attention(q, k, v, patterns, return_lse=True, backend="triton")
    for head, pattern in enumerate(patterns):
        one = slice(head, head + 1)
        expected = dilated_attention_ref(q[:, :, one].double(), k[:, :, one].double(), v[:, :, one].double(), pattern)
        assert relative_error(out[:, :, one], expected[0]) < 2e-6
        assert relative_error(lse[:, :, one], expected[1]) < 2e-6


# --- linear cross entropy -----------------------------------------------------------------------------------------------------
# N, C, V: one row, a ragged vocabulary over several blocks, several chunks with a short last one
CROSS_ENTROPY = [(1, 16, 5), (37, 32, 4500)] + ([] if INTERPRETED else [(3000, 256, 32000)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_linear_cross_entropy_and_its_gradients_match_float64(case, split, dtype):
    rows, channels, entries = case
    x = torch.randn(rows, channels, device=DEVICE).to(dtype)
    weight = (torch.randn(entries, channels, device=DEVICE) * channels**-0.5).to(dtype)
    labels = torch.randint(0, entries, (rows,), device=DEVICE)
    labels[rows // 2] = -100 if rows > 1 else labels[0]
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = linear_cross_entropy_ref(*wide, labels)
    narrow = [t.clone().requires_grad_() for t in (x, weight)]
    options = {"backend": "triton", "chunk": -(-rows // 3)}
    if split:  # two parts of the vocabulary, joined by the other part's statistics
        cut = entries // 2
        other = narrow[1][cut:]
        found, _ = linear_cross_entropy(
            narrow[0], narrow[1][:cut], labels, combine=joiner(x, other, labels, cut, options["chunk"]), **options
        )
        expected_gradients = torch.autograd.grad(expected, wide[1])[0][:cut]
        found_gradients = torch.autograd.grad(found, narrow[1])[0][:cut]
    else:
        found, _ = linear_cross_entropy(*narrow, labels, **options)
        expected_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(expected, wide)])
        found_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(found, narrow)])
    assert_close((found, found_gradients), (expected, expected_gradients), dtype, outputs=1)


def joiner(x, other_weight, labels, vocab_start, chunk):
    """A `combine` that plays the second of two ranks: it makes that part's statistics of the same chunk itself."""
    chunks = iter(range(0, x.shape[0], chunk))

    def combine(mine: Statistics) -> Statistics:
        rows = slice(start := next(chunks), start + chunk)
        logits = (x[rows] @ other_weight.detach().T).float()
        theirs = Statistics(logits.amax(1), logits.sub(logits.amax(1, True)).exp().sum(1), torch.zeros_like(mine.target))
        inside = labels[rows] >= vocab_start
        theirs.target[inside] = logits[inside].gather(1, (labels[rows][inside] - vocab_start)[:, None])[:, 0]
        top = torch.maximum(mine.largest, theirs.largest)
        sum_exp = mine.sum_exp * (mine.largest - top).exp() + theirs.sum_exp * (theirs.largest - top).exp()
        return Statistics(top, sum_exp, mine.target + theirs.target)

    return combine


# --- decode step --------------------------------------------------------------------------------------------------------------
DECODE_PATTERNS = [(4, 0, 0), (5, 7, 3), (-1, 6, 2), (1, 0, 0), (64, 0, 0), (3, 4, 9)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("pattern", DECODE_PATTERNS, ids=str)
def test_decoding_step_by_step_equals_the_full_forward_for_rows_of_different_lengths(pattern, splits, monkeypatch):
    """Two rows, the second padded by 5 on the left of time: it starts 5 steps later. Slots never written hold NaN."""
    length, heads, channels = (12 if INTERPRETED else 30), (1 if INTERPRETED else 2), 16
    monkeypatch.setattr("megarat.ops.kernels.decode_attention.PROGRAMS", splits * 2 * heads)
    monkeypatch.setattr("megarat.ops.kernels.decode_attention.TILES", ((1 << 30, (4, 4, 2)),))
    q, k, v, g, gate = torch.randn(2, length, 5, heads, channels, device=DEVICE).unbind(2)
    cos, sin = rotary_tables(torch.arange(length, device=DEVICE), channels)
    wide = [x.double() for x in (q, k, v, g, gate)]
    k_all, v_all, _ = gated_scan_ref(*wide[1:4], cos.double(), sin.double())
    q_all = apply_rotary(wide[0], cos.double(), sin.double())
    expected = dilated_attention_ref(q_all, k_all, v_all, pattern)[0] * torch.sigmoid(wide[4])

    slots = cache_slots(pattern, length)
    caches = torch.full((2, 2, heads, slots, channels), float("nan"), device=DEVICE)
    state = ScanState(*torch.zeros(2, 2, heads, channels, device=DEVICE))
    rows = torch.arange(2, device=DEVICE)
    lengths, late = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([0, 5], device=DEVICE)
    found = torch.zeros_like(expected)
    for step in range(length + 5):
        now = (step - late).clamp(0, length - 1)
        if step == 5:  # the second row starts afresh
            for x in (*state, caches[0], caches[1]):
                x[1] = 0.0 if x.dim() == 3 else float("nan")
            lengths[1] = 0
        token = [x[rows, now].contiguous() for x in (q, k, v, g)]
        where = torch.minimum(lengths, torch.tensor(length - 1, device=DEVICE))
        out = decode_step(
            *token, cos, sin, state, *caches, where, pattern, output_gate_BHK=gate[rows, now].contiguous(), backend="triton"
        )
        active = (step - late >= 0) & (step - late < length)
        found[rows[active], now[active]] = out[active].double()
        lengths += 1
    assert relative_error(found, expected) < 5e-6


# --- rms norm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["both", "normal", "sum"])
@pytest.mark.parametrize("dtype", [*DTYPES, (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (2, 5, 96), (1, 23, 640)] if INTERPRETED else [(1, 1, 16), (2, 5, 96), (3, 101, 640)], ids=str
)
def test_norm_behind_a_residual_sum_and_all_its_gradients_match_float64(shape, dtype, used):
    """In one dtype, or with an fp32 residual and the rest in fp16; with gradients reaching both outputs or only one."""
    residual_dtype, dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    residual = torch.randn(shape, device=DEVICE).to(dtype).to(residual_dtype)
    branch, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[-1], device=DEVICE).to(dtype)
    if residual_dtype == torch.bfloat16:  # so that their sum is exact in bf16 and the oracle sees the sum that was normalised
        residual = (residual + branch) - branch
    d_normal, d_sum = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape, device=DEVICE).to(residual_dtype)

    def run(wide, norm):
        inputs = [(x.double() if wide else x.detach()).requires_grad_() for x in (residual, branch, weight)]
        pairs = list(zip(norm(*inputs), (d_normal, d_sum), strict=True))
        pairs = pairs if used == "both" else [pairs[used == "sum"]]
        outputs, gradients = zip(*((y, d.to(y.dtype)) for y, d in pairs), strict=True)
        inputs = inputs if used != "sum" else inputs[:2]
        return (*outputs, *torch.autograd.grad(outputs, inputs, gradients))

    def oracle(a, b, w):
        total = a + b
        return total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w, total

    found = run(False, lambda a, b, w: add_rms_norm(a, b, w, backend="triton"))
    assert_close(found, run(True, oracle), dtype, outputs=2 if used == "both" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_its_gradients_match_float64(dtype, monkeypatch):
    """Three programs with some seven rows each."""
    monkeypatch.setattr("megarat.ops.kernels.rms_norm.BACKWARD", (3, 512, 1))
    x, dy = torch.randn(2, 20, 80, device=DEVICE).to(dtype)
    weight = torch.randn(80, device=DEVICE).to(dtype)

    def run(wide, norm):
        inputs = [(t.double() if wide else t.detach()).requires_grad_() for t in (x, weight)]
        y = norm(*inputs)
        return y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))

    found = run(False, lambda x, w: rms_norm(x, w, backend="triton"))
    assert_close(found, run(True, lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w), dtype, outputs=1)


# --- gelu ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_gradient_match_float64(dtype):
    x, dy = (3 * torch.randn(2, 7, 5, 333, device=DEVICE)).to(dtype)
    wide = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(wide)
    (expected_d,) = torch.autograd.grad(expected, wide, dy.double())
    assert_close(gelu_and_gradient(x, dy, backend="triton"), (expected, expected_d), dtype, outputs=1)


# --- rotary -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", ["shared", "rows", "tokens"])
def test_rotation_of_a_strided_view_and_its_gradient_match_float64(tables, dtype):
    projection = torch.randn(2, 7, 3, 5, 32, device=DEVICE).to(dtype)
    x = projection[:, :, 1] if tables != "tokens" else projection[:, 3, 1]
    positions = {"shared": torch.arange(7), "rows": torch.arange(14).view(2, 7) * 99, "tokens": torch.tensor([3, 1000])}[tables]
    cos, sin = rotary_tables(positions.to(DEVICE), 32)
    dout = torch.randn(x.shape, device=DEVICE).to(dtype)

    def run(compute, backend):
        leaf = x.to(compute) if compute != dtype else x.detach()
        leaf = leaf.requires_grad_()
        out = apply_rotary(leaf, cos, sin, backend=backend)
        return out, *torch.autograd.grad(out, leaf, dout.to(compute))

    assert_close(run(dtype, "triton"), run(torch.float64, "reference"), dtype, outputs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gate_of_a_strided_view_and_its_gradients_match_float64(dtype):
    x = torch.randn(2, 5, 3, 48, device=DEVICE).to(dtype)
    gate = torch.randn(2, 5, 4, 3, 48, device=DEVICE).to(dtype)[:, :, 2]
    dout = torch.randn(x.shape, device=DEVICE).to(dtype)

    def run(compute, backend):
        inputs = [t.detach().to(compute).requires_grad_() for t in (x, gate)]
        out = output_gate(*inputs, backend=backend)
        return out, *torch.autograd.grad(out, inputs, dout.to(compute))

    assert_close(run(dtype, "triton"), run(torch.float64, "reference"), dtype, outputs=1)
