"""How a model is read: the pattern of every layer and head and, if asked for, top-k blocks on top, or SnapKV's policy for the cache."""

from __future__ import annotations

from typing import NamedTuple, Union, cast

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.snapkv import SnapKV
from megarat.infer.topk import TopK
from megarat.model.pattern import LayerPattern, Patterns, PatternSpec, describe, resolve


class ReadingSpec(NamedTuple):
    """What a user wrote: a pattern, and what follows ``+`` behind it (empty: nothing)."""

    pattern: PatternSpec
    extra: str = ""


class Reading(NamedTuple):
    """Patterns of all layers, and the top-k blocks that every head reads beside them, or what SnapKV leaves of the keys of a prompt."""

    patterns: Patterns
    topk: TopK | None = None
    snapkv: SnapKV | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the patterns are all there is to it."""
        return self.topk is None and self.snapkv is None

    @property
    def kept(self) -> Patterns:
        """The patterns by which the cache keeps keys: top-k may choose any, so it keeps them all."""
        if self.is_plain:
            return self.patterns
        heads = len(self.patterns[0].per_head)
        return resolve("dense", len(self.patterns), heads)

    def layer(self, index: int) -> LayerPattern:
        """The patterns of one layer's heads."""
        return self.patterns[index]

    def __str__(self) -> str:
        return " + ".join(str(part) for part in (describe(self.patterns), self.topk, self.snapkv) if part)


AnySpec = Union[PatternSpec, ReadingSpec, Reading]


def read_as(spec: AnySpec, config: ModelConfig) -> Reading:
    """The reading a user meant, for a model of this shape. Raises ``UserError``.

    ``D=16``, ``D=16 + topk blocks=16,size=64,score=max`` or ``dense + snapkv size=1024,window=64,pool=7,answer=512``.
    """
    if isinstance(spec, Reading):
        return spec
    pattern, extra = spec if isinstance(spec, ReadingSpec) else (cast("PatternSpec", spec), "")
    if isinstance(pattern, str) and not extra:
        pattern, _, extra = pattern.partition("+")
    patterns = resolve(pattern, config.layers, config.heads)
    return _with_extra(Reading(patterns), extra.strip()) if extra else Reading(patterns)


def _with_extra(reading: Reading, extra: str) -> Reading:
    word, _, options = extra.partition(" ")
    if word == "topk":
        return reading._replace(topk=TopK.parse(options))
    if word != "snapkv":
        raise UserError(
            f"pattern: cannot read '+ {extra}'; write for example 'D=16 + topk blocks=16,size=64,score=max' or "
            "'dense + snapkv size=1024,window=64'"
        )
    if not all(group.pattern.is_dense for layer in reading.patterns for group in layer):
        raise UserError(
            f"pattern '{describe(reading.patterns)} + {extra}': snapkv chooses among all keys; write 'dense + {extra}'"
        )
    return reading._replace(snapkv=SnapKV.parse(options))
