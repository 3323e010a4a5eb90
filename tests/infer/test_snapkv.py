"""SnapKV as a policy of the cache: which keys stay, against loops written out here; answers against a masked full forward; memory; refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer import decoder as decoder_module
from megarat.infer.cache import SparseCache, cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.forward import decode_step, hidden, prefill
from megarat.infer.generate import generate
from megarat.infer.reading import read_as
from megarat.infer.snapkv import SnapKV, keys_to_keep, observing
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

SHAPE = ModelConfig(layers=2, hidden=16, heads=2, vocab=128, init_std=0.6)
SPEC = "dense + snapkv size=12,window=3,pool=3,answer=10"


class Bytes:
    eos_id, vocab_size, file = 0, 128, Path("bytes")

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> RATPlusLM:
    return RATPlusLM(SHAPE).double().initialise(5)


def worth_by_hand(q, k, policy: SnapKV) -> list[float]:
    """What each key of one head's prompt in front of the window is worth, in loops; q and k are (T, K)."""
    length = len(k)
    front = max(0, length - policy.window)
    attention = [0.0] * front
    for query in range(front, length):
        weights = (k[: query + 1] @ q[query] / k.shape[1] ** 0.5).softmax(dim=0).tolist()
        for key in range(front):
            attention[key] += weights[key]
    half = policy.pool // 2
    return [max(attention[max(0, key - half) : key + half + 1]) for key in range(front)]


def kept_by_hand(q, k, policy: SnapKV) -> list[int]:
    """The positions that stay, where no two are worth the same."""
    length = len(k)
    if length <= policy.size:
        return list(range(length))
    worth = worth_by_hand(q, k, policy)
    best = sorted(range(len(worth)), key=lambda key: -worth[key])[: policy.size - policy.window]
    return sorted([*best, *range(len(worth), length)])


@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_the_keys_that_stay_are_those_the_last_queries_looked_at(chunk):
    """Prompts shorter than the window, than what is kept, and longer; the queries seen in chunks."""
    policy, lengths = SnapKV(size=9, window=3, pool=5), [2, 9, 10, 24, 30]
    generator = torch.Generator().manual_seed(0)
    q_BTHK, k_BTHK = torch.randn(2, 5, 30, 2, 4, generator=generator, dtype=torch.float64) * 2
    lengths_B = torch.tensor(lengths)
    seen = None
    for start in range(0, 30, chunk):
        seen = observing(q_BTHK[:, start : start + chunk], start, lengths_B, policy.window, seen)
    kept_BHS = keys_to_keep(seen, k_BTHK.transpose(1, 2), lengths_B, policy)
    assert kept_BHS.shape == (5, 2, 9)
    for row, length in enumerate(lengths):
        for head in range(2):
            found = kept_BHS[row, head].tolist()
            if length <= 9:
                assert found[:length] == list(range(length))
                continue
            assert found[6:] == list(range(length - 3, length)) and found == sorted(set(found))
            worth = worth_by_hand(q_BTHK[row, :length, head], k_BTHK[row, :length, head], policy)
            # neighbours of a maximum are worth the same, so positions may be chosen in several ways, but not their worth
            assert sorted(worth[key] for key in found[:6]) == pytest.approx(sorted(worth)[-6:], abs=1e-12)


@torch.no_grad()
def by_full_forward(model, prompt: list[int], answer: list[int], policy: SnapKV) -> torch.Tensor:
    """Logits of the answer's tokens by a full forward of prompt and answer in which the answer's queries see the kept keys and the answer only."""
    from megarat.infer.forward import _gated

    ids_BT = torch.tensor([prompt + answer])
    total, length = ids_BT.shape[1], len(prompt)
    rotary = model.rotary(torch.arange(total))
    x = model.embed(ids_BT)
    for block in model.blocks:
        projections = block.mixer.project(x)
        q, k, v, _ = block.mixer.recur(projections, rotary)
        seen_HTT = torch.ones(total, total).tril().bool().repeat(2, 1, 1)
        for head in range(2):
            kept = set(kept_by_hand(q[0, :length, head], k[0, :length, head], policy))
            dropped = [key for key in range(length) if key not in kept]
            seen_HTT[head, length:, dropped] = False
        mixed = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=seen_HTT)
        x = x + _gated(block, mixed.transpose(1, 2), projections.o)
        x = x + block.ffn(x)
    return model.logits(model.norm(x))[0, length - 1 :]


@pytest.mark.parametrize("chunk", [None, 7])
def test_answers_read_the_kept_keys_and_everything_new(model, chunk):
    """Unequal prompts in one batch; pool=1, where no two positions have the same worth."""
    reading = read_as("dense + snapkv size=12,window=3,pool=1,answer=10", SHAPE)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 128, (length,), generator=generator).tolist() for length in (40, 12, 5, 23)]
    answers = [torch.randint(1, 128, (9,), generator=generator).tolist() for _ in prompts]
    ids_BT = torch.tensor([prompt + [0] * (40 - len(prompt)) for prompt in prompts])
    cache = SparseCache(SHAPE, reading, 4, 50, torch.float64, "cpu")
    logits = [prefill(model, ids_BT, torch.tensor([len(prompt) for prompt in prompts]), cache, chunk)]
    for step in range(9):
        logits.append(decode_step(model, torch.tensor([answer[step] for answer in answers]), cache))
    found_BNV = torch.stack(logits, dim=1)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected_NV = by_full_forward(model, prompt, answer, reading.snapkv)
        assert torch.allclose(found_BNV[row], expected_NV, rtol=0, atol=1e-11 * float(expected_NV.abs().max()))


def test_a_short_prompt_is_answered_as_dense(model):
    ids_BT = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    assert torch.equal(generate(model, ids_BT, 9, read_as(SPEC, SHAPE)), generate(model, ids_BT, 9, resolve("dense", 2, 2)))
    longer = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    assert not torch.equal(generate(model, longer, 9, read_as(SPEC, SHAPE)), generate(model, longer, 9, resolve("dense", 2, 2)))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_requests_that_share_a_batch_get_what_each_gets_alone(model, rows, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    asked = [
        Request(torch.randint(1, 128, (prompt,), generator=generator).tolist(), new)
        for prompt, new in ((40, 9), (5, 10), (23, 2), (12, 10), (30, 7), (30, 1))
    ]
    engine = Engine(model, read_as(SPEC, SHAPE), Bytes(), rows=rows, capacity=60)
    alone = [generate(model, torch.tensor([r.ids]), r.max_new_tokens, read_as(SPEC, SHAPE))[0].tolist() for r in asked]
    monkeypatch.setattr(decoder_module, "prefill_chunk", lambda config: 8)
    in_chunks = Engine(model, read_as(SPEC, SHAPE), Bytes(), rows=rows, capacity=60)
    assert [g.ids for g in engine.run(asked)] == [g.ids for g in in_chunks.run(asked)] == alone


def test_the_cache_is_as_large_as_said_whatever_the_prompt(model):
    reading = read_as(SPEC, SHAPE)
    for capacity, slots in ((1000, 22), (22, 22), (15, 15)):
        cache = SparseCache(SHAPE, reading, 3, capacity, torch.bfloat16, "cpu")
        assert cache.bytes == 3 * cache_bytes(SHAPE, reading, capacity) == 3 * 2 * (slots * 2 * 2 * 2 * 8 + 8 * 16)


def test_more_answer_than_there_is_room_for_is_refused(model):
    engine = Engine(model, read_as(SPEC, SHAPE), Bytes(), rows=1, capacity=60)
    with pytest.raises(UserError, match="max_new_tokens: 11 new tokens do not fit behind a prompt of 40 under 'snapkv size=12,"):
        engine.submit(Request([5] * 40, 11))
    engine.submit(Request([5] * 8, 14))  # a shorter prompt leaves more


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("D=16 + snapkv size=8", "snapkv chooses among all keys; write 'dense + snapkv size=8'"),
        ("dense + snapkv sise=8", "cannot read 'sise=8'"),
        ("dense + snapkv size=8,size=9", "cannot read 'size=9'"),
        ("dense + snapkv size=8,window=8", "needs 1 <= window < size"),
        ("dense + snapkv pool=4", "an odd pool"),
        ("dense + snappy", "cannot read '+ snappy'"),
    ],
)
def test_impossible_policies_are_refused(spec, message):
    with pytest.raises(UserError) as error:
        read_as(spec, SHAPE)
    assert message in str(error.value)


def test_it_has_no_perplexity(model):
    assert str(read_as("dense + snapkv", SHAPE)) == "dense + snapkv size=1024,window=64,pool=7,answer=512"
    with pytest.raises(UserError, match="it can be judged by answers only"):
        hidden(model, torch.zeros(1, 5, dtype=torch.int64), read_as(SPEC, SHAPE))
