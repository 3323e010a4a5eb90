"""Triton kernels over a chunk of logits: softmax statistics of each row, and the logits' gradient in their place.

One program owns one row of n V logits (bf16 or fp32) and walks it in blocks; all arithmetic is fp32. Fused, the second walk finds the
row in the L2 cache, so the chunk crosses memory once each way.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _row_statistics(row_ptr, entries, BLOCK: tl.constexpr):
    """Largest logit of a row and the sum of exp(logit - largest), with one exponential per logit."""
    c = tl.arange(0, BLOCK)
    largest = tl.max(tl.load(row_ptr + c, mask=c < entries, other=float("-inf")).to(tl.float32), axis=0)
    sums = tl.zeros([BLOCK], tl.float32)
    for c0 in tl.range(0, entries, BLOCK):
        x = tl.load(row_ptr + c0 + c, mask=c0 + c < entries, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        sums = sums * tl.exp(largest - new_largest) + tl.exp(x - new_largest)
        largest = new_largest
    return largest, tl.sum(sums, axis=0)


@triton.jit
def _row_gradient(row_ptr, entries, log_sum, local, weight, BLOCK: tl.constexpr):
    """(softmax - onehot) * weight over the logits of a row; `local` is the label's column, or outside of the row."""
    c = tl.arange(0, BLOCK)
    for c0 in tl.range(0, entries, BLOCK):
        inside = c0 + c < entries
        x = tl.load(row_ptr + c0 + c, mask=inside, other=0.0).to(tl.float32)
        d = (tl.exp(x - log_sum) - tl.where(c0 + c == local, 1.0, 0.0)) * weight
        tl.store(row_ptr + c0 + c, d.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy_statistics_kernel(
    logits_ptr, labels_ptr, weights_ptr, largest_ptr, sum_ptr, target_ptr, entries, vocab_start,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * entries
    local = tl.load(labels_ptr + row) - vocab_start
    inside = (local >= 0) & (local < entries)
    target = tl.load(row_ptr + local, mask=inside, other=0.0).to(tl.float32)
    largest, total = _row_statistics(row_ptr, entries, BLOCK)
    tl.store(largest_ptr + row, largest)
    tl.store(sum_ptr + row, total)
    tl.store(target_ptr + row, target)
    if GRADIENT:
        tl.debug_barrier()  # the target is read before it is overwritten
        _row_gradient(row_ptr, entries, largest + tl.log(total), local, tl.load(weights_ptr + row), BLOCK)


@triton.jit
def _cross_entropy_gradient_kernel(
    logits_ptr, labels_ptr, weights_ptr, largest_ptr, sum_ptr, entries, vocab_start, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    log_sum = tl.load(largest_ptr + row) + tl.log(tl.load(sum_ptr + row))
    local = tl.load(labels_ptr + row) - vocab_start
    _row_gradient(logits_ptr + row.to(tl.int64) * entries, entries, log_sum, local, tl.load(weights_ptr + row), BLOCK)


def row_statistics(
    logits_nV: Tensor, labels_n: Tensor, vocab_start: int, weights_n: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(largest, sum_exp, target) of every row, (n,) fp32. With weights, the logits also become their gradient, in place."""
    rows, entries = logits_nV.shape
    largest_n, sum_n, target_n = torch.empty(3, rows, dtype=torch.float32, device=logits_nV.device)
    _cross_entropy_statistics_kernel[(rows,)](
        logits_nV, labels_n, largest_n if weights_n is None else weights_n, largest_n, sum_n, target_n, entries, vocab_start,
        GRADIENT=weights_n is not None, BLOCK=min(BLOCK, triton.next_power_of_2(entries)), num_warps=WARPS,
    )  # fmt: skip
    return largest_n, sum_n, target_n


def logit_gradient_(
    logits_nV: Tensor, largest_n: Tensor, sum_n: Tensor, labels_n: Tensor, vocab_start: int, weights_n: Tensor
) -> None:
    """Turns logits into their gradient, in place, by statistics of the whole vocabulary."""
    rows, entries = logits_nV.shape
    _cross_entropy_gradient_kernel[(rows,)](
        logits_nV, labels_n, weights_n, largest_n, sum_n, entries, vocab_start,
        BLOCK=min(BLOCK, triton.next_power_of_2(entries)), num_warps=WARPS,
    )  # fmt: skip
