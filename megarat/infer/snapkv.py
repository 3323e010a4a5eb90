"""SnapKV (arXiv 2404.14469) as a policy of the cache: of a long prompt only the keys stay that its last queries looked at.

When a prompt has been read, each head keeps ``size`` of its keys: the last ``window`` ones, whose queries observe, and of those before them the
ones with the most attention from the observing queries, summed over these and smoothed by a maximum over ``pool`` neighbours. A prompt of at most
``size`` tokens stays whole. Every token of the answer is kept, up to ``answer`` of them. So a sequence takes ``size + answer`` slots, however
long its prompt; while one is read, all its keys are there.

Shapes: B sequences, T positions of the prompts, W observing queries, H heads, K head channels, S kept keys.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megarat.errors import UserError


class SnapKV(NamedTuple):
    """Keys a head keeps of a prompt, observing queries, width of the smoothing, and room for the answer."""

    size: int = 1024
    window: int = 64
    pool: int = 7
    answer: int = 512

    @classmethod
    def parse(cls, text: str) -> SnapKV:
        """Read ``size=1024,window=64,pool=7,answer=512``; any may be left out. Raises ``UserError``."""
        how = "write for example 'dense + snapkv size=1024,window=64,pool=7,answer=512'"
        values: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in cls._fields or key in values or not re.fullmatch(r"[0-9]{1,9}", value):
                raise UserError(f"snapkv {text.strip()!r}: cannot read {part!r}; {how}")
            values[key] = int(value)
        parsed = cls(**values)
        if not 1 <= parsed.window < parsed.size or parsed.pool % 2 == 0 or parsed.answer < 1:
            raise UserError(f"snapkv {text.strip()!r}: needs 1 <= window < size, an odd pool and answer >= 1; {how}")
        return parsed

    def slots(self, length: int) -> int:
        """Slots of a head for a sequence of at most ``length`` tokens."""
        return min(length, self.size + self.answer)

    def __str__(self) -> str:
        return f"snapkv size={self.size},window={self.window},pool={self.pool},answer={self.answer}"


def observing(q_BTHK: Tensor, start: int, lengths_B: Tensor, window: int, before_BWHK: Tensor | None) -> Tensor:
    """The last ``window`` queries of each prompt (B, W, H, K), as far as a chunk from position ``start`` on has them; ``before`` has the rest.

    A prompt shorter than the window has queries at no position in front; they stay what they are and are never looked at.
    """
    positions_BW = lengths_B[:, None] - window + torch.arange(window, device=q_BTHK.device)
    here_BW11 = ((positions_BW >= start) & (positions_BW < start + q_BTHK.shape[1]))[..., None, None]
    index_BW11 = (positions_BW - start).clamp(0, q_BTHK.shape[1] - 1)[..., None, None]
    found_BWHK = q_BTHK.gather(1, index_BW11.expand(-1, -1, *q_BTHK.shape[2:]))
    return found_BWHK if before_BWHK is None else torch.where(here_BW11, found_BWHK, before_BWHK)


def keys_to_keep(q_BWHK: Tensor, k_BHTK: Tensor, lengths_B: Tensor, policy: SnapKV) -> Tensor:
    """Positions (B, H, S) of the keys that stay, ascending, S = min(``size``, T); behind a shorter prompt's own follow ones that mean nothing."""
    compute = torch.float64 if k_BHTK.dtype == torch.float64 else torch.float32
    keys_T = torch.arange(k_BHTK.shape[2], device=k_BHTK.device)
    positions_BW = lengths_B[:, None] - policy.window + torch.arange(policy.window, device=k_BHTK.device)
    scores_BHWT = torch.einsum("bwhk,bhtk->bhwt", q_BWHK.to(compute), k_BHTK.to(compute)) * k_BHTK.shape[-1] ** -0.5
    unseen_B1WT = (keys_T > positions_BW[..., None])[:, None]
    weights_BHWT = (
        scores_BHWT.masked_fill(unseen_B1WT, -math.inf).softmax(dim=-1).nan_to_num(0.0)
    )  # queries before the start see none
    in_front_B1T = (keys_T < lengths_B[:, None] - policy.window)[:, None]
    attention_BHT = weights_BHWT.sum(dim=2).masked_fill(~in_front_B1T, 0.0)
    smooth_BHT = functional.max_pool1d(attention_BHT, policy.pool, stride=1, padding=policy.pool // 2)
    real_B1T = (keys_T < lengths_B[:, None])[:, None]
    worth_BHT = torch.where(in_front_B1T, smooth_BHT, torch.where(real_B1T, math.inf, -math.inf))
    return worth_BHT.topk(min(policy.size, len(keys_T)), dim=-1).indices.sort(dim=-1).values
