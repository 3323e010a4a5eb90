"""Prose out of HTML manuals: the paragraphs that are sentences, without markup, code, lists of names and navigation."""

from __future__ import annotations

import html
import re

_LEFT_OUT = re.compile(r"<(script|style|pre|head|nav|footer)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"</?(?:p|li|dd|dt|td|th|tr|div|h[1-6]|ul|ol|dl|table|br|hr|section|article|body|main|blockquote)\b[^>]*>", re.IGNORECASE
)
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*[,.;:!?)]*")
_FUNCTION_WORDS = frozenset(
    "a an and are as at be but by can for from has have if in is it may not of on or so such that the then there this to was"
    " when which will with you".split()
)
_LEAST_WORDS = 20
_LEAST_LETTERS = 0.7  # share of words made of letters
_LEAST_FUNCTION = 0.2  # share of function words


def paragraphs(page: str) -> list[str]:
    """The prose of an HTML page, in its order, white space folded."""
    text = _LEFT_OUT.sub(" ", page)
    blocks = (" ".join(html.unescape(_TAG.sub("", block)).split()) for block in _BLOCK.split(text))
    return [block for block in blocks if is_prose(block)]


def is_prose(paragraph: str) -> bool:
    """Whether it is long enough, ends as a sentence does, and is made of English words."""
    words = paragraph.split(" ")
    if len(words) < _LEAST_WORDS or paragraph[-1] not in ".!?:)":
        return False
    letters = sum(_WORD.fullmatch(word) is not None for word in words)
    function = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return letters >= _LEAST_LETTERS * len(words) and function >= _LEAST_FUNCTION * len(words)
