"""Prefill and decoding from the sparse cache against the full forward, and against the bytes really held."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer import decoder
from megarat.infer.cache import SparseCache, cache_bytes
from megarat.infer.forward import decode_step, prefill
from megarat.infer.generate import generate
from megarat.infer.reading import read_as
from megarat.infer.sampling import Draws, draw
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

SPECS = [
    "dense",
    "D=4",
    "D=16",
    "D=16,W=32,I=4",
    "D=16,I=5",
    "D=-1,W=32,I=4",
    "D=-1,W=0,I=0",
    "D=-1,W=0,I=60",
    "D=8,W=3,I=17",
    "D=5,I=13",
    "D=7,W=1",
    "D=64",
    "D=4,W=80",
    "D=4,I=80",
    ["dense", "D=64,W=5"],
    [["D=2", "D=8,W=3,I=1"], ["dense", "D=16"]],
    [["D=-1,W=6", "D=-1,W=6"], ["D=-1,W=2,I=9", "D=3"]],
]
LENGTHS = (41, 61, 7, 1)  # unequal prompts: longer and shorter than windows, initial tokens and dilations; one of a single token
STEPS = 13


@torch.no_grad()
def worst_error(model: RATPlusLM, spec, lengths, steps: int, chunk: int | None = None) -> float:
    """Largest difference of logits between prefill + decode and the full forward, in units of the largest logit."""
    patterns = resolve(spec, model.config.layers, model.config.heads)
    total = max(lengths) + steps
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(0, model.config.vocab, (len(lengths), total), generator=generator)
    full_BTV = model(ids_BT, patterns)
    lengths_B = torch.tensor(lengths)
    dtype = model.embedding.weight.dtype
    cache = SparseCache(model.config, patterns, len(lengths), total, dtype, "cpu")
    prompts_BT = ids_BT[:, : max(lengths)].clone()
    logits_BV = prefill(model, prompts_BT, lengths_B, cache, chunk)
    rows = torch.arange(len(lengths))
    worst = 0.0
    for step in range(steps + 1):
        worst = max(worst, float((logits_BV - full_BTV[rows, lengths_B - 1 + step]).abs().max()))
        if step < steps:
            logits_BV = decode_step(model, ids_BT[rows, lengths_B + step], cache)
    assert cache.lengths_B.tolist() == [length + steps for length in lengths]
    return worst / float(full_BTV.abs().max())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prefill_and_decode_equal_the_full_forward_of_the_published_weights(published, spec):
    assert worst_error(published, spec, LENGTHS, STEPS) < 1e-5


def sharp_model(recurrence: bool) -> RATPlusLM:
    """Large weights in float64: gates near 0 and 1, attention that picks single keys; any key out of place shows."""
    shape = ModelConfig(layers=2, hidden=16, heads=2, vocab=31, recurrence=recurrence, init_std=0.6)
    return RATPlusLM(shape).double().initialise(1)


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prefill_and_decode_equal_the_full_forward_of_sharp_float64_weights(spec, recurrence):
    assert worst_error(sharp_model(recurrence), spec, LENGTHS, STEPS) < 1e-11


@pytest.mark.parametrize(("chunk", "recurrence"), [(1, True), (5, True), (16, True), (60, True), (5, False), (60, False)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_prefill_in_chunks_equals_the_full_forward(spec, chunk, recurrence):
    """Prompts that end in, at the edge of and before the last chunk; windows, initial tokens and dilations across chunks."""
    assert worst_error(sharp_model(recurrence), spec, LENGTHS, steps=3, chunk=chunk) < 1e-11


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("initial", range(9))
def test_every_prompt_length_around_the_edges_of_a_pattern(window, initial):
    """D = 4 and every I from 0 to past two blocks, so that its last token is a dilated one, or not; prompts from one token on."""
    assert worst_error(sharp_model(True), f"D=4,W={window},I={initial}", tuple(range(1, 16)), steps=8) < 1e-11


@pytest.mark.parametrize("spec", ["dense", "D=16,W=32,I=4", [["D=2", "D=8,W=3,I=1"], ["dense", "D=16"]]], ids=str)
def test_padding_on_either_side_changes_no_token(published, spec):
    patterns = resolve(spec, 2, 2)
    prompts = [torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 25, 1)]
    alone = [generate(published, prompt[None], 8, patterns)[0].tolist() for prompt in prompts]
    for left, filler in itertools.product((True, False), (0, 499)):
        ids_BT = torch.full((3, 31), filler)
        mask_BT = torch.zeros(3, 31, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            columns = slice(31 - len(prompt), 31) if left else slice(0, len(prompt))
            ids_BT[row, columns], mask_BT[row, columns] = prompt, 1
        assert generate(published, ids_BT, 8, patterns, attention_mask_BT=mask_BT).tolist() == alone


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize("spec", ["dense", "D=4", "D=8,W=3,I=2", "D=-1,W=5", [["D=2", "D=8,W=3"], ["dense", "D=4"]]], ids=str)
def test_greedy_generation_equals_repeated_full_forwards(spec, recurrence):
    model, patterns = sharp_model(recurrence), resolve(spec, 2, 2)
    ids_BT = torch.randint(0, 31, (2, 11), generator=torch.Generator().manual_seed(0))
    generated = generate(model, ids_BT, 15, patterns)
    with torch.no_grad():
        for _ in range(15):
            ids_BT = torch.cat([ids_BT, model(ids_BT, patterns)[:, -1:].argmax(dim=-1)], dim=1)
    assert generated.tolist() == ids_BT[:, 11:].tolist()


# ---- cache size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrence", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cache_bytes_are_the_bytes_held(spec, dtype, recurrence):
    shape = ModelConfig(layers=2, hidden=16, heads=2, vocab=31, recurrence=recurrence)
    model, patterns = RATPlusLM(shape).to(dtype).initialise(0), resolve(spec, 2, 2)
    for capacity in (9, 50):
        cache = SparseCache(shape, patterns, 3, capacity, dtype, "cpu")
        prefill(model, torch.zeros(3, 5, dtype=torch.int64), torch.tensor([5, 1, 3]), cache)
        states = [tensor for state in cache.states if state is not None for tensor in state]
        slots = [tensor for layer in cache.layers for group in layer for tensor in (group.k_BHSK, group.v_BHSK)]
        held = sum(tensor.untyped_storage().nbytes() for tensor in states + slots)
        assert all(tensor.dtype == torch.float32 for tensor in states)
        assert held == cache.bytes == 3 * cache_bytes(shape, patterns, capacity, dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cache_bytes_are_the_formula(spec):
    """2 K bytes for keys and as much for values in every slot, 8 C for the fp32 state of a layer."""
    shape, length = ModelConfig(layers=2, hidden=16, heads=2, vocab=31), 50
    patterns = resolve(spec, 2, 2)
    slots = sum(pattern.cache_slots(length) for layer in patterns for pattern in layer.per_head)
    assert cache_bytes(shape, patterns, length) == slots * 2 * shape.head_dim * 2 + shape.layers * 8 * shape.hidden


@pytest.mark.parametrize(
    ("spec", "length", "mebibytes"),
    [  # 24 layers x 4 bytes x 2048 channels x slots, counted by hand: all tokens; 4 + 256 - 0; 4 + 64 - 0; 4 + 256 + 256 - 0
        ("dense", 4096, 4096 * 0.1875 + 0.375),
        ("D=16,I=4", 4096, 260 * 0.1875 + 0.375),
        ("D=64,I=4", 4096, 68 * 0.1875 + 0.375),
        ("D=16,W=256,I=4", 4096, 516 * 0.1875 + 0.375),
        ("D=16,W=256,I=4", 16384, 1284 * 0.1875 + 0.375),
        ("D=16,I=33", 4096, (33 + 256 - 2) * 0.1875 + 0.375),
    ],
)
def test_cache_size_of_the_15b_model(spec, length, mebibytes):
    shape = ModelConfig(layers=24, hidden=2048, heads=16)
    assert cache_bytes(shape, resolve(spec, 24, 16), length) / 2**20 == mebibytes


# ---- bad prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "new", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), None, 4, "found (1, 0)"),
        (torch.zeros(3, dtype=torch.int64), None, 4, "found (3,)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]]), 4, "all padding"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), 4, "padding between real tokens"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1]]), 4, "the attention mask has shape (1, 2)"),
        (torch.zeros(1, 3, dtype=torch.int64), None, 0, "max_new_tokens is 0"),
    ],
)
def test_impossible_prompts_are_refused(ids, mask, new, message):
    model = sharp_model(True)
    with pytest.raises(UserError) as error:
        generate(model, ids, new, resolve("dense", 2, 2), attention_mask_BT=mask)
    assert message in str(error.value)


READINGS = [
    "D=4,W=3,I=1",
    [["D=2", "D=8,W=3,I=1"], ["dense", "D=16"]],
    "D=8 + topk blocks=3,size=8",
    "dense + snapkv size=24,window=8,answer=40",
]


@pytest.mark.parametrize("spec", READINGS, ids=str)
def test_a_step_asks_the_device_nothing(spec):
    """Tensors without values refuse every question about one (``item``, ``bool``, ``nonzero``), and a CUDA graph may hold no such question."""
    shape = ModelConfig(layers=2, hidden=32, heads=2, vocab=50)
    with FakeTensorMode(), torch.no_grad():
        cache = SparseCache(shape, read_as(spec, shape), 3, 64, torch.float32, "cpu")
        logits_BV = decode_step(RATPlusLM(shape), torch.zeros(3, dtype=torch.int64), cache, torch.ones(3, dtype=torch.int64))
        assert draw(logits_BV, Draws.of(3, 50, "cpu")).shape == (3,)
        with pytest.raises(DataDependentOutputException):
            bool(logits_BV[0, 0] > 0)


@pytest.mark.parametrize("spec", [SPECS[3], READINGS[-1]], ids=str)
def test_many_prompts_are_read_a_few_at_a_time(spec, monkeypatch):
    shape = ModelConfig(layers=2, hidden=32, heads=2, vocab=50, init_std=0.3)
    model, ids_BT = (
        RATPlusLM(shape).double().initialise(1),
        torch.randint(0, 50, (5, 20), generator=torch.Generator().manual_seed(2)),
    )
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[3, 7:] = 0
    reading, read = read_as(spec, shape), []
    at_once = generate(model, ids_BT, 9, reading, attention_mask_BT=mask_BT)

    def noting(model, ids_BT, *others):
        read.append(tuple(ids_BT.shape))
        return prefill(model, ids_BT, *others)

    monkeypatch.setattr(decoder, "prefill_chunk", lambda config: 45)
    monkeypatch.setattr(decoder, "prefill", noting)
    assert torch.equal(generate(model, ids_BT, 9, reading, attention_mask_BT=mask_BT), at_once)
    assert read == [(2, 20), (2, 20), (1, 20)]
