from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megarat.ops import Statistics, linear_cross_entropy, partial_statistics


def tensors(rows, channels, entries):
    x = torch.randn(rows, channels, dtype=torch.float64).requires_grad_()
    weight = torch.randn(entries, channels, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, entries, (rows,))
    labels[::5] = -100
    return x, weight, labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 100, None])
def test_loss_and_gradients_equal_those_of_all_logits_for_any_chunk(chunk, reduction):
    x, weight, labels = tensors(33, 8, 50)
    loss, count = linear_cross_entropy(x, weight, labels, chunk=chunk, reduction=reduction)
    expected = F.cross_entropy(x @ weight.T, labels, reduction=reduction)
    assert count == (labels != -100).sum()
    torch.testing.assert_close(loss, expected)
    scaled = [torch.autograd.grad(3 * value, (x, weight)) for value in (loss, expected)]
    torch.testing.assert_close(*scaled)


def test_a_batch_without_labels_has_zero_loss_and_zero_gradients():
    x, weight, labels = tensors(4, 8, 50)
    loss, count = linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    assert (loss, count) == (0, 0)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, weight)))


def test_two_halves_of_the_vocabulary_joined_by_their_statistics_equal_the_whole():
    x, weight, labels = tensors(20, 8, 50)
    other = partial_statistics((x @ weight[:30].T).detach(), labels, 0)

    def combine(mine: Statistics) -> Statistics:
        top = torch.maximum(mine.largest, other.largest)
        sum_exp = mine.sum_exp * (mine.largest - top).exp() + other.sum_exp * (other.largest - top).exp()
        return Statistics(top, sum_exp, mine.target + other.target)

    half = weight[30:].detach().requires_grad_()
    loss, _ = linear_cross_entropy(x, half, labels, vocab_start=30, combine=combine)
    expected = F.cross_entropy(x @ weight.T, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, half)[0], torch.autograd.grad(expected, weight)[0][30:])


def test_evaluation_makes_no_gradients_and_bf16_sums_in_fp32():
    x, weight, labels = tensors(64, 8, 50)
    narrow = [t.detach().to(torch.bfloat16) for t in (x, weight)]
    with torch.no_grad():
        loss, _ = linear_cross_entropy(*narrow, labels)
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    # logits of size 3 are rounded to bf16 by 2^-9 relative
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(narrow[0].double() @ narrow[1].double().T, labels), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("share", [1 / 3, 1 / 12])
def test_a_share_of_the_loss_scales_bf16_gradients_by_that_share_and_not_by_its_rounding(share):
    """As with 3 or 12 micro-batches an update. Roundings of single elements average out; that of the share would be common to all."""
    x, weight, labels = tensors(64, 32, 50)
    narrow = [t.detach().to(torch.bfloat16).requires_grad_() for t in (x, weight)]
    loss, _ = linear_cross_entropy(*narrow, labels)
    whole = torch.autograd.grad(loss, narrow, retain_graph=True)
    for found, gradient in zip(torch.autograd.grad(loss * share, narrow), whole, strict=True):
        expected = gradient.double() * share
        scale = float((found.double() * expected).sum() / expected.square().sum())
        assert abs(scale - 1) < 5e-4  # 1/3 and 1/12 lie 2e-3 from the nearest bf16 number


def test_an_unknown_reduction_and_mixed_dtypes_are_refused():
    x, weight, labels = tensors(4, 8, 50)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, labels, reduction="none")
    with pytest.raises(ValueError, match="float32"):
        linear_cross_entropy(x.float(), weight, labels)


@pytest.mark.parametrize("label", [-1, 50, -99])
def test_a_label_that_is_no_entry_is_refused_and_not_read_as_another(label):
    x, weight, labels = tensors(4, 8, 50)
    labels[2] = label
    with pytest.raises(ValueError, match=f"label {label} is none of 0 ... 49"):
        linear_cross_entropy(x, weight, labels)


def test_no_rows_have_zero_loss_and_zero_gradients():
    x, weight, labels = tensors(4, 8, 50)
    loss, count = linear_cross_entropy(x[:0], weight, labels[:0])
    assert (loss, count) == (0, 0)
    assert (torch.autograd.grad(loss, weight)[0] == 0).all()


def test_unequal_shapes_and_an_impossible_chunk_are_refused():
    x, weight, labels = tensors(4, 8, 50)
    for wrong in ((x[:3], weight, labels), (x, weight[:, :7], labels), (x, weight, labels[:, None])):
        with pytest.raises(ValueError, match="must be"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="chunk=-1"):
        linear_cross_entropy(x, weight, labels, chunk=-1)
