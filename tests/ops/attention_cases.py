"""Cases of dilated attention's kernels; see `oracle.py`."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import dilated_attention
from megarat.ops.dilated_attention import dilated_attention_ref
from tests.ops.oracle import DEVICE, DTYPES, INTERPRETED, assert_close, poisoned_memory, relative_error  # noqa: F401

# B, T, H, K, pattern, gated, documents. Dilation, window and initial part each absent, each alone, each larger than the sequence, and
# together; documents shorter than a tile and longer than several.
ATTENTION_SMALL = [
    (1, 1, 1, 16, (4, 0, 0), False, False),
    (2, 37, 2, 16, (4, 0, 0), True, False),
    (1, 75, 1, 32, (5, 20, 7), True, False),
    (1, 60, 1, 16, (-1, 20, 7), False, False),
    (1, 41, 1, 16, (30, 3, 0), False, False),
    (1, 40, 1, 16, (1, 0, 0), False, False),
    (1, 40, 1, 16, (200, 0, 30), False, False),
    (1, 40, 1, 16, (3, 150, 40), False, False),
    (1, 75, 1, 16, (4, 0, 9), True, True),
    (2, 45, 1, 16, (5, 20, 7), False, True),
    (1, 40, 1, 16, (1, 0, 0), False, True),
]
ATTENTION_LARGE = [
    (2, 1000, 3, 128, (64, 0, 0), True, False),
    (2, 1000, 3, 128, (16, 0, 0), False, False),
    (1, 1511, 2, 128, (16, 256, 4), True, False),
    (1, 1511, 2, 64, (16, 100, 130), False, False),
    (1, 2048, 1, 128, (-1, 300, 4), False, False),
    (1, 1024, 2, 64, (4096, 0, 0), False, False),
    (1, 1024, 2, 128, (1, 0, 0), False, False),
    (2, 1511, 2, 128, (16, 256, 4), True, True),
    (2, 2048, 2, 128, (64, 0, 0), True, True),
    (2, 1511, 2, 128, (1, 0, 0), False, True),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Interpreted: tiles of 16 queries and 16 keys, of which short sequences have several."""
    if INTERPRETED:
        monkeypatch.setattr("megarat.ops.kernels.dilated_attention.FP32_TILE", (16, 16, 4, 1, 255))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_SMALL + ([] if INTERPRETED else ATTENTION_LARGE), ids=str)
def test_dilated_attention_and_all_its_gradients_match_float64(case, dtype):
    batch, length, heads, channels, pattern, gated, documents = case
    projection = torch.randn(batch, length, 4, heads, channels, device=DEVICE).to(dtype)
    dout = torch.randn(batch, length, heads, channels, device=DEVICE).to(dtype).double()
    dlse = torch.randn(batch, length, heads, device=DEVICE, dtype=torch.float64)
    dlse += dlse.sign()  # far from 0: of a query that sees one key it is the whole gradient, behind a difference of equal numbers
    ids = (torch.rand(batch, length, device=DEVICE) < 6 / length).cumsum(1) if documents else None

    def run(compute):
        inputs = projection.to(compute).requires_grad_()
        q, k, v, gate = inputs.unbind(2)
        if compute == torch.float64:
            out, lse = dilated_attention_ref(q, k, v, pattern, document_ids_BT=ids)
            out = out * torch.sigmoid(gate) if gated else out
        else:
            options = {"output_gate_BTHK": gate if gated else None, "document_ids_BT": ids}
            out, lse = dilated_attention(q, k, v, pattern, return_lse=True, backend="triton", **options)
        (gradient,) = torch.autograd.grad((out.double() * dout).sum() + (lse.double() * dlse).sum(), inputs)
        return (out, lse, *gradient.unbind(2))

    assert_close(run(dtype), run(torch.float64), dtype, outputs=2)


def test_scores_that_rise_from_tile_to_tile_are_carried_over():
    """Keys that grow along the sequence: each tile's largest score lies far above all before it, and far above the own one's."""
    length, window = (45, 20) if INTERPRETED else (110, 50)
    q, k, v = torch.randn(1, length, 3, 1, 16, device=DEVICE).unbind(2)
    k = k * torch.linspace(0.1, 60.0, length, device=DEVICE)[None, :, None, None]
    for pattern in ((1, 0, 0), (3, window, 5)):
        out, lse = dilated_attention(q, k, v, pattern, return_lse=True, backend="triton")
        expected = dilated_attention_ref(q.double(), k.double(), v.double(), pattern)
        # scores of up to 500 are rounded by 2^-24 of themselves, and so are the weights, whose logarithms they are
        assert relative_error(out, expected[0]) < 500 * 2**-23
        assert relative_error(lse, expected[1]) < 2e-6


def test_heads_of_different_patterns_are_attended_apart_and_put_back_in_order():
    q, k, v = torch.randn(1, 35, 3, 4, 16, device=DEVICE).unbind(2)
    patterns = [(4, 0, 0), (1, 0, 0), (4, 0, 0), (-1, 5, 2)]
    out, lse = dilated_attention(q, k, v, patterns, return_lse=True, backend="triton")
    for head, pattern in enumerate(patterns):
        one = slice(head, head + 1)
        expected = dilated_attention_ref(q[:, :, one].double(), k[:, :, one].double(), v[:, :, one].double(), pattern)
        assert relative_error(out[:, :, one], expected[0]) < 2e-6
        assert relative_error(lse[:, :, one], expected[1]) < 2e-6
