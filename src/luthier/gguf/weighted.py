"""The block formats with an importance matrix: the error of every weight counts by how strongly its input column is used.

A quantiser takes float32 ``[B, n]`` blocks, the importance of every weight of the same shape, and the mean square
``[B]`` that llama.cpp adds to each weight's own square: of its row for the formats of 32, of its superblock for those
of 256. It gives uint8 ``[B, bytes of a block]``. See ``blocks.py`` and ``kquants.py`` for layout and rounding.
"""

from __future__ import annotations

import numpy as np
import torch

from luthier.gguf.blocks import fifth_bits, groups_of, half_bytes, loops, nibbles, ordered_sum
from luthier.gguf.fits import (
    SMALLEST,
    divided,
    exchange,
    first_codes,
    first_codes_above,
    fit_symmetric,
    fit_with_offset,
    nearest,
)
from luthier.gguf.kquants import store_q2_k, store_q3_k, store_q4_k, store_q5_k, store_q6_k

NO_LIMIT = 1 << 30


def _error_weights(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """importance * sqrt(mean square + weight squared); ``x`` and ``importance`` are ``[n, G]``, ``mean_square`` ``[G]``."""
    return importance * (mean_square + x * x).double().sqrt().float()  # float64: see kquants


def _grouped(
    x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of ``size`` weights ``[size, G]`` and the weights of their errors, of the same shape."""
    groups = groups_of(x, size)
    return groups, _error_weights(groups, groups_of(importance, size), mean_square.repeat_interleave(x.shape[1] // size))


def fit_scales(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative ``[n, G]`` as scale ``[G]`` times codes int32 0..levels ``[n, G]``, with the least weighted error."""
    zero = ~(x.amax(0) >= SMALLEST)
    tops = [float(levels)]
    tops += [float(np.float32(0.1) * np.float32(step) + np.float32(levels)) for step in range(-4, 5) if step]
    search = getattr(loops(x), "search_scales", None) or _search_scales
    codes, sum_xl, sum_l2 = search(x, weights, levels, tops, SMALLEST)
    sum_xl, sum_l2 = exchange(x, weights, -NO_LIMIT, levels, codes, sum_xl, sum_l2, need_rest=True)
    scale = torch.where((sum_l2 > 0) & ~zero, sum_xl / sum_l2, torch.zeros_like(sum_xl))
    return scale, torch.where(zero, torch.zeros_like(codes), codes).to(torch.int32)


def _search_scales(
    x: torch.Tensor, weights: torch.Tensor, levels: int, tops: list[float], smallest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes ``[n, G]`` of the best of the grids from 0 to ``tops``, and their two sums, see ``fits.exchange``."""
    top = x.amax(0)
    top = torch.where(top >= smallest, top, torch.ones_like(top))

    def error(grid: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        gap = x - divided(1.0, grid) * codes.float()
        return ordered_sum((weights * gap) * gap)

    grid = divided(tops[0], top)
    best = error(grid, nearest(grid * x) & 255)
    for numerator in tops[1:]:
        other = divided(numerator, top)
        new_error = error(other, nearest(other * x).clamp_max(levels))
        better = new_error < best
        best, grid = torch.where(better, new_error, best), torch.where(better, other, grid)
    codes = nearest(grid * x).clamp_max(levels)
    sum_xl = ordered_sum((weights * x) * codes.float())
    sum_l2 = ordered_sum((weights * codes.float()) * codes.float())
    return (codes & 255).float(), sum_xl, sum_l2


def _fit_superblock(
    x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor, size: int, levels: int, scale_levels: int
) -> tuple[torch.Tensor, ...]:
    """The first pass of Q2_K, Q4_K and Q5_K: what their ``store_`` functions take."""
    groups, weights = _grouped(x, importance, mean_square, size)
    fit = fit_with_offset(groups, weights, levels, -0.9, 0.05, 36)
    per_block = x.shape[1] // size
    total = groups_of(ordered_sum(weights), per_block)
    scale, scale_codes = fit_scales(groups_of(fit.scale, per_block), total, scale_levels)
    low, low_codes = fit_scales(groups_of(fit.low, per_block), total, scale_levels)
    return groups, fit, scale, scale_codes.t().contiguous(), low, low_codes.t().contiguous()


def quantize_q2_k(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    return store_q2_k(*_fit_superblock(x, importance, mean_square, 16, 3, 15))


def quantize_q4_k(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    return store_q4_k(*_fit_superblock(x, importance, 2 * mean_square, 32, 15, 63))


def quantize_q5_k(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    groups, fit, scale, scale_codes, low, low_codes = _fit_superblock(x, importance, 2 * mean_square, 32, 31, 63)
    return store_q5_k(groups, fit, scale, (scale_codes & 255).clamp_max(63), low, (low_codes & 255).clamp_max(63))


def quantize_q3_k(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    groups, weights = _grouped(x, importance, 2 * mean_square, 16)
    scale, grid = fit_symmetric(groups, weights, 4)
    scales = groups_of(scale, 16)
    block_scale, block_grid = fit_symmetric(scales, groups_of(ordered_sum(weights), 16), 32)
    codes = first_codes(scales, block_grid, 32).t().contiguous()
    groups = x.reshape(-1, 16)
    return store_q3_k(groups, lambda: first_codes(groups, grid[:, None], 4).to(torch.uint8), block_scale, codes)


def quantize_q6_k(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    groups = groups_of(x, 16)
    return store_q6_k(x, *fit_symmetric(groups, groups_of(importance, 16), 32))


def _symmetric_codes(
    x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, weights = _grouped(x, importance, mean_square, 32)
    scale, grid = fit_symmetric(groups, weights, levels)
    return scale, first_codes(groups, grid, levels).to(torch.uint8).t().contiguous()


def _offset_codes(
    x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups, weights = _grouped(x, importance, mean_square, 32)
    fit = fit_with_offset(groups, weights, levels, -0.9, 0.05, 36)
    codes = first_codes_above(groups, fit, levels)
    return fit.scale, -fit.low, codes.to(torch.uint8).t().contiguous()


def quantize_q4_0(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(x, importance, mean_square, 8)
    return torch.cat([half_bytes(scale), nibbles(codes)], 1)


def quantize_q5_0(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric_codes(x, importance, mean_square, 16)
    return torch.cat([half_bytes(scale), fifth_bits(codes), nibbles(codes)], 1)


def quantize_q4_1(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    scale, low, codes = _offset_codes(x, importance, mean_square, 15)
    return torch.cat([half_bytes(scale, low), nibbles(codes)], 1)


def quantize_q5_1(x: torch.Tensor, importance: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    scale, low, codes = _offset_codes(x, importance, mean_square, 31)
    return torch.cat([half_bytes(scale, low), fifth_bits(codes), nibbles(codes)], 1)
