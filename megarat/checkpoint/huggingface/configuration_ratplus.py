"""Configuration of RAT+ language models for transformers, and the notation of attention patterns.

RAT+ (arXiv 2602.18196): an elementwise gated average of keys and values under dense, dilated or windowed attention. One set of weights, many
patterns. A pattern is (D, W, I); the query at position i sees the key at position j <= i if

    i - j <= W   or   j < I   or   (D != -1 and (j + 1) mod D == 0)

written ``D=16,W=256,I=4``, or ``dense`` for D = 1. D = -1 has no dilated keys. Self-contained: needs transformers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig


class Pattern(NamedTuple):
    """Dilation D (1 = dense, -1 = no dilated keys), local window W (previous tokens beside the query itself) and initial tokens I."""

    dilation: int = 1
    window: int = 0
    initial: int = 0


class HeadGroup(NamedTuple):
    """Heads of one layer that share a pattern."""

    pattern: Pattern
    heads: tuple[int, ...]


def parse_pattern(text: Any) -> Pattern:
    """``dense`` or ``D=16,W=256,I=4`` (W and I default to 0). Raises ``ValueError``."""
    how = "write 'dense' or for example 'D=16,W=256,I=4'"
    if not isinstance(text, str):
        raise ValueError(f"pattern: found {text!r}; {how}")
    if text.strip().lower() == "dense":
        return Pattern()
    values: dict[str, int] = {}
    for part in text.split(","):
        key, _, number = (piece.strip() for piece in part.partition("="))
        if key.upper() not in ("D", "W", "I") or key.upper() in values or not number.lstrip("+-").isdecimal():
            raise ValueError(f"pattern {text!r}: cannot read {part.strip()!r}; {how}")
        values[key.upper()] = int(number)
    pattern = Pattern(values.get("D", 0), values.get("W", 0), values.get("I", 0))
    if pattern.dilation == 0 or pattern.dilation < -1 or pattern.window < 0 or pattern.initial < 0:
        raise ValueError(f"pattern {text!r}: needs D >= 1 (or -1: no dilated keys), W >= 0 and I >= 0; {how}")
    return Pattern() if pattern.dilation == 1 else pattern


def resolve_pattern(spec: Any, layers: int, heads: int) -> list[list[HeadGroup]]:
    """The head groups of every layer. ``spec`` is one pattern, or a list with one a layer, where an entry may be a list with one a head."""
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        spec = [spec] * layers
    if len(spec) != layers:
        raise ValueError(f"pattern: a list of {len(spec)} for {layers} layers; give one a layer, or a single pattern for all")
    return [_head_groups(entry, layer, heads) for layer, entry in enumerate(spec)]


def _head_groups(entry: Any, layer: int, heads: int) -> list[HeadGroup]:
    if isinstance(entry, str) or not isinstance(entry, Sequence):
        entry = [entry] * heads
    if len(entry) != heads:
        raise ValueError(
            f"pattern of layer {layer}: a list of {len(entry)} for {heads} heads; give one a head, or a single pattern"
        )
    by_pattern: dict[Pattern, list[int]] = {}
    for head, text in enumerate(entry):
        by_pattern.setdefault(parse_pattern(text), []).append(head)
    return [HeadGroup(pattern, tuple(own)) for pattern, own in by_pattern.items()]


class RATPlusConfig(PretrainedConfig):
    """Shape of a RAT+ model and the pattern it is read with.

    ``recurrence=False`` is the attention-only baseline. ``max_position_embeddings`` is the length it was trained with, not a limit.
    """

    model_type = "ratplus"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 8192,
        recurrence: bool = True,
        pattern: str | list[Any] = "dense",
        rope_base: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        residual_in_fp32: bool = True,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(f"hidden_size = {hidden_size} gives {num_attention_heads} heads no even number of channels each")
        if not tie_word_embeddings:
            raise ValueError("tie_word_embeddings = False: the head of a RAT+ model is its embedding")
        resolve_pattern(pattern, num_hidden_layers, num_attention_heads)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.recurrence = recurrence
        self.pattern = pattern
        self.rope_base = rope_base
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.residual_in_fp32 = residual_in_fp32
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads
