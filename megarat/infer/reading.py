"""How a model is read: the pattern of every layer and head and, if asked for, top-k blocks on top."""

from __future__ import annotations

from typing import NamedTuple, Union, cast

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.topk import TopK
from megarat.model.pattern import LayerPattern, Patterns, PatternSpec, describe, resolve


class ReadingSpec(NamedTuple):
    """What a user wrote: a pattern, and what follows ``+`` behind it (empty: nothing)."""

    pattern: PatternSpec
    extra: str = ""


class Reading(NamedTuple):
    """Patterns of all layers, and the top-k blocks that every head reads beside them."""

    patterns: Patterns
    topk: TopK | None = None

    @property
    def kept(self) -> Patterns:
        """The patterns by which the cache keeps keys: top-k may choose any, so it keeps them all."""
        if self.topk is None:
            return self.patterns
        heads = len(self.patterns[0].per_head)
        return resolve("dense", len(self.patterns), heads)

    def layer(self, index: int) -> LayerPattern:
        """The patterns of one layer's heads."""
        return self.patterns[index]

    def __str__(self) -> str:
        return describe(self.patterns) + (f" + {self.topk}" if self.topk else "")


AnySpec = Union[PatternSpec, ReadingSpec, Reading]


def read_as(spec: AnySpec, config: ModelConfig) -> Reading:
    """The reading a user meant, for a model of this shape: ``D=16``, or ``D=16 + topk blocks=16,size=64,score=max``. Raises ``UserError``."""
    if isinstance(spec, Reading):
        return spec
    pattern, extra = spec if isinstance(spec, ReadingSpec) else (cast("PatternSpec", spec), "")
    if isinstance(pattern, str):
        pattern, _, extra = pattern.partition("+")
    patterns = resolve(pattern, config.layers, config.heads)
    return Reading(patterns, _topk(extra) if extra else None)


def _topk(text: str) -> TopK:
    word, _, options = text.strip().partition(" ")
    if word != "topk":
        raise UserError(f"pattern: cannot read '+ {text.strip()}'; write for example 'D=16 + topk blocks=16,size=64,score=max'")
    return TopK.parse(options)
