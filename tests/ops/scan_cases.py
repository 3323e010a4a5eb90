"""Cases of the gated scan's kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import ScanState, gated_scan, rotary_tables
from megarat.ops.gated_scan import gated_scan_ref
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, assert_close, poisoned_memory, relative_error  # noqa: F401

# B, T, H, K, initial state, document starts, rotary, gate logits: T = 1, several blocks (of 8 steps, see below) with a ragged end, several
# columns of a head, whole blocks; "mixed" gates are N(0, 3^2), the others the extremes.
SCAN_SMALL = [
    (1, 1, 1, 16, False, False, True, "mixed"),
    (2, 13, 2, 16, True, True, True, "mixed"),
    (1, 27, 1, 32, True, False, True, "mixed"),
    (1, 16, 1, 16, False, False, False, "closed"),
    (1, 13, 1, 16, True, False, True, "open"),
    (1, 13, 1, 16, True, False, True, "slow"),
]
SCAN_LARGE = [
    (2, 1000, 3, 128, True, True, True, "mixed"),
    (3, 4096, 2, 64, False, False, True, "mixed"),
    (1, 20011, 2, 128, True, False, True, "slow"),
    (1, 4099, 1, 48, False, True, True, "mixed"),
    (2, 777, 1, 128, True, False, False, "closed"),
    (2, 777, 1, 128, True, False, True, "open"),
]
GATE_LOGIT = {"closed": -30.0, "open": 30.0, "slow": 16.118}  # gates 1e-13, 1 - 1e-13, 1 - 1e-7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Interpreted: blocks of 8 steps and 8 pairs, of which short sequences have several."""
    if INTERPRETED:
        from megarat.ops.kernels.gated_scan import Tile

        for table in ("MANY_COLUMNS", "FEW_COLUMNS"):
            monkeypatch.setattr(f"megarat.ops.kernels.gated_scan.{table}", (Tile(8, 4, 2, 1, 128, 1),) * 2)


def scan_inputs(case, dtype):
    batch, length, heads, channels, initial, documents, rotary, gates = case
    projection = torch.randn(batch, length, 3, heads, channels, device=DEVICE)
    projection[:, :, 2] = GATE_LOGIT[gates] if gates in GATE_LOGIT else 3 * projection[:, :, 2]
    state = torch.randn(2, batch, heads, channels, device=DEVICE) if initial else None
    starts = (torch.rand(length, batch, device=DEVICE) < 0.05 + 1 / length).T if documents else None  # strided
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
    from megarat.ops.kernels.gated_scan import Tile

    tile = Tile(8, 4, 2, 1, 128, back, patient=back == 2)
    monkeypatch.setattr("megarat.ops.kernels.gated_scan._tiles", lambda k: (tile, tile))
    case = (1, 27, 1, 16, True, True, True, "mixed")
    weights = [torch.randn(1, 27, 1, 16, device=DEVICE).double() for _ in range(2)]
    weights += [torch.randn(1, 1, 16, device=DEVICE).double() for _ in range(2)]
    inputs = scan_inputs(case, torch.float32)
    found = run_scan(gated_scan, torch.float32, *inputs, weights, backend="triton")
    assert_close(found, run_scan(gated_scan_ref, torch.float64, *inputs, weights), torch.float32, outputs=4)


def test_two_halves_with_carried_state_equal_one_scan():
    length, cut = (30, 11) if INTERPRETED else (300, 141)
    k, v, g = torch.randn(1, length, 3, 1, 32, device=DEVICE).unbind(2)
    cos, sin = rotary_tables(torch.arange(length, device=DEVICE), 32)
    whole_k, whole_v, whole_state = gated_scan(k, v, g, cos, sin, backend="triton")
    first_k, first_v, state = gated_scan(k[:, :cut], v[:, :cut], g[:, :cut], cos[:cut], sin[:cut], backend="triton")
    second_k, second_v, state = gated_scan(
        k[:, cut:], v[:, cut:], g[:, cut:], cos[cut:], sin[cut:], initial_state=state, backend="triton"
    )
    halves = (torch.cat((first_k, second_k), 1), torch.cat((first_v, second_v), 1), *state)
    assert_close(halves, [x.double() for x in (whole_k, whole_v, *whole_state)], torch.float32, outputs=4)


def test_infinite_gates_hold_the_state_bit_for_bit_with_finite_gradients():
    length, filled = (20, 11) if INTERPRETED else (90, 40)
    k, v, g = (x.clone() for x in torch.randn(1, length, 3, 1, 16, device=DEVICE).unbind(2))
    g[:, filled:] = float("inf")
    k, v, g = (x.requires_grad_() for x in (k, v, g))
    k_out, v_out, state = gated_scan(k, v, g, backend="triton")
    unpadded = gated_scan(k[:, :filled], v[:, :filled], g[:, :filled], backend="triton")
    assert torch.equal(state.k_BHK, unpadded[2].k_BHK)
    assert torch.equal(state.v_BHK, unpadded[2].v_BHK)
    held = v_out[:, filled - 1 : filled].expand(-1, length - filled, -1, -1)
    torch.testing.assert_close(v_out[:, filled:], held, rtol=0, atol=1e-6)
    for gradient in torch.autograd.grad((k_out + v_out).sum(), (k, v, g)):
        assert gradient.isfinite().all()
        assert (gradient[:, filled:] == 0).all()


def test_row_tables_rotate_each_row_by_its_own_positions():
    k, v, g = torch.randn(2, 11, 3, 1, 16, device=DEVICE).unbind(2)
    positions = torch.stack((torch.arange(11), torch.arange(11) + 1000)).to(DEVICE)
    cos, sin = rotary_tables(positions, 16)
    found = gated_scan(k, v, g, cos, sin, backend="triton")[0]
    expected = gated_scan_ref(k.double(), v.double(), g.double(), cos.double(), sin.double())[0]
    assert relative_error(found, expected) < 2e-6
