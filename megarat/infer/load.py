"""``megarat.load``: a checkpoint as a model with a pattern, ready to score and to generate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import megarat.checkpoint.load as checkpoints
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.cache import cache_bytes
from megarat.infer.forward import hidden
from megarat.infer.generate import generate
from megarat.infer.reading import AnySpec, Reading, read_as
from megarat.infer.sampling import GREEDY, Sampling
from megarat.mesh import TENSOR, start
from megarat.model import names
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Patterns, PatternSpec, describe, resolve
from megarat.parallel.tensor import ALONE, TensorParallel


class LoadedModel(nn.Module):
    """A RAT+ model with its default pattern. ``model(ids)`` gives logits, ``model.generate(ids, ...)`` new tokens."""

    def __init__(self, lm: RATPlusLM, patterns: Patterns, checkpoint: Path, adapted_to: Patterns | None = None) -> None:
        super().__init__()
        self.adapted_to = adapted_to  # the pattern an adaptation trained it for
        self.lm = lm
        self.patterns = patterns
        self.checkpoint = checkpoint

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.embedding.weight.device

    def reading(self, spec: AnySpec | None) -> Reading:
        """A pattern, perhaps with top-k blocks (``D=16 + topk blocks=16``), for this model; None is the pattern given at load.

        Warns where an adaptation trained the model for another pattern.
        """
        reading = self._read(spec)
        if self.adapted_to is not None and reading.patterns != self.adapted_to:
            warnings.warn(
                f"{self.checkpoint} was adapted to {describe(self.adapted_to)}, but is read as {reading}",
                UserWarning,
                stacklevel=2,
            )
        return reading

    def forward(self, ids_BT: Tensor, pattern: AnySpec | None = None) -> Tensor:
        """Logits (B, T, V), fp32, on the model's device, of token ids (B, T), int64, on any."""
        reading = self._read(pattern)
        if reading.is_plain:
            return self.lm(self._checked(ids_BT), reading.patterns)
        return self.lm.logits(hidden(self.lm, self._checked(ids_BT), reading))

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        pattern: AnySpec | None = None,
        *,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        stop_id: int | None = None,
    ) -> Tensor:
        """New tokens (B, <= max_new_tokens) after the prompts ``ids`` (B, T), decoded from the sparse cache.

        ``attention_mask`` (B, T) marks real tokens with 1 where prompts are padded on the left or right. See ``megarat.infer.generate``.
        """
        return generate(
            self.lm,
            self._checked(ids),
            max_new_tokens,
            self._read(pattern),
            attention_mask_BT=None if attention_mask is None else attention_mask.to(self.device),
            sampling=sampling,
            stop_id=stop_id,
        )

    def cache_bytes(self, length: int, pattern: AnySpec | None = None) -> int:
        """Bytes of cache one sequence of ``length`` tokens takes, in the dtype of the weights."""
        return cache_bytes(self.config, self._read(pattern), length, self.lm.embedding.weight.dtype)

    def _read(self, spec: AnySpec | None) -> Reading:
        return Reading(self.patterns) if spec is None else read_as(spec, self.config)

    def _checked(self, ids_BT: Tensor) -> Tensor:
        if ids_BT.dim() != 2 or ids_BT.dtype not in (torch.int64, torch.int32):
            raise UserError(f"token ids: expected int64 of shape (batch, length), found {ids_BT.dtype} {tuple(ids_BT.shape)}")
        if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.config.vocab:
            raise UserError(
                f"token ids: found ids from {int(ids_BT.min())} to {int(ids_BT.max())}; the model has 0 to {self.config.vocab - 1}"
            )
        return ids_BT.to(self.device, torch.int64)


def load(
    checkpoint: str | Path,
    pattern: PatternSpec | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    ranks: TensorParallel = ALONE,
) -> LoadedModel:
    """Load a checkpoint for inference, whatever mesh wrote it.

    ``checkpoint`` is a checkpoint folder, or a run folder (its latest one). ``pattern`` is a string such as ``"D=16,W=32,I=4"`` or
    ``"dense"``, or a list of them, one a layer; None takes the pattern the checkpoint was trained for. ``device`` defaults to the GPU if
    there is one, ``dtype`` to bf16 on GPUs and fp32 on CPUs (fp32 weights are the optimizer's masters where the checkpoint has them).
    Where ``ranks`` share the model, each holds its own heads, channels and vocabulary rows only; all make the same calls and get the same
    results. Raises ``UserError`` when there is no whole checkpoint, no such device, the pattern does not fit the model, or the model cannot
    be shared by so many.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch finds no GPU on this machine; use cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = checkpoints.resolve(checkpoint)
    state = checkpoints.load_state(folder)
    patterns = resolve(
        pattern if pattern is not None else state.config.attention.pattern, state.config.model.layers, state.config.model.heads
    )
    _check_shares(state.config.model, ranks.size)
    with torch.device("meta"):
        lm = RATPlusLM(state.config.model, ranks).to(dtype)
    lm = lm.to_empty(device=device).requires_grad_(False).eval()
    weights = checkpoints.StoredWeights(folder, prefer_masters=dtype not in (torch.bfloat16, torch.float16))
    fill_model(lm, weights, str(folder))  # tensor by tensor: a model for the GPU is never whole on the host
    adapted_to = state.config.patterns if state.kind == "adapt" else None
    return LoadedModel(lm, patterns, folder, adapted_to)


def join_ranks(tensor: int, device: str | None) -> tuple[torch.device | None, TensorParallel]:
    """This process' device and the ranks it shares a model with, of ``tensor`` that a launcher started for each model; (None, alone) for 1.

    Raises ``UserError`` where the number of processes is no multiple of ``tensor``.
    """
    if tensor == 1:
        return None, ALONE
    mesh = start(device or "auto", tensor=tensor)
    return mesh.device, TensorParallel(mesh.group(TENSOR))


def _check_shares(model: ModelConfig, ranks: int) -> None:
    widths = {"model.heads": model.heads, "FFN width": model.ffn_multiple * model.hidden, "model.vocab": model.vocab}
    for key, size in widths.items():
        if size % ranks:
            raise UserError(f"--tensor {ranks}: the checkpoint's {key} is {size}, not a multiple; take a divisor of it")


@torch.no_grad()
def fill_model(lm: RATPlusLM, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy logical tensors, or this rank's part of them, into the run-time parameters; every parameter exactly once, or a ``UserError``
    naming the tensor."""
    remaining = set(weights)
    for name, parameter in lm.named_parameters():
        pieces = names.pieces(name, tuple(parameter.shape), lm.ranks.rank, lm.ranks.size)
        for piece, view in zip(pieces, parameter.data.chunk(len(pieces)), strict=True):
            if piece.name not in remaining:
                raise UserError(f"{source}: the tensor {piece.name} is missing")
            remaining.remove(piece.name)
            tensor = weights[piece.name]
            if tensor.shape != piece.whole:
                raise UserError(f"{source}: {piece.name} has shape {tuple(tensor.shape)}; the model needs {piece.whole}")
            view.copy_(piece.of(tensor))
    if remaining:
        raise UserError(f"{source}: tensors the model has no place for: {', '.join(sorted(remaining)[:5])}")


def describe_shape(model: LoadedModel) -> str:
    """The shape of a model in a few words."""
    shape = model.config
    return f"{shape.layers} layers x {shape.hidden}, {shape.heads} heads of {shape.head_dim}"
