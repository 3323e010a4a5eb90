"""A fused projection used in parts, and its gradient put together without copying.

    o, q, k, v, g = parts(fused, 5)           views of (B, T, 5 C)

Autograd would make the gradients of the parts one by one and then copy them all into one tensor, 20 bytes an element of (B, T, C). Here
an operation that makes the gradient of a part asks for memory by ``GradientPlace.of(part).claimed().empty()``: where the part belongs to
a fused tensor, that is its slice of the whole gradient. What came from elsewhere, or is a sum of several gradients, is copied as before.

Shapes: B batch, T length, H heads, K head channels, C = H K, X all channels of the fused tensor.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from megarat.ops.dispatch import choose_backend


class _Whole:
    """The gradient of one fused tensor; its memory is made when the first part of it is."""

    def __init__(self, fused_BTX: Tensor, count: int) -> None:
        self.shape, self.dtype, self.device = fused_BTX.shape, fused_BTX.dtype, fused_BTX.device
        self.width = fused_BTX.shape[-1] // count
        self.first = int(fused_BTX.storage_offset())
        self.storage = StorageWeakRef(fused_BTX.untyped_storage())  # keeps the storage's identity, not its memory
        self.forget()

    def forget(self) -> None:
        """The gradient of the last backward, which is its caller's now."""
        self.backward = -1
        self.gradient: Tensor | None = None
        self.claimed: set[int] = set()

    def claim(self, offset: int) -> bool:
        """Whether the part there has no gradient yet in the backward that runs."""
        self._begin()
        if offset in self.claimed:
            return False
        self.claimed.add(offset)
        return True

    def buffer(self) -> Tensor:
        """Uninitialised, contiguous, of the fused tensor's shape."""
        self._begin()
        if self.gradient is None:
            self.gradient = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.gradient

    def _begin(self) -> None:
        """What a backward left that never came to the fused tensor (`autograd.grad` of a part) belongs to whoever asked for it."""
        running = torch._C._current_graph_task_id()
        if running != self.backward:
            self.forget()
            self.backward = running


# The fused tensors whose parts are in use, by the identity of their storage. Each graph that may run backward owns its entry's value; when
# it is gone, so is the entry.
_in_use: weakref.WeakValueDictionary[int, _Whole] = weakref.WeakValueDictionary()


class GradientPlace(NamedTuple):
    """Where the gradient of a tensor (B, T, H, K) shall lie: one row of H K contiguous channels a token, ``row_stride`` elements apart."""

    like_BTHK: torch.Size
    dtype: torch.dtype
    device: torch.device
    row_stride: int
    offset: int = 0
    whole: _Whole | None = None

    @classmethod
    def of(cls, x_BTHK: Tensor) -> GradientPlace:
        """The slice of a whole gradient if ``x`` is a part of a fused tensor, else memory of its own."""
        _, length, heads, channels = x_BTHK.shape
        alone = cls(x_BTHK.shape, x_BTHK.dtype, x_BTHK.device, heads * channels)
        whole = _in_use.get(x_BTHK.untyped_storage()._cdata)
        row = x_BTHK.stride(1)
        is_part = x_BTHK.stride() == (length * row, row, channels, 1)
        if whole is None or not is_part or (x_BTHK.dtype, row, heads * channels) != (whole.dtype, whole.shape[-1], whole.width):
            return alone
        return alone._replace(row_stride=row, offset=int(x_BTHK.storage_offset()) - whole.first, whole=whole)

    def alone(self) -> GradientPlace:
        """The same tensor with memory of its own."""
        return self._replace(row_stride=self.like_BTHK[2] * self.like_BTHK[3], whole=None)

    def claimed(self) -> GradientPlace:
        """This place for one gradient of the backward that runs; for a second one of the same part memory of its own: autograd adds both."""
        return self if self.whole is not None and self.whole.claim(self.offset) else self.alone()

    def empty(self) -> Tensor:
        """The memory, uninitialised."""
        if self.whole is None:
            return torch.empty(self.like_BTHK, dtype=self.dtype, device=self.device)
        _, length, _, channels = self.like_BTHK
        stride = (length * self.row_stride, self.row_stride, channels, 1)
        return self.whole.buffer().as_strided(self.like_BTHK, stride, self.offset)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused_BTX: Tensor, count: int) -> tuple[Tensor, ...]:
        """Views."""
        ctx.whole = _in_use[fused_BTX.untyped_storage()._cdata] = _Whole(fused_BTX, count)
        ctx.set_materialize_grads(False)
        return fused_BTX.chunk(count, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        """The whole gradient, of which most parts are in place."""
        whole_BTX = ctx.whole.buffer()
        ctx.whole.forget()
        for place, gradient in zip(whole_BTX.chunk(len(gradients), dim=-1), gradients, strict=True):
            if gradient is None:
                place.zero_()
            elif gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride():
                place.copy_(gradient)
        return whole_BTX, None


def parts(fused_BTX: Tensor, count: int, *, backend: str | None = None) -> tuple[Tensor, ...]:
    """``count`` equal slices of the last axis of (B, T, X), as views (B, T, X / count).

    backend: "triton" (the kernels write gradients in place), "reference" (autograd's own way) or None to choose (see ops.dispatch).
    """
    in_place = choose_backend("parts", backend, fused_BTX, None) == "triton"
    if not (in_place and torch.is_grad_enabled() and fused_BTX.requires_grad):
        return fused_BTX.chunk(count, dim=-1)
    pieces: tuple[Tensor, ...] = _Parts.apply(fused_BTX.contiguous(), count)
    return pieces
