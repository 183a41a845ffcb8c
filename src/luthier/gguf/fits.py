"""The searches at the heart of the block formats: the scale, or scale and offset, that stores a group with least error.

The torch code is the reference and runs everywhere; the same loops run as kernels on a GPU (``kernels.py``), and compiled
on the CPU where numba is installed (``compiled.py``). All take groups as ``[n, G]``: n weights of G groups, see ``blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from luthier.gguf.blocks import groups_of, largest, loops, ordered_sum, smallest

EXCHANGES = 5
SMALLEST = 1e-15  # a group whose largest weight is below this is stored as zeros
LARGEST_ROUNDED = float(1 << 22)  # up to here `nearest` is the nearest integer


@dataclass
class OffsetFit:
    """weight ~ scale * code - low, for G groups; ``grid``/``start`` are how the best codes were rounded."""

    scale: torch.Tensor
    low: torch.Tensor  # >= 0: minus the smallest weight
    grid: torch.Tensor  # codes of the first pass are round(grid * (weight - start))
    start: torch.Tensor


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Round to int32, halves to even, by adding 1.5 * 2**23 as llama.cpp does: beyond 2**22 it wraps as theirs does.

    NaN gives 0 that way on a CPU. A GPU's NaN has other bits.
    """
    codes = ((x + 12582912.0).view(torch.int32) & 0x007FFFFF) - 0x00400000
    return codes.masked_fill_(x.isnan(), 0) if x.is_cuda else codes


def _round(x: torch.Tensor, lowest: int, highest: int, widest: torch.Tensor) -> None:
    """`nearest` within bounds, in place; ``widest``: the largest magnitudes in ``x``, where weights near 1e38 may overflow."""
    if widest.amax() <= LARGEST_ROUNDED:
        x.round_().clamp_(lowest, highest)
    else:
        x.copy_(nearest(x).clamp_(lowest, highest))


def _step(first: float, width: float, step: int, levels: int) -> float:
    """``first + width * step + levels`` in float32, rounded after each operation."""
    return float(np.float32(first) + np.float32(width) * np.float32(step) + np.float32(levels))


def divided(number: float, by: torch.Tensor) -> torch.Tensor:
    return torch.full_like(by, number) / by


def fit_with_offset(
    x: torch.Tensor, weights: torch.Tensor, levels: int, first: float, width: float, steps: int, absolute: bool = False
) -> OffsetFit:
    """Scale and offset of every group of ``x`` ``[n, G]`` that store it with codes 0..levels and the least weighted error.

    Tries ``steps + 1`` grids, a little coarser and finer than from smallest to largest weight, and for each the best line
    through the codes it gives. ``absolute``: of the error itself, not of its square. An accepted offset also moves the
    grids that are tried later.
    """
    tops = [float(levels), *(_step(first, width, step, levels) for step in range(steps + 1))]
    if faster := loops(x):
        return OffsetFit(*faster.fit_with_offset(x, weights, levels, tops, absolute))
    lowest = x.amin(0)
    if (lowest == 0).any():  # of 0.0 and -0.0 the first: the sign is stored
        lowest = smallest(x)
    low = torch.where(lowest > 0, torch.zeros_like(lowest), lowest)
    high = x.amax(0)
    flat = high == low
    sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)
    codes, term, product = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    def round_with(grid: torch.Tensor, start: torch.Tensor) -> None:
        widest = torch.maximum((lowest - start).abs(), (high - start).abs()).mul_(grid.abs())
        _round(torch.sub(x, start, out=codes).mul_(grid).clamp_min_(0), 0, levels, widest)

    def error(scale: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        torch.mul(codes, scale, out=term).add_(start).sub_(x)
        _ = term.abs_() if absolute else term.mul_(term)
        return ordered_sum(term.mul_(weights))

    def span(start: torch.Tensor) -> torch.Tensor:
        return torch.where(flat, torch.ones_like(high), high - start)

    grid = divided(tops[0], span(low))
    scale = divided(1.0, grid)
    round_with(grid, low)
    best = error(scale, low)
    best_grid, best_start, offset = grid, low, low
    for top in tops[1:]:
        grid = divided(top, span(offset))
        round_with(grid, offset)
        sum_l = ordered_sum(torch.mul(weights, codes, out=term))
        sum_l2 = ordered_sum(torch.mul(term, codes, out=product))
        sum_xl = ordered_sum(torch.mul(term, x, out=product))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = new_offset > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, new_scale)
        new_offset = torch.where(positive, torch.zeros_like(new_offset), new_offset)
        new_error = error(new_scale, new_offset)
        better = (determinant > 0) & (new_error < best)
        best = torch.where(better, new_error, best)
        scale = torch.where(better, new_scale, scale)
        best_grid, best_start = torch.where(better, grid, best_grid), torch.where(better, offset, best_start)
        offset = torch.where(better, new_offset, offset)
    zero = torch.zeros_like(scale)
    return OffsetFit(
        torch.where(flat, zero, scale),
        -torch.where(flat, low, offset),
        torch.where(flat, zero, best_grid),
        best_start,
    )


def fit_symmetric(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of each group of ``[n, G]`` for codes -levels..levels-1 with the least weighted error.

    Also the grid that gave the best codes, 0 for a group of zeros: `first_codes` turns it into codes.
    """
    tops = [-float(levels), *(-_step(0.0, 0.1, step, levels) for step in range(-9, 10) if step)]
    if faster := loops(x):
        return faster.fit_symmetric(x, weights, levels, tops, SMALLEST)
    magnitude, value = largest(x)
    zero = magnitude < SMALLEST
    value = torch.where(zero, torch.ones_like(value), value)
    weighted = weights * x
    codes, term = torch.empty_like(x), torch.empty_like(x)

    def sums(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.mul(x, grid, out=codes).round_().clamp_(-levels, levels - 1)
        sum_xl = ordered_sum(torch.mul(weighted, codes, out=term))
        return sum_xl, ordered_sum(torch.mul(weights, codes, out=term).mul_(codes))

    best_grid = divided(tops[0], value)
    sum_xl, sum_l2 = sums(best_grid)
    scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, torch.zeros_like(sum_xl))
    best = scale * sum_xl
    for top in tops[1:]:
        grid = divided(top, value)
        sum_xl, sum_l2 = sums(grid)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        new_scale = sum_xl / sum_l2
        scale, best = torch.where(better, new_scale, scale), torch.where(better, new_scale * sum_xl, best)
        best_grid = torch.where(better, grid, best_grid)
    none = torch.zeros_like(scale)
    return torch.where(zero, none, scale), torch.where(zero, none, best_grid)


def first_codes_above(x: torch.Tensor, fit: OffsetFit, levels: int) -> torch.Tensor:
    """Codes int32 0..levels of the first pass."""
    return nearest((fit.grid * (x - fit.start)).clamp_min_(0)).clamp_(0, levels)


def first_codes(x: torch.Tensor, grid: torch.Tensor, levels: int) -> torch.Tensor:
    """Codes int32 0..2*levels-1 of the first pass; zeros are stored as 0, which is not the code of the weight 0."""
    return torch.where(
        grid == 0, torch.zeros_like(x, dtype=torch.int32), nearest(grid * x).clamp_(-levels, levels - 1) + levels
    )


def start_exchange(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First codes -levels..levels-1 (float32 ``[n, G]``) and the two sums of `exchange`, errors weighted by squared weights."""
    magnitude, value = largest(x)
    value = torch.where(magnitude < SMALLEST, torch.ones_like(value), value)
    codes = torch.mul(divided(-float(levels), value), x).round_().clamp_(-levels, levels - 1)
    weights = x * x
    return codes, ordered_sum((weights * x) * codes), ordered_sum((weights * codes) * codes)


def fit_by_exchange(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups ``[G, n]`` as scale ``[G]`` times codes uint8 ``[G, n]`` (0 is -levels), errors weighted by squared weights."""
    if in_one := getattr(loops(x), "fit_by_exchange", None):
        return in_one(x, levels, SMALLEST, EXCHANGES)
    x = groups_of(x, x.shape[1])
    codes, sum_xl, sum_l2 = start_exchange(x, levels)
    sum_xl, sum_l2 = exchange(x, x * x, -levels, levels - 1, codes, sum_xl, sum_l2)
    zero = torch.maximum(x.amax(0), -x.amin(0)) < SMALLEST
    scale = torch.where((sum_l2 > 0) & ~zero, sum_xl / sum_l2, torch.zeros_like(sum_xl))
    return scale, codes.add_(levels).mul_(~zero).to(torch.uint8).t()


def round_symmetric(x: torch.Tensor, step: torch.Tensor, levels: int, first_pass: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Codes uint8 ``[G, n]`` (0 is -levels) of the weights ``[G, n]`` in steps ``[G]``; where that is 0, of the first pass."""
    zero = step == 0
    step = torch.where(zero, torch.ones_like(step), step)
    if in_one := getattr(loops(x), "round_symmetric", None):
        codes = in_one(x, step, levels)
    else:
        codes = (nearest(x / step[:, None]).clamp_(-levels, levels - 1) + levels).to(torch.uint8)
    return torch.where(zero[:, None], first_pass(), codes) if zero.any() else codes


def exchange(
    x: torch.Tensor,
    weights: torch.Tensor,
    lowest: int,
    highest: int,
    codes: torch.Tensor,
    sum_xl: torch.Tensor,
    sum_l2: torch.Tensor,
    need_rest: bool = False,
    rounds: int = EXCHANGES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change one of the ``codes`` (float32 ``[n, G]``, in place) after the other where that lowers the error, for ``rounds``.

    ``sum_xl``, ``sum_l2`` ``[G]``: weighted sums of weight times code and of code squared; gives what they become.
    ``need_rest``: only where the other codes are not all zero.
    """
    if faster := loops(x):
        faster.exchange(x, weights, lowest, highest, need_rest, rounds, codes, sum_xl, sum_l2)
        return sum_xl, sum_l2
    moved = torch.zeros_like(sum_xl, dtype=torch.bool)
    for v, w, code in zip(x, weights, codes, strict=True):
        wv = w * v
        rest_xl, rest_l2 = sum_xl - wv * code, sum_l2 - (w * code).mul_(code)
        new = (v * rest_l2).div_(rest_xl)
        _round(new, lowest, highest, new.abs())
        new_xl, new_l2 = (wv * new).add_(rest_xl), (w * new).mul_(new).add_(rest_l2)
        better = (new_xl * new_xl).mul_(sum_l2) > (sum_xl * sum_xl).mul_(new_l2)
        better &= torch.minimum(rest_xl, rest_l2 if need_rest else new_l2) > 0
        better &= new != code
        code.copy_(torch.where(better, new, code))
        sum_xl, sum_l2 = torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)
        moved |= better
    left = moved.nonzero().squeeze(1)  # what did not move now will not later: most groups are done after one round
    if rounds > 1 and len(left):
        part = codes[:, left]
        sum_xl[left], sum_l2[left] = exchange(
            x[:, left], weights[:, left], lowest, highest, part, sum_xl[left], sum_l2[left], need_rest, rounds - 1
        )
        codes[:, left] = part
    return sum_xl, sum_l2
