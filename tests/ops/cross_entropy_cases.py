"""Cases of the cross entropy's kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import Statistics, linear_cross_entropy
from megarat.ops.cross_entropy import linear_cross_entropy_ref
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, assert_close, poisoned_memory  # noqa: F401

# N, C, V: one row, a ragged vocabulary over several blocks, several chunks with a short last one
CROSS_ENTROPY = [(1, 16, 5), (37, 32, 4500)] + ([] if INTERPRETED else [(3000, 256, 32000)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_linear_cross_entropy_and_its_gradients_match_float64(case, split, dtype):
    rows, channels, entries = case
    x = torch.randn(rows, channels, device=DEVICE).to(dtype)
    weight = (torch.randn(entries, channels, device=DEVICE) * channels**-0.5).to(dtype)
    labels = torch.randint(0, entries, (rows,), device=DEVICE)
    labels[rows // 2] = -100 if rows > 1 else labels[0]
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = linear_cross_entropy_ref(*wide, labels)
    narrow = [t.clone().requires_grad_() for t in (x, weight)]
    options = {"backend": "triton", "chunk": -(-rows // 3)}
    if split:  # two parts of the vocabulary, joined by the other part's statistics
        cut = entries // 2
        other = narrow[1][cut:]
        found, _ = linear_cross_entropy(
            narrow[0], narrow[1][:cut], labels, combine=joiner(x, other, labels, cut, options["chunk"]), **options
        )
        expected_gradients = torch.autograd.grad(expected, wide[1])[0][:cut]
        found_gradients = torch.autograd.grad(found, narrow[1])[0][:cut]
    else:
        found, _ = linear_cross_entropy(*narrow, labels, **options)
        expected_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(expected, wide)])
        found_gradients = torch.cat([g.flatten() for g in torch.autograd.grad(found, narrow)])
    assert_close((found, found_gradients), (expected, expected_gradients), dtype, outputs=1)


def joiner(x, other_weight, labels, vocab_start, chunk):
    """A `combine` that plays the second of two ranks: it makes that part's statistics of the same chunk itself."""
    chunks = iter(range(0, x.shape[0], chunk))

    def combine(mine: Statistics) -> Statistics:
        rows = slice(start := next(chunks), start + chunk)
        logits = (x[rows] @ other_weight.detach().T).float()
        theirs = Statistics(logits.amax(1), logits.sub(logits.amax(1, True)).exp().sum(1), torch.zeros_like(mine.target))
        inside = labels[rows] >= vocab_start
        theirs.target[inside] = logits[inside].gather(1, (labels[rows][inside] - vocab_start)[:, None])[:, 0]
        top = torch.maximum(mine.largest, theirs.largest)
        sum_exp = mine.sum_exp * (mine.largest - top).exp() + theirs.sum_exp * (theirs.largest - top).exp()
        return Statistics(top, sum_exp, mine.target + theirs.target)

    return combine
