from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarat.ops.accumulate import accumulate_

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_exact_in_fp32(dtype):
    total, x = torch.randn(7, 33), torch.randn(7 * 33).to(dtype)
    wanted = total + x.float().view(7, 33)
    assert accumulate_(total, x) is total
    assert torch.equal(total, wanted)


def test_sizes_and_strides_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="contiguous and of one size"):
        accumulate_(torch.zeros(4), torch.zeros(5))
    with pytest.raises(ValueError, match="contiguous and of one size"):
        accumulate_(torch.zeros(4, 4).T, torch.zeros(4, 4))
