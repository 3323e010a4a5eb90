from __future__ import annotations

import pytest
import torch

from megarat.ops import add_rms_norm, rms_norm


def formula(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_norm_follows_the_formula_and_keeps_the_input_dtype(dtypes):
    x, weight = torch.randn(3, 5, 16).to(dtypes[0]), torch.randn(16).to(dtypes[1])
    found = rms_norm(x, weight)
    assert found.dtype == dtypes[0]
    # at most one rounding of the result to bf16
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtypes[0]]
    torch.testing.assert_close(found.double(), formula(x.double(), weight.double()), rtol=tolerance, atol=tolerance)


def test_sum_keeps_the_residual_dtype_and_the_norm_takes_the_branch_dtype():
    residual, branch, weight = torch.randn(4, 16), torch.randn(4, 16).to(torch.bfloat16), torch.ones(16)
    normal, total = add_rms_norm(residual, branch, weight)
    assert (normal.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + branch.float())
    torch.testing.assert_close(normal.float(), formula(total, weight), rtol=2**-8, atol=2**-8)


def test_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match="16 channels"):
        rms_norm(torch.ones(2, 16), torch.ones(8))


def test_a_branch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="add_rms_norm"):
        add_rms_norm(torch.ones(2, 16), torch.ones(1, 16), torch.ones(16))
