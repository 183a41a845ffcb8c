"""Dropout that keeps no mask: which elements are dropped is a function of a seed and of where they stand.

    kept[i, j] = bits(seed, i, j) >= p

The bits are Philox 4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): key = seed, counter = (i, j mod Q,
0, 0), whose four outputs serve four columns, Q = ceil(columns / 4) apart. Nothing is scaled by 1 / (1 - p) here: the caller
has a factor to put it in, and so the kept values stay what they were to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, tl, triton

ROUNDS = 7  # the fewest that pass BigCrush
ROUND_A, ROUND_B, KEY_A, KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
BITS = 24  # of each output that are compared with p
TILE = 256  # columns of each quarter that a program handles, in as many rows as fill it
ROWS = 8


@dataclass(frozen=True)
class Dropout:
    """Drop each element with probability ``p``; ``seed`` below 2^63."""

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> Dropout:
        """One with a seed from torch's own generator, so that ``torch.manual_seed`` makes a run repeat."""
        return cls(p, int(torch.randint(1 << 62, (), device="cpu")))

    @property
    def threshold(self) -> int:
        return round(self.p * (1 << BITS))


def philox(seed: int, row: Tensor, column: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32 random bits for each pair of ``row`` and ``column`` (int64, broadcast)."""
    a, b, c, d = row, column, torch.zeros_like(row), torch.zeros_like(row)
    key, other_key = seed & LOW, seed >> 32
    for _ in range(rounds):
        left, right = a * ROUND_A, c * ROUND_B  # 64 bits each, the upper half signed
        a, b, c, d = (right >> 32 & LOW) ^ b ^ key, right & LOW, (left >> 32 & LOW) ^ d ^ other_key, left & LOW
        key, other_key = key + KEY_A & LOW, other_key + KEY_B & LOW
    return a, b, c, d


def kept_reference(rows: int, columns: int, dropout: Dropout, first_row: int = 0, device: torch.device | None = None) -> Tensor:
    """Which elements of a (rows, columns) matrix, whose first row is number ``first_row``, are kept: bool."""
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    column = torch.arange(-(-columns // 4), device=device)[None, :]
    bits = torch.cat([part.expand(rows, column.shape[1]) for part in philox(dropout.seed, row, column)], dim=1)
    return (bits[:, :columns] >> 32 - BITS) >= dropout.threshold


def drop(x: Tensor, dropout: Dropout, first_row: int = 0) -> Tensor:
    """x (N, K) with zeros where it is dropped, as new memory; rows of x may be further apart than K."""
    if not has_kernels(x):
        return x * kept_reference(*x.shape, dropout, first_row, x.device)
    return launch(x, None, dropout, first_row, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def add_dropped_(total: Tensor, x: Tensor, dropout: Dropout, first_row: int = 0) -> Tensor:
    """total += drop(x), both (N, K), in ``total``."""
    if not has_kernels(x):
        return total.add_(drop(x, dropout, first_row))
    return launch(x, total, dropout, first_row, total)


def launch(x: Tensor, total: Tensor | None, dropout: Dropout, first_row: int, out: Tensor) -> Tensor:
    rows, columns = x.shape
    quarter = triton.cdiv(columns, 4)
    added = x if total is None else total
    _dropout_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(quarter, TILE))](
        x, added, out, dropout.seed, dropout.threshold, first_row, rows, columns, quarter, x.stride(0), added.stride(0),
        out.stride(0), ADDS=total is not None, ROUNDS=ROUNDS, SHIFT=32 - BITS, ROWS=ROWS, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return out


@jit
def _dropout_kernel(
    X, TOTAL, OUT, seed, threshold, first_row, rows, columns, quarter, stride_x, stride_total, stride_out,
    ADDS: tl.constexpr, ROUNDS: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    zero = (row + column) * 0
    bits = tl.philox(seed, row + first_row + zero, column + zero, zero, zero, ROUNDS)
    row = row.to(tl.int64)
    for part in tl.static_range(4):
        at = column + part * quarter
        inside = (row < rows) & (column < quarter) & (at < columns)
        value = tl.load(X + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where((bits[part] >> SHIFT).to(tl.int32) >= threshold, value, 0.0)
        if ADDS:
            value += tl.load(TOTAL + row * stride_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + row * stride_out + at, value.to(OUT.dtype.element_ty), mask=inside)
