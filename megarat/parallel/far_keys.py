"""Sparse attention over sequences that ranks share: what travels is the far keys and a window's worth of tokens, not whole heads.

A rank's queries see, beyond its own tokens, the far keys of the ranks before it (initial tokens and every D-th one, gathered from all)
and the last W tokens of its neighbour (the halo). These keys are put in front of the rank's own such that the mask rule itself shows each
query what it sees in the whole sequence, and the same attention runs on this much shorter one:

    position   0 ... F-2       F-1 ... P'-1     P' ...             P ...
    key        far keys        padding, last    halo, from h0 on   own tokens, from s on
               of before h0    far key at P'-1

with s the first own token, h0 = s - halo, the halo W rounded up to whole strides of D, and P' the F far keys rounded up likewise. Because
s, h0, P and P' are multiples of D, dilated tokens stay dilated; the far keys count as initial tokens (I = F-1) and the last one as a
dilated token; padding is neither, and too far away for a window. Queries of the positions before P are zeros whose results are cut off.

Shapes: B batch, T length, H heads, K head channels; n ranks, S = T / n own tokens; leading 2: keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megarat import comm
from megarat.model.pattern import Pattern
from megarat.ops import dilated_attention

_TOKENS = 2  # dim of (2, B, S, H, K)


def can_exchange(pattern: Pattern, own_tokens: int) -> bool:
    """Whether a segment of ``own_tokens`` has room for it: whole strides, the halo within one neighbour, initial tokens before its halo."""
    fits = own_tokens % _stride(pattern) == 0 and pattern.initial + _halo(pattern) <= own_tokens
    return fits and not pattern.is_dense


def attend(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, pattern: Pattern, group: ProcessGroup) -> Tensor:
    """Attention of this rank's queries over the visible keys of the whole sequence, (B, S, H, K); differentiable.

    Sends (I + S / D) (n - 1) + halo keys and values a head. ``pattern`` must pass ``can_exchange``.
    """
    own = torch.stack((k_BSHK, v_BSHK))
    far, halo = _far_before(own, pattern, group), _halo_before(own, pattern, group)
    first, stride = far[:, :, :-1], _stride(pattern)
    padding = far.new_zeros(*far.shape[:_TOKENS], -far.shape[_TOKENS] % stride, *far.shape[_TOKENS + 1 :])
    k_BTHK, v_BTHK = torch.cat((first, padding, far[:, :, -1:], halo, own), _TOKENS)
    before = k_BTHK.shape[1] - q_BSHK.shape[1]
    q_BTHK = functional.pad(q_BSHK, (0, 0, 0, 0, before, 0))
    as_initial = first.shape[_TOKENS] if pattern.dilation > 0 else far.shape[_TOKENS]
    rule = pattern if comm.rank(group) == 0 else pattern._replace(initial=as_initial)
    out_BTHK = dilated_attention(q_BTHK, k_BTHK, v_BTHK, rule)
    assert isinstance(out_BTHK, Tensor)
    return out_BTHK[:, before:]


def _stride(pattern: Pattern) -> int:
    """Positions must keep their number modulo this."""
    return max(1, pattern.dilation)


def _halo(pattern: Pattern) -> int:
    return -(-pattern.window // _stride(pattern)) * _stride(pattern)


def _far_before(own: Tensor, pattern: Pattern, group: ProcessGroup) -> Tensor:
    """Far keys and values in front of this rank's halo, in order; none on the first rank (which still takes part in the gather)."""
    initial, dilation = own[:, :, : pattern.initial], pattern.dilation
    dilated = own[:, :, dilation - 1 :: dilation] if dilation > 0 else own[:, :, :0]
    sent = torch.cat((initial, dilated), _TOKENS)
    everyones = comm.gather_along(sent, group, _TOKENS).unflatten(_TOKENS, (comm.size(group), -1))
    if comm.rank(group) == 0:
        return everyones[:, :, 0, :0]
    all_initial = everyones[:, :, 0, : pattern.initial]
    if dilation < 0:
        return all_initial
    all_dilated = everyones[:, :, :, pattern.initial :].flatten(_TOKENS, _TOKENS + 1)
    end = comm.rank(group) * own.shape[_TOKENS] - _halo(pattern)
    return torch.cat((all_initial, all_dilated[:, :, pattern.initial // dilation : end // dilation]), _TOKENS)


def _halo_before(own: Tensor, pattern: Pattern, group: ProcessGroup) -> Tensor:
    """The tokens of the rank before this one that a window reaches; none on the first rank."""
    length = _halo(pattern)
    if length == 0:
        return own[:, :, :0]
    halo = comm.to_next(own[:, :, own.shape[_TOKENS] - length :], group)
    return halo[:, :, : length if comm.rank(group) else 0]
