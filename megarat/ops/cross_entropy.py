"""The output projection and its cross entropy in one op, chunk by chunk over the rows, so that all logits never exist at once.

    logits = x W^T,   loss = sum over kept rows of  logsumexp(logits) - logits[label]   (divided by their number for "mean")

Shapes: N rows (tokens), C channels, V vocabulary entries *held here*. The gradients dx = dlogits W and dW = dlogits^T x are made in the
forward, while a chunk's logits are at hand, and only scaled in the backward: 3 matrix products in all, none repeated.

Vocabulary-parallel use: give each rank its rows of W with the number of its first one as `vocab_start`, and a `combine` that joins the
three per-row statistics over the ranks (a max, and two sums after rescaling; see `Statistics`). The op itself knows no ranks. dx
is then this rank's part, to be summed by whoever split the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarat.ops.autograd import once_differentiable
from megarat.ops.dispatch import choose_backend

CUDA_CHUNK_BYTES = 768 << 20  # of logits: long enough products for the matrix units, small beside a training step's memory
CPU_CHUNK_BYTES = 16 << 20  # of fp32 logits: about what the last-level cache of a desktop holds


class Statistics(NamedTuple):
    """Per row of a chunk: what a softmax over a part of the vocabulary has to tell the other parts. All (n,), fp32.

    To join parts: top = max over parts of `largest`; `sum_exp` and `target` are summed, after sum_exp *= exp(largest - top).
    """

    largest: Tensor
    sum_exp: Tensor
    target: Tensor


Combine = Callable[[Statistics], Statistics]


def linear_cross_entropy_ref(
    x_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition with all logits, in fp32 (float64 for float64 inputs): the oracle. 0 where no row is kept."""
    compute = torch.float64 if x_NC.dtype == torch.float64 else torch.float32
    logits_NV = x_NC.to(compute) @ weight_VC.to(compute).T
    kept_N = labels_N != ignore_index
    losses_N = logits_NV.logsumexp(dim=-1) - logits_NV.gather(1, labels_N.clamp_min(0)[:, None])[:, 0]
    total = losses_N.masked_fill(~kept_N, 0.0).sum()
    return total / kept_N.sum().clamp_min(1) if reduction == "mean" else total


def partial_statistics(logits_nV: Tensor, labels_n: Tensor, vocab_start: int) -> Statistics:
    """The statistics of the vocabulary entries vocab_start ... vocab_start + V. `target` is 0 for labels outside of them."""
    largest_n = logits_nV.amax(dim=-1)
    sum_exp_n = (logits_nV - largest_n[:, None]).exp_().sum(dim=-1)
    local_n, inside_n = _local_labels(labels_n, vocab_start, logits_nV.shape[1])
    target_n = logits_nV.gather(1, local_n[:, None])[:, 0]
    return Statistics(largest_n, sum_exp_n, target_n.masked_fill_(~inside_n, 0.0))


def _local_labels(labels_n: Tensor, vocab_start: int, entries: int) -> tuple[Tensor, Tensor]:
    """Labels as columns of this part (0 where they lie outside), and whether they lie inside."""
    local_n = labels_n - vocab_start
    inside_n = (local_n >= 0) & (local_n < entries)
    return local_n.masked_fill(~inside_n, 0), inside_n


def _logit_gradient_(logits_nV: Tensor, joined: Statistics, labels_n: Tensor, vocab_start: int, weights_n: Tensor) -> Tensor:
    """(softmax - onehot) * weights, in place over the logits."""
    logits_nV.sub_((joined.largest + joined.sum_exp.log())[:, None]).exp_()
    local_n, inside_n = _local_labels(labels_n, vocab_start, logits_nV.shape[1])
    logits_nV.scatter_add_(1, local_n[:, None], -inside_n[:, None].to(logits_nV.dtype))
    return logits_nV.mul_(weights_n[:, None])


def _torch_rows(
    logits_nV: Tensor, labels_n: Tensor, vocab_start: int, weights_n: Tensor, combine: Combine | None, want_gradient: bool
) -> tuple[Statistics, Tensor]:
    """Joined statistics of a chunk's rows, and (in fp32, if wanted) the gradient of its logits."""
    logits_nV = logits_nV.to(weights_n.dtype)
    joined = partial_statistics(logits_nV, labels_n, vocab_start)
    if combine is not None:
        joined = combine(joined)
    if want_gradient:
        _logit_gradient_(logits_nV, joined, labels_n, vocab_start, weights_n)
    return joined, logits_nV


def _triton_rows(
    logits_nV: Tensor, labels_n: Tensor, vocab_start: int, weights_n: Tensor, combine: Combine | None, want_gradient: bool
) -> tuple[Statistics, Tensor]:
    """The same by the kernels, in place of the logits and in their dtype."""
    from megarat.ops.kernels.cross_entropy import logit_gradient_, row_statistics

    if combine is None:
        return Statistics(*row_statistics(logits_nV, labels_n, vocab_start, weights_n if want_gradient else None)), logits_nV
    joined = combine(Statistics(*row_statistics(logits_nV, labels_n, vocab_start)))
    if want_gradient:
        logit_gradient_(logits_nV, joined.largest, joined.sum_exp, labels_n, vocab_start, weights_n)
    return joined, logits_nV


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_VC: Tensor,
        labels_N: Tensor,
        ignore_index: int,
        chunk: int,
        reduction: str,
        vocab_start: int,
        combine: Combine | None,
        want_gradients: bool,
        rows_of_chunk: Callable[..., tuple[Statistics, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Walks the chunks; keeps the gradients for a loss gradient of 1."""
        compute = torch.float64 if x_NC.dtype == torch.float64 else torch.float32
        kept_N = labels_N != ignore_index
        count = kept_N.sum()
        weights_N = kept_N.to(compute)
        if reduction == "mean":
            weights_N = weights_N / count.clamp_min(1)
        loss = torch.zeros((), dtype=compute, device=x_NC.device)
        dx_NC = torch.empty_like(x_NC) if want_gradients else None
        new = torch.empty if x_NC.shape[0] else torch.zeros  # the first chunk writes all of it, if there is one
        dweight_VC = new(weight_VC.shape, dtype=compute, device=x_NC.device) if want_gradients else None
        for start in range(0, x_NC.shape[0], chunk):
            rows = slice(start, start + chunk)
            joined, dlogits_nV = rows_of_chunk(
                x_NC[rows] @ weight_VC.T, labels_N[rows], vocab_start, weights_N[rows], combine, want_gradients
            )
            loss += ((joined.largest + joined.sum_exp.log() - joined.target) * weights_N[rows]).sum()
            if dx_NC is not None and dweight_VC is not None:
                dlogits_nV = dlogits_nV.to(x_NC.dtype)
                torch.mm(dlogits_nV, weight_VC, out=dx_NC[rows])
                _accumulate_outer(dweight_VC, dlogits_nV, x_NC[rows], fresh=start == 0)
            del dlogits_nV  # before the next chunk's logits are allocated
        if dx_NC is not None and dweight_VC is not None:
            ctx.save_for_backward(dx_NC, dweight_VC)
        ctx.weight_dtype = weight_VC.dtype
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dcount: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward made."""
        dx_NC, dweight_VC = ctx.saved_tensors
        return _scaled(dx_NC, dloss, dx_NC.dtype), _scaled(dweight_VC, dloss, ctx.weight_dtype), *(None,) * 8


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * dloss, scaled in dloss's dtype and rounded to ``dtype`` in one pass.

    dloss as a matrix: torch takes a scalar in the matrix's dtype, and 1/12 in bf16 is off by 0.2 %, the same way for every gradient below.
    """
    scaled = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, dloss.view(1, 1), out=scaled)


def _accumulate_outer(dweight_VC: Tensor, dlogits_nV: Tensor, x_nC: Tensor, fresh: bool) -> None:
    """dweight += dlogits^T x (= if fresh), summed in dweight's dtype (fp32) whatever the operands' dtype."""
    if dlogits_nV.dtype == dweight_VC.dtype:
        torch.addmm(dweight_VC, dlogits_nV.T, x_nC, beta=0 if fresh else 1, out=dweight_VC)
    elif dlogits_nV.is_cuda and fresh:
        torch.mm(dlogits_nV.T, x_nC, out_dtype=dweight_VC.dtype, out=dweight_VC)
    elif dlogits_nV.is_cuda:
        torch.addmm(dweight_VC, dlogits_nV.T, x_nC, out_dtype=dweight_VC.dtype, out=dweight_VC)
    elif fresh:
        dweight_VC.copy_(dlogits_nV.T @ x_nC)
    else:
        dweight_VC.add_(dlogits_nV.T @ x_nC)


def linear_cross_entropy(
    x_NC: Tensor,
    weight_VC: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: str = "mean",
    vocab_start: int = 0,
    combine: Combine | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `x W^T` against labels without ever holding all logits.

    x_NC, weight_VC: one float dtype. labels_N: int64; rows with `ignore_index` count for nothing.
    chunk: rows at a time; by default equal chunks of at most 768 MB of logits (16 MB of fp32 logits on a CPU).
    reduction: "mean" over the kept rows (0 if there are none) or "sum".
    vocab_start, combine: for a vocabulary split over ranks, see the module's docstring.
    backend: of the passes over the logits: "triton", "reference" or None to choose (see ops.dispatch); products are torch's.

    Returns (loss, count of kept rows): a scalar fp32 (float64 for float64 inputs) and a scalar int64.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}, expected 'mean' or 'sum'")
    if x_NC.dtype != weight_VC.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x_NC.dtype} but the weight is {weight_VC.dtype}")
    if x_NC.shape[:1] != labels_N.shape or x_NC.shape[1:] != weight_VC.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x_NC, weight_VC, labels_N))
        raise ValueError(f"linear_cross_entropy: x, weight and labels must be (N, C), (V, C) and (N,); got {shapes}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk={chunk}, expected at least one row")
    if combine is None:
        _check_labels(labels_N, ignore_index, vocab_start, weight_VC.shape[0])
    x_NC, labels_N = x_NC.contiguous(), labels_N.contiguous()
    unsupported = "the inputs are float64" if x_NC.dtype == torch.float64 else None
    kernels = choose_backend("linear_cross_entropy", backend, x_NC, unsupported) == "triton"
    want_gradients = torch.is_grad_enabled() and (x_NC.requires_grad or weight_VC.requires_grad)
    loss, count = _LinearCrossEntropy.apply(
        x_NC, weight_VC, labels_N, ignore_index, chunk or _default_chunk(x_NC, weight_VC), reduction, vocab_start, combine,
        want_gradients, _triton_rows if kernels else _torch_rows,
    )  # fmt: skip
    return loss, count


def _check_labels(labels_N: Tensor, ignore_index: int, vocab_start: int, entries: int) -> None:
    """Refuses labels of no entry: `ValueError`, or on a GPU, without waiting for it, a failed assertion of the device."""
    known_N = (labels_N == ignore_index) | ((labels_N >= vocab_start) & (labels_N < vocab_start + entries))
    if labels_N.is_cuda:
        torch._assert_async(known_N.all())
    elif not known_N.all():
        raise ValueError(
            f"linear_cross_entropy: label {int(labels_N[~known_N][0])} is none of {vocab_start} ... {vocab_start + entries - 1}"
        )


def _default_chunk(x_NC: Tensor, weight_VC: Tensor) -> int:
    """Rows of a chunk: as few equal chunks as the budget allows, in steps of 128 rows where there are many."""
    rows, entries = x_NC.shape[0], weight_VC.shape[0]
    limit = CUDA_CHUNK_BYTES // (x_NC.element_size() * entries) if x_NC.is_cuda else CPU_CHUNK_BYTES // (4 * entries)
    chunks = -(-rows // max(1, limit))
    chunk = -(-rows // max(1, chunks))
    return max(1, -(-chunk // 128) * 128 if chunk > 1024 else chunk)
