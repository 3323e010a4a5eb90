"""The FP8 linear layer: its roundings against float64, its kernel in the interpreter, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarat.ops.fp8_linear import GRADIENT_DTYPE, WEIGHT_DTYPE, fp8_linear, quantise_ref

# Rounding to 3 (e4m3) or 2 (e5m2) bits of mantissa moves a number by at most 2^-4 or 2^-3 of itself.
UNIT = {WEIGHT_DTYPE: 2.0**-4, GRADIENT_DTYPE: 2.0**-3}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [WEIGHT_DTYPE, GRADIENT_DTYPE])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_quantised_values_are_near_and_the_largest_is_kept(dtype, size):
    x = torch.randn(64, 48) * size
    rows, columns, scale = quantise_ref(x, dtype, True, True)
    assert rows is not None and columns is not None
    assert torch.equal(columns.float(), rows.float().T)
    back = rows.float() * scale
    smallest_normal = torch.finfo(dtype).smallest_normal * float(scale)
    assert ((back - x).abs() <= UNIT[dtype] * x.abs().clamp_min(smallest_normal) * 1.0001).all()
    assert back.abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)


def test_a_tensor_of_zeros_stays_zero_and_what_is_not_finite_is_seen():
    rows, _, scale = quantise_ref(torch.zeros(16, 16), WEIGHT_DTYPE, True, False)
    assert rows is not None and torch.equal(rows.float() * scale, torch.zeros(16, 16))
    for bad in (float("inf"), float("nan")):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        assert not fp8_linear(x, torch.ones(16, 16)).isfinite().all()


def test_output_and_gradients_against_float64():
    """Errors of the factors are independent of each other: an output's error is that of a random walk over its terms.

    A rounded number's relative error is uniform within +-UNIT at worst, so its root mean square is below UNIT / sqrt(3); two factors add
    in squares. Relative to the norm of the result (terms have random signs) that is what remains: sqrt(sum of UNIT^2 / 3).
    """
    torch.manual_seed(0)
    x = torch.randn(64, 96, requires_grad=True)
    weight = (torch.randn(80, 96) * 0.02).requires_grad_()
    dy = torch.randn(64, 80)
    y = fp8_linear(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    wide_x, wide_weight, wide_dy = (tensor.detach().double() for tensor in (x, weight, dy))
    forward = (2 * UNIT[WEIGHT_DTYPE] ** 2 / 3) ** 0.5
    backward = ((UNIT[WEIGHT_DTYPE] ** 2 + UNIT[GRADIENT_DTYPE] ** 2) / 3) ** 0.5
    for found, wanted, bound in (
        (y, wide_x @ wide_weight.T, forward), (dx, wide_dy @ wide_weight, backward), (dweight, wide_dy.T @ wide_x, backward)
    ):  # fmt: skip
        error = float((found.detach().double() - wanted).norm() / wanted.norm())
        assert bound / 10 < error < bound, (error, bound)  # not exact either: the roundings are there


def test_the_result_is_the_product_of_the_rounded_factors():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 32), torch.randn(48, 32)
    x8, _, x_scale = quantise_ref(x.view(32, 32), WEIGHT_DTYPE, True, False)
    w8, _, w_scale = quantise_ref(weight, WEIGHT_DTYPE, True, False)
    assert x8 is not None and w8 is not None
    wanted = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    torch.testing.assert_close(fp8_linear(x, weight).double().view(32, 48), wanted, rtol=1e-5, atol=1e-5)


def test_sizes_that_matrix_units_cannot_take_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(16, 24), torch.randn(16, 24))
