"""What the kernels do not serve is said, and what has no derivative raises."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import (
    ScanState,
    accumulate_,
    apply_rotary,
    decode_step,
    dilated_attention,
    fp8_linear,
    gated_scan,
    gelu_and_gradient,
    gelu_linear,
    linear_cross_entropy,
    output_gate,
    rms_norm,
    rotary_tables,
)
from megarat.ops.summed_linear import summed_linear


def heads(channels=16, dtype=torch.float32, count=3):
    return torch.randn(count, 1, 4, 2, channels).to(dtype).unbind(0)


def decode(channels=16, dtype=torch.float32, **changed):
    token = torch.randn(4, 2, 2, channels).to(dtype)
    cos, sin = rotary_tables(torch.arange(4), channels)
    inputs = {
        "state": torch.zeros(2, 2, 2, channels), "k": torch.zeros(2, 2, 5, channels, dtype=dtype),
        "v": torch.zeros(2, 2, 5, channels, dtype=dtype), "lengths": torch.zeros(2, dtype=torch.int64), "gate": None, **changed,
    }  # fmt: skip
    state, k, v, lengths, gate = inputs.values()
    return decode_step(*token, cos, sin, ScanState(*state), k, v, lengths, (4, 3, 2), output_gate_BHK=gate, backend="triton")


def strided(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


WIDE = torch.float64
UNSERVED = {
    "gated_scan float64": lambda: gated_scan(*heads(dtype=WIDE), backend="triton"),
    "gated_scan 24": lambda: gated_scan(*heads(24), backend="triton"),
    "gated_scan contiguous": lambda: gated_scan(*(strided(x) for x in heads()), backend="triton"),
    "dilated_attention float64": lambda: dilated_attention(*heads(dtype=WIDE), (4, 0, 0), backend="triton"),
    "dilated_attention 256": lambda: dilated_attention(*heads(256), (4, 0, 0), backend="triton"),
    "dilated_attention contiguous": lambda: dilated_attention(*(strided(x) for x in heads()), (4, 0, 0), backend="triton"),
    "dilated_attention channels of an input": lambda: dilated_attention(
        *heads(), (4, 0, 0), output_gate_BTHK=strided(heads()[0]), backend="triton"
    ),
    "dilated_attention not positive": lambda: dilated_attention(*heads(), (4, 0, 0), scale=-1.0, backend="triton"),
    "decode_step float64": lambda: decode(dtype=WIDE),
    "decode_step 48": lambda: decode(48),
    "linear_cross_entropy float64": lambda: linear_cross_entropy(
        torch.ones(2, 3, dtype=WIDE), torch.ones(5, 3, dtype=WIDE), torch.zeros(2, dtype=torch.int64), backend="triton"
    ),
    "rms_norm float64": lambda: rms_norm(torch.ones(2, 8, dtype=WIDE), torch.ones(8), backend="triton"),
    "rms_norm 16385": lambda: rms_norm(torch.ones(1, 16385), torch.ones(16385), backend="triton"),
    "output_gate float64": lambda: output_gate(*heads(dtype=WIDE, count=2), backend="triton"),
    "output_gate contiguous": lambda: output_gate(heads()[0], strided(heads()[0]), backend="triton"),
    "output_gate 17000": lambda: output_gate(*heads(8500, count=2), backend="triton"),
    "apply_rotary float64": lambda: apply_rotary(heads(dtype=WIDE)[0], *rotary_tables(torch.arange(4), 16), backend="triton"),
    "apply_rotary 24": lambda: apply_rotary(heads(24)[0], *rotary_tables(torch.arange(4), 24), backend="triton"),
    "gelu_and_gradient float64": lambda: gelu_and_gradient(*torch.ones(2, 3, dtype=WIDE), backend="triton"),
    "accumulate_ float64": lambda: accumulate_(torch.zeros(3), torch.zeros(3, dtype=WIDE), backend="triton"),
    "fp8_linear GPU": lambda: fp8_linear(torch.ones(16, 16), torch.ones(16, 16), backend="triton"),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_kernels_asked_for_where_they_do_not_serve_say_which_operation_and_why(case):
    pytest.importorskip("triton")
    op, _, reason = case.partition(" ")
    with pytest.raises(ValueError, match=f"{op}: backend='triton' was asked for, but .*{reason}"):
        UNSERVED[case]()


STRIDED = {
    "gate": strided(torch.zeros(2, 2, 16)),
    "state": strided(torch.zeros(2, 2, 2, 16)),
    "k": strided(torch.zeros(2, 2, 5, 16)),
    "v": strided(torch.zeros(2, 2, 5, 16)),
    "lengths": torch.zeros(1, dtype=torch.int64).expand(2),
}


@pytest.mark.parametrize("what", STRIDED)
def test_a_decode_step_whose_kernels_know_no_strides_of_an_input_is_refused(what):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"decode_step: backend='triton' was asked for, but .* are not contiguous"):
        decode(**{what: STRIDED[what]})


def leaf(*shape):
    return torch.randn(shape, dtype=WIDE, requires_grad=True)


def twice(op):
    """Inputs and first derivatives of something linear in the operation's result, made to be differentiated again."""
    if op == "gated_scan":
        inputs = [leaf(1, 3, 1, 4) for _ in range(3)]
        result = gated_scan(*inputs)[0].sum()
    elif op == "linear_cross_entropy":
        inputs = [leaf(2, 3), leaf(5, 3)]
        result = linear_cross_entropy(*inputs, torch.zeros(2, dtype=torch.int64))[0]
    elif op == "summed_linear":
        inputs, weight = [leaf(2, 3)], leaf(4, 3)
        result = summed_linear(*inputs, weight, total_FC=torch.zeros_like(weight), note=lambda: None).sum()
    elif op == "gelu_linear":
        inputs = [leaf(2, 3), leaf(4, 3)]
        result = gelu_linear(*inputs).sum()
    else:
        inputs = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
        result = fp8_linear(*inputs).sum()
    return inputs, torch.autograd.grad(result, inputs, create_graph=True)


@pytest.mark.parametrize("op", ["gated_scan", "linear_cross_entropy", "gelu_linear", "fp8_linear", "summed_linear"])
def test_second_derivatives_raise_and_are_no_zeros(op):
    inputs, gradients = twice(op)
    penalised = sum(x.square().sum() for x in (*inputs, *gradients))
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalised.backward()


@pytest.mark.parametrize("op", ["gated_scan", "gelu_linear", "fp8_linear"])
def test_so_they_do_where_only_the_way_to_an_input_is_followed(op):
    inputs, gradients = twice(op)
    penalised = sum(x.square().sum() for x in (*inputs, *gradients))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalised, inputs[-1])


def test_a_decode_step_has_no_gradient_to_give():
    token = torch.randn(4, 1, 2, 16, requires_grad=True)
    state, cache = ScanState(*torch.zeros(2, 1, 2, 16)), torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="decode_step has no backward"):
        decode_step(
            *token, *rotary_tables(torch.arange(4), 16), state, cache, cache, torch.zeros(1, dtype=torch.int64), (4, 3, 2)
        )
