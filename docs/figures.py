"""What the README shows and code can compute: the picture ``docs/patterns.svg`` and the table of cache sizes.

python docs/figures.py          # writes docs/patterns.svg, prints the table
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megarat.config import ModelConfig
from megarat.infer.cache import cache_bytes
from megarat.model.pattern import Pattern, resolve

PICTURE = Path(__file__).with_name("patterns.svg")
PANELS = ("dense", "D=4", "D=4,W=2,I=1", "D=-1,W=4,I=1")
TABLE = ("dense", "D=4", "D=16", "D=16,I=4", "D=64,I=4", "D=16,W=256,I=4", "D=64,W=256,I=4", "D=-1,W=1024,I=4")
SHAPE_1B = ModelConfig(layers=24, hidden=2048, heads=16)  # the published 1.5B model
TABLE_LENGTHS = (4096, 16384)

_TOKENS, _CELL, _GAP, _LEFT, _TOP = 16, 13, 26, 20, 128
_COLOURS = {"self": "#1b3a57", "window": "#4c8cbf", "initial": "#e0a030", "dilated": "#c2503c", "hidden": "#eef1f4"}
_NAMES = {"self": "itself", "window": "window W", "initial": "initial I", "dilated": "every D-th"}


def part(query: int, key: int, pattern: Pattern) -> str | None:
    """Which part of the pattern shows ``key`` to ``query``, "hidden" if none, None for keys in the future."""
    if key > query:
        return None
    if key == query:
        return "self"
    if query - key <= pattern.window:
        return "window"
    if key < pattern.initial:
        return "initial"
    return "dilated" if pattern.dilation != -1 and (key + 1) % pattern.dilation == 0 else "hidden"


def picture() -> str:
    """The SVG: the recurrence along the tokens, and below it the keys that each query reads under four patterns."""
    side = _TOKENS * _CELL
    width, height = 2 * _LEFT + len(PANELS) * side + (len(PANELS) - 1) * _GAP, _TOP + side + 62
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_recurrence(width),
    ]
    for index, text in enumerate(PANELS):
        lines += _panel(_LEFT + index * (side + _GAP), text)
    return "\n".join([*lines, *_legend(_TOP + side + 34), "</svg>"]) + "\n"


def _text(x: float, y: float, content: str, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="#222222">{content}</text>'


def _recurrence(width: int) -> Iterator[str]:
    """A row of tokens; arrows carry the running average; every fourth box is what D=4 keeps."""
    yield _text(_LEFT, 22, "Along the tokens, each key and value is a gated running average of all before it (the recurrence);")
    yield _text(
        _LEFT, 40, "so a kept one (red: every 4th) still knows of those between. Dense or sparse is chosen when the model runs."
    )
    step, box, y = (width - 2 * _LEFT) / _TOKENS, 22, 56
    for token in range(_TOKENS):
        x = _LEFT + token * step + (step - box) / 2
        colour = _COLOURS["dilated" if (token + 1) % 4 == 0 else "hidden"]
        yield f'<rect x="{x:g}" y="{y}" width="{box}" height="{box}" rx="4" fill="{colour}" stroke="#8894a0"/>'
        if token:
            start, end, middle = x - step + box + 2, x - 3, y + box / 2
            yield f'<path d="M{start:g} {middle:g}H{end:g}m-5 -4l5 4l-5 4" fill="none" stroke="#444444" stroke-width="1.5"/>'


def _panel(left: float, text: str) -> Iterator[str]:
    pattern = Pattern.parse(text)
    yield _text(left + _TOKENS * _CELL / 2, _TOP - 12, text, "middle", 14)
    for query in range(_TOKENS):
        for key in range(query + 1):
            colour = _COLOURS[part(query, key, pattern) or "hidden"]
            x, y = left + key * _CELL, _TOP + query * _CELL
            yield f'<rect x="{x:g}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{colour}"/>'


def _legend(y: float) -> Iterator[str]:
    yield _text(_LEFT, y, "Each row is a query, each column a key. The query reads:")
    x = _LEFT + 430
    for name, label in _NAMES.items():
        yield f'<rect x="{x:g}" y="{y - 11:g}" width="12" height="12" fill="{_COLOURS[name]}"/>'
        yield _text(x + 18, y, label)
        x += 100


def cache_table() -> str:
    """Cache of one sequence of the 1.5B model in bf16, as Markdown."""
    dense = [_cache("dense", length) for length in TABLE_LENGTHS]
    titles = [f"{length // 1024}K tokens" for length in TABLE_LENGTHS]
    lines = [f"| pattern | {' | '.join(titles)} | smaller than dense |", "|---|" + "---:|" * (len(titles) + 1)]
    for text in TABLE:
        sizes = [_cache(text, length) for length in TABLE_LENGTHS]
        ratios = " / ".join(f"{full / size:.1f}x" for full, size in zip(dense, sizes, strict=True))
        lines.append(f"| `{text}` | {' | '.join(f'{size / 2**20:.1f} MiB' for size in sizes)} | {ratios} |")
    return "\n".join(lines)


def _cache(text: str, length: int) -> int:
    return cache_bytes(SHAPE_1B, resolve(text, SHAPE_1B.layers, SHAPE_1B.heads), length)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(cache_table())
