"""Collectives with gradients, as named conjugate pairs: the backward of each is the forward of its partner.

    copy_to            x on every rank -> the same x          backward: sum over ranks      (partner: reduce_from)
    reduce_from        partial sums -> their sum              backward: the same gradient   (partner: copy_to)
    gather_along       a slice of ``dim`` -> all of it        backward: sum, keep own slice (partner: reduce_scatter_along)
    reduce_scatter_along  partial sums -> own slice of sum    backward: gather the slices   (partner: gather_along)
    swap_slices        own slice of one dim, all of another -> the reverse          (its own partner, dims exchanged)
    to_next            x goes to the next rank, the first gets zeros                backward: to the rank before

The group is an argument; ``None`` and a group of one rank are the identity, without a branch in the caller. n below is the group's size
and |x| the bytes of the whole tensor; every rank sends about what is named. ``start_*`` are collectives without gradients that run while
the caller computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from megarat.errors import ToldByFirstRank, UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The ranks that share something; without a group, this process alone."""

    group: ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return size(self.group)

    @property
    def rank(self) -> int:
        """This one's number among them."""
        return rank(self.group)


def size(group: ProcessGroup | None) -> int:
    """Ranks of a group; None is this process alone."""
    return 1 if group is None else group.size()


def rank(group: ProcessGroup | None) -> int:
    """This process' number within a group."""
    return 0 if group is None else group.rank()


def copy_to(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Enter a region where each rank computes a part. Forward free; backward all-reduces, 2 |x| (n-1)/n."""
    return x if size(group) == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Leave such a region: the ranks' partial sums are added. Forward all-reduces, 2 |x| (n-1)/n; backward free."""
    return x if size(group) == 1 else _ReduceFrom.apply(x, group)


def gather_along(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """Concatenate the ranks' slices along ``dim``. |x| (n-1)/n either way."""
    return x if size(group) == 1 else _GatherAlong.apply(x, group, dim)


def reduce_scatter_along(x: Tensor, group: ProcessGroup | None, dim: int) -> Tensor:
    """Add the ranks' partial sums and keep this rank's slice of ``dim``. |x| (n-1)/n either way."""
    return x if size(group) == 1 else _ReduceScatterAlong.apply(x, group, dim)


def swap_slices(x: Tensor, group: ProcessGroup | None, split: int, join: int) -> Tensor:
    """Cut ``split`` over the ranks and join ``join``, of which each rank held a slice. |x| (n-1)/n^2 either way (all-to-all)."""
    return x if size(group) == 1 else _SwapSlices.apply(x, group, split, join)


def to_next(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Hand x on: each rank gets that of the rank before it, the first one zeros. |x| either way, x one rank's."""
    return torch.zeros_like(x) if group is None or size(group) == 1 else _ToNext.apply(x, group)


# ---- the forwards, without gradients ----------------------------------------------------------------------------------------------


def summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A new tensor: the sum of the ranks' x."""
    total = x.clone(memory_format=torch.contiguous_format)
    if size(group) > 1:
        distributed.all_reduce(total, group=group)
    return total


class Pending(NamedTuple):
    """A tensor on its way."""

    result: Tensor
    source: Tensor  # kept until the collective has read it
    work: Any

    def wait(self) -> Tensor:
        """The result; on a GPU what is launched from now on waits for it, not the process."""
        self.work.wait()
        return self.result


def start_gather(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to concatenate the ranks' x along its first dim."""
    x = x.contiguous()
    whole = x.new_empty((size(group) * x.shape[0], *x.shape[1:]))
    return Pending(whole, x, distributed.all_gather_into_tensor(whole, x, group=group, async_op=True))


def start_reduce_scatter(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to add the ranks' x, of which this rank keeps its slice of the first dim."""
    x = x.contiguous()
    own = x.new_empty((x.shape[0] // size(group), *x.shape[1:]))
    return Pending(own, x, distributed.reduce_scatter_tensor(own, x, group=group, async_op=True))


def start_sum_(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to replace a contiguous x by the sum of the ranks' x."""
    return Pending(x, x, distributed.all_reduce(x, group=group, async_op=True))


def _gathered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    slices = start_gather(x[None], group).wait()
    return slices.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scattered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    slices = x.unflatten(dim, (size(group), -1)).movedim(dim, 0)
    return start_reduce_scatter(slices, group).wait()[0]


def _swapped(x: Tensor, group: ProcessGroup, split: int, join: int) -> Tensor:
    slices = x.unflatten(split, (size(group), -1)).movedim(split, 0).contiguous()
    received = torch.empty_like(slices)
    distributed.all_to_all_single(received, slices, group=group)
    return received.movedim(0, join).flatten(join, join + 1)


def _handed_on(x: Tensor, group: ProcessGroup, by: int) -> Tensor:
    """Each rank's x to the rank ``by`` further on; zeros where none comes."""
    sent, received = [0] * size(group), [0] * size(group)
    target, source = rank(group) + by, rank(group) - by
    if 0 <= target < size(group):
        sent[target] = x.numel()
    if 0 <= source < size(group):
        received[source] = x.numel()
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    distributed.all_to_all_single(
        result.flatten()[: sum(received)], x.contiguous().flatten()[: sum(sent)], received, sent, group=group
    )
    return result


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        """The same values."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Each rank saw a part of what x was used for: the sum is the whole gradient."""
        return summed(gradient, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        """The sum over ranks."""
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Every rank's summand has the gradient of the sum."""
        return gradient, None


class _GatherAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        """The whole of ``dim``."""
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """What all ranks did with this rank's slice."""
        return _reduce_scattered(gradient, ctx.group, ctx.dim), None, None


class _ReduceScatterAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        """This rank's slice of the sum."""
        ctx.group, ctx.dim = group, dim
        return _reduce_scattered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Every rank's summand has the gradient of the whole sum."""
        return _gathered(gradient, ctx.group, ctx.dim), None, None


class _SwapSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, split: int, join: int) -> Tensor:
        """Slices of ``split`` go out, slices of ``join`` come in."""
        ctx.group, ctx.split, ctx.join = group, split, join
        return _swapped(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The same with the dims exchanged."""
        return _swapped(gradient, ctx.group, ctx.join, ctx.split), None, None, None


class _ToNext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        """What the rank before has."""
        ctx.group = group
        return _handed_on(x, group, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """What the next rank did with it."""
        return _handed_on(gradient, ctx.group, -1), None


# ---- agreement between processes ----------------------------------------------------------------------------------------------------


def first_decides(decide: Callable[[], Result], group: ProcessGroup | None) -> Result:
    """What ``decide`` returns on the first rank, on every rank (a pickled broadcast).

    A ``UserError`` there is raised there, and as ``ToldByFirstRank`` elsewhere. All ranks call it.
    """
    if size(group) == 1:
        return decide()
    told: list[Any] = [None, None]
    if rank(group) == 0:
        try:
            told[0] = decide()
        except UserError as error:
            told[1] = error
    distributed.broadcast_object_list(told, group=group, group_src=0)
    if told[1] is not None:
        raise told[1] if rank(group) == 0 else ToldByFirstRank(str(told[1]))
    return told[0]  # type: ignore[no-any-return]


def gather_objects(value: Result, group: ProcessGroup | None) -> list[Result]:
    """Every rank's value, by rank, on every rank (pickled)."""
    if size(group) == 1:
        return [value]
    values: list[Any] = [None] * size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def sum_wrapped(value: int, group: ProcessGroup | None, device: torch.device) -> int:
    """The ranks' sum modulo 2**64 of integers in [0, 2**64). All-reduces 8 bytes: the group's backend sets the device."""
    if size(group) == 1:
        return value
    signed = value - (1 << 64) if value >= 1 << 63 else value
    total = torch.tensor(signed, dtype=torch.int64, device=device)  # int64 additions wrap, as the sum shall
    distributed.all_reduce(total, group=group)
    return int(total) % (1 << 64)


def any_flags(flags: Sequence[bool], group: ProcessGroup | None, device: torch.device) -> list[bool]:
    """Which of the (at most four) flags are set on one of the (fewer than 65536) ranks. All-reduces 8 bytes."""
    total = sum_wrapped(sum(int(flag) << 16 * place for place, flag in enumerate(flags)), group, device)
    return [bool(total >> 16 * place & 0xFFFF) for place in range(len(flags))]
