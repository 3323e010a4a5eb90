"""The model against an independent float64 re-implementation in numpy: loops over tokens, heads and keys, and the literal mask."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megarat.config import ModelConfig
from megarat.model import names
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Pattern, resolve
from megarat.ops.dilated_attention import visible

SHAPE = ModelConfig(layers=2, hidden=24, heads=3, vocab=29, ffn_multiple=3, norm_eps=1e-5, rope_base=500.0)
LENGTH = 23  # odd, no multiple of any dilation below


def build(recurrence: bool = True, seed: int = 0) -> RATPlusLM:
    """A float64 model with weights large enough that gates, attention and GELU leave their linear range, and uneven norms."""
    shape = ModelConfig(**{**vars(SHAPE), "recurrence": recurrence, "init_std": 0.35})
    model = RATPlusLM(shape).double().initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


# ---- the independent forward: w maps logical names to numpy arrays ----------------------------------------------------------


def is_visible(i: int, j: int, pattern: Pattern) -> bool:
    """The rule as the paper words it: self, the W tokens before, the first I tokens, and the last token of every block of D."""
    if j > i:
        return False
    is_last_of_block = pattern.dilation > 0 and j % pattern.dilation == pattern.dilation - 1
    return j == i or j >= i - pattern.window or j < pattern.initial or is_last_of_block


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * weight


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Half-split rotary: channel c pairs with c + K/2, as one complex number turned by position * base^(-2c/K)."""
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def mix(x_TC: np.ndarray, w: dict, stem: str, shape: ModelConfig, per_head: list[Pattern], documents: list[int]) -> np.ndarray:
    normed = [rms_norm(x, w[f"{stem}.norm.weight"], shape.norm_eps) for x in x_TC]
    o, q, k, v = (np.array([w[f"{stem}.{letter}.weight"] @ x for x in normed]) for letter in "oqkv")
    if shape.recurrence:
        state_k, state_v = np.zeros(shape.hidden), np.zeros(shape.hidden)
        for t, x in enumerate(normed):
            if t and documents[t] != documents[t - 1]:
                state_k, state_v = np.zeros(shape.hidden), np.zeros(shape.hidden)
            gate = sigmoid(w[f"{stem}.g.weight"] @ x)
            state_k = gate * state_k + (1 - gate) * k[t]
            state_v = gate * state_v + (1 - gate) * v[t]
            k[t], v[t] = state_k, state_v
    size = shape.hidden // shape.heads
    mixed = np.zeros_like(x_TC)
    for head, pattern in enumerate(per_head):
        rows = slice(head * size, (head + 1) * size)
        keys = [rotate(k[t, rows], t, shape.rope_base) for t in range(len(x_TC))]
        for i in range(len(x_TC)):
            query = rotate(q[i, rows], i, shape.rope_base)
            seen = [j for j in range(len(x_TC)) if is_visible(i, j, pattern) and documents[i] == documents[j]]
            weights = np.exp(np.array([query @ keys[j] for j in seen]) / math.sqrt(size))
            mixed[i, rows] = sum(weight * v[j, rows] for weight, j in zip(weights / weights.sum(), seen, strict=True))
    return np.array([w[f"{stem}.out.weight"] @ row for row in mixed * sigmoid(o)])


def forward(
    ids: list[int], w: dict, shape: ModelConfig, per_layer: list[list[Pattern]], documents: list[int] | None = None
) -> np.ndarray:
    """Logits (T, V) of one sequence; ``documents`` numbers the document of each token, None is one document."""
    documents = documents or [0] * len(ids)
    x_TC = w["embedding.weight"][ids]
    for layer, per_head in enumerate(per_layer):
        x_TC = x_TC + mix(x_TC, w, f"layers.{layer}.mixer", shape, per_head, documents)
        ffn = f"layers.{layer}.ffn"
        normed = [rms_norm(x, w[f"{ffn}.norm.weight"], shape.norm_eps) for x in x_TC]
        x_TC = x_TC + np.array([w[f"{ffn}.down.weight"] @ gelu(w[f"{ffn}.up.weight"] @ x) for x in normed])
    return np.array([w["embedding.weight"] @ rms_norm(x, w["norm.weight"], shape.norm_eps) for x in x_TC])


def logical_weights(model: RATPlusLM) -> dict[str, np.ndarray]:
    """Split by hand: the fused projection holds o, q, k, v, g, in this order, C rows each."""
    weights = {}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        if name.endswith("in_proj.weight"):
            width = array.shape[1]
            for index in range(array.shape[0] // width):
                weights[name.replace("in_proj", "oqkvg"[index])] = array[index * width : (index + 1) * width]
        else:
            weights[name.replace("out_proj", "out")] = array
    return weights


# ---- visibility -------------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_literal_rule_for_all_small_patterns():
    dilations, windows, initials = (-1, 1, 2, 3, 7, 40), (0, 1, 4, 39), (0, 1, 3, 8, 39)
    for length, *values in itertools.product((1, 2, 17, 24), dilations, windows, initials):
        pattern = Pattern(*values)
        literal = [[is_visible(i, j, pattern) for j in range(length)] for i in range(length)]
        positions = torch.arange(length)
        assert visible(positions, positions, pattern).tolist() == literal, (length, pattern)


# ---- the whole forward ------------------------------------------------------------------------------------------------------

SPECS = [
    "dense",
    "D=4",
    "D=40",
    "D=5,W=3,I=2",
    "D=8,W=0,I=11",
    "D=3,W=50",
    "D=6,I=50",
    "D=-1,W=4,I=3",
    "D=-1",
    ["dense", "D=4,W=1"],
    [["D=2", "dense", "D=-1,W=5"], ["D=7,I=3", "D=7,I=3", "D=3"]],
]


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_logits_equal_an_independent_forward_in_float64(spec, recurrence):
    model = build(recurrence)
    patterns = resolve(spec, SHAPE.layers, SHAPE.heads)
    ids = torch.randint(0, SHAPE.vocab, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids, patterns).numpy()
    per_layer = [list(layer.per_head) for layer in patterns]
    expected = [forward(row, logical_weights(model), model.config, per_layer) for row in ids.tolist()]
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize(
    "spec", ["dense", "D=4", "D=5,W=3,I=2", "D=-1,W=4,I=3", [["D=2", "dense", "D=-1,W=5"], "D=7,I=12"]], ids=str
)
def test_documents_kept_apart_equal_the_independent_forward(spec, recurrence):
    model = build(recurrence)
    patterns = resolve(spec, SHAPE.layers, SHAPE.heads)
    ids = torch.randint(0, SHAPE.vocab, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 7 + [1] * 1 + [2] * 10 + [3] * 5, [0] * 23])
    with torch.no_grad():
        logits = model(ids, patterns, document_ids_BT=documents).numpy()
        assert not np.allclose(logits[0], model(ids, patterns)[0].numpy(), atol=1e-2)
    per_layer = [list(layer.per_head) for layer in patterns]
    rows = zip(ids.tolist(), documents.tolist(), strict=True)
    expected = [forward(row, logical_weights(model), model.config, per_layer, numbers) for row, numbers in rows]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


def test_the_pattern_matters_and_the_recurrence_matters():
    """Guards the comparison above: the forwards it tells apart differ by much more than its tolerance."""
    ids = torch.arange(LENGTH)[None] % SHAPE.vocab
    outputs = [build(r)(ids, resolve(spec, SHAPE.layers, SHAPE.heads)) for r in (True, False) for spec in ("dense", "D=4")]
    for one, other in itertools.combinations(outputs, 2):
        assert float((one - other).detach().abs().max()) > 1e-2


def test_a_token_influences_nothing_before_it():
    model = build()
    ids = torch.arange(LENGTH)[None] % SHAPE.vocab
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % SHAPE.vocab
    patterns = resolve("D=4,W=2,I=1", SHAPE.layers, SHAPE.heads)
    with torch.no_grad():
        before, after = model(ids, patterns), model(changed, patterns)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_the_loss_is_the_mean_cross_entropy_of_the_labels_that_count():
    model = build()
    ids = torch.randint(0, SHAPE.vocab, (2, LENGTH))
    labels = torch.randint(0, SHAPE.vocab, (2, LENGTH))
    labels[0, 3:7] = -100
    labels[1, 0] = -100
    loss = model(ids, None, labels)
    per_layer = [[Pattern()] * SHAPE.heads] * SHAPE.layers
    losses = []
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        for logits, target in zip(forward(row, logical_weights(model), model.config, per_layer), targets, strict=True):
            if target != -100:
                losses.append(np.log(np.exp(logits).sum()) - logits[target])
    assert len(losses) == 2 * LENGTH - 5
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-10)


def test_gradients_equal_finite_differences_of_the_loss():
    model = build()
    ids = torch.randint(0, SHAPE.vocab, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    patterns = resolve(["D=4,W=2,I=1", "D=5"], SHAPE.layers, SHAPE.heads)
    model(ids, patterns, ids.roll(-1, 1)).backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(model(ids, patterns, ids.roll(-1, 1)).item())
                parameter.add_(direction, alpha=-sign * step)
            slope = (values[0] - values[1]) / (2 * step)
            # central differences: error of order step^2 = 1e-10 times the third derivative, and 1e-16 / step of rounding
            assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_the_residual_stream_stays_fp32_unless_asked_otherwise():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for setting, dtype in (("fp32", torch.float32), ("compute", torch.bfloat16)):
        model = RATPlusLM(ModelConfig(**{**vars(SHAPE), "residual_dtype": setting})).initialise(0).bfloat16()
        assert model.embed(ids).dtype == dtype
        assert model(ids).dtype == torch.float32


# ---- initial weights --------------------------------------------------------------------------------------------------------


def pieces_of(model: RATPlusLM) -> dict[str, torch.Tensor]:
    return {piece: view for name, tensor in model.state_dict().items() for piece, view in names.split(name, tensor).items()}


def test_initial_matrices_have_std_002_and_norms_are_one():
    for name, tensor in pieces_of(RATPlusLM(ModelConfig(layers=2, hidden=128, heads=2, vocab=256)).initialise(5)).items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        # the std of n draws scatters by 0.02 / sqrt(2 n), the mean by 0.02 / sqrt(n): five of these
        n = tensor.numel()
        assert float(tensor.std()) == pytest.approx(0.02, abs=5 * 0.02 / math.sqrt(2 * n)), name
        assert abs(float(tensor.mean())) < 5 * 0.02 / math.sqrt(n), name


def test_initial_weights_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = pieces_of(RATPlusLM(SHAPE).initialise(5))
    torch.manual_seed(2)
    torch.randn(7)
    again = pieces_of(RATPlusLM(SHAPE).initialise(5))
    deeper = pieces_of(RATPlusLM(ModelConfig(**{**vars(SHAPE), "layers": 3})).initialise(5))
    baseline = pieces_of(RATPlusLM(ModelConfig(**{**vars(SHAPE), "recurrence": False})).initialise(5))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, deeper[name]), name
        if ".g." not in name:
            assert torch.equal(tensor, baseline[name]), name
    assert len(first) == len(baseline) + SHAPE.layers


def test_initial_matrices_differ_by_name_and_by_seed():
    one, other = pieces_of(RATPlusLM(SHAPE).initialise(5)), pieces_of(RATPlusLM(SHAPE).initialise(6))
    square = [name for name, tensor in one.items() if tensor.shape == (SHAPE.hidden, SHAPE.hidden)]
    assert len(square) == 6 * SHAPE.layers
    for left, right in itertools.combinations(square, 2):
        assert not torch.equal(one[left], one[right])
    for name in square:
        assert not torch.equal(one[name], other[name])
