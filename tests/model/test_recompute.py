"""Selective recomputation: the same gradients bit for bit, less kept, no product made twice."""

from __future__ import annotations

import pytest
import tiny_run
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megarat.config import validate
from megarat.errors import UserError
from megarat.model import layers
from megarat.model.layers import FeedForward
from megarat.model.lm import local_model


def gradients(recompute: bool, dtype: torch.dtype, fused_gelu: bool = False) -> list[torch.Tensor]:
    settings = tiny_run.config()
    model = tiny_run.model(settings).to(dtype)
    for block in model.blocks:
        block.mixer.recompute = block.ffn.recompute = recompute
        block.ffn.fused_gelu = fused_gelu
    ids, labels = tiny_run.micro_batches(1)[0]
    for patterns in (settings.sparse_patterns, settings.patterns):
        model(ids, patterns, labels).backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_bit_for_bit(dtype):
    for kept, made_again in zip(gradients(False, dtype), gradients(True, dtype), strict=True):
        assert torch.equal(kept, made_again)


@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_in_one_pass_with_its_gradient_gives_the_same_gradients(recompute):
    for kept, fused in zip(gradients(False, torch.float64), gradients(recompute, torch.float64, fused_gelu=True), strict=True):
        torch.testing.assert_close(fused, kept, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_of_norm_and_gelu_are_kept_only_without_it(recompute, monkeypatch):
    kept: dict[str, StorageWeakRef] = {}

    def watched(name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            kept.setdefault(name, StorageWeakRef((result[0] if isinstance(result, tuple) else result).untyped_storage()))
            return result

        return call

    monkeypatch.setattr(layers, "add_rms_norm", watched("norm", layers.add_rms_norm))
    monkeypatch.setattr(functional, "gelu", watched("gelu", functional.gelu))
    ffn = FeedForward(16, 4, 1e-6)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    ffn.recompute = recompute
    stream, branch = torch.randn(2, 1, 8, 16, requires_grad=True)
    normal, stream = ffn.norm(stream, branch)
    result = ffn.after_norm(normal, stream)
    del normal
    assert {name: reference.expired() for name, reference in kept.items()} == {"norm": recompute, "gelu": recompute}
    result.sum().backward()


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


def test_no_product_is_repeated():
    counts = []
    for recompute in (False, True):
        with _Products() as products:
            gradients(recompute, torch.float32)
        counts.append(products.count)
    assert counts[0] == counts[1]


def test_a_run_turns_gelu_in_one_pass_on_where_layers_make_their_products_in_the_usual_way(mesh):
    settings = tiny_run.config()
    settings.train.fused_gelu = True
    assert all(block.ffn.fused_gelu for block in local_model(settings, mesh).blocks)
    for key, value in (("fp8", True), ("compile", True), ("weight_gradients", "product")):
        other = tiny_run.config()
        other.train.fused_gelu = True
        setattr(other.train, key, value)
        with pytest.raises(UserError, match=rf"train\.fused_gelu with train\.{key}"):
            validate(other, "test")
