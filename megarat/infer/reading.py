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
