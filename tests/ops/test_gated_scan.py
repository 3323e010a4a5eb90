from __future__ import annotations

import math

import pytest
import torch

from megarat.ops import ScanState, gated_scan, rotary_tables
from megarat.ops.gated_scan import gated_scan_ref


def inputs(batch, length, heads, channels, dtype=torch.float64):
    """k, v, g as slices of one projection, and an initial state."""
    k, v, g = torch.randn(batch, length, 3, heads, channels, dtype=dtype).requires_grad_().unbind(2)
    return k, v, g, ScanState(*torch.randn(2, batch, heads, channels, dtype=dtype).requires_grad_())


# one step; fewer steps than a chunk's square; a ragged last chunk; whole chunks
@pytest.mark.parametrize("length", [1, 3, 37, 49])
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_form_equals_the_step_by_step_definition(length, documents):
    k, v, g, state = inputs(2, length, 2, 6)
    starts = torch.rand(2, length) < 0.2 if documents else None
    cos, sin = rotary_tables(torch.arange(length), 6, dtype=torch.float64)
    results = []
    for scan in (gated_scan_ref, gated_scan):
        k_out, v_out, last = scan(k, v, g, cos, sin, initial_state=state, document_starts_BT=starts)
        loss = (k_out.sin() + v_out.cos()).sum() + (last.k_BHK * last.v_BHK).sum()
        results.append((k_out, v_out, *last, *torch.autograd.grad(loss, (k, v, g, *state))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_chunked_form_match_finite_differences():
    k, v, g, state = inputs(1, 7, 1, 4)
    k, v, g = (x.detach().requires_grad_() for x in (k, v, g))
    starts = torch.tensor([[False, False, True, False, False, False, False]])

    def run(k, v, g, state_k, state_v):
        return gated_scan(k, v, g, initial_state=ScanState(state_k, state_v), document_starts_BT=starts)[0]

    assert torch.autograd.gradcheck(run, (k, v, g, *(s.detach().requires_grad_() for s in state)))


def test_two_segments_with_carried_state_equal_one():
    k, v, g, state = inputs(2, 20, 1, 4)
    whole = gated_scan(k, v, g, initial_state=state)
    first = gated_scan(k[:, :13], v[:, :13], g[:, :13], initial_state=state)
    second = gated_scan(k[:, 13:], v[:, 13:], g[:, 13:], initial_state=first[2])
    torch.testing.assert_close(torch.cat((first[0], second[0]), dim=1), whole[0])
    torch.testing.assert_close(second[2].v_BHK, whole[2].v_BHK)


def test_infinite_gate_holds_the_state_exactly_and_has_zero_gradient():
    k, v, g, _ = inputs(1, 12, 1, 4)
    k, v, g = (x.detach().clone() for x in (k, v, g))
    g[:, 5:] = math.inf
    k, v, g = (x.requires_grad_() for x in (k, v, g))
    exact = gated_scan_ref(k, v, g)[1]
    assert torch.equal(exact[:, 5:], exact[:, 4:5].expand(-1, 7, -1, -1))
    k_out, v_out, last = gated_scan(k, v, g)
    # the state in front of a chunk is composed, that inside of one is walked: they may differ in the last bit, and then no more
    torch.testing.assert_close(v_out[:, 5:], exact[:, 5:], rtol=1e-15, atol=1e-15)
    assert torch.equal(last.v_BHK, v_out[:, 11])
    for gradient in torch.autograd.grad((k_out + v_out).sum(), (k, v, g)):
        assert gradient.isfinite().all()
        assert (gradient[:, 5:] == 0).all()


def test_bf16_inputs_keep_an_fp32_state_and_give_outputs_of_the_asked_dtype():
    k, v, g = torch.randn(1, 500, 3, 1, 8).to(torch.bfloat16).unbind(2)
    k_out, _, last = gated_scan(k, v, g + 5)
    wide, _, wide_last = gated_scan(k, v, g + 5, out_dtype=torch.float32)
    expected = gated_scan_ref(k.double(), v.double(), (g + 5).double())
    assert (k_out.dtype, wide.dtype, last.k_BHK.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    # 500 fp32 roundings of 2^-24 relative to a state that gates of about 0.99 keep near its largest
    torch.testing.assert_close(wide.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide_last.v_BHK.double(), expected[2].v_BHK, rtol=1e-5, atol=1e-5)


def test_unequal_shapes_and_a_lone_table_are_refused():
    k, v, g, _ = inputs(1, 4, 1, 4)
    with pytest.raises(ValueError, match="one shape"):
        gated_scan(k, v, g[:, :3])
    with pytest.raises(ValueError, match="come together"):
        gated_scan(k, v, g, torch.ones(4, 2))


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 1), (3, 4, 2), (1, 4, 2)], ids=str)
def test_rotary_tables_of_other_positions_rows_or_heads_are_refused(shape):
    """A kernel would read behind them."""
    k, v, g, _ = inputs(2, 4, 1, 4)
    with pytest.raises(ValueError, match="gated_scan"):
        gated_scan(k, v, g, torch.ones(shape), torch.ones(shape))


def test_states_and_document_starts_of_other_shapes_are_refused():
    k, v, g, state = inputs(2, 4, 1, 4)
    with pytest.raises(ValueError, match="initial state of shape"):
        gated_scan(k, v, g, initial_state=ScanState(state.k_BHK[:1], state.v_BHK[:1]))
    with pytest.raises(ValueError, match=r"is torch\.int64"):
        gated_scan(k, v, g, document_starts_BT=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="document_starts_BT"):
        gated_scan(k, v, g, document_starts_BT=torch.zeros(4, dtype=torch.bool))


def test_an_initial_state_of_another_dtype_is_widened_and_gets_its_gradient():
    k, v, g, _ = inputs(1, 6, 1, 4)
    narrow = ScanState(*torch.randn(2, 1, 1, 4).to(torch.bfloat16).requires_grad_())
    found = gated_scan(k, v, g, initial_state=narrow)
    expected = gated_scan(k, v, g, initial_state=ScanState(*(s.double() for s in narrow)))
    assert torch.equal(found[0], expected[0])
    (gradient,) = torch.autograd.grad(found[0].sum(), narrow.k_BHK)
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().sum() > 0
