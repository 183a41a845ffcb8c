"""The K formats in torch: superblocks of 256 weights, cut into groups with a small scale (and offset) each.

A quantiser takes float32 ``[B, 256]`` and gives uint8 ``[B, bytes]``, bit for bit what llama.cpp writes. How that is
reached, and the layout ``[n, G]`` used inside (n weights of G groups), is told in ``blocks.py``.

Each works in two passes: fit a scale for every group, store the scales themselves in few bits, then round every weight
with the scale as it was stored. A group whose stored scale is 0 keeps the codes of the first pass, as in llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from luthier.gguf.blocks import half_bytes, largest, ordered_sum, ratio, smallest

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
    """Round to int32, halves to even, by adding 1.5 * 2**23 as llama.cpp does: beyond 2**22 it wraps as theirs does."""
    return ((x + 12582912.0).view(torch.int32) & 0x007FFFFF) - 0x00400000


def signed_bytes(codes: torch.Tensor) -> torch.Tensor:
    """What is left of int32 codes when they are kept in an int8."""
    return ((codes + 128) & 255) - 128


def _step(first: float, width: float, step: int, levels: int) -> float:
    """``first + width * step + levels`` in float32, rounded after each operation."""
    return float(np.float32(first) + np.float32(width) * np.float32(step) + np.float32(levels))


def _divided(number: float, by: torch.Tensor) -> torch.Tensor:
    return torch.full_like(by, number) / by


def fit_with_offset(
    x: torch.Tensor, weights: torch.Tensor, levels: int, first: float, width: float, steps: int, absolute: bool = False
) -> OffsetFit:
    """Scale and offset of every group of ``x`` ``[n, G]`` that store it with codes 0..levels and the least weighted error.

    Tries ``steps + 1`` grids, a little coarser and finer than from smallest to largest weight, and for each the best line
    through the codes it gives. ``absolute``: of the error itself, not of its square. An accepted offset also moves the
    grids that are tried later.
    """
    lowest = x.amin(0)
    if (lowest == 0).any():  # of 0.0 and -0.0 the first: the sign is stored
        lowest = smallest(x)
    low = torch.where(lowest > 0, torch.zeros_like(lowest), lowest)
    high = x.amax(0)
    flat = high == low
    sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)
    codes, term, product = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    def round_with(grid: torch.Tensor, start: torch.Tensor) -> None:
        torch.sub(x, start, out=codes).mul_(grid)
        widest = torch.maximum((lowest - start).abs(), (high - start).abs()) * grid.abs()
        if (widest <= LARGEST_ROUNDED).all():
            codes.round_().clamp_(0, levels)
        else:  # weights near the end of float32 overflow the grid
            codes.copy_(nearest(codes).clamp_(0, levels))

    def error(scale: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        torch.mul(codes, scale, out=term).add_(start).sub_(x)
        _ = term.abs_() if absolute else term.mul_(term)
        return ordered_sum(term.mul_(weights))

    def span(start: torch.Tensor) -> torch.Tensor:
        return torch.where(flat, torch.ones_like(high), high - start)

    grid = _divided(float(levels), span(low))
    scale = _divided(1.0, grid)
    round_with(grid, low)
    best = error(scale, low)
    best_grid, best_start, offset = grid, low, low
    for step in range(steps + 1):
        grid = _divided(_step(first, width, step, levels), span(offset))
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


def _positive_maximum(x: torch.Tensor) -> torch.Tensor:
    """The largest of each row of ``[B, k]``, or 0."""
    top = x.amax(1)
    return torch.where(top > 0, top, torch.zeros_like(top))


def _scale_codes(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative scales ``[B, k]`` in 0..levels: their own scale float32 ``[B]`` and the codes int32."""
    top = _positive_maximum(x)
    codes = nearest(ratio(float(levels), top)[:, None] * x) & 255
    return top / torch.full_like(top, float(levels)), torch.where(top[:, None] > 0, codes, torch.zeros_like(codes))


def _pack_6_bit(scales: torch.Tensor, lows: torch.Tensor) -> torch.Tensor:
    """Two times 8 numbers of 6 bits, int32 ``[B, 8]`` each: uint8 ``[B, 12]``."""
    parts = [
        scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
        lows[:, :4] | ((lows[:, 4:] >> 4) << 6),
        (scales[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4),
    ]
    return torch.cat(parts, 1).to(torch.uint8)


def _fit_eight_groups(x: torch.Tensor, levels: int, first: float, steps: int) -> tuple[torch.Tensor, ...]:
    """The first pass of Q4_K and Q5_K: what `store_q4_k` and `store_q5_k` take."""
    groups = x.reshape(-1, 32).t().contiguous()
    # through float64: float32 sqrt of the CPU's vector library is not correctly rounded
    mean_square = ordered_sum(groups * groups) / torch.full_like(groups[0], 32.0)
    fit = fit_with_offset(groups, mean_square.double().sqrt().float() + groups.abs(), levels, first, 0.1, steps)
    scale, scale_codes = _scale_codes(fit.scale.view(-1, 8), 63)
    low, low_codes = _scale_codes(fit.low.view(-1, 8), 63)
    return groups, fit, scale, scale_codes.clamp_max(63), low, low_codes.clamp_max(63)


def round_with_stored(
    groups: torch.Tensor,
    fit: OffsetFit,
    scale: torch.Tensor,
    scale_codes: torch.Tensor,
    low: torch.Tensor,
    low_codes: torch.Tensor,
    levels: int,
) -> torch.Tensor:
    """The second pass: codes uint8 ``[B, 8, 32]``. ``scale``, ``low`` ``[B]``; their codes int32 ``[B, groups of a block]``."""
    step = (scale.half().float()[:, None] * scale_codes.float()).view(-1)
    offset = (low.half().float()[:, None] * low_codes.float()).view(-1)
    zero = step == 0
    codes = nearest((groups + offset) / torch.where(zero, torch.ones_like(step), step)).clamp_(0, levels)
    if zero.any():
        first_pass = nearest(fit.grid * (groups - fit.start)).clamp_(0, levels)
        codes = torch.where(zero, first_pass, codes)
    return codes.to(torch.uint8).t().reshape(-1, 8, 32)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 16, uint8 ``[B, 8, 32]``, of two groups to a byte: uint8 ``[B, 128]``."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(-1, 128)


def _pack_top_bits(codes: torch.Tensor, bit: int) -> torch.Tensor:
    """Bit ``bit`` of uint8 ``[B, 8, 32]``, of eight groups to a byte: uint8 ``[B, 32]``."""
    place = torch.arange(8, device=codes.device, dtype=torch.uint8)[None, :, None]
    return (((codes >> bit) & 1) << place).sum(1, dtype=torch.uint8)


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 4, uint8 ``[B, 8, 32]``, of four groups to a byte: uint8 ``[B, 64]``."""
    q = codes.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)).reshape(-1, 64)


def quantize_q4_k(x: torch.Tensor) -> torch.Tensor:
    return store_q4_k(*_fit_eight_groups(x, 15, -1.0, 20))


def store_q4_k(groups, fit, scale, scale_codes, low, low_codes) -> torch.Tensor:
    codes = round_with_stored(groups, fit, scale, scale_codes, low, low_codes, 15)
    return torch.cat([half_bytes(scale, low), _pack_6_bit(scale_codes, low_codes), _pack_nibbles(codes)], 1)


def quantize_q5_k(x: torch.Tensor) -> torch.Tensor:
    return store_q5_k(*_fit_eight_groups(x, 31, -0.5, 15))


def store_q5_k(groups, fit, scale, scale_codes, low, low_codes) -> torch.Tensor:
    codes = round_with_stored(groups, fit, scale, scale_codes, low, low_codes, 31)
    parts = [half_bytes(scale, low), _pack_6_bit(scale_codes, low_codes), _pack_top_bits(codes, 4), _pack_nibbles(codes & 15)]
    return torch.cat(parts, 1)


def quantize_q2_k(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(-1, 16).t().contiguous()
    fit = fit_with_offset(groups, groups.abs(), 3, -0.5, 0.1, 15, absolute=True)
    scale, scale_codes = _scale_codes(fit.scale.view(-1, 16), 15)
    low, low_codes = _scale_codes(fit.low.view(-1, 16), 15)
    return store_q2_k(groups, fit, scale, scale_codes, low, low_codes)


def store_q2_k(groups, fit, scale, scale_codes, low, low_codes) -> torch.Tensor:
    both = (scale_codes | (low_codes << 4)) & 255
    codes = round_with_stored(groups, fit, scale, both & 15, low, both >> 4, 3)
    return torch.cat([both.to(torch.uint8), _pack_pairs(codes), half_bytes(scale, low)], 1)


def quantize_q6_k(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(-1, 16).t().contiguous()
    return store_q6_k(groups, *fit_symmetric(groups, groups * groups, 32))


def store_q6_k(groups: torch.Tensor, scale: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The second pass and the packing; ``groups`` is float32 ``[16, 16 * B]``."""
    scale = scale.view(-1, 16)
    count = len(scale)
    top, value = largest(scale.t().contiguous())
    empty = top < SMALLEST
    inverse = _divided(-128.0, torch.where(empty, torch.ones_like(value), value))
    scale_codes = nearest(inverse[:, None] * scale).clamp_max(127)
    stored = _divided(1.0, inverse).half()
    step = (stored.float()[:, None] * scale_codes.float()).view(-1)
    codes = nearest(groups / torch.where(step == 0, torch.ones_like(step), step)).clamp_(-32, 31) + 32
    codes = torch.where(step == 0, first_codes(groups, grid, 32), codes).to(torch.uint8).t().reshape(count, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    low = torch.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2).reshape(count, 128)
    high = (high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)).reshape(count, 64)
    packed = torch.cat([low, high, scale_codes.to(torch.int8).view(torch.uint8), stored[:, None].view(torch.uint8)], 1)
    return torch.where(empty[:, None], torch.zeros_like(packed), packed)


def fit_symmetric(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of each group of ``[n, G]`` for codes -levels..levels-1 with the least weighted error.

    Also the grid that gave the best codes, 0 for a group of zeros: `first_codes` turns it into codes.
    """
    magnitude, value = largest(x)
    zero = magnitude < SMALLEST
    value = torch.where(zero, torch.ones_like(value), value)
    weighted = weights * x
    codes, term = torch.empty_like(x), torch.empty_like(x)

    def sums(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.mul(x, grid, out=codes).round_().clamp_(-levels, levels - 1)
        sum_xl = ordered_sum(torch.mul(weighted, codes, out=term))
        return sum_xl, ordered_sum(torch.mul(weights, codes, out=term).mul_(codes))

    best_grid = _divided(-float(levels), value)
    sum_xl, sum_l2 = sums(best_grid)
    scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, torch.zeros_like(sum_xl))
    best = scale * sum_xl
    for step in [*range(-9, 0), *range(1, 10)]:
        grid = _divided(-_step(0.0, 0.1, step, levels), value)
        sum_xl, sum_l2 = sums(grid)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        new_scale = sum_xl / sum_l2
        scale, best = torch.where(better, new_scale, scale), torch.where(better, new_scale * sum_xl, best)
        best_grid = torch.where(better, grid, best_grid)
    none = torch.zeros_like(scale)
    return torch.where(zero, none, scale), torch.where(zero, none, best_grid)


def first_codes(x: torch.Tensor, grid: torch.Tensor, levels: int) -> torch.Tensor:
    """Codes int32 0..2*levels-1 of the first pass; zeros are stored as 0, which is not the code of the weight 0."""
    return torch.where(
        grid == 0, torch.zeros_like(x, dtype=torch.int32), nearest(grid * x).clamp_(-levels, levels - 1) + levels
    )


def quantize_q3_k(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(-1, 16).t().contiguous()
    scale, first_pass = _fit_by_exchange(groups, groups * groups)
    scale = scale.view(-1, 16)
    _, value = largest(scale.t().contiguous())
    inverse = ratio(-32.0, value)
    scale_codes = signed_bytes(nearest(inverse[:, None] * scale)).clamp_(-32, 31) + 32
    scale_codes = torch.where(value[:, None] != 0, scale_codes, torch.zeros_like(scale_codes))
    return store_q3_k(groups, first_pass, ratio(1.0, inverse), scale_codes)


def store_q3_k(
    groups: torch.Tensor, first_pass: torch.Tensor, scale: torch.Tensor, codes_of_scales: torch.Tensor
) -> torch.Tensor:
    """The second pass and the packing; ``groups`` ``[16, 16 * B]``, ``scale`` ``[B]``, its codes int32 ``[B, 16]`` in 0..63."""
    step = (scale.half().float()[:, None] * (codes_of_scales - 32).float()).view(-1)
    codes = nearest(groups / torch.where(step == 0, torch.ones_like(step), step)).clamp_(-4, 3) + 4
    codes = torch.where(step == 0, first_pass, codes).to(torch.uint8).t().reshape(-1, 8, 32)
    low, high = codes_of_scales & 15, codes_of_scales >> 4
    high = high[:, 0:4] | (high[:, 4:8] << 2) | (high[:, 8:12] << 4) | (high[:, 12:] << 6)
    packed_scales = torch.cat([low[:, :8] | (low[:, 8:] << 4), high], 1).to(torch.uint8)
    return torch.cat([_pack_top_bits(codes, 2), _pack_pairs(codes & 3), packed_scales, half_bytes(scale)], 1)


def _fit_by_exchange(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale ``[G]`` for codes -4..3 and the codes (+4) ``[n, G]``: five rounds of changing one code where that helps."""
    magnitude, value = largest(x)
    zero = magnitude < SMALLEST
    codes = torch.round(_divided(-4.0, torch.where(zero, torch.ones_like(value), value)) * x).clamp_(-4, 3)
    weighted = weights * x
    sum_xl, sum_l2 = ordered_sum(weighted * codes), ordered_sum((weights * codes) * codes)
    for _ in range(5):
        for i in range(len(x)):
            rest_xl = sum_xl - weighted[i] * codes[i]
            rest_l2 = sum_l2 - (weights[i] * codes[i]) * codes[i]
            new = nearest((x[i] * rest_l2) / rest_xl).clamp_(-4, 3).float()
            new_xl = rest_xl + weighted[i] * new
            new_l2 = rest_l2 + (weights[i] * new) * new
            better = (rest_xl > 0) & (new != codes[i]) & (new_l2 > 0)
            better &= (new_xl * new_xl) * sum_l2 > (sum_xl * sum_xl) * new_l2
            codes[i] = torch.where(better, new, codes[i])
            sum_xl, sum_l2 = torch.where(better, new_xl, sum_xl), torch.where(better, new_l2, sum_l2)
    scale = torch.where((sum_l2 > 0) & ~zero, sum_xl / sum_l2, torch.zeros_like(sum_xl))
    return scale, torch.where(zero, torch.zeros_like(codes), codes + 4).to(torch.int32)
