"""Which keys a query may read: the sparse attention pattern (D, W, I).

A pattern belongs to a run, never to the weights: the same RAT+ checkpoint is read dense, dilated or windowed by
passing another pattern. The one visibility rule, for a query at position i and a key at position j <= i
(RAT+, arXiv 2602.18196; in code: ``megarat.ops.dilated_attention.visible``):

    i - j <= W   or   j < I   or   (D != -1 and (j + 1) mod D == 0)

D = 1 keeps every key (plain causal attention, written ``dense``); D = -1 keeps none but the window and the initial tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Union

from megarat.errors import UserError

_FIELDS = {"D": "dilation", "W": "window", "I": "initial"}
_LONGEST = 2**31  # of any sequence; positions are compared as 64-bit integers


class Pattern(NamedTuple):
    """Dilation D (1 = dense, -1 = no dilated keys), local window W (previous tokens beside the query itself) and initial tokens I."""

    dilation: int = 1
    window: int = 0
    initial: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``dense`` or ``D=16,W=256,I=4`` (W and I default to 0)."""
        if text.strip().lower() == "dense":
            return cls()
        values: dict[str, int] = {}
        for part in text.split(","):
            key, equals, number = (piece.strip() for piece in part.partition("="))
            if key.upper() not in _FIELDS or not equals or not _is_integer(number) or _FIELDS[key.upper()] in values:
                raise UserError(f"pattern {text!r}: cannot read {part.strip()!r}; write 'dense' or for example 'D=16,W=256,I=4'")
            values[_FIELDS[key.upper()]] = int(number)
        if "dilation" not in values:
            raise UserError(
                f"pattern {text!r}: the dilation D is missing; write for example 'D=16,W=256,I=4', or D=-1 for a window only"
            )
        return cls(**values).checked()

    def checked(self) -> Pattern:
        """This pattern, or a ``UserError`` when it is none."""
        if self.dilation == 0 or self.dilation < -1:
            raise UserError(f"pattern {self}: the dilation D must be 1 (dense) or more, or -1 (no dilated keys)")
        if self.window < 0 or self.initial < 0:
            raise UserError(f"pattern {self}: the window W and the initial tokens I must not be negative")
        if max(self) > _LONGEST:
            raise UserError(f"pattern {self}: {max(self)} is longer than any sequence (at most {_LONGEST})")
        return self

    @property
    def is_dense(self) -> bool:
        """Whether every earlier token is visible, whatever W and I say."""
        return self.dilation == 1

    def __str__(self) -> str:
        return "dense" if self == Pattern() else f"D={self.dilation},W={self.window},I={self.initial}"

    def far_slots(self, length: int) -> int:
        """Dilated keys at positions >= I among the first ``length`` tokens: the far part of the cache."""
        if self.dilation == -1:
            return 0
        return max(0, length // self.dilation - self.initial // self.dilation)

    def cache_slots(self, length: int) -> int:
        """Key/value entries a head keeps to decode up to ``length`` tokens: initial, window ring and far keys.

        The current token is handed to the attention directly and needs no slot. Dense keeps each token once, as far keys (I and W add nothing).
        """
        if self.is_dense:
            return length
        return min(self.initial, length) + min(self.window, length) + self.far_slots(length)


class HeadGroup(NamedTuple):
    """Heads of one layer that share a pattern."""

    pattern: Pattern
    heads: tuple[int, ...]


class LayerPattern(tuple[HeadGroup, ...]):
    """The patterns of one layer: one group for all heads, or several disjoint groups covering them."""

    @classmethod
    def of(cls, per_head: Sequence[Pattern]) -> LayerPattern:
        """Group the heads of a layer by pattern, in order of first appearance."""
        groups: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(per_head):
            key = Pattern() if pattern.is_dense else pattern
            groups.setdefault(key, []).append(head)
        return cls(HeadGroup(pattern, tuple(heads)) for pattern, heads in groups.items())

    @property
    def per_head(self) -> tuple[Pattern, ...]:
        """The pattern of each head, by head number."""
        by_head = {head: group.pattern for group in self for head in group.heads}
        return tuple(by_head[head] for head in range(len(by_head)))

    def part(self, heads: range) -> LayerPattern:
        """The patterns of some consecutive heads, numbered anew."""
        own = self.per_head[heads.start : heads.stop]
        return self if len(own) == len(self.per_head) else LayerPattern.of(own)

    def __str__(self) -> str:
        if len(self) == 1:
            return str(self[0].pattern)
        return "[" + "; ".join(str(pattern) for pattern in self.per_head) + "]"


Patterns = tuple[LayerPattern, ...]
PatternSpec = Union[str, Pattern, Sequence[Union[str, Pattern, Sequence[Union[str, Pattern]]]]]


def resolve(spec: PatternSpec, layers: int, heads: int) -> Patterns:
    """One ``LayerPattern`` a layer from what a user wrote.

    ``spec`` is one pattern for the whole model, a list with one entry a layer, where an entry may itself be a list with one
    pattern a head. Raises ``UserError`` when a list has the wrong length or an entry is no pattern.
    """
    if isinstance(spec, (str, Pattern)):
        return (LayerPattern.of([_pattern(spec)] * heads),) * layers
    entries = _entries(spec)
    if len(entries) != layers:
        raise UserError(
            f"pattern list: found {len(entries)} entries for {layers} layers; give one a layer, or a single pattern for all"
        )
    return tuple(_resolve_layer(entry, index, heads) for index, entry in enumerate(entries))


def _resolve_layer(entry: str | Pattern | Sequence[str | Pattern], layer: int, heads: int) -> LayerPattern:
    if isinstance(entry, (str, Pattern)):
        return LayerPattern.of([_pattern(entry)] * heads)
    per_head = [_pattern(item) for item in _entries(entry)]
    if len(per_head) != heads:
        raise UserError(
            f"pattern of layer {layer}: found {len(per_head)} entries for {heads} heads; give one a head, or a single pattern for the layer"
        )
    return LayerPattern.of(per_head)


def _pattern(item: Any) -> Pattern:
    if isinstance(item, Pattern):
        return item.checked()
    if isinstance(item, str):
        return Pattern.parse(item)
    raise UserError(f"pattern: found {item!r}; write 'dense' or for example 'D=16,W=256,I=4'")


def _entries(spec: Any) -> list[Any]:
    """The entries of a list; anything else (a bare number, say) is refused as a pattern."""
    return list(spec) if isinstance(spec, (list, tuple)) else [_pattern(spec)]


def describe(patterns: Patterns) -> str:
    """One line for logs and tables: a single pattern, or the layers' patterns with repeats counted."""
    runs: list[tuple[str, int]] = []
    for text in (str(layer) for layer in patterns):
        if runs and runs[-1][0] == text:
            runs[-1] = (text, runs[-1][1] + 1)
        else:
            runs.append((text, 1))
    if len(runs) == 1:
        return runs[0][0]
    return " | ".join(text if count == 1 else f"{count}x {text}" for text, count in runs)


def layer_groups(patterns: Patterns) -> Iterator[tuple[int, HeadGroup]]:
    """Every (layer, head group) of the model."""
    for layer, groups in enumerate(patterns):
        for group in groups:
            yield layer, group


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]{1,20}", text) is not None
