"""Every collective against the same arithmetic on one process, forward and backward."""

from __future__ import annotations

import torch

from megarat import comm, mesh
from megarat.parallel import worlds

SIZE = 2
SHAPE = (2, 4, 6)


def inputs() -> list[torch.Tensor]:
    """Each rank's x; sums of integers are exact."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-9, 9, SHAPE, generator=generator).double() for _ in range(SIZE)]


def forward_and_backward(name: str, arguments: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's output, and the gradient of sum over ranks of (output * weights of that rank)."""
    group = mesh.start("cpu").group(mesh.DATA)
    x = inputs()[comm.rank(group)].requires_grad_()
    y = getattr(comm, name)(x, group, *arguments)
    (y * weights(y.shape, comm.rank(group))).sum().backward()
    return y.detach(), x.grad


def weights(shape: torch.Size, rank: int) -> torch.Tensor:
    return torch.arange(shape.numel(), dtype=torch.float64).view(shape) + 100 * rank


def expected(outputs_of, ranks: int = SIZE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same on one process: ``outputs_of`` maps all ranks' inputs to all ranks' outputs."""
    xs = [x.requires_grad_() for x in inputs()]
    ys = outputs_of(xs)
    sum((y * weights(y.shape, rank)).sum() for rank, y in enumerate(ys)).backward()
    return [(y.detach(), x.grad) for y, x in zip(ys, xs, strict=True)]


def check(name: str, arguments: tuple[int, ...], wanted) -> None:
    for (y, dx), (wanted_y, wanted_dx) in zip(worlds.run(SIZE, forward_and_backward, name, arguments), wanted, strict=True):
        assert torch.equal(y, wanted_y)
        assert torch.equal(dx, wanted_dx)


def test_gather_along_concatenates_and_its_gradient_sums_over_ranks():
    for dim in range(3):
        check("gather_along", (dim,), expected(lambda xs, dim=dim: [torch.cat(xs, dim)] * SIZE))


def test_reduce_scatter_along_adds_and_cuts():
    for dim in range(3):
        check("reduce_scatter_along", (dim,), expected(lambda xs, dim=dim: list(sum(xs).chunk(SIZE, dim))))


def test_swap_slices_joins_one_dim_and_cuts_the_other():
    for split, join in ((2, 1), (1, 2), (1, 0)):

        def swap(xs, split=split, join=join):
            return list(torch.cat(xs, join).chunk(SIZE, split))

        check("swap_slices", (split, join), expected(swap))


def test_copy_to_and_reduce_from_are_conjugate():
    """Their gradients belong to a loss that every rank computes once: the identity's is summed, the sum's is not."""
    x = inputs()
    for rank, (y, dx) in enumerate(worlds.run(SIZE, forward_and_backward, "copy_to", ())):
        assert torch.equal(y, x[rank])
        assert torch.equal(dx, weights(x[0].shape, 0) + weights(x[0].shape, 1))
    for rank, (y, dx) in enumerate(worlds.run(SIZE, forward_and_backward, "reduce_from", ())):
        assert torch.equal(y, x[0] + x[1])
        assert torch.equal(dx, weights(x[0].shape, rank))


def test_everything_is_the_identity_without_a_group():
    x = inputs()[0]
    for name, arguments in {
        "copy_to": (), "reduce_from": (), "gather_along": (1,), "reduce_scatter_along": (1,), "swap_slices": (2, 1)
    }.items():  # fmt: skip
        assert getattr(comm, name)(x, None, *arguments) is x
