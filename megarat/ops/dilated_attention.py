"""Dilated attention of RAT+ (arXiv 2602.18196): every query sees itself, a window, some initial tokens and every D-th token.

Query i sees key j iff j <= i and ( i - j <= W  or  j < I  or  (D != -1 and (j + 1) mod D == 0) ), for a pattern (D, W, I). D = 1 is
dense causal attention, D = -1 has no dilated part, and a query always sees its own key.

Shapes: B batch, T length, H heads, K head channels, F far keys. The sparse paths rest on a split of the visible keys into disjoint
ranges, each a function of i alone. With lo = max(0, i - W) and n0 = I // D:

    local    [lo, i]
    initial  [0, min(I, lo))
    dilated  (n0 + c + 1) D - 1   for 0 <= c < max(0, lo // D - n0)

The initial and the dilated keys at or behind position I are packed into one *far buffer*; slot f of it is at `far_positions[f]` and
is visible to query i iff that position is below lo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor

from megarat.ops.dispatch import choose_backend
from megarat.ops.output_gate import output_gate

PatternLike = Sequence[int]


def visible(q_positions: Tensor, k_positions: Tensor, pattern: PatternLike) -> Tensor:
    """The mask rule itself: bool (..., Q, K) for integer positions (..., Q) and (..., K)."""
    dilation, window, initial = check_pattern(pattern)
    i, j = q_positions[..., :, None], k_positions[..., None, :]
    seen = (i - j <= window) | (j < initial)
    if dilation != -1:
        seen = seen | ((j + 1) % dilation == 0)
    return seen & (j <= i)


def check_pattern(pattern: PatternLike) -> tuple[int, int, int]:
    """(D, W, I) as plain integers, or ValueError."""
    dilation, window, initial = (int(part) for part in pattern)
    if dilation < 1 and dilation != -1:
        raise ValueError(f"pattern {tuple(pattern)}: dilation {dilation} is neither positive nor -1 (no dilated part)")
    if window < 0 or initial < 0:
        raise ValueError(f"pattern {tuple(pattern)}: window {window} and initial {initial} must not be negative")
    return dilation, window, initial


def far_positions(length: int, pattern: PatternLike, device: torch.device | str = "cpu") -> Tensor:
    """Positions (F,) of the far buffer of a sequence: the initial tokens, then every dilated one at or behind position I."""
    dilation, _, initial = check_pattern(pattern)
    first = torch.arange(min(initial, length), device=device)
    if dilation == -1:
        return first
    first_dilated = min((initial // dilation + 1) * dilation - 1, length)
    return torch.cat((first, torch.arange(first_dilated, length, dilation, device=device)))


def dilated_attention_ref(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    pattern: PatternLike,
    *,
    scale: float | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, by the literal mask over all T x T scores, in the inputs' dtype: the oracle. Returns out_BTHK, lse_BTH."""
    positions = torch.arange(q_BTHK.shape[1], device=q_BTHK.device)
    hidden_B1TT = ~visible(positions, positions, pattern)[None, None]
    if document_ids_BT is not None:
        hidden_B1TT = hidden_B1TT | (document_ids_BT[:, None, :, None] != document_ids_BT[:, None, None, :])
    scores_BHTT = torch.einsum("bihk,bjhk->bhij", q_BTHK, k_BTHK) * (q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
    scores_BHTT = scores_BHTT.masked_fill(hidden_B1TT, -math.inf)
    out_BTHK = torch.einsum("bhij,bjhk->bihk", scores_BHTT.softmax(dim=-1), v_BTHK)
    return out_BTHK, scores_BHTT.logsumexp(dim=-1).transpose(1, 2)


# --- the torch paths ----------------------------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores and softmax."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _attend_far_and_self(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, pattern: PatternLike, scale: float, document_ids_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W = 0: one softmax over [far | self], O(T F) instead of O(T T). Scores and softmax in fp32 (float64 for float64)."""
    far_F = far_positions(q_BTHK.shape[1], pattern, q_BTHK.device)
    k_far_BFHK, v_far_BFHK = k_BTHK[:, far_F], v_BTHK[:, far_F]
    hidden_11TF = (far_F[None, :] >= torch.arange(q_BTHK.shape[1], device=q_BTHK.device)[:, None])[None, None]
    if document_ids_BT is not None:
        hidden_11TF = hidden_11TF | (document_ids_BT[:, None, :, None] != document_ids_BT[:, far_F][:, None, None, :])
    compute = _compute_dtype(q_BTHK)
    q_BTHK = q_BTHK.to(compute)
    scores_BHTF = torch.einsum("bthk,bfhk->bhtf", q_BTHK, k_far_BFHK.to(compute)) * scale
    own_BHT1 = ((q_BTHK * k_BTHK.to(compute)).sum(dim=-1) * scale).transpose(1, 2)[..., None]
    scores_BHTS = torch.cat((scores_BHTF.masked_fill(hidden_11TF, -math.inf), own_BHT1), dim=-1)
    weights_BHTS = scores_BHTS.softmax(dim=-1).to(v_BTHK.dtype)
    out_BTHK = torch.einsum("bhtf,bfhk->bthk", weights_BHTS[..., :-1], v_far_BFHK)
    out_BTHK = out_BTHK + weights_BHTS[..., -1:].transpose(1, 2) * v_BTHK
    return out_BTHK, scores_BHTS.logsumexp(dim=-1).transpose(1, 2)


def _attend_sdpa(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, pattern: PatternLike, scale: float, document_ids_BT: Tensor | None
) -> Tensor:
    """Torch's own attention: causal where the pattern is dense, with the explicit mask where a window or documents ask for it."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if is_dense(pattern, q_BTHK.shape[1]) and document_ids_BT is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    positions = torch.arange(q_BTHK.shape[1], device=q_BTHK.device)
    mask_B1TT = visible(positions, positions, pattern)[None, None]
    if document_ids_BT is not None:
        mask_B1TT = mask_B1TT & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT, scale=scale).transpose(1, 2)


def document_runs(document_ids_BT: Tensor) -> Tensor:
    """Documents are runs of equal ids: the number of each token's run, so that an id that comes back is another document."""
    changes_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return F.pad(changes_BT.cumsum(dim=1), (1, 0))


def document_start_positions(document_ids_BT: Tensor) -> Tensor:
    """The position at which each token's run of equal ids starts, int32."""
    changes_BT = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    positions_T = torch.arange(1, document_ids_BT.shape[1], dtype=torch.int32, device=document_ids_BT.device)
    return F.pad(torch.where(changes_BT, positions_T, 0), (1, 0)).cummax(dim=1).values.contiguous()


def is_dense(pattern: PatternLike, length: int) -> bool:
    """Whether every query of a sequence of this length sees all keys up to its own."""
    dilation, window, initial = check_pattern(pattern)
    return dilation == 1 or window >= length - 1 or initial >= length - 1


def dense_backend(device: torch.device, dtype: torch.dtype, length: int, head_dim: int) -> str:
    """Which of torch's attentions a dense causal pattern takes in training: "cuDNN", "Flash", "efficient" or "math"."""
    q = torch.empty(1, 1, length, head_dim, dtype=dtype, device=device, requires_grad=True)
    choice = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True))
    names = {"CUDNN_ATTENTION": "cuDNN", "FLASH_ATTENTION": "Flash", "EFFICIENT_ATTENTION": "efficient", "MATH": "math"}
    return names.get(choice.name, choice.name)


def _attend_torch(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, pattern: PatternLike, scale: float, lse: bool, document_ids_BT: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if pattern[1] == 0 and not is_dense(pattern, q_BTHK.shape[1]):
        return _attend_far_and_self(q_BTHK, k_BTHK, v_BTHK, pattern, scale, document_ids_BT)
    if lse:  # torch's own attention has none
        q, k, v = (x.to(_compute_dtype(x)) for x in (q_BTHK, k_BTHK, v_BTHK))
        out_BTHK, lse_BTH = dilated_attention_ref(q, k, v, pattern, scale=scale, document_ids_BT=document_ids_BT)
        return out_BTHK.to(q_BTHK.dtype), lse_BTH
    return _attend_sdpa(q_BTHK, k_BTHK, v_BTHK, pattern, scale, document_ids_BT), None


def dilated_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    pattern: PatternLike | Sequence[PatternLike],
    *,
    scale: float | None = None,
    output_gate_BTHK: Tensor | None = None,
    return_lse: bool = False,
    document_ids_BT: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys a pattern shows, differentiable in q, k, v and the gate.

    q, k, v: (B, T, H, K), one float dtype; any strides with a contiguous last dimension.
    pattern: (D, W, I) for all heads, or a sequence of H of them; heads of equal pattern run together.
    scale: of the scores, K ** -0.5 by default. output_gate_BTHK: if given, the result is multiplied by its sigmoid.
    document_ids_BT: integers, equal within a document; keys of another document than the query's are invisible.
    backend: "triton", "reference" or None to choose (see ops.dispatch). A dense pattern without documents takes torch's own attention,
    unless the log-sum-exp is asked for.

    Returns out_BTHK in q's dtype, and with return_lse also the log-sum-exp of the visible scaled scores, (B, T, H) fp32 (float64
    for float64 inputs).
    """
    _check(q_BTHK, k_BTHK, v_BTHK, output_gate_BTHK, document_ids_BT)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    unsupported = _unsupported(q_BTHK, k_BTHK, v_BTHK, output_gate_BTHK, scale)
    kernels = choose_backend("dilated_attention", backend, q_BTHK, unsupported) == "triton"
    starts_BT = document_start_positions(document_ids_BT) if kernels and document_ids_BT is not None else None
    groups = group_heads(pattern, q_BTHK.shape[2])
    parts: list[tuple[Tensor, Tensor | None]] = []
    for one_pattern, heads in groups:
        q, k, v = (_take_heads(x, heads) for x in (q_BTHK, k_BTHK, v_BTHK))
        gate = None if output_gate_BTHK is None else _take_heads(output_gate_BTHK, heads)
        if kernels and (return_lse or starts_BT is not None or not is_dense(one_pattern, q.shape[1])):
            parts.append(_attend_triton(q, k, v, gate, starts_BT, one_pattern, scale))
        else:
            runs_BT = None if document_ids_BT is None else document_runs(document_ids_BT)
            out, lse = _attend_torch(q, k, v, one_pattern, scale, return_lse, runs_BT)
            parts.append((out if gate is None else output_gate(out, gate, backend=backend), lse))
    order = [head for _, heads in groups for head in heads]
    out_BTHK = _restore_heads([out for out, _ in parts], order)
    if not return_lse:
        return out_BTHK
    return out_BTHK, _restore_heads([lse for _, lse in parts if lse is not None], order)


def _attend_triton(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    gate_BTHK: Tensor | None,
    starts_BT: Tensor | None,
    pattern: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    from megarat.ops.kernels.dilated_attention import DilatedAttention

    if is_dense(pattern, q_BTHK.shape[1]):
        pattern = (-1, q_BTHK.shape[1], 0)  # as one window, whose keys' gradients need no partial sums
    out_BTHK, lse_BHT = DilatedAttention.apply(q_BTHK, k_BTHK, v_BTHK, gate_BTHK, starts_BT, pattern, scale)
    return out_BTHK, lse_BHT.transpose(1, 2)


def _check(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, gate_BTHK: Tensor | None, document_ids_BT: Tensor | None) -> None:
    others = (k_BTHK, v_BTHK) if gate_BTHK is None else (k_BTHK, v_BTHK, gate_BTHK)
    if q_BTHK.dim() != 4 or any(x.shape != q_BTHK.shape for x in others):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BTHK, *others))
        raise ValueError(f"dilated_attention: q, k, v and the output gate must share one shape (B, T, H, K); got {shapes}")
    if q_BTHK.shape[1] == 0:
        raise ValueError("dilated_attention: the sequence is empty (T = 0)")
    if document_ids_BT is not None and document_ids_BT.shape != q_BTHK.shape[:2]:
        raise ValueError(
            f"dilated_attention: document ids of shape {tuple(document_ids_BT.shape)} for inputs of shape {tuple(q_BTHK.shape)}"
        )


def _unsupported(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, gate_BTHK: Tensor | None, scale: float) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if not q_BTHK.dtype == k_BTHK.dtype == v_BTHK.dtype or q_BTHK.dtype == torch.float64:
        return f"the inputs are {q_BTHK.dtype}, {k_BTHK.dtype} and {v_BTHK.dtype}"
    if q_BTHK.shape[-1] not in (16, 32, 64, 128):
        return f"the head size {q_BTHK.shape[-1]} is none of 16, 32, 64 and 128"
    if any(x is not None and x.stride(-1) != 1 for x in (q_BTHK, k_BTHK, v_BTHK, gate_BTHK)):
        return "the channels of an input are not contiguous"
    if scale <= 0:
        return f"the scale {scale} is not positive"
    return None


def group_heads(pattern: PatternLike | Sequence[PatternLike], heads: int) -> list[tuple[tuple[int, int, int], list[int]]]:
    """[(pattern, its heads)] in order of first appearance."""
    if isinstance(pattern[0], int):
        return [(check_pattern(pattern), list(range(heads)))]  # type: ignore[arg-type]
    if len(pattern) != heads:
        raise ValueError(f"dilated_attention: {len(pattern)} patterns for {heads} heads")
    groups: dict[tuple[int, int, int], list[int]] = {}
    for head, one_pattern in enumerate(pattern):
        groups.setdefault(check_pattern(one_pattern), []).append(head)  # type: ignore[arg-type]
    return list(groups.items())


def _take_heads(x_BTHK: Tensor, heads: list[int]) -> Tensor:
    if len(heads) == x_BTHK.shape[2]:
        return x_BTHK
    if heads == list(range(heads[0], heads[-1] + 1)):
        return x_BTHK[:, :, heads[0] : heads[-1] + 1]
    return x_BTHK[:, :, heads]


def _restore_heads(parts: list[Tensor], order: list[int]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    x_BTH = torch.cat(parts, dim=2)
    if order == sorted(order):
        return x_BTH
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x_BTH[:, :, inverse]
