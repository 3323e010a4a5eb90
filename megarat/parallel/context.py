"""Context parallelism: ranks share each sequence, consecutive tokens each.

Only two things look beyond a rank's own tokens. The recurrence needs the state that the tokens before them leave behind: each rank
sums its segment up as s -> A s + H, with A the product of its gates and H its last state from an empty start, all ranks gather these
summaries (3 fp32 a channel and a segment, whatever its length) and fold those before their own. Attention needs other tokens' keys and
values: under sparse patterns those that it sees are sent (``megarat.parallel.far_keys``); under dense ones an all-to-all gives each rank
the whole sequence of a part of its heads, and another one brings the result back.

Shapes: B batch, T tokens of a sequence, H heads, K head channels; n ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megarat import comm
from megarat.model.pattern import LayerPattern, Pattern
from megarat.ops import ScanState, dilated_attention, gated_scan, output_gate
from megarat.ops.gated_scan import state_dtype
from megarat.parallel import far_keys

_SEQUENCE_DIM, _HEADS_DIM = 1, 2


@dataclass(frozen=True)
class ContextParallel(comm.Ranks):
    """The ranks that share each sequence."""

    def own(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of whole sequences: (B, T) -> (B, T / n)."""
        return x_BT.chunk(self.size, _SEQUENCE_DIM)[self.rank]

    def state_before(self, k_BTHK: Tensor, v_BTHK: Tensor, g_BTHK: Tensor) -> ScanState | None:
        """The state of the recurrence in front of this rank's tokens, differentiable; None at size one. Gathers 3 B H K numbers a rank."""
        if self.size == 1:
            return None
        _, _, last = gated_scan(k_BTHK, v_BTHK, g_BTHK)
        decay_BHK = torch.exp(functional.logsigmoid(g_BTHK.to(state_dtype(g_BTHK.dtype))).sum(_SEQUENCE_DIM))
        summary_13BHK = torch.stack([decay_BHK, last.k_BHK, last.v_BHK])[None]
        decays, keys, values = comm.gather_along(summary_13BHK, self.group, 0).unbind(1)
        # Every rank computes the states in front of all segments, so that all take part in the gather's backward.
        return ScanState(self._fold(decays, keys), self._fold(decays, values))

    def _fold(self, decays: Tensor, lasts: Tensor) -> Tensor:
        """The state in front of this rank's segment, from all ranks' (n, B, H, K)."""
        before = [torch.zeros_like(lasts[0])]
        for decay_BHK, last_BHK in zip(decays[:-1], lasts[:-1], strict=True):
            before.append(decay_BHK * before[-1] + last_BHK)
        return torch.stack(before)[self.rank]

    def attend(self, o_BTHK: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, patterns: Sequence[Pattern]) -> Tensor:
        """Gated attention of this rank's tokens over whole sequences, (B, T / n, H, K); ``patterns`` has one entry a head."""
        assert self.group is not None
        if not all(far_keys.can_exchange(pattern, q_BTHK.shape[_SEQUENCE_DIM]) for pattern in patterns):
            return self._attend_by_heads(o_BTHK, q_BTHK, k_BTHK, v_BTHK, patterns)
        groups = LayerPattern.of(patterns)
        if len(groups) == 1:
            return output_gate(far_keys.attend(q_BTHK, k_BTHK, v_BTHK, groups[0].pattern, self.group), o_BTHK)
        parts = [
            far_keys.attend(q_BTHK[:, :, heads], k_BTHK[:, :, heads], v_BTHK[:, :, heads], pattern, self.group)
            for pattern, heads in groups
        ]
        order = torch.tensor([head for _, heads in groups for head in heads]).argsort()
        return output_gate(torch.cat(parts, _HEADS_DIM)[:, :, order.tolist()], o_BTHK)

    def _attend_by_heads(
        self, o_BTHK: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, patterns: Sequence[Pattern]
    ) -> Tensor:
        """The same on whole sequences of H / n heads."""
        joined = torch.cat((o_BTHK, q_BTHK, k_BTHK, v_BTHK), dim=-1)
        o, q, k, v = comm.swap_slices(joined, self.group, _HEADS_DIM, _SEQUENCE_DIM).chunk(4, dim=-1)
        first = self.rank * q.shape[_HEADS_DIM]
        mixed = dilated_attention(q, k, v, patterns[first : first + q.shape[_HEADS_DIM]], output_gate_BTHK=o)
        assert isinstance(mixed, Tensor)
        return comm.swap_slices(mixed, self.group, _SEQUENCE_DIM, _HEADS_DIM)


WHOLE = ContextParallel()
