"""Top-k block attention against loops over queries, heads and blocks, written here without a mask or a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megarat import cli
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.cache import SparseCache, cache_bytes
from megarat.infer.forward import decode_step, hidden, prefill
from megarat.infer.reading import Reading, ReadingSpec, read_as
from megarat.infer.topk import TopK, block_bounds, readable, topk_attention
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import Pattern, resolve

SHAPE = ModelConfig(layers=2, hidden=16, heads=2, vocab=31, init_std=0.6)
CASES = [
    (TopK(3, 4, "max"), Pattern(-1)),
    (TopK(4, 4, "mean"), Pattern(-1)),
    (TopK(2, 8, "max"), Pattern(-1)),  # nothing left to choose: the first and the current block
    (TopK(3, 5, "mean"), Pattern(4)),
    (TopK(3, 8, "max"), Pattern(16, 3, 2)),
    (TopK(5, 1, "max"), Pattern(-1, 2, 0)),
    (TopK(3, 64, "max"), Pattern(-1)),  # one block holds everything
]


def keys_read(q_K, k_SK, i: int, topk: TopK, pattern: Pattern) -> list[int]:
    """The rule for one query of one head, in words of the module's docstring."""
    size, current = topk.size, i // topk.size
    scores = {}
    for block in range(1, current):
        inside = k_SK[block * size : (block + 1) * size]
        if topk.score == "mean":
            scores[block] = float(q_K @ inside.mean(axis=0))
        else:
            scores[block] = sum(
                max(q * key for key in (column.max(), column.min())) for q, column in zip(q_K, inside.T, strict=True)
            )
    best = sorted(scores, key=scores.__getitem__, reverse=True)[: topk.blocks - 2]
    blocks = {0, current, *best}
    dilation, window, initial = pattern
    return [
        j
        for j in range(i + 1)
        if j // size in blocks or i - j <= window or j < initial or (dilation != -1 and (j + 1) % dilation == 0)
    ]


def oracle(q, k, v, topk, pattern):
    out = np.zeros_like(q)
    batch, length, heads, channels = q.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = keys_read(q[b, i, h], k[b, :, h], i, topk, pattern)
                scores = k[b, seen, h] @ q[b, i, h] / np.sqrt(channels)
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


@pytest.mark.parametrize(("topk", "pattern"), CASES, ids=str)
def test_attention_equals_the_loops(topk, pattern, monkeypatch):
    monkeypatch.setattr("megarat.infer.topk._QUERIES", 16)  # so that 37 queries are computed in three parts
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 37, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    out = topk_attention(q, k, v, torch.arange(37).expand(2, -1), pattern, topk)
    np.testing.assert_allclose(out.numpy(), oracle(q.numpy(), k.numpy(), v.numpy(), topk, pattern), rtol=0, atol=1e-12)


@pytest.mark.parametrize("score", ["max", "mean"])
def test_no_query_reads_more_than_its_budget_and_each_head_chooses(score):
    topk = TopK(4, 8, score)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 96, 2, 8, generator=generator) for _ in range(2))
    seen = readable(q, block_bounds(k, topk), torch.arange(96)[None], 96, Pattern(-1), topk)[0]
    counts = seen.sum(dim=-1)
    assert int(counts.max()) == 4 * 8
    assert bool(seen[:, :, :8].logical_or(torch.arange(8) > torch.arange(96)[:, None]).all())  # the first block, always
    assert bool(seen.diagonal(dim1=1, dim2=2).all()) and not torch.equal(seen[0], seen[1])


def test_the_max_score_bounds_every_key_of_its_block():
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(8, generator=generator), torch.randn(1, 64, 1, 8, generator=generator)
    high, low = block_bounds(k, TopK(2, 16, "max"))
    bound = (q.clamp_min(0) * high[0, :, 0] + q.clamp_max(0) * low[0, :, 0]).sum(dim=-1)
    assert bool((bound + 1e-5 >= (k[0, :, 0] @ q).view(4, 16).amax(dim=1)).all())


@pytest.mark.parametrize("recurrence", [True, False])
def test_blocks_for_everything_are_dense(recurrence):
    model = RATPlusLM(ModelConfig(**{**vars(SHAPE), "recurrence": recurrence})).double().initialise(1)
    ids = torch.randint(0, 31, (2, 40), generator=torch.Generator().manual_seed(0))
    reading = read_as("D=-1 + topk blocks=10,size=4", SHAPE)
    torch.testing.assert_close(hidden(model, ids, reading), model.hidden(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
@pytest.mark.parametrize(
    "spec",
    [
        "D=-1 + topk blocks=3,size=4",
        "D=8,W=2,I=1 + topk blocks=4,size=4,score=mean",
        ReadingSpec([["D=4", "D=-1,W=3"], "dense"], " topk blocks=3,size=8"),
    ],
    ids=str,
)
def test_prefill_and_decode_equal_the_full_forward(spec, chunk):
    model = RATPlusLM(SHAPE).double().initialise(1)
    reading = read_as(spec, SHAPE)
    lengths_B, steps = torch.tensor([33, 41, 5, 1]), 9
    ids_BT = torch.randint(0, 31, (4, 41 + steps), generator=torch.Generator().manual_seed(3))
    full_BTV = model.logits(hidden(model, ids_BT, reading))
    cache = SparseCache(SHAPE, reading, 4, 41 + steps, torch.float64, "cpu")
    logits_BV = prefill(model, ids_BT[:, :41], lengths_B, cache, chunk)
    rows = torch.arange(4)
    for step in range(steps):
        torch.testing.assert_close(logits_BV, full_BTV[rows, lengths_B - 1 + step], rtol=0, atol=1e-10)
        logits_BV = decode_step(model, ids_BT[rows, lengths_B + step], cache)


@pytest.mark.parametrize(
    "text", ["D=16 + topk blocks=3,size=8", "D=-1+topk blocks=2", "dense", "[D=4, [D=2, dense]] + topk blocks=2,score=mean"]
)
def test_the_command_line_reads_what_python_reads(text):
    """And the extra is there: `megarat eval --pattern "D=16 + topk ..."` is not D=16."""
    found = read_as(cli._reading(text), SHAPE)
    assert (found.topk is not None) == ("topk" in text)
    if not text.startswith("["):
        assert found == read_as(text, SHAPE)
    else:
        assert found == read_as(ReadingSpec(["D=4", ["D=2", "dense"]], "topk blocks=2,score=mean"), SHAPE)


def test_the_cache_keeps_every_key():
    reading = read_as("D=64 + topk blocks=4", SHAPE)
    assert cache_bytes(SHAPE, reading, 500) == cache_bytes(SHAPE, resolve("dense", 2, 2), 500)
    cache = SparseCache(SHAPE, reading, 3, 500, torch.bfloat16, "cpu")
    assert cache.bytes == 3 * cache_bytes(SHAPE, reading, 500)


def test_readings_are_read_and_named():
    reading = read_as("D=16,W=4 + topk blocks=16,size=32,score=mean", SHAPE)
    assert reading == Reading(resolve("D=16,W=4", 2, 2), TopK(16, 32, "mean"))
    assert str(reading) == "D=16,W=4,I=0 + topk blocks=16,size=32,score=mean"
    assert read_as(str(reading), SHAPE) == reading
    assert str(read_as("D=-1+topk blocks=8", SHAPE)) == "D=-1,W=0,I=0 + topk blocks=8,size=64,score=max"
    assert read_as("dense", SHAPE).topk is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("D=-1 + best 3", "cannot read '+ best 3'"),
        ("D=-1 + topk", "cannot read ''"),
        ("D=-1 + topk size=64", "blocks and size must be whole numbers"),
        ("D=-1 + topk blocks=x", "blocks and size must be whole numbers"),
        ("D=-1 + topk blocks=1", "needs blocks >= 2"),
        ("D=-1 + topk blocks=4,size=0", "needs blocks >= 2 (the first and the current one are always read) and size >= 1"),
        ("D=-1 + topk blocks=4,score=sum", "score is 'sum'; expected max or mean"),
        ("D=-1 + topk blocks=4,blocks=5", "cannot read 'blocks=5'"),
        ("D=0 + topk blocks=4", "the dilation D must be 1"),
    ],
)
def test_what_is_no_reading_is_refused(text, message):
    with pytest.raises(UserError) as error:
        read_as(text, SHAPE)
    assert message in str(error.value)
