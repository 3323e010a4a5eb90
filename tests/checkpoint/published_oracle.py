"""A RAT+ model by its published formulae, token by token in float64 numpy, straight from the weights of a published file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def random_task(layers: int, heads: int, head_dim: int, vocab: int, seed: int = 0, separate_gate: bool = False) -> dict[str, Any]:
    """A state dict in the published names, of matrices large enough that gates and attention are far from uniform."""
    import torch

    draw, width = np.random.default_rng(seed), heads * head_dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(draw.normal(0, 1.5 / math.sqrt(columns), (rows, columns)).astype(np.float32))

    def scale() -> torch.Tensor:
        return torch.from_numpy(draw.uniform(0.5, 1.5, width).astype(np.float32))

    task = {"embedding.wte.weight": matrix(vocab, width), "backbone.ln.weight": scale()}
    for layer in range(layers):
        mixer, ffn = f"backbone.layers.{layer}.seq_layer.", f"backbone.layers.{layer}.hidden_layer."
        fused = matrix(5 * width, width)
        if separate_gate:
            task |= {
                f"{mixer}in_proj.weight": fused[: 4 * width].clone(),
                f"{mixer}fgate_proj.weight": fused[4 * width :].clone(),
            }
        else:
            task[f"{mixer}in_proj.weight"] = fused
        task |= {f"{mixer}input_norm.weight": scale(), f"{mixer}out_proj.weight": matrix(width, width)}
        task |= {
            f"{ffn}ln.weight": scale(),
            f"{ffn}fc1.weight": matrix(4 * width, width),
            f"{ffn}fc2.weight": matrix(width, 4 * width),
        }
    return task | {"head.lm_head.weight": task["embedding.wte.weight"]}


def logits(task: dict[str, Any], ids: list[int], patterns: list[tuple[int, int, int]], heads: int, base: float) -> np.ndarray:
    """(T, V) for one sequence; ``patterns`` are (D, W, I) of each layer."""
    weights = {name: tensor.double().numpy() for name, tensor in task.items()}
    x_TC = weights["embedding.wte.weight"][ids]
    for layer, pattern in enumerate(patterns):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"backbone.layers.{layer}.")}
        x_TC = x_TC + _mixer(own, x_TC, pattern, heads, base)
        inner = _norm(x_TC, own["hidden_layer.ln.weight"]) @ own["hidden_layer.fc1.weight"].T
        gelu = 0.5 * inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x_TC = x_TC + gelu @ own["hidden_layer.fc2.weight"].T
    return _norm(x_TC, weights["backbone.ln.weight"]) @ weights["embedding.wte.weight"].T


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _mixer(own: dict[str, np.ndarray], x_TC: np.ndarray, pattern: tuple[int, int, int], heads: int, base: float) -> np.ndarray:
    fused = own["seq_layer.in_proj.weight"]
    if "seq_layer.fgate_proj.weight" in own:
        fused = np.concatenate([fused, own["seq_layer.fgate_proj.weight"]])
    o, q, k, v, g = np.split(_norm(x_TC, own["seq_layer.input_norm.weight"]) @ fused.T, 5, axis=-1)
    gate = 1 / (1 + np.exp(-g))
    key, value = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    keys, values = [], []
    for t in range(len(x_TC)):
        key, value = gate[t] * key + (1 - gate[t]) * k[t], gate[t] * value + (1 - gate[t]) * v[t]
        keys.append(key)
        values.append(value)
    q, k, v = (np.array(x).reshape(len(x_TC), heads, -1) for x in (q, keys, values))
    q, k = _rotate(q, base), _rotate(k, base)
    mixed = np.zeros_like(q)
    dilation, window, initial = pattern
    for i in range(len(x_TC)):
        seen = [j for j in range(i + 1) if i - j <= window or j < initial or (dilation != -1 and (j + 1) % dilation == 0)]
        for h in range(heads):
            scores = k[seen, h] @ q[i, h] / math.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            mixed[i, h] = weights / weights.sum() @ v[seen, h]
    return (mixed.reshape(len(x_TC), -1) / (1 + np.exp(-o))) @ own["seq_layer.out_proj.weight"].T


def _rotate(x_THK: np.ndarray, base: float) -> np.ndarray:
    half = x_THK.shape[-1] // 2
    angles = np.arange(len(x_THK))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x_THK[..., :half], x_THK[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
