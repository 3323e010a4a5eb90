from __future__ import annotations

import pytest
import torch

from megarat.ops import dilated_attention, visible
from megarat.ops.dilated_attention import dilated_attention_ref, far_positions
from tests.ops.oracle import TOLERANCE

# dense; dilation alone, beyond the sequence, with a window, with initial tokens, all three; none of it; larger than the sequence
PATTERNS = [
    (1, 0, 0), (4, 0, 0), (64, 0, 0), (4, 3, 0), (5, 0, 7), (4, 3, 2), (-1, 0, 0), (-1, 3, 2), (3, 100, 0), (3, 0, 100),
]  # fmt: skip


def literal(i, j, dilation, window, initial):
    return j <= i and (i - j <= window or j < initial or (dilation != -1 and (j + 1) % dilation == 0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mask_follows_the_rule_pair_by_pair(pattern):
    positions = torch.arange(20)
    found = visible(positions, positions, pattern)
    assert found.tolist() == [[literal(i, j, *pattern) for j in range(20)] for i in range(20)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_far_list_window_and_self_are_disjoint_and_make_up_the_mask(pattern):
    _, window, _ = pattern
    length = 40
    far = far_positions(length, pattern).tolist()
    assert far == sorted(set(far))
    for i in range(length):
        lo = max(0, i - window)
        seen = [j for j in far if j < lo] + list(range(lo, i + 1))
        assert seen == [j for j in range(length) if literal(i, j, *pattern)]


def projections(*shape):
    return torch.randn(*shape[:2], 4, *shape[2:], dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_torch_paths_equal_the_masked_definition_with_their_gradients(pattern, documents):
    projection = projections(2, 23, 2, 4)
    q, k, v, gate = projection.unbind(2)
    ids = (torch.arange(23) // 9).expand(2, -1) if documents else None
    expected, expected_lse = dilated_attention_ref(q, k, v, pattern, document_ids_BT=ids)
    expected = expected * torch.sigmoid(gate)
    found = dilated_attention(q, k, v, pattern, output_gate_BTHK=gate, document_ids_BT=ids)
    _, lse = dilated_attention(q, k, v, pattern, return_lse=True, document_ids_BT=ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse, expected_lse)
    gradients = [torch.autograd.grad(out.square().sum(), projection) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pattern", [(4, 0, 0), (5, 0, 7)], ids=str)
def test_large_scores_of_bf16_inputs_are_not_rounded_to_bf16(pattern):
    """Queries 16 times as large as a new model's: by bf16 scores of up to 60 are rounded by 1/8. Limits as of the kernels (oracle.py)."""
    torch.manual_seed(0)
    projection = (torch.randn(1, 200, 3, 1, 32) * torch.tensor([16.0, 1.0, 1.0])[:, None, None]).to(torch.bfloat16)
    dout = torch.randn(1, 200, 1, 32).to(torch.bfloat16)
    results = []
    for compute, attend in ((torch.bfloat16, dilated_attention), (torch.float64, lambda *x: dilated_attention_ref(*x)[0])):
        inputs = projection.to(compute).requires_grad_()
        out = attend(*inputs.unbind(2), pattern)
        (gradient,) = torch.autograd.grad(out, inputs, dout.to(compute))
        results.append((out, *gradient.unbind(2)))
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < TOLERANCE[torch.bfloat16][index > 0], (index, error)


def test_each_head_attends_by_its_own_pattern():
    q, k, v, _ = projections(1, 15, 4, 4).unbind(2)
    patterns = [(4, 0, 0), (1, 0, 0), (4, 0, 0), (-1, 2, 1)]
    found = dilated_attention(q, k, v, patterns)
    for head, pattern in enumerate(patterns):
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        torch.testing.assert_close(found[:, :, head : head + 1], dilated_attention_ref(*one, pattern)[0])


def test_log_sum_exp_joins_two_halves_of_the_keys():
    """What context parallelism relies on: far keys and the rest, attended apart, weigh in by their log-sum-exps."""
    q, k, v, _ = (x.detach() for x in projections(1, 30, 1, 4).unbind(2))
    whole, whole_lse = dilated_attention(q, k, v, (3, 0, 0), return_lse=True)
    own, own_lse = dilated_attention(q, k, v, (-1, 0, 0), return_lse=True)
    share = (own_lse - whole_lse).exp()[..., None]
    far = (whole - own * share) / (1 - share).clamp_min(1e-12)
    torch.testing.assert_close(own * share + far * (1 - share), whole)
    assert (share[:, :3] == 1).all()  # nothing far is visible to the first D queries
    assert (share[:, 3:] < 1).all()


@pytest.mark.parametrize("pattern", [(4, 0, 0), (4, 3, 2), (1, 0, 0)], ids=str)
def test_the_log_sum_exp_of_bf16_inputs_is_fp32(pattern):
    q, k, v = torch.randn(1, 100, 3, 2, 16).to(torch.bfloat16).unbind(2)
    out, lse = dilated_attention(q, k, v, pattern, return_lse=True)
    expected, expected_lse = dilated_attention_ref(q.double(), k.double(), v.double(), pattern)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert (out.double() - expected).norm() < TOLERANCE[torch.bfloat16][0] * expected.norm()


def test_a_scale_of_zero_weighs_all_visible_keys_alike():
    q, k, v, _ = projections(1, 9, 1, 4).unbind(2)
    out, lse = dilated_attention(q, k, v, (4, 1, 0), scale=0.0, return_lse=True)
    seen = visible(torch.arange(9), torch.arange(9), (4, 1, 0)).double()
    torch.testing.assert_close(out[0, :, 0], seen @ v[0, :, 0] / seen.sum(1, keepdim=True))
    torch.testing.assert_close(lse[0, :, 0], seen.sum(1).log())


@pytest.mark.parametrize("pattern", [(0, 0, 0), (-2, 1, 1), (4, -1, 0), (4, 0, -1)], ids=str)
def test_impossible_patterns_are_refused(pattern):
    q, k, v, _ = projections(1, 5, 1, 4).unbind(2)
    with pytest.raises(ValueError, match="pattern"):
        dilated_attention(q, k, v, pattern)


def test_a_wrong_number_of_head_patterns_is_refused():
    q, k, v, _ = projections(1, 5, 2, 4).unbind(2)
    with pytest.raises(ValueError, match="3 patterns for 2 heads"):
        dilated_attention(q, k, v, [(4, 0, 0)] * 3)


@pytest.mark.parametrize("wrong", ["keys", "gate", "documents", "nothing"])
def test_inputs_of_unequal_shapes_are_refused(wrong):
    """A kernel would read behind the shorter one."""
    q, k, v, gate = projections(2, 5, 2, 4).unbind(2)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    if wrong == "keys":
        k = k[:, :4]
    elif wrong == "gate":
        gate = gate[:, :, :1]
    elif wrong == "documents":
        ids = ids[0]
    else:
        q, k, v, gate, ids = q[:, :0], k[:, :0], v[:, :0], gate[:, :0], ids[:, :0]
    with pytest.raises(ValueError, match="dilated_attention: "):
        dilated_attention(q, k, v, (4, 1, 1), output_gate_BTHK=gate, document_ids_BT=ids)
