"""The RAT+ mixer: a gated recurrence over keys and values under dense or dilated attention (arXiv 2602.18196).

    o, q, k, v, g = norm(x) W_in                      one projection, rows in this order
    gate_t = sigmoid(g_t)                             one gate a channel, shared by k and v
    k~_t = gate_t k~_{t-1} + (1 - gate_t) k_t         likewise v~; fp32 state; over the whole sequence
    a_t  = attention(rope(q_t), rope(k~), v~)         over the keys that the pattern leaves visible
    y_t  = (a_t * sigmoid(o_t)) W_out

Without the recurrence (``recurrence=False``) k~ = k and v~ = v: the attention-only baseline, which keeps its output gate.

Shapes: B batch, T length, C width, H heads, K channels of a head (C = H K), R = K / 2 rotary angles.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional

from megarat.model.layers import RMSNorm, made_again
from megarat.model.pattern import LayerPattern
from megarat.ops import ScanState, apply_rotary, dilated_attention, gated_scan, parts
from megarat.parallel.context import WHOLE, ContextParallel
from megarat.parallel.tensor import ALONE, ColumnLinear, RowLinear, TensorParallel


class Projections(NamedTuple):
    """The five heads-split projections of a token, each (B, T, H, K); g is None without the recurrence."""

    o: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None


class RATPlusMixer(nn.Module):
    """Token mixing of one block; (B, T, C) -> (B, T, C), the residual is added by the caller.

    Ranks share the heads: H below is the number of this rank's heads, from ``first_head`` on. The mixing itself is theirs alone, unless ranks
    share the sequence as well (``context``): then T are this rank's tokens, and the scan and the attention reach beyond them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        eps: float,
        recurrence: bool,
        ranks: TensorParallel = ALONE,
        context: ContextParallel = WHOLE,
    ) -> None:
        super().__init__()
        self.context = context
        self.heads = ranks.share(heads)
        self.first_head = ranks.rank * self.heads
        self.head_dim = width // heads
        self.recurrence = recurrence
        self.norm = RMSNorm(width, eps, ranks)
        self.in_proj = ColumnLinear(width, (5 if recurrence else 4) * width, ranks)
        self.out_proj = RowLinear(width, width, ranks)
        self.recompute = False  # the norm once more in the backward, instead of keeping its output

    def forward(
        self,
        x_BTC: Tensor,
        rotary: tuple[Tensor, Tensor],
        pattern: LayerPattern,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Mix a whole sequence from its start; ``rotary`` holds cos and sin of positions 0..T-1, each (T, R).

        Nothing crosses from one document into another where ``document_ids_BT`` (integers) differ.
        """
        return self.mix(self.project(x_BTC), rotary, pattern, document_ids_BT)

    def mix(
        self,
        projections: Projections,
        rotary: tuple[Tensor, Tensor],
        pattern: LayerPattern,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """The same from the input projection on."""
        before = None if projections.g is None else self.context.state_before(projections.k, projections.v, projections.g)
        q, k, v, _ = self.recur(projections, rotary, before, document_ids_BT=document_ids_BT)
        return self.attend(projections.o, q, k, v, pattern, document_ids_BT)

    def project(self, x_BTC: Tensor) -> Projections:
        """Norm and the fused input projection, split."""
        return self.split(self.fused(self.norm(x_BTC), x_BTC))

    def fused(self, normal_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """The fused input projection (B, T, 5 C) of the norm of ``x_BTC``."""
        with made_again(normal_BTC, lambda: self.norm(x_BTC), self.recompute):
            return self.in_proj(normal_BTC)

    def split(self, fused: Tensor) -> Projections:
        """The fused projection as strided views of (B, T, H, K)."""
        pieces = parts(fused, 5 if self.recurrence else 4)
        o, q, k, v, *gate = (piece.unflatten(-1, (self.heads, self.head_dim)) for piece in pieces)
        return Projections(o, q, k, v, gate[0] if gate else None)

    def recur(
        self,
        projections: Projections,
        rotary: tuple[Tensor, Tensor],
        state: ScanState | None = None,
        padding_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, ScanState | None]:
        """Rotated queries, recurred and rotated keys, recurred values, and the state after the last token (None without recurrence).

        Tokens marked in ``padding_BT`` (bool) leave the state untouched: their gate is held at exactly 1.
        """
        _, q, k, v, g = projections
        q = apply_rotary(q, *rotary)
        if g is None:
            return q, apply_rotary(k, *rotary), v, None
        if padding_BT is not None:
            g = g.masked_fill(padding_BT[:, :, None, None], float("inf"))
        starts_BT = None if document_ids_BT is None else document_starts(document_ids_BT)
        k, v, state = gated_scan(k, v, g, *rotary, initial_state=state, document_starts_BT=starts_BT)
        return q, k, v, state

    def attend(
        self,
        o_BTHK: Tensor,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        pattern: LayerPattern,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Attention over the visible keys, output gate and output projection: (B, T, C)."""
        patterns = pattern.per_head[self.first_head : self.first_head + self.heads]
        if self.context.size > 1:
            return self.out_proj(self.context.attend(o_BTHK, q_BTHK, k_BTHK, v_BTHK, patterns).flatten(-2))
        mixed = dilated_attention(q_BTHK, k_BTHK, v_BTHK, patterns, output_gate_BTHK=o_BTHK, document_ids_BT=document_ids_BT)
        return self.out_proj(cast(Tensor, mixed).flatten(-2))


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """True at each token whose document is not that of the token before it; bool (B, T), False at the first."""
    changes_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return functional.pad(changes_BT, (1, 0))
