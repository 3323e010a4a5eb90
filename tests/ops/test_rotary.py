from __future__ import annotations

import cmath

import pytest
import torch

from megarat.ops import apply_rotary, rotary_tables


def test_pairs_turn_as_complex_numbers_by_their_frequency():
    x = torch.randn(1, 6, 2, 8, dtype=torch.float64)
    found = apply_rotary(x, *rotary_tables(torch.arange(6), 8, dtype=torch.float64))
    for t in range(6):
        for pair in range(4):
            turned = complex(x[0, t, 1, pair], x[0, t, 1, pair + 4]) * cmath.exp(1j * t * 10000 ** (-pair / 4))
            assert found[0, t, 1, pair].item() == pytest.approx(turned.real, abs=1e-12)
            assert found[0, t, 1, pair + 4].item() == pytest.approx(turned.imag, abs=1e-12)


def test_scores_depend_on_distance_alone_even_far_out():
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(i, j):
        rotated = [apply_rotary(x, *rotary_tables(torch.tensor([p]), 64, dtype=torch.float64)) for x, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(131072, 131060), score(12, 0), rtol=1e-9, atol=1e-9)


def test_rows_may_have_their_own_positions():
    x = torch.randn(2, 3, 1, 8)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    found = apply_rotary(x, *rotary_tables(positions, 8))
    for row in range(2):
        one = apply_rotary(x[row : row + 1], *rotary_tables(positions[row], 8))
        assert torch.equal(found[row : row + 1], one)


def test_odd_head_sizes_and_tables_of_another_size_are_refused():
    with pytest.raises(ValueError, match="odd"):
        rotary_tables(torch.arange(3), 7)
    with pytest.raises(ValueError, match="4 pairs"):
        apply_rotary(torch.ones(1, 3, 1, 16), *rotary_tables(torch.arange(3), 8))
    for positions in (torch.arange(2), torch.arange(4), torch.arange(3).expand(3, 3), torch.arange(3).expand(1, 3)):
        with pytest.raises(ValueError, match="rotary tables"):
            apply_rotary(torch.ones(2, 3, 1, 8), *rotary_tables(positions, 8))
