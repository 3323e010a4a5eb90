"""The generation engine on this machine's GPU: fused steps in CUDA graphs against plain calls and the full forward, and the memory it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

from megarat.config import ModelConfig  # noqa: E402
from megarat.infer.cache import SparseCache, cache_bytes  # noqa: E402
from megarat.infer.engine import Engine, Request  # noqa: E402
from megarat.infer.generate import generate  # noqa: E402
from megarat.infer.reading import read_as  # noqa: E402
from megarat.infer.sampling import GREEDY, Sampling  # noqa: E402
from megarat.model.lm import RATPlusLM  # noqa: E402

SHAPE = ModelConfig(layers=2, hidden=128, heads=2, vocab=150, init_std=0.2)
PLAIN = ["dense", "D=4,W=8,I=2", [["D=4", "D=8,W=3,I=1"], ["dense", "D=16"]]]
READINGS = [*PLAIN, "D=8 + topk blocks=3,size=8", "dense + snapkv size=24,window=8,pool=3,answer=80"]


class Bytes:
    eos_id, vocab_size, file = 0, 128, Path("bytes")

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> RATPlusLM:
    """fp32, so that no two logits are equal and every form of the same computation takes the same tokens."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return RATPlusLM(SHAPE).initialise(5).cuda().requires_grad_(False)


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (prompt, new) in enumerate([(5, 40), (170, 20), (1, 60), (300, 1), (80, 33), (33, 30), (12, 70)]):
        sampling = [GREEDY, Sampling(0.8, 0.9, 1.1, seed=index), Sampling(repetition_penalty=1.5)][index % 3]
        made.append(Request(torch.randint(1, 128, (prompt,), generator=generator).tolist(), new, sampling))
    return made


@pytest.mark.parametrize("spec", READINGS, ids=str)
def test_graphs_take_the_tokens_of_plain_steps(model, spec):
    """Top-k blocks and SnapKV are captured here too, though they are not unless it is asked for."""
    found = {}
    for graphs in (True, False):
        engine = Engine(model, read_as(spec, SHAPE), Bytes(), rows=5, capacity=400, graphs=graphs)
        found[graphs] = [generation.ids for generation in engine.run(requests())]
        captured = [graph for graph in engine.decoder._graphs.values() if graph is not None]
        assert bool(captured) == graphs
    assert found[True] == found[False]


@pytest.mark.parametrize("spec", PLAIN, ids=str)
def test_greedy_graphs_take_the_tokens_of_repeated_full_forwards(model, spec):
    reading = read_as(spec, SHAPE)
    ids_BT = torch.randint(1, 150, (3, 50), generator=torch.Generator().manual_seed(1)).cuda()
    made = generate(model, ids_BT, 40, reading)
    with torch.no_grad():
        for _ in range(40):
            ids_BT = torch.cat([ids_BT, model(ids_BT, reading.patterns)[:, -1:].argmax(dim=-1)], dim=1)
    assert made.tolist() == ids_BT[:, 50:].tolist()


def test_a_request_draws_the_same_in_any_company_and_on_the_cpu(model):
    request = Request([70, 71, 72], 40, Sampling(1.2, 0.9, 1.1, seed=11))
    crowd = Engine(model, read_as("D=16", SHAPE), Bytes(), rows=8, capacity=400).run([*requests(), request])[-1]
    alone = Engine(model, read_as("D=16", SHAPE), Bytes(), rows=1, capacity=64).run([request])[0]
    host = RATPlusLM(SHAPE).initialise(5)
    on_cpu = Engine(host, read_as("D=16", SHAPE), Bytes(), rows=1, capacity=64).run([request])[0]
    assert crowd.ids == alone.ids == on_cpu.ids


@pytest.mark.parametrize("spec", READINGS, ids=str)
def test_the_memory_taken_is_the_formula(spec):
    """At the 1.5B model's width: what the allocator was asked for, beside tables of positions and lengths of rows, to the byte."""
    shape = ModelConfig(layers=2, hidden=2048, heads=2, vocab=32000)
    reading = read_as(spec, shape)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    cache = SparseCache(shape, reading, 7, 4096, torch.bfloat16, "cuda")
    taken = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
    heads = [group.heads_G for layer in cache.layers for group in layer if group.heads_G is not None]
    beside = sum(tensor.nbytes for tensor in (*cache.rotary, cache.lengths_B, cache.dropped_B, *heads))
    assert taken - beside == cache.bytes == 7 * cache_bytes(shape, reading, 4096)
