"""Context parallelism: ranks share each sequence, consecutive tokens each.

Only two things look beyond a rank's own tokens. The recurrence needs the state that the tokens before them leave behind: each rank
sums its segment up as s -> A s + H, with A the product of its gates and H its last state from an empty start, all ranks gather these
summaries (3 fp32 a channel and a segment, whatever its length) and fold those before their own. Attention needs other tokens' keys and values:
an all-to-all gives each rank the whole sequence of a part of its heads, and another one brings the result back.

Shapes: B batch, T tokens of a sequence, H heads, K head channels; n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megarat import comm
from megarat.ops import ScanState, gated_scan
from megarat.ops.gated_scan import state_dtype

_SEQUENCE_DIM, _HEADS_DIM = 1, 2


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share each sequence; without a group, this process alone."""

    group: ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks that share each sequence."""
        return comm.size(self.group)

    @property
    def rank(self) -> int:
        """This rank among them."""
        return comm.rank(self.group)

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

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, T / n, H, K) of all heads -> (B, T, H / n, K) of whole sequences, in one exchange."""
        if self.size == 1:
            return tensors
        joined = comm.swap_slices(torch.cat(tensors, dim=-1), self.group, _HEADS_DIM, _SEQUENCE_DIM)
        return joined.chunk(len(tensors), dim=-1)

    def to_tokens(self, x_BTHK: Tensor) -> Tensor:
        """The reverse."""
        return comm.swap_slices(x_BTHK, self.group, _SEQUENCE_DIM, _HEADS_DIM)


WHOLE = ContextParallel()
