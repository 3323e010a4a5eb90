"""RAT+ in plain PyTorch, as one would write it without kernels of one's own: what megarat is compared with.

torch.compile of the block and of the head with its loss (all blocks are one code, compiled once a pass, in a fraction of the time that the
whole model takes), associative_scan for the recurrence (its backward is the same scan from the other end), cuDNN or
Flash attention in the dense pass, two compiled flex_attention calls joined by their log-sum-exps in the sparse pass, masks made once,
fp32 weights under bf16 autocast, fused AdamW, clipping by `clip_grad_norm_`. Same parameters, same order of the two updates.

Shapes: B batch, T length, H heads, K head channels, C = H K, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.phases import Stopwatch
from megarat.config import Config, ModelConfig
from megarat.engine import Update
from megarat.model.pattern import Pattern, Patterns
from megarat.ops.dilated_attention import far_positions, visible
from megarat.ops.rotary import apply_rotary_ref, rotary_tables


def scan(gate: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """s_t = gate_t s_{t-1} + x_t along dim 1, (B, T, C) fp32; from the end when `reverse`."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    mode = "pointwise" if gate.is_cuda else "generic"
    return associative_scan(combine, (gate, x), dim=1, reverse=reverse, combine_mode=mode)[1]


class Scan(torch.autograd.Function):
    """The recurrence with its gradient: the total gradient of s_t runs backwards with the next step's gate."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        state = scan(gate, x, reverse=False)
        ctx.save_for_backward(gate, state)
        return state

    @staticmethod
    def backward(ctx: Any, dstate: Tensor) -> tuple[Tensor, Tensor]:
        gate, state = ctx.saved_tensors
        next_gate = F.pad(gate[:, 1:], (0, 0, 0, 1))
        total = scan(next_gate, dstate.contiguous(), reverse=True)
        return F.pad(state[:, :-1], (0, 0, 1, 0)) * total, total


class SparseAttention:
    """Dilated attention as two flex_attention calls: far keys gathered, the window and the own key; (B, H, T, K).

    flex_attention has no backward on CPUs; there it is torch's own attention under the literal mask.
    """

    def __init__(self, pattern: Pattern, length: int, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        self.mask = None
        if device.type == "cpu":
            positions = torch.arange(length)
            self.mask = visible(positions, positions, pattern)
            return
        window, far = pattern.window, far_positions(length, pattern, device)
        self.far = far
        self.far_blocks = create_block_mask(lambda b, h, i, j: far[j] < i - window, None, None, length, len(far), device=device)
        self.near_blocks = create_block_mask(
            lambda b, h, i, j: (j <= i) & (i - j <= window), None, None, length, length, device=device
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if self.mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        out_far, lse_far = flex_attention(q, k[:, :, self.far], v[:, :, self.far], block_mask=self.far_blocks, return_lse=True)
        out_near, lse_near = flex_attention(q, k, v, block_mask=self.near_blocks, return_lse=True)
        weight = torch.sigmoid(lse_near - lse_far)[..., None].to(q.dtype)
        return out_far * (1 - weight) + out_near * weight


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden
        self.heads, self.eps = config.heads, config.norm_eps
        self.norm1, self.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.in_proj = nn.Linear(width, 5 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, config.ffn_multiple * width, bias=False)
        self.down = nn.Linear(config.ffn_multiple * width, width, bias=False)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, sparse: SparseAttention | None) -> Tensor:
        o, q, k, v, g = self.in_proj(F.rms_norm(x_BTC, x_BTC.shape[-1:], self.norm1, self.eps)).chunk(5, dim=-1)
        gate = torch.sigmoid(g.float())
        state = Scan.apply(gate.repeat(1, 1, 2), (1 - gate).repeat(1, 1, 2) * torch.cat((k, v), dim=-1).float())
        k, v = state.chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        q, k = apply_rotary_ref(q, cos, sin), apply_rotary_ref(k, cos, sin)
        q, k, v = (x.to(o.dtype).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True) if sparse is None else sparse(q, k, v)
        x_BTC = x_BTC + self.out_proj(mixed.transpose(1, 2).flatten(-2) * torch.sigmoid(o))
        return x_BTC + self.down(F.gelu(self.up(F.rms_norm(x_BTC, x_BTC.shape[-1:], self.norm2, self.eps))))


class PlainRATPlus(nn.Module):
    """The whole model, to the loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, cos: Tensor, sin: Tensor, sparse: SparseAttention | None) -> Tensor:
        x_BTC = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, cos, sin, sparse)
        return self.loss(x_BTC, labels_BT)

    def loss(self, x_BTC: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean cross entropy, over all logits at once."""
        x_BTC = F.rms_norm(x_BTC, x_BTC.shape[-1:], self.norm, self.config.norm_eps)
        logits_BTV = F.linear(x_BTC, self.embedding.weight)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())

    def compile_parts(self) -> None:
        """torch.compile of each block and of the loss; what is not one graph is an error."""
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
        self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True)  # type: ignore[method-assign]


class PlainTrainer:
    """Two AdamW updates a pair, as the engine makes them."""

    def __init__(self, config: Config, micro_batches: int, device: torch.device, watch: Stopwatch) -> None:
        self.config, self.device, self.watch = config, device, watch
        self.micro_batches = micro_batches
        with device:
            self.model = PlainRATPlus(config.model)
            positions = torch.arange(config.data.sequence_length, device=device)
        self.rotary = rotary_tables(positions, config.model.head_dim, config.model.rope_base)
        if device.type == "cuda":
            self.model.compile_parts()
        optim = config.optim
        self.adamw = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip
        self.sparse: dict[Pattern, SparseAttention] = {}

    def update(self, micro_batches: Sequence[tuple[Tensor, Tensor]], patterns: Patterns, lr: float) -> Update:
        """One update under one pattern for all layers and heads."""
        sparse = self._attention(patterns[0][0].pattern)
        losses = []
        for ids_BT, labels_BT in micro_batches:
            with (
                self.watch.phase("forward"),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
            ):
                loss = self.model(ids_BT, labels_BT, *self.rotary, sparse)
            with self.watch.phase("backward"):
                (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        with self.watch.phase("update"):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.adamw.zero_grad()
        loss_value, norm_value = torch.stack([torch.stack(losses).mean(), norm]).tolist()
        return Update(loss_value, norm_value, math.isfinite(loss_value) and math.isfinite(norm_value))

    def _attention(self, pattern: Pattern) -> SparseAttention | None:
        if pattern.is_dense:
            return None
        if pattern not in self.sparse:
            self.sparse[pattern] = SparseAttention(pattern, self.config.data.sequence_length, self.device)
        return self.sparse[pattern]
