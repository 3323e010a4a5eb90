from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from megarat.ops import gelu_and_gradient, gelu_linear
from megarat.ops.gelu import gelu_and_gradient_ref


def test_it_equals_the_two_operations_with_their_gradients():
    x, weight = (
        t.requires_grad_() for t in (torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64))
    )
    dy = torch.randn(2, 5, 4, dtype=torch.float64)
    results = []
    for run in (gelu_linear, lambda x, w: functional.linear(functional.gelu(x), w)):
        y = run(x, weight)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_gradient_matches_finite_differences():
    inputs = [
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 6, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(gelu_linear, inputs)


def test_it_keeps_the_input_and_the_weight_alone():
    x, weight = torch.randn(7, 12, requires_grad=True), torch.randn(4, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gelu_linear(x, weight)
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])


def test_far_from_zero_the_activation_is_the_input_or_nothing():
    x = torch.tensor([-60.0, 0.0, 60.0], dtype=torch.bfloat16)
    y, dx = gelu_and_gradient_ref(x, torch.ones_like(x))
    assert y.tolist() == [0.0, 0.0, 60.0]
    assert dx.tolist() == [0.0, 0.5, 1.0]


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="gelu_and_gradient"):
        gelu_and_gradient(torch.ones(4, 3), torch.ones(3, 4))
