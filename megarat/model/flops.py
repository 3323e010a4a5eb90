"""How much arithmetic and how many parameters a RAT+ model has.

Convention: a multiply-add is 2 FLOPs; the backward costs twice the forward; attention counts only the keys that the pattern leaves visible
(for dense causal attention about T/2 a query, the "causal-half" convention); elementwise work and the scan are not counted. MFU everywhere
in megarat is these FLOPs over time and the GPU's dense bf16 peak.

Shapes: L layers, C width, T sequence length, V vocabulary, H heads, n visible keys a query.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from megarat.config import Config, ModelConfig
from megarat.model.pattern import Pattern, Patterns

if TYPE_CHECKING:
    import torch

# Dense bf16 matrix rate, FLOP/s, from the vendors' data sheets; keyed by a part of the device name, of which the longest counts.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def parameter_count(model: ModelConfig) -> int:
    """All parameters; the embedding is tied to the head and counted once.

    V C + L ((5 + 1 + 2 ffn_multiple) C^2 + 2 C) + C with the recurrence, one C^2 a layer less without.
    """
    return model.vocab * model.hidden + model.layers * (_block_matrix(model) + 2 * model.hidden) + model.hidden


def _block_matrix(model: ModelConfig) -> int:
    projections = 6 if model.recurrence else 5
    return (projections + 2 * model.ffn_multiple) * model.hidden**2


@lru_cache(maxsize=256)
def visible_pairs(pattern: Pattern, length: int) -> int:
    """Visible (query, key) pairs in one sequence of ``length`` tokens under one head's pattern."""
    dilation, window, initial = pattern
    total = 0
    for query in range(length):
        low = max(0, query - window)
        far = 0 if dilation == -1 else max(0, low // dilation - initial // dilation)
        total += query - low + 1 + min(initial, low) + far
    return total


def forward_flops_per_token(model: ModelConfig, patterns: Patterns, length: int) -> float:
    """Matrix FLOPs of one forward pass, averaged over the tokens of a sequence."""
    matrices = model.layers * _block_matrix(model) + model.vocab * model.hidden
    pairs = sum(len(group.heads) * visible_pairs(group.pattern, length) for layer in patterns for group in layer)
    return 2.0 * matrices + 4.0 * model.head_dim * pairs / length


def training_flops_per_token(model: ModelConfig, patterns: Patterns, length: int) -> float:
    """Forward and backward of one pass."""
    return 3.0 * forward_flops_per_token(model, patterns, length)


def pair_flops_per_token(config: Config) -> float:
    """Both passes of a pair, for each token of data, on average over pairs; only the main pass when active recurrence learning is off."""
    length = config.data.sequence_length
    dense = training_flops_per_token(config.model, config.patterns, length)
    if config.sparse_patterns is None:
        return dense
    return dense + training_flops_per_token(config.model, config.sparse_patterns, length) / config.train.sparse_every


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 peak of this device in FLOP/s, or None when it is not in the table (CPUs never are)."""
    import torch  # planning a run needs the arithmetic above without it

    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    part = max((part for part in _PEAK_FLOPS if part in name), key=len, default=None)
    return None if part is None else _PEAK_FLOPS[part]
