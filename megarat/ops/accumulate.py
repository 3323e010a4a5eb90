"""Adding a gradient to its fp32 sum: total += x, in one pass over both.

torch does the same, but where the dtypes differ by a kernel that loads element by element: at about half of the memory's rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarat.ops.dispatch import choose_backend


@torch.no_grad()
def accumulate_(total: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """total += x, in place; both contiguous and of one number of elements, of any float dtypes.

    backend: "triton", "reference" or None to choose (see ops.dispatch).
    """
    if total.numel() != x.numel() or not (total.is_contiguous() and x.is_contiguous()):
        raise ValueError(f"accumulate_: {tuple(total.shape)} += {tuple(x.shape)}; both must be contiguous and of one size")
    unsupported = "an input is float64" if torch.float64 in (total.dtype, x.dtype) else None
    if choose_backend("accumulate_", backend, x, unsupported) == "reference":
        return total.add_(x.view(total.shape))
    from megarat.ops.kernels.accumulate import launch

    launch(total, x)
    return total
