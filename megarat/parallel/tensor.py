"""Tensor parallelism by heads: which part of each matrix a rank holds, and where the parts meet.

    x -> enter -> column linear (own heads, own FFN channels) -> gate, scan, rotary, attention, GELU -> row linear -> leave -> residual

Between ``enter`` and ``leave`` nothing is communicated. Plain tensor parallelism keeps the residual stream whole on every rank:
``enter`` copies, ``leave`` sums. With ``sequence`` (Megatron's sequence parallelism) norms and residual stream live on 1/n of the
tokens: ``enter`` gathers them, ``leave`` sums and scatters; the same bytes on the wire, 1/n of the activations outside. Which tokens are
whose does not matter there (norms and residuals look at one token), so the B T tokens of a micro-batch are cut as one row: what is sent
is contiguous in memory, and nothing is copied around it.

Shapes: B batch, T length, C width, V vocabulary, N rows, F outputs of a matrix; n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from megarat import comm
from megarat.ops import linear_cross_entropy
from megarat.ops.cross_entropy import Statistics

Product = Callable[[Tensor, Tensor], Tensor]  # x, weight -> x @ weight.T


@dataclass(frozen=True)
class TensorParallel(comm.Ranks):
    """The ranks that share each layer; with ``sequence`` also what lies between the matrices."""

    sequence: bool = False

    def enter(self, x_BTC: Tensor) -> Tensor:
        """Before the matrices that ranks share: (B, T, C), or with ``sequence`` 1/n of its tokens as (B, T/n, C) -> (B, T, C)."""
        if not self.sequence:
            return comm.copy_to(x_BTC, self.group)
        return comm.gather_along(x_BTC, self.group, 0).view(_all_tokens(x_BTC, self.size))

    def leave(self, x_BTC: Tensor) -> Tensor:
        """After them: the sum of the ranks' (B, T, C), of which ``sequence`` keeps this rank's tokens as (B, T/n, C)."""
        if not self.sequence:
            return comm.reduce_from(x_BTC, self.group)
        return comm.reduce_scatter_along(_in_slices(x_BTC, self.size), self.group, 0)

    def replicated(self, weight: Tensor) -> Tensor:
        """A weight that every rank holds. Where ranks apply it to different tokens, their gradients are summed."""
        return comm.copy_to(weight, self.group) if self.sequence else weight

    def share(self, channels: int) -> int:
        """This rank's part of ``channels``."""
        return channels // self.size


ALONE = TensorParallel()


def _all_tokens(x_BTC: Tensor, ranks: int) -> tuple[int, int, int]:
    """The shape of all ranks' tokens, from that of one rank's."""
    batch, length, width = x_BTC.shape
    return batch, ranks * length, width


def _in_slices(x_BTC: Tensor, ranks: int) -> Tensor:
    """All tokens, rank by rank along the first dim: (n B, T/n, C)."""
    batch, length, width = x_BTC.shape
    return x_BTC.reshape(ranks * batch, length // ranks, width)


class _EnteredLinear(torch.autograd.Function):
    """``enter`` and a column-parallel product in one, so that the backward computes while it communicates.

    With ``sequence`` only this rank's tokens are kept for the backward: it gathers all of them again while it makes the gradient of the
    input, and sums and scatters that while it makes the gradient of the weight.
    """

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_FC: Tensor, ranks: TensorParallel) -> Tensor:
        """-> (B, T, F) with this rank's F."""
        ctx.ranks = ranks
        ctx.save_for_backward(x_BTC, weight_FC)
        return functional.linear(ranks.enter(x_BTC), weight_FC)

    @staticmethod
    def backward(ctx: Any, dy_BTF: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input slice, summed over ranks, and of this rank's part of the weight."""
        x_BTC, weight_FC = ctx.saved_tensors
        group, ranks, sequence = ctx.ranks.group, ctx.ranks.size, ctx.ranks.sequence
        gathering = comm.start_gather(x_BTC, group) if sequence else None
        dx_BTC = dy_BTF @ weight_FC
        entered = x_BTC if gathering is None else gathering.wait()
        summing = comm.start_reduce_scatter(_in_slices(dx_BTC, ranks), group) if sequence else comm.start_sum_(dx_BTC, group)
        dweight_FC = dy_BTF.flatten(0, 1).T @ entered.flatten(0, 1)
        return summing.wait(), dweight_FC, None


def matrix(rows: int, columns: int, ranks: TensorParallel) -> nn.Parameter:
    """This rank's part of a matrix that ``ranks`` share. The mark makes DeepSpeed's gradient norm count every rank's part."""
    parameter = nn.Parameter(torch.empty(rows, columns))
    if ranks.size > 1:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


class ColumnLinear(nn.Module):
    """x @ weight.T without a bias, each rank making its share of the outputs; the weight is (out / n, in)."""

    def __init__(self, fan_in: int, fan_out: int, ranks: TensorParallel) -> None:
        super().__init__()
        self.ranks = ranks
        self.product: Product = functional.linear  # of a rank that shares its layers with no other
        self.weight = matrix(ranks.share(fan_out), fan_in, ranks)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """The residual stream's slice -> (B, T, out / n)."""
        if self.ranks.size == 1:
            return self.product(x_BTC, self.weight)
        return _EnteredLinear.apply(x_BTC, self.weight, self.ranks)


class RowLinear(nn.Module):
    """x @ weight.T without a bias, each rank summing over its share of the inputs; the weight is (out, in / n)."""

    def __init__(self, fan_in: int, fan_out: int, ranks: TensorParallel) -> None:
        super().__init__()
        self.ranks = ranks
        self.product: Product = functional.linear
        self.weight = matrix(fan_out, ranks.share(fan_in), ranks)

    def forward(self, x_BTC: Tensor, product: Product | None = None) -> Tensor:
        """(B, T, in / n) -> the residual stream's slice; by another product than the layer's own if one is given."""
        return self.ranks.leave((product or self.product)(x_BTC, self.weight))


class VocabularyEmbedding(nn.Module):
    """The tied embedding, each rank holding V / n consecutive rows: looked up at the start, multiplied with at the end."""

    def __init__(self, vocabulary: int, width: int, ranks: TensorParallel) -> None:
        super().__init__()
        self.ranks = ranks
        self.rows = ranks.share(vocabulary)  # ZeRO 3 shows an empty weight between uses
        self.first_row = ranks.rank * self.rows
        self.loss_chunk: int | None = None  # tokens whose logits exist at a time; None leaves it to the operation
        self.weight = matrix(self.rows, width, ranks)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids (int64) -> the residual stream's slice in the weight's dtype. Exact: one rank has the row, the others add 0."""
        if self.ranks.size == 1:
            return functional.embedding(ids_BT, self.weight)
        local_BT = ids_BT - self.first_row
        foreign_BT = (local_BT < 0) | (local_BT >= self.rows)
        rows_BTC = functional.embedding(local_BT.masked_fill(foreign_BT, 0), self.weight)
        return self.ranks.leave(rows_BTC.masked_fill(foreign_BT[..., None], 0.0))

    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """Entered hidden states (B, T, C) -> logits of the whole vocabulary (B, T, V)."""
        return comm.gather_along(functional.linear(hidden_BTC, self.weight), self.ranks.group, hidden_BTC.dim() - 1)

    def cross_entropy(self, hidden_NC: Tensor, labels_N: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
        """Loss of entered hidden states and the number of labels that count, equal on all ranks; see ``linear_cross_entropy``."""
        if self.ranks.size == 1:
            return linear_cross_entropy(hidden_NC, self.weight, labels_N, reduction=reduction, chunk=self.loss_chunk)
        return linear_cross_entropy(
            hidden_NC,
            self.weight,
            labels_N,
            reduction=reduction,
            chunk=self.loss_chunk,
            vocab_start=self.first_row,
            combine=self._combine,
        )

    def _combine(self, own: Statistics) -> Statistics:
        """Softmax statistics over all parts of the vocabulary. All-reduces 3 fp32 a token."""
        largest = own.largest.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.ranks.group)
        sums = torch.stack([own.sum_exp * torch.exp(own.largest - largest), own.target])
        distributed.all_reduce(sums, group=self.ranks.group)
        return Statistics(largest, sums[0], sums[1])
