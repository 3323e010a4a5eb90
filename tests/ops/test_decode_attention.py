from __future__ import annotations

import pytest
import torch

from megarat.ops import (
    ScanState,
    apply_rotary,
    cache_slots,
    cache_write,
    decode_attention,
    decode_step,
    gated_scan,
    rotary_tables,
)
from megarat.ops.decode_attention import slot_positions, visible_slots
from megarat.ops.dilated_attention import dilated_attention_ref

PATTERNS = [(1, 0, 0), (4, 0, 0), (4, 3, 2), (-1, 5, 3), (-1, 0, 4), (64, 0, 0), (5, 7, 12), (3, 40, 0)]
LENGTH = 30


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_decoding_token_by_token_equals_the_full_forward(pattern):
    q, k, v = torch.randn(LENGTH, 3, 2, 2, 4, dtype=torch.float64).permute(1, 2, 0, 3, 4)
    expected = dilated_attention_ref(q, k, v, pattern)[0]
    # slots are NaN until written: nothing may be read before
    caches = torch.full((2, 2, 2, cache_slots(pattern, LENGTH), 4), float("nan"), dtype=torch.float64)
    lengths = torch.zeros(2, dtype=torch.int64)
    for t in range(LENGTH):
        found = decode_attention(q[:, t], k[:, t], v[:, t], *caches, lengths, pattern)
        torch.testing.assert_close(found, expected[:, t])
        cache_write(*caches, k[:, t], v[:, t], lengths, pattern)
        lengths += 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_visible_slots_hold_each_visible_position_once(pattern):
    dilation, window, initial = pattern
    lengths = torch.arange(LENGTH)
    slots = cache_slots(pattern, LENGTH)
    positions, seen = slot_positions(slots, lengths, pattern), visible_slots(slots, lengths, pattern)
    for t in range(LENGTH):
        expected = [j for j in range(t) if t - j <= window or j < initial or (dilation != -1 and (j + 1) % dilation == 0)]
        assert sorted(positions[t][seen[t]].tolist()) == expected


def test_rows_of_different_lengths_do_not_touch_each_other():
    pattern, slots = (4, 3, 2), cache_slots((4, 3, 2), LENGTH)
    caches = torch.randn(2, 3, 1, slots, 4)
    q, k, v = torch.randn(3, 3, 1, 4)
    lengths = torch.tensor([0, 9, 23])
    together = decode_attention(q, k, v, *caches, lengths, pattern)
    written = caches.clone()
    cache_write(*written, k, v, lengths, pattern)
    for row in range(3):
        one = slice(row, row + 1)
        alone = decode_attention(q[one], k[one], v[one], *caches[:, one], lengths[one], pattern)
        torch.testing.assert_close(together[one], alone)
        apart = caches[:, one].clone()
        cache_write(*apart, k[one], v[one], lengths[one], pattern)
        assert torch.equal(written[:, one], apart)


def test_a_far_token_beyond_the_cache_is_dropped():
    caches = torch.zeros(2, 1, 1, cache_slots((2, 0, 0), 4), 4)
    cache_write(*caches, torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([5]), (2, 0, 0))
    assert (caches == 0).all()


def test_decode_step_equals_scan_rotary_attention_and_gate_of_the_whole_sequence():
    pattern, wide = (4, 3, 2), torch.float64
    q, k, v, g, gate = torch.randn(2, LENGTH, 5, 2, 4, dtype=wide).unbind(2)
    cos, sin = rotary_tables(torch.arange(LENGTH), 4, dtype=wide)
    k_all, v_all, last = gated_scan(k, v, g, cos, sin)
    expected = dilated_attention_ref(apply_rotary(q, cos, sin), k_all, v_all, pattern)[0] * torch.sigmoid(gate)
    state = ScanState(*torch.zeros(2, 2, 2, 4, dtype=wide))
    caches = torch.full((2, 2, 2, cache_slots(pattern, LENGTH), 4), float("nan"), dtype=wide)
    lengths = torch.zeros(2, dtype=torch.int64)
    for t in range(LENGTH):
        token = [x[:, t] for x in (q, k, v, g)]
        found = decode_step(*token, cos, sin, state, *caches, lengths, pattern, output_gate_BHK=gate[:, t])
        torch.testing.assert_close(found, expected[:, t])
        lengths += 1
    torch.testing.assert_close(state.k_BHK, last.k_BHK)


def test_slots_beyond_a_pattern_without_dilated_part_are_neither_read_nor_written():
    """D = -1 in a cache that is larger than it needs."""
    pattern, slots = (-1, 3, 2), 9
    caches = torch.full((2, 1, 1, slots, 4), float("nan"))
    q, k, v = torch.randn(LENGTH, 3, 1, 1, 4).permute(1, 2, 0, 3, 4)
    expected = dilated_attention_ref(q, k, v, pattern)[0]
    for t in range(LENGTH):
        lengths = torch.tensor([t])
        torch.testing.assert_close(decode_attention(q[:, t], k[:, t], v[:, t], *caches, lengths, pattern), expected[:, t])
        cache_write(*caches, k[:, t], v[:, t], lengths, pattern)
    assert caches[..., 5:, :].isnan().all()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 2, 5, 4), (1, 1, 5, 4), (2, 1, 5, 8)], ids=str)
def test_a_cache_of_another_shape_or_too_small_for_the_pattern_is_refused(shape):
    """A kernel would write behind it."""
    token = torch.randn(4, 2, 1, 4)
    cos, sin = rotary_tables(torch.arange(9), 4)
    state = ScanState(*torch.zeros(2, 2, 1, 4))
    with pytest.raises(ValueError, match="decode_step: "):
        decode_step(*token, cos, sin, state, torch.zeros(shape), torch.zeros(shape), torch.zeros(2, dtype=torch.int64), (4, 3, 2))
