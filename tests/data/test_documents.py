"""Documents kept apart: what the loader says of them, and that nothing of one reaches another, forward or backward."""

from __future__ import annotations

import pytest
import torch
from corpora import EOS, Corpus
from torch import Tensor

from megarat.config import ModelConfig
from megarat.data.loader import Loader, number_documents
from megarat.data.plan import ShuffledPlan
from megarat.data.reader import TokenReader
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import resolve

T = 48
PATTERNS = ["dense", "D=4", "D=4,W=3,I=2", "D=-1,W=5", ["dense", "D=8,W=2"], [["D=4", "D=2,W=1"], ["dense", "D=16"]]]


def test_a_micro_batch_numbers_the_documents_and_an_eos_ends_its_own(corpus: Corpus) -> None:
    reader = TokenReader(corpus.folder)
    loader = Loader(
        reader, ShuffledPlan(reader.num_tokens, T, 0), sequence_length=T, global_batch=8, micro_batch=4, separate_documents=True
    )
    for inputs, _, documents in loader.pair(0).micro_batches:
        for row, numbers in zip(inputs.tolist(), documents.tolist(), strict=True):
            number, expected = 0, []
            for token in row:
                expected.append(number)
                number += token == EOS
            assert numbers == expected
    packed = Loader(reader, ShuffledPlan(reader.num_tokens, T, 0), sequence_length=T, global_batch=8, micro_batch=4)
    assert all(len(batch) == 2 for batch in packed.pair(0).micro_batches)
    assert packed.pair(0).digest == loader.pair(0).digest


def tokens_of_documents(lengths: list[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (1, sum(lengths)), generator=generator)
    ids[0, torch.tensor(lengths).cumsum(0) - 1] = EOS
    return ids


def losses_and_gradients(model: RATPlusLM, ids: Tensor, documents: Tensor, patterns: object, counted: Tensor) -> list[Tensor]:
    """Logits of the counted tokens, and all gradients of a loss over these alone."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, patterns, document_ids_BT=documents)
    weights = torch.arange(logits.shape[-1], dtype=logits.dtype).sin()
    (logits * weights * counted[..., None]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [logits.detach()[counted], *gradients]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("recurrence", [True, False])
def test_perturbing_one_document_leaves_every_other_bit_equal(pattern: object, recurrence: bool) -> None:
    config = ModelConfig(layers=2, hidden=32, heads=2, vocab=40, recurrence=recurrence)
    model = RATPlusLM(config).initialise(1)
    patterns = resolve(pattern, 2, 2)
    lengths = [7, 1, 13, 16, 11]
    ids = tokens_of_documents(lengths, 0)
    documents = number_documents(ids, EOS)
    for changed in range(len(lengths)):
        others = documents != changed
        perturbed = torch.where(others, ids, torch.where(ids == EOS, ids, (ids + 5) % 37 + 3))
        assert lengths[changed] == 1 or not torch.equal(perturbed, ids)
        before = losses_and_gradients(model, ids, documents, patterns, others)
        after = losses_and_gradients(model, perturbed, documents, patterns, others)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_packed_documents_do_see_each_other(pattern: object) -> None:
    model = RATPlusLM(ModelConfig(layers=2, hidden=32, heads=2, vocab=40)).initialise(1)
    ids = tokens_of_documents([20, 28], 0)
    changed = ids.clone()
    changed[0, 3] = 39
    patterns = resolve(pattern, 2, 2)
    assert not torch.equal(model(ids, patterns)[0, 20:], model(changed, patterns)[0, 20:])


@pytest.mark.parametrize("pattern", ["dense", "D=-1,W=5"])
def test_a_document_gives_what_it_gives_alone_where_the_pattern_is_relative(pattern: str) -> None:
    model = RATPlusLM(ModelConfig(layers=2, hidden=32, heads=2, vocab=40)).initialise(1).double()
    lengths = [9, 14, 25]
    ids = tokens_of_documents(lengths, 3)
    patterns = resolve(pattern, 2, 2)
    together = model(ids, patterns, document_ids_BT=number_documents(ids, EOS))
    start = 0
    for length in lengths:
        alone = model(ids[:, start : start + length], patterns)
        # rotations by absolute positions cancel in exact arithmetic only: float64 rounding over a sum of 32 channels, 2 layers
        torch.testing.assert_close(together[:, start : start + length], alone, rtol=0, atol=1e-12)
        start += length
