"""Cases of the decode step's kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import ScanState, apply_rotary, cache_slots, decode_step, rotary_tables
from megarat.ops.dilated_attention import dilated_attention_ref
from megarat.ops.gated_scan import gated_scan_ref
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, poisoned_memory, relative_error  # noqa: F401

# far keys alone; all three kinds, of which each shows and hides in 11 steps; no far keys; more initial tokens than a dilation; all keys; none
DECODE_PATTERNS = [(4, 0, 0), (3, 4, 2), (-1, 5, 2), (2, 3, 5), (1, 0, 0), (64, 0, 0)]
LONGER_PATTERNS = [] if INTERPRETED else [(5, 7, 3), (3, 4, 9), (-1, 6, 2)]
SPLIT_PATTERNS = [(3, 4, 2), (1, 0, 0)] if INTERPRETED else DECODE_PATTERNS + LONGER_PATTERNS
SMALL_TILE = ((1 << 30, (4, 2, 2)),)  # several tiles even of few slots
DECODES = [
    (p, splits, 16, torch.float32) for splits, ps in ((1, DECODE_PATTERNS + LONGER_PATTERNS), (3, SPLIT_PATTERNS)) for p in ps
]
# Heads of models, by the tiles that are used for them.
HEADS = [((3, 4, 2), splits, channels, dtype) for splits, channels in ((1, 64), (3, 128)) for dtype in DTYPES]
# fp32: the state's sums over all steps; bf16: one rounding of what the cache holds and one of the output
DECODE_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(("pattern", "splits", "channels", "dtype"), DECODES + HEADS, ids=str)
def test_decoding_step_by_step_equals_the_full_forward_for_rows_of_different_lengths(
    pattern, splits, channels, dtype, monkeypatch
):
    """Two rows, the second of which starts some steps later. Slots never written hold NaN."""
    length, delay, heads = (11, 3, 1) if INTERPRETED else (30, 5, 2)
    monkeypatch.setattr("megarat.ops.kernels.decode_attention.PROGRAMS", splits * 2 * heads)
    if channels == 16:
        monkeypatch.setattr("megarat.ops.kernels.decode_attention.TILES", SMALL_TILE)
    q, k, v, g, gate = torch.randn(2, length, 5, heads, channels, device=DEVICE, dtype=dtype).unbind(2)
    cos, sin = rotary_tables(torch.arange(length, device=DEVICE), channels)
    wide = [x.double() for x in (q, k, v, g, gate)]
    k_all, v_all, _ = gated_scan_ref(*wide[1:4], cos.double(), sin.double())
    q_all = apply_rotary(wide[0], cos.double(), sin.double())
    expected = dilated_attention_ref(q_all, k_all, v_all, pattern)[0] * torch.sigmoid(wide[4])

    slots = cache_slots(pattern, length)
    caches = torch.full((2, 2, heads, slots, channels), float("nan"), device=DEVICE, dtype=dtype)
    state = ScanState(*torch.zeros(2, 2, heads, channels, device=DEVICE))
    rows = torch.arange(2, device=DEVICE)
    lengths, late = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([0, delay], device=DEVICE)
    found = torch.zeros_like(expected)
    for step in range(length + delay):
        now = (step - late).clamp(0, length - 1)
        if step == delay:  # the second row starts afresh
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
    assert relative_error(found, expected) < DECODE_TOLERANCE[dtype]
