"""megarat: train RAT+ language models dense, once, on many GPUs; run the same checkpoint with sparse dilated attention.

    import megarat
    model = megarat.load("runs/demo/checkpoints/latest", pattern="D=16,W=32,I=4", device="cpu")
    logits = model(ids)                         # (B, T) token ids -> (B, T, V)
    model.generate(ids, max_new_tokens=64)

Importing megarat imports nothing heavy; torch is loaded when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarat.infer.load import load
    from megarat.model.pattern import Pattern

__version__ = "0.1.0"
__all__ = ["Pattern", "__version__", "load"]

_LAZY = {"load": "megarat.infer.load", "Pattern": "megarat.model.pattern"}


def __getattr__(name: str) -> Any:
    """Import ``load`` and ``Pattern`` on first use, so that ``import megarat`` stays light (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'megarat' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
