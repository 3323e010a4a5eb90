from __future__ import annotations

import pytest
import torch

from megarat.ops import output_gate


def test_gate_opens_by_its_sigmoid():
    x, gate = torch.randn(2, 1, 2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(output_gate(x, gate), x / (1 + (-gate).exp()))


def test_result_keeps_the_dtype_of_x_and_shapes_must_agree():
    x = torch.ones(1, 2, 2, 3, dtype=torch.bfloat16)
    assert output_gate(x, torch.zeros(1, 2, 2, 3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="output_gate"):
        output_gate(x, torch.zeros(1, 2, 2, 4))
