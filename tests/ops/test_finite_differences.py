"""The gradients of the torch references against finite differences in float64: what the kernels' gradients are compared with."""

from __future__ import annotations

import pytest
import torch

from megarat.ops import (
    ScanState,
    add_rms_norm,
    apply_rotary,
    dilated_attention,
    gated_scan,
    linear_cross_entropy,
    output_gate,
    rms_norm,
    rotary_tables,
)
from megarat.ops.cross_entropy import linear_cross_entropy_ref
from megarat.ops.dilated_attention import dilated_attention_ref
from megarat.ops.gated_scan import gated_scan_ref
from megarat.ops.rms_norm import rms_norm_ref

TABLES = rotary_tables(torch.arange(7), 4, dtype=torch.float64)
LABELS = torch.tensor([3, -100, 0, 10, 6])
SEQUENCE, STATE = (1, 7, 2, 4), (1, 2, 4)


def scan(form):
    def run(k, v, g, state_k, state_v):
        k_out, v_out, last = form(k, v, g, *TABLES, initial_state=ScanState(state_k, state_v))
        return k_out, v_out, *last

    return run


def attention(form, pattern, **options):
    return lambda q, k, v: form(q, k, v, pattern, **options)


# a function and the shapes of its inputs; scans, attention and the loss by their definition and by what runs in its place
CASES = {
    "gated_scan_ref": (scan(gated_scan_ref), [SEQUENCE] * 3 + [STATE] * 2),
    "gated_scan": (scan(gated_scan), [SEQUENCE] * 3 + [STATE] * 2),
    **{
        f"{form.__name__} {pattern}": (attention(form, pattern, **options), [SEQUENCE] * 3)
        for pattern in [(1, 0, 0), (3, 0, 0), (3, 2, 1), (-1, 2, 1), (20, 0, 20)]
        for form, options in ((dilated_attention_ref, {}), (dilated_attention, {"return_lse": True}))
    },
    "linear_cross_entropy_ref": (lambda x, weight: linear_cross_entropy_ref(x, weight, LABELS), [(5, 4), (11, 4)]),
    "linear_cross_entropy": (lambda x, weight: linear_cross_entropy(x, weight, LABELS, chunk=2)[0], [(5, 4), (11, 4)]),
    "rms_norm_ref": (lambda x, weight: rms_norm_ref(x, weight, 1e-6), [(2, 3, 8), (8,)]),
    "rms_norm": (rms_norm, [(2, 3, 8), (8,)]),
    "add_rms_norm": (add_rms_norm, [(2, 3, 8), (2, 3, 8), (8,)]),
    "output_gate": (output_gate, [SEQUENCE] * 2),
    "apply_rotary": (lambda x: apply_rotary(x, *TABLES), [SEQUENCE]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences(name):
    run, shapes = CASES[name]
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(run, [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes])
