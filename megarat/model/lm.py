"""The RAT+ language model: embedding, N x (mixer, feed-forward), norm, tied head.

The pattern is an argument of the call: the same weights run dense, dilated, windowed, per layer or per head.

Shapes: B batch, T length, C width, V vocabulary, R rotary angles of a head.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarat import comm
from megarat.config import Config, ModelConfig
from megarat.mesh import CONTEXT, TENSOR, Mesh
from megarat.model import compiled, names
from megarat.model.layers import FeedForward, RMSNorm
from megarat.model.mixer import RATPlusMixer
from megarat.model.pattern import LayerPattern, Patterns, resolve
from megarat.ops import fp8_linear, rotary_tables
from megarat.parallel.context import WHOLE, ContextParallel
from megarat.parallel.fragments import Piece
from megarat.parallel.pipeline import balance, head_cost, layer_costs
from megarat.parallel.tensor import ALONE, ColumnLinear, RowLinear, TensorParallel, VocabularyEmbedding

_DRAWING_THREADS = 8


class Block(nn.Module):
    """Mixer and feed-forward, each pre-norm with its own residual."""

    def __init__(self, config: ModelConfig, ranks: TensorParallel = ALONE, context: ContextParallel = WHOLE) -> None:
        super().__init__()
        self.mixer = RATPlusMixer(config.hidden, config.heads, config.norm_eps, config.recurrence, ranks, context)
        self.ffn = FeedForward(config.hidden, config.ffn_multiple, config.norm_eps, ranks)
        self.eps = config.norm_eps
        self.compiled = False  # see ``megarat.model.compiled``

    @property
    def linears(self) -> tuple[ColumnLinear | RowLinear, ...]:
        """The matrices of this layer."""
        return self.mixer.in_proj, self.mixer.out_proj, self.ffn.up, self.ffn.down

    def forward(
        self,
        x_BTC: Tensor,
        branch_BTC: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        pattern: LayerPattern,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream (B, T, C) and a branch to be added to it -> the same behind this block, whose last addition is still to be made.

        Each addition is left to the norm that follows it, which reads the sum anyway.
        """
        if self.compiled:
            return self._compiled(x_BTC, branch_BTC, rotary, pattern, document_ids_BT)
        if branch_BTC is None:
            normal_BTC = self.mixer.norm(x_BTC)
        else:
            normal_BTC, x_BTC = self.mixer.norm(x_BTC, branch_BTC)
        projections = self.mixer.split(self.mixer.fused(normal_BTC, x_BTC))
        branch_BTC = self.mixer.mix(projections, rotary, pattern, document_ids_BT)
        normal_BTC, x_BTC = self.ffn.norm(x_BTC, branch_BTC)
        return x_BTC, self.ffn.after_norm(normal_BTC, x_BTC)

    def _compiled(
        self,
        x_BTC: Tensor,
        branch_BTC: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        pattern: LayerPattern,
        document_ids_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        mixer, ffn = self.mixer, self.ffn
        x_BTC, fused = compiled.compiled(compiled.enter)(x_BTC, branch_BTC, mixer.norm.weight, mixer.in_proj.weight, self.eps)
        branch_BTC = mixer.mix(mixer.split(fused), rotary, pattern, document_ids_BT)
        return cast(
            "tuple[Tensor, Tensor]",
            compiled.compiled(compiled.feed_forward)(
                x_BTC, branch_BTC, ffn.norm.weight, ffn.up.weight, ffn.down.weight, self.eps
            ),
        )


class RATPlusLM(nn.Module):
    """A RAT+ language model, or its attention-only baseline (``config.recurrence = False``); or this rank's part of it.

    ``ranks`` share every layer, those of ``context`` each sequence; ``stage`` are the layers of a pipeline stage, all of them without
    pipelines. The first stage embeds, the last one norms and holds the head, which is the embedding once more: both keep a copy, trained
    by the sum of their gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: TensorParallel = ALONE,
        context: ContextParallel = WHOLE,
        stage: range | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        self.recompute = False  # whole layers in the backward: 4/3 of the arithmetic, one residual stream a layer kept
        self.config = config
        self.ranks = ranks
        self.stage = range(config.layers) if stage is None else stage
        self.is_first, self.is_last = self.stage.start == 0, self.stage.stop == config.layers
        if self.is_first or self.is_last:
            self.embedding = VocabularyEmbedding(config.vocab, config.hidden, ranks)
        self.layers = nn.ModuleDict({str(layer): Block(config, ranks, context) for layer in self.stage})
        if self.is_last:
            self.norm = RMSNorm(config.hidden, config.norm_eps, ranks)
        self.dense = resolve("dense", config.layers, config.heads)

    @property
    def blocks(self) -> list[Block]:
        """The layers held here, in order."""
        return cast("list[Block]", list(self.layers.values()))

    @property
    def own_heads(self) -> range:
        """The heads of each layer that this rank holds."""
        mixer = self.blocks[0].mixer
        return range(mixer.first_head, mixer.first_head + mixer.heads)

    def forward(
        self,
        ids_BT: Tensor,
        patterns: Patterns | None = None,
        labels_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in fp32 or wider; or, with labels, the mean cross entropy as a scalar.

        ``ids_BT`` and ``labels_BT`` are int64; labels of -100 are ignored (the input token ends a document). ``patterns`` is one
        ``LayerPattern`` a layer (``megarat.model.pattern.resolve``); None is dense. Where ``document_ids_BT`` (integers, equal within
        a document) is given, attention and recurrence stay inside each document; positions, and with them which keys a pattern
        keeps, still count from the start of the sequence.
        """
        hidden_BTC = self.hidden(self.context.own(ids_BT), patterns, document_ids_BT)
        if labels_BT is None:
            return self.logits(hidden_BTC)
        return self.loss(hidden_BTC, self.context.own(labels_BT))

    def hidden(self, ids_BT: Tensor, patterns: Patterns | None = None, document_ids_BT: Tensor | None = None) -> Tensor:
        """Final normed hidden states (B, T, C) in the dtype of the matrices."""
        return self.run_stage(self.embed(ids_BT), patterns, document_ids_BT)

    def run_stage(self, x_BTC: Tensor, patterns: Patterns | None = None, document_ids_BT: Tensor | None = None) -> Tensor:
        """This stage's layers on the residual stream (B, T, C), with sequence parallelism (B, T / n, C); the last stage also norms.

        ``patterns`` are those of the whole model.
        """
        length = x_BTC.shape[1] * (self.ranks.size if self.ranks.sequence else 1)
        rotary = self.rotary(self.context.rank * length + torch.arange(length, device=x_BTC.device))
        own_patterns = (patterns or self.dense)[self.stage.start : self.stage.stop]
        branch_BTC = None
        for block, pattern in zip(self.blocks, own_patterns, strict=True):
            run = _recomputing(block) if self.recompute and torch.is_grad_enabled() else block
            x_BTC, branch_BTC = run(x_BTC, branch_BTC, rotary, pattern, document_ids_BT)
        assert branch_BTC is not None, "a stage without layers"
        if not self.is_last:
            return x_BTC + branch_BTC
        normal_BTC, _ = self.norm(x_BTC, branch_BTC)
        return self.ranks.enter(normal_BTC)

    def loss(self, hidden_BTC: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean cross entropy of final hidden states, a scalar; of ranks that share sequences, such that their mean is that of all tokens."""
        if self.context.size == 1:
            return self.embedding.cross_entropy(hidden_BTC.flatten(0, 1), labels_BT.flatten())[0]
        total, count = self.embedding.cross_entropy(hidden_BTC.flatten(0, 1), labels_BT.flatten(), reduction="sum")
        everyones_count = comm.summed(count, self.context.group)
        return total * self.context.size / everyones_count.clamp_min(1)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The start of the residual stream, (B, T, C); fp32 unless the config says otherwise (or the weights are wider)."""
        x_BTC = self.embedding(ids_BT)
        narrow = x_BTC.dtype in (torch.bfloat16, torch.float16)
        return x_BTC.float() if narrow and self.config.residual_dtype == "fp32" else x_BTC

    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """Tied head: (B, T, C) -> (B, T, V), returned in fp32 (fp64 for an fp64 model)."""
        logits = self.embedding.logits(hidden_BTC)
        return logits if logits.dtype == torch.float64 else logits.float()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the given positions, (..., R); fp32, or fp64 for an fp64 model."""
        dtype = torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32
        return rotary_tables(positions, self.config.head_dim, self.config.rope_base, dtype)

    @torch.no_grad()
    def initialise(self, seed: int) -> RATPlusLM:
        """Matrices ~ N(0, init_std^2) without depth scaling, norms 1.

        Each logical matrix (o, q, k, v and g apart) is drawn from a generator seeded by (seed, its name), so the initial weights do not
        depend on the mesh or on what else a process holds.
        """
        pieces: list[Piece] = []
        parts: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            rows = names.pieces(name, parameter.shape, self.ranks.rank, self.ranks.size)
            pieces += rows
            parts += parameter.data.chunk(len(rows))
        draw = functools.partial(_draw, seed=seed, std=self.config.init_std)
        with ThreadPoolExecutor(_DRAWING_THREADS) as threads:  # a generator draws with one thread: 1.5B numbers take 16 s
            list(threads.map(draw, pieces, parts))
        return self


def _draw(piece: Piece, part: Tensor, seed: int, std: float) -> None:
    """Fill this rank's ``part`` of a logical matrix."""
    generator = torch.Generator().manual_seed(_name_seed(seed, piece.name))
    part.copy_(piece.of(torch.randn(piece.whole, generator=generator)) * std)


def _recomputing(block: Block) -> Callable[..., tuple[Tensor, Tensor]]:
    """The layer, of which only the inputs are kept for the backward (there are no random numbers to draw again)."""
    return functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)


def local_model(config: Config, mesh: Mesh) -> RATPlusLM:
    """This rank's part of a run's model, its weights not yet made."""
    stages = balance(layer_costs(config), head_cost(config), mesh.shape.pipeline)
    ranks = TensorParallel(mesh.group(TENSOR), config.parallel.sequence)
    model = RATPlusLM(config.model, ranks, ContextParallel(mesh.group(CONTEXT)), stages[mesh.place.pipeline])
    model.recompute = config.parallel.recompute == "full"
    for block in model.blocks:
        block.mixer.recompute = block.ffn.recompute = config.parallel.recompute == "selective"
        block.ffn.fused_gelu = config.train.fused_gelu
        block.compiled = config.train.compile
        if config.train.fp8:
            for linear in block.linears:
                linear.product = fp8_linear
    if config.train.loss_chunk and model.is_last:
        model.embedding.loss_chunk = config.train.loss_chunk
    return model


def _name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")
