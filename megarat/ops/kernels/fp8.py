"""Triton kernel that writes a matrix in FP8, as it is and transposed, reading it once."""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the Triton language has no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 128


@triton.jit
def _fp8_quantise_kernel(
    x_ptr, largest_ptr, rows_ptr, columns_ptr, scale_ptr, M, N, x_m, smallest,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    largest = tl.maximum(tl.load(largest_ptr), smallest)
    first_m, first_n = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1).to(tl.int64) * BN
    if (first_m == 0) & (first_n == 0):  # not a number stays one: tl.maximum would drop it
        tl.store(scale_ptr, tl.where(tl.load(largest_ptr) >= 0, largest, float("nan")) / LIMIT)
    m_M, n_N = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    inside = (m_M < M)[:, None] & (n_N < N)[None, :]
    x_MN = tl.load(x_ptr + m_M[:, None] * x_m + n_N[None, :], mask=inside, other=0.0).to(tl.float32) * (LIMIT / largest)
    x_MN = tl.minimum(tl.maximum(x_MN, -LIMIT), LIMIT)
    if ROWS:
        tl.store(rows_ptr + m_M[:, None] * N + n_N[None, :], x_MN.to(rows_ptr.dtype.element_ty), mask=inside)
    if COLUMNS:
        x_NM = tl.trans(x_MN.to(columns_ptr.dtype.element_ty))
        tl.store(columns_ptr + n_N[:, None] * M + m_M[None, :], x_NM, mask=tl.trans(inside))


def quantise(
    x_MN: Tensor, dtype: torch.dtype, largest: Tensor, smallest: float, rows: bool, columns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Launches the kernel: FP8 (M, N), FP8 (N, M), and the fp32 scalar scale, given the largest magnitude (fp32 scalar)."""
    if x_MN.stride(-1) != 1:
        x_MN = x_MN.contiguous()
    m, n = x_MN.shape
    rows_MN = torch.empty(m, n, dtype=dtype, device=x_MN.device) if rows else None
    columns_NM = torch.empty(n, m, dtype=dtype, device=x_MN.device) if columns else None
    scale = torch.empty((), dtype=torch.float32, device=x_MN.device)
    written = rows_MN if rows_MN is not None else columns_NM
    _fp8_quantise_kernel[(triton.cdiv(m, TILE_ROWS), triton.cdiv(n, TILE_COLUMNS))](
        x_MN, largest, written if rows_MN is None else rows_MN, written if columns_NM is None else columns_NM, scale, m, n, x_MN.stride(0),
        smallest, LIMIT=torch.finfo(dtype).max, ROWS=rows, COLUMNS=columns, BM=TILE_ROWS, BN=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    return rows_MN, columns_NM, scale
