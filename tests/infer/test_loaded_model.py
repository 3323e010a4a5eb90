"""``megarat.load`` on an imported published checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import megarat
from megarat.checkpoint.convert import import_upstream
from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.load import LoadedModel, fill_model
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve


@pytest.fixture(scope="module")
def imported(golden_pth, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "tiny"
    import_upstream(golden_pth, folder)
    return folder


def relative_error(ours: torch.Tensor, theirs) -> float:
    reference = torch.from_numpy(theirs).double()
    return float((ours.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (None, "logits_D1_W0_I0"),
        ("D=16,W=32,I=4", "logits_D16_W32_I4"),
        ("D=-1,W=32,I=4", "logits_D-1_W32_I4"),
        (["D=1", "D=64"], "logits_D1-64_W0_I0"),
        ([megarat.Pattern(1), ["D=64", megarat.Pattern(64)]], "logits_D1-64_W0_I0"),
    ],
    ids=str,
)
def test_an_imported_checkpoint_gives_the_published_logits(imported, golden, pattern, name):
    ids = torch.from_numpy(golden["ids"][:1]).long()
    model = megarat.load(imported, pattern=pattern, device="cpu", dtype=torch.float32)
    assert relative_error(model(ids), golden[name]) <= 1.5e-2
    other_default = megarat.load(imported, pattern="D=2", device="cpu")
    assert torch.equal(other_default(ids, pattern=pattern or "dense"), model(ids))


def test_bf16_stays_near_the_published_bf16(imported, golden):
    ids = torch.from_numpy(golden["ids"][:1])  # int32 ids serve as well
    model = megarat.load(imported, pattern="D=16,W=32,I=4", device="cpu", dtype=torch.bfloat16)
    logits = model(ids)
    assert logits.dtype == torch.float32
    # both round to 8 bits everywhere, and ours rounds the weights too: the error of one (0.8 %) times 2
    assert relative_error(logits, golden["logits_D16_W32_I4"]) <= 1.6e-2


def test_generation_follows_the_logits(imported, golden):
    model = megarat.load(imported, pattern="D=8,W=3,I=2", device="cpu")
    ids = torch.from_numpy(golden["ids"][:, :20]).long()
    generated = model.generate(ids, max_new_tokens=6)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, ids[:, 20:])


def test_a_reading_with_topk_may_be_given_at_any_call(imported, golden):
    model = megarat.load(imported, pattern="D=16", device="cpu")
    ids = torch.from_numpy(golden["ids"][:, :40]).long()
    reading = "D=-1 + topk blocks=2,size=8"
    own, first_block = (
        model(ids, reading),
        "D=-1,I=8",
    )  # within the first 16 tokens both see block 0 and themselves, top-k its block too
    assert not torch.allclose(own, model(ids)) and torch.allclose(own[:, :8], model(ids, "dense")[:, :8], atol=1e-5)
    assert torch.allclose(own[:, 8], model(ids, first_block)[:, 8], atol=1e-5)
    generated = model.generate(ids, 6, reading)
    for _ in range(6):
        ids = torch.cat([ids, model(ids, reading)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, ids[:, 40:])
    assert model.cache_bytes(64, reading) == model.cache_bytes(64, "dense")


def test_cache_bytes_follow_pattern_and_dtype(imported):
    model = megarat.load(imported, pattern="D=16,I=4", device="cpu", dtype=torch.float32)
    state = 2 * 8 * 256  # two layers of width 256
    assert model.cache_bytes(64) == 2 * 2 * 256 * 4 * (4 + 4) + state
    assert model.cache_bytes(64, "dense") == 2 * 2 * 256 * 4 * 64 + state


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "expected int64 of shape (batch, length), found torch.int64 (3,)"),
        (torch.zeros(1, 3), "found torch.float32 (1, 3)"),
        (torch.tensor([[3, 512]]), "found ids from 3 to 512; the model has 0 to 511"),
        (torch.tensor([[-1, 5]]), "found ids from -1 to 5"),
    ],
)
def test_ids_the_model_cannot_read_are_refused(imported, ids, message):
    model = megarat.load(imported, device="cpu")
    for use in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(UserError) as error:
            use(ids)
        assert message in str(error.value)


def test_ids_come_from_any_device():
    """The meta device stands for a GPU: a tensor left on the CPU would be refused in the first product."""
    lm = RATPlusLM(ModelConfig(layers=1, hidden=16, heads=2, vocab=31)).to("meta")
    model = LoadedModel(lm, resolve("D=4,W=2", 1, 2), Path("nowhere"))
    assert model(torch.zeros(1, 5, dtype=torch.int64)).device.type == "meta"


def test_a_pattern_that_does_not_fit_the_model_is_refused(imported):
    with pytest.raises(UserError, match="3 entries for 2 layers"):
        megarat.load(imported, pattern=["dense"] * 3, device="cpu")
    with pytest.raises(UserError, match="1 entries for 2 layers"):
        megarat.load(imported, device="cpu")(torch.tensor([[1]]), pattern=["D=4"])


def test_what_is_no_checkpoint_is_refused_by_path(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            megarat.load(path, device="cpu")


def test_weights_fill_a_model_completely_or_not_at_all(golden_pth):
    from megarat.checkpoint.upstream import read_upstream

    config, weights, _ = read_upstream(golden_pth)
    for change, message in (
        (lambda w: w.pop("layers.1.mixer.k.weight"), "x: the tensor layers.1.mixer.k.weight is missing"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), r"x: norm.weight has shape \(3,\); the model needs \(256,\)"),
        (lambda w: w.update({"bias": torch.zeros(3)}), "x: tensors the model has no place for: bias"),
    ):
        damaged = dict(weights)
        change(damaged)
        with pytest.raises(UserError, match=message):
            fill_model(RATPlusLM(config), damaged, "x")


def test_reading_an_adapted_model_by_another_pattern_warns_and_names_both(imported):
    lm = megarat.load(imported, device="cpu").lm
    adapted = LoadedModel(lm, resolve("D=4", 2, 2), Path("ck"), resolve("D=4", 2, 2))
    with pytest.warns(UserWarning, match=r"ck was adapted to D=4,W=0,I=0, but is read as dense"):
        adapted.reading("dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.reading(None)
        adapted.reading("D=4 + topk blocks=3")
        megarat.load(imported, device="cpu").reading("D=16")
