"""What adapters add around the products of ``lora_linear``, each in one pass over what is wide."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.ops.backend import jit, power_of_2, side_by_side, tl, triton

TILE_ROWS, TILE_COLUMNS = 64, 1024  # of B and A that one program copies
GRADIENT_ROWS = 16, 32  # of a gradient that one program extends, and where there are many: each of them reads all of B
MANY = 8192
SUM_TILE = 64, 64  # rows and columns that one program adds to
WIDEST = 128  # ranks that the kernels with products in them hold


def launch_adapter(
    a: Tensor | None, b: Tensor | None, bias: Tensor | None, columns: Tensor, rows: Tensor, rank_start: int, bias_column: int
) -> None:
    """columns (N, E) and rows (r, K), which may be views of one buffer, become [0 | b | 0 | bias | 0] and a."""
    (height, extension), rank = columns.shape, 0 if a is None else a.shape[0]
    a, b = (columns, columns) if a is None else (side_by_side(a), side_by_side(b))
    of_b, of_a = triton.cdiv(height, TILE_ROWS), rank * triton.cdiv(rows.shape[1], TILE_COLUMNS)
    _adapter_kernel[(of_b + of_a,)](
        a, b, columns if bias is None else bias, columns, rows, height, rows.shape[1], of_b, rank_start,
        bias_column, a.stride(0), b.stride(0), columns.stride(0), rows.stride(0), RANK=rank, EXTENSION=extension,
        BLOCK=power_of_2(extension), HAS_BIAS=bias is not None, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip


@jit
def _adapter_kernel(
    A, B, BIAS, OUT_COLUMNS, OUT_ROWS, height, width, programs_of_b, rank_start, bias_column, stride_a, stride_b,
    stride_columns, stride_rows, RANK: tl.constexpr, EXTENSION: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs_of_b:
        row, column = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = (row < height)[:, None] & (column < EXTENSION)[None, :]
        value = tl.zeros((ROWS, BLOCK), tl.float32)
        own = column - rank_start
        if RANK > 0:
            mine = inside & ((own >= 0) & (own < RANK))[None, :]
            value += tl.load(B + row[:, None] * stride_b + own[None, :], mask=mine, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(BIAS + row, mask=row < height, other=0.0).to(tl.float32)
            value += tl.where(column == bias_column, 1.0, 0.0)[None, :] * bias[:, None]
        target = OUT_COLUMNS + row.to(tl.int64)[:, None] * stride_columns + column[None, :]
        tl.store(target, value.to(OUT_COLUMNS.dtype.element_ty), mask=inside)
    elif RANK > 0:
        blocks = tl.cdiv(width, COLUMNS)
        rank = ((program - programs_of_b) // blocks).to(tl.int64)
        at = (program - programs_of_b) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        copied = tl.load(A + rank * stride_a + at, mask=at < width, other=0.0)
        tl.store(OUT_ROWS + rank * stride_rows + at, copied.to(OUT_ROWS.dtype.element_ty), mask=at < width)


def launch_gradient(grad: Tensor, b: Tensor, alpha: float, scale: float, wide: Tensor) -> Tensor:
    """``wide`` (n, N + R) becomes [alpha grad | s alpha grad @ b | 0], which gives the second; reads ``grad`` (n, N) once."""
    (rows, width), rank = grad.shape, b.shape[1]
    low = torch.empty(rows, rank, dtype=grad.dtype, device=grad.device)
    block, own = power_of_2(max(16, wide.shape[1] - width)), GRADIENT_ROWS[rows >= MANY]
    _gradient_kernel[(triton.cdiv(rows, own),)](
        grad, b, wide, low, rows, width, grad.stride(0), b.stride(0), wide.stride(0), alpha, scale,
        COPIES=alpha != 1.0 or wide.data_ptr() != grad.data_ptr(), RANK=rank, EXTENSION=wide.shape[1] - width,
        RANK_BLOCK=block, ROWS=own, COLUMNS=min(256, 8192 // (block * grad.element_size())), num_warps=4,
    )  # fmt: skip
    return low


@jit
def _gradient_kernel(
    GRAD, B, WIDE, LOW, rows, width, stride_grad, stride_b, stride_wide, alpha, scale, COPIES: tl.constexpr,
    RANK: tl.constexpr, EXTENSION: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, rank = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, RANK_BLOCK)
    low = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(GRAD + row[:, None] * stride_grad + column[None, :], mask=inside, other=0.0)
        if COPIES:
            grad = (grad.to(tl.float32) * alpha).to(WIDE.dtype.element_ty)
            tl.store(WIDE + row[:, None] * stride_wide + column[None, :], grad, mask=inside)
        mine = (column < width)[:, None] & (rank < RANK)[None, :]
        b = tl.load(B + column.to(tl.int64)[:, None] * stride_b + rank[None, :], mask=mine, other=0.0)
        low = tl.dot(grad, b, low, input_precision="ieee")
    value = (low * scale).to(LOW.dtype.element_ty)
    extension = WIDE + row[:, None] * stride_wide + width + rank[None, :]
    tl.store(extension, value, mask=(row < rows)[:, None] & (rank < EXTENSION)[None, :])
    tl.store(LOW + row[:, None] * RANK + rank[None, :], value, mask=(row < rows)[:, None] & (rank < RANK)[None, :])


def launch_sum(residual: Tensor, low: Tensor, b: Tensor, alpha: float) -> Tensor:
    """residual (n, N) + alpha * low (n, R) @ b.T (N, R), in one pass."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    (rows, width), rank = out.shape, b.shape[1]
    grid = triton.cdiv(rows, SUM_TILE[0]), triton.cdiv(width, SUM_TILE[1])
    _sum_kernel[grid](
        residual, low, b, out, rows, width, residual.stride(0), low.stride(0), b.stride(0), alpha, RANK=rank,
        RANK_BLOCK=power_of_2(max(16, rank)), ROWS=SUM_TILE[0], COLUMNS=SUM_TILE[1], num_warps=4,
    )  # fmt: skip
    return out


@jit
def _sum_kernel(
    RESIDUAL, LOW, B, OUT, rows, width, stride_residual, stride_low, stride_b, alpha,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column, rank = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK_BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    low_at, b_at = row[:, None] * stride_low + rank[None, :], column.to(tl.int64)[:, None] * stride_b + rank[None, :]
    low = tl.load(LOW + low_at, mask=(row < rows)[:, None] & (rank < RANK)[None, :], other=0.0)
    b = tl.load(B + b_at, mask=(column < width)[:, None] & (rank < RANK)[None, :], other=0.0)
    added = tl.dot(low, tl.trans(b), input_precision="ieee") * alpha
    residual = tl.load(RESIDUAL + row[:, None] * stride_residual + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row[:, None] * width + column[None, :], (residual + added).to(OUT.dtype.element_ty), mask=inside)
