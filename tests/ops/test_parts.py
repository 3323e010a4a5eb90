"""The gradient of a fused tensor put together in place."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarat.ops.parts import GradientPlace, _in_use, parts

ROOT = Path(__file__).parents[2]


def in_place(fused, count):
    return parts(fused, count, backend="triton")


class Doubled(torch.autograd.Function):
    """Writes its gradient where the whole one wants it, as the kernels do; keeps the addresses of the memory that it got."""

    storages: list[int] = []

    @staticmethod
    def forward(ctx, x):
        ctx.place = GradientPlace.of(x)
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        dx = ctx.place.claimed().empty()
        Doubled.storages.append(dx.untyped_storage().data_ptr())
        return dx.copy_(2 * dy)


def gradient(take, of, fused):
    """The gradient of ``of(pieces)`` where ``take`` makes three pieces (B, T, 2, 4)."""
    pieces = (piece.unflatten(-1, (2, 4)) for piece in take(fused, 3))
    return torch.autograd.grad(of(*pieces), fused)[0]


# What is done with three parts; ``Doubled`` makes gradients in place, everything else does not.
USES = {
    "all in place": lambda a, b, c: (Doubled.apply(a) * 3 + Doubled.apply(b) * 5 + Doubled.apply(c).sin()).sum(),
    "none in place, one unused": lambda a, b, c: (a.sin() + b.cos() * a).sum(),
    "some": lambda a, b, c: (Doubled.apply(a) * b + c.cos()).sum(),
    "one part twice": lambda a, b, c: (Doubled.apply(a).sin() + Doubled.apply(a) * Doubled.apply(b) + c).sum(),
    "one part twice and elsewhere": lambda a, b, c: (Doubled.apply(a).sin() + Doubled.apply(a) * b + a * c).sum(),
    "copies of a part": lambda a, b, c: (Doubled.apply(a.clone()) * Doubled.apply(b.masked_fill(b > 0, 1.0)) * c).sum(),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_equal_those_of_autograd_whoever_made_them(use):
    torch.manual_seed(0)
    leaf = torch.randn(2, 6, 24, requires_grad=True, dtype=torch.float64)
    fused = leaf * 1.5
    wanted = gradient(lambda x, n: x.chunk(n, dim=-1), USES[use], fused)
    for _ in range(2):  # a second graph over the same fused tensor
        torch.testing.assert_close(gradient(in_place, USES[use], fused), wanted, rtol=1e-12, atol=1e-12)


def test_a_graph_runs_backward_twice():
    leaf = torch.randn(1, 3, 24, requires_grad=True)
    fused = leaf * 1.0
    a, b, c = (piece.unflatten(-1, (2, 4)) for piece in in_place(fused, 3))
    total = (Doubled.apply(a) * Doubled.apply(b) * c).sum()
    first, second = (torch.autograd.grad(total, fused, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_a_part_s_own_gradient_is_not_written_again_by_a_later_backward():
    leaf = torch.randn(1, 3, 16, requires_grad=True)
    a, b = (piece.unflatten(-1, (2, 4)) for piece in in_place(leaf * 1.0, 2))
    doubled = Doubled.apply(a)
    (kept,) = torch.autograd.grad(doubled.sum(), a, retain_graph=True)  # never comes to the fused tensor
    (doubled * 3 + Doubled.apply(b) * 5).sum().backward()
    assert torch.equal(kept, torch.full_like(a, 2.0))
    assert torch.equal(leaf.grad, torch.cat((torch.full((1, 3, 8), 6.0), torch.full((1, 3, 8), 10.0)), dim=-1))


def test_gradients_made_in_place_are_not_copied():
    leaf = torch.randn(2, 6, 16, requires_grad=True)
    fused = leaf * 1.0
    Doubled.storages.clear()
    a, b = (part.unflatten(-1, (2, 4)) for part in in_place(fused, 2))
    (whole,) = torch.autograd.grad(Doubled.apply(a).sum() + 3 * Doubled.apply(b).sum(), fused)
    assert set(Doubled.storages) == {whole.untyped_storage().data_ptr()}
    torch.testing.assert_close(whole, torch.cat((torch.full((2, 6, 8), 2.0), torch.full((2, 6, 8), 6.0)), dim=-1))


def test_a_tensor_that_is_no_part_gets_memory_of_its_own():
    leaf = torch.randn(2, 3, 16, requires_grad=True)
    pieces = in_place(leaf * 1.0, 2)
    others = (torch.randn(2, 3, 2, 4), torch.randn(2, 3, 5, 2, 4).unbind(2)[1], pieces[0].unflatten(-1, (2, 4))[:, :, :1])
    for x in others:
        place = GradientPlace.of(x).claimed()
        assert place.whole is None and place.empty().is_contiguous() and place.row_stride == x.shape[2] * x.shape[3]


def test_another_tensor_at_the_same_address_is_no_part():
    """The memory of a fused tensor may be given to another one while the graph of the first still lives."""
    leaf = torch.randn(1, 4, 16, requires_grad=True)
    memory = torch.empty(64)
    fused = torch.frombuffer(memory.numpy(), dtype=torch.float32).view(1, 4, 16).copy_(leaf.detach()).requires_grad_()
    pieces = in_place(fused, 2)
    address = fused.data_ptr()
    other = torch.frombuffer(memory.numpy(), dtype=torch.float32).view(1, 4, 16)[..., :8].unflatten(-1, (2, 4))
    assert other.data_ptr() == address and GradientPlace.of(other).whole is None
    assert GradientPlace.of(pieces[0].unflatten(-1, (2, 4))).whole is not None


def test_nothing_is_remembered_of_graphs_that_are_gone():
    before = len(_in_use)
    pieces = in_place(torch.randn(1, 2, 4, requires_grad=True) * 1.0, 2)
    assert len(_in_use) == before + 1
    del pieces
    gc.collect()
    assert len(_in_use) == before
    with torch.no_grad():
        in_place(torch.randn(1, 2, 4, requires_grad=True), 2)
    assert len(_in_use) == before


INTERPRETED = """
import torch
from megarat.ops import apply_rotary, dilated_attention, gated_scan, output_gate, rotary_tables
from megarat.ops.parts import parts
torch.manual_seed(0)
T, K = 9, 16
tables = rotary_tables(torch.arange(T), K)
copies = []
copy = torch.Tensor.copy_
torch.Tensor.copy_ = lambda self, *args: (copies.append(1), copy(self, *args))[1]
def run(pieces, in_place):
    o, q, k, v, g = pieces
    q = apply_rotary(q, *tables, backend="triton")
    # Ranks that share sequences scan the same parts twice: the gradients of both are added.
    state = None if in_place else gated_scan(k, v, g, backend="triton")[2]
    k, v, _ = gated_scan(k, v, g, *tables, initial_state=state, backend="triton")
    if in_place:
        return dilated_attention(q, k, v, (4, 0, 0), output_gate_BTHK=o, backend="triton")
    return output_gate(q * k + v, o, backend="triton")
for B, H, in_place in ((1, 2, True), (2, 1, False)):
    fused, dout = torch.randn(B, T, 5 * H * K, requires_grad=True), torch.randn(B, T, H, K)
    gradients = []
    for backend in ("triton", "reference"):
        copies.clear()
        pieces = (part.unflatten(-1, (H, K)) for part in parts(fused, 5, backend=backend))
        gradients += torch.autograd.grad(run(pieces, in_place), fused, dout)
        assert backend == "reference" or not (in_place and copies), len(copies)
    assert torch.equal(*gradients), in_place
"""


@pytest.mark.slow
def test_every_kernel_writes_its_part_in_place():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
