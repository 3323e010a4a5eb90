from __future__ import annotations

import pytest
import torch

from megarat.ops import output_gate
from tests.ops.oracle import TOLERANCE


def test_gate_opens_by_its_sigmoid():
    x, gate = torch.randn(2, 1, 2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(output_gate(x, gate), x / (1 + (-gate).exp()))


@pytest.mark.parametrize("logit", [-7.0, 0.0, 7.0])
def test_gradients_of_bf16_inputs_are_right_for_gates_that_are_almost_open_or_closed(logit):
    torch.manual_seed(0)
    x, gate, dout = (torch.randn(3, 1, 50, 2, 16) + torch.tensor([0.0, logit, 0.0]).view(3, 1, 1, 1, 1)).to(torch.bfloat16)
    narrow, wide = ([t.to(dtype).requires_grad_() for t in (x, gate)] for dtype in (torch.bfloat16, torch.float64))
    expected = wide[0] / (1 + (-wide[1]).exp())
    pairs = zip(torch.autograd.grad(output_gate(*narrow), narrow, dout), torch.autograd.grad(expected, wide, dout), strict=True)
    for found, oracle in pairs:
        assert (found.double() - oracle).norm() < TOLERANCE[torch.bfloat16][1] * oracle.norm()


def test_result_keeps_the_dtype_of_x_and_shapes_must_agree():
    x = torch.ones(1, 2, 2, 3, dtype=torch.bfloat16)
    assert output_gate(x, torch.zeros(1, 2, 2, 3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="output_gate"):
        output_gate(x, torch.zeros(1, 2, 2, 4))
