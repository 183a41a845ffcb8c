"""The searches of ``fits.py`` as compiled loops for the CPU, where numba is installed (extra "gguf").

The same operations in the same order on float32, so the same bytes; several times as fast as one torch operation after the
other. Loops run over the weights of a group outside and over groups (``LANES`` at a time) inside, where they become vector
instructions. No fast math: nothing is reordered or fused.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch

LANES = 256
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23
ZERO, ONE = np.float32(0), np.float32(1)

OPTIONS = {"nogil": True, "error_model": "numpy"}


def _compiled(function: Callable) -> Callable:
    """Compiled at its first call, seconds, and kept beside this file or in the user's cache, where one can be written."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:
        return numba.njit(**OPTIONS)(function)


@_compiled
def _nearest(x):
    """See ``fits.nearest``; as float32."""
    return np.float32((np.float32(x + MAGIC).view(np.int32) & np.int32(0x007FFFFF)) - np.int32(0x00400000))


# One loop with one array that is written: more would need so many checks for overlap that no vector code is made.


@_compiled
def _round(x, offset, grid, lowest, highest, codes):
    for j in range(len(codes)):
        code = (x[j] - offset[j]) * grid[j]
        code = _nearest(lowest if code < lowest else code)
        code = highest if code > highest else code
        codes[j] = lowest if code < lowest else code


@_compiled
def _add_product(a, b, total):
    for j in range(len(total)):
        total[j] += a[j] * b[j]


@_compiled
def _add_products(a, b, c, total):
    for j in range(len(total)):
        total[j] += (a[j] * b[j]) * c[j]


@_compiled
def _add(a, total):
    for j in range(len(total)):
        total[j] += a[j]


@_compiled
def _add_square_error(x, weights, codes, scale, offset, error):
    for j in range(len(error)):
        gap = codes[j] * scale[j] + offset[j] - x[j]
        error[j] += gap * gap * weights[j]


@_compiled
def _add_absolute_error(x, weights, codes, scale, offset, error):
    for j in range(len(error)):
        error[j] += abs(codes[j] * scale[j] + offset[j] - x[j]) * weights[j]


@_compiled
def _fit_with_offset(x, weights, levels, numerators, absolute, scale, low, grid, start):
    n, groups = x.shape
    codes, sums = np.empty((n, LANES), np.float32), np.empty((13, LANES), np.float32)
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        last = first + lanes
        sum_w, sum_x, sum_l, sum_l2, sum_xl = (
            sums[0, :lanes],
            sums[1, :lanes],
            sums[2, :lanes],
            sums[3, :lanes],
            sums[4, :lanes],
        )
        best, error, high, lowest, offset = sums[5, :lanes], sums[6, :lanes], sums[7, :lanes], sums[8, :lanes], sums[9, :lanes]
        new_scale, new_offset, new_grid = sums[10, :lanes], sums[11, :lanes], sums[12, :lanes]
        sum_w[:], sum_x[:] = ZERO, ZERO
        lowest[:], high[:] = x[0, first:last], x[0, first:last]
        for i in range(n):
            row = x[i, first:last]
            for j in range(lanes):
                lowest[j] = row[j] if row[j] < lowest[j] else lowest[j]
            for j in range(lanes):
                high[j] = row[j] if row[j] > high[j] else high[j]
            _add(weights[i, first:last], sum_w)
            _add_product(weights[i, first:last], row, sum_x)
        for j in range(lanes):
            offset[j] = ZERO if lowest[j] > ZERO else lowest[j]
            lowest[j] = offset[j]
        for step in range(len(numerators)):
            for j in range(lanes):
                new_grid[j] = numerators[step] / (ONE if high[j] == lowest[j] else high[j] - offset[j])
            sum_l[:], sum_l2[:], sum_xl[:], error[:] = ZERO, ZERO, ZERO, ZERO
            for i in range(n):
                row, w, code = x[i, first:last], weights[i, first:last], codes[i, :lanes]
                _round(row, offset, new_grid, ZERO, levels, code)
                _add_product(w, code, sum_l)
                _add_products(w, code, code, sum_l2)
                _add_products(w, code, row, sum_xl)
            for j in range(lanes):
                s = (sum_w[j] * sum_xl[j] - sum_x[j] * sum_l[j]) / (sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j])
                o = (sum_l2[j] * sum_x[j] - sum_l[j] * sum_xl[j]) / (sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j])
                new_scale[j] = sum_xl[j] / sum_l2[j] if o > ZERO else s
                new_offset[j] = ZERO if o > ZERO else o
                if step == 0:  # the grid from smallest to largest weight, as it is
                    new_scale[j], new_offset[j] = ONE / new_grid[j], offset[j]
            for i in range(n):
                row, w, code = x[i, first:last], weights[i, first:last], codes[i, :lanes]
                if absolute:
                    _add_absolute_error(row, w, code, new_scale, new_offset, error)
                else:
                    _add_square_error(row, w, code, new_scale, new_offset, error)
            for j in range(lanes):
                solvable = sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j] > ZERO
                if step == 0 or (solvable and error[j] < best[j]):
                    best[j] = error[j]
                    scale[first + j], grid[first + j], start[first + j] = new_scale[j], new_grid[j], offset[j]
                    offset[j] = new_offset[j]
        for j in range(lanes):
            flat = high[j] == lowest[j]
            low[first + j] = -lowest[j] if flat else -offset[j]
            if flat:
                scale[first + j] = grid[first + j] = ZERO


@_compiled
def _fit_symmetric(x, weights, levels, numerators, smallest, scale, grid):
    n, groups = x.shape
    codes, sums = np.empty(LANES, np.float32), np.empty((7, LANES), np.float32)
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        last = first + lanes
        magnitude, value, best, new_grid = sums[0, :lanes], sums[1, :lanes], sums[2, :lanes], sums[3, :lanes]
        sum_xl, sum_l2, nothing = sums[4, :lanes], sums[5, :lanes], sums[6, :lanes]
        code = codes[:lanes]
        magnitude[:], value[:], nothing[:] = ZERO, ZERO, ZERO
        for i in range(n):
            row = x[i, first:last]
            for j in range(lanes):
                value[j] = row[j] if abs(row[j]) > magnitude[j] else value[j]
            for j in range(lanes):
                magnitude[j] = abs(value[j])
        for step in range(len(numerators)):
            for j in range(lanes):
                new_grid[j] = numerators[step] / (ONE if magnitude[j] < smallest else value[j])
            sum_xl[:], sum_l2[:] = ZERO, ZERO
            for i in range(n):
                row, w = x[i, first:last], weights[i, first:last]
                _round(row, nothing, new_grid, -levels, levels - ONE, code)
                _add_products(w, row, code, sum_xl)
                _add_products(w, code, code, sum_l2)
            for j in range(lanes):
                s = sum_xl[j] / sum_l2[j]
                if step == 0:
                    s = s if sum_l2[j] != ZERO else ZERO
                if step == 0 or (sum_l2[j] > ZERO and sum_xl[j] * sum_xl[j] > best[j] * sum_l2[j]):
                    best[j] = s * sum_xl[j]
                    scale[first + j], grid[first + j] = s, new_grid[j]
        for j in range(lanes):
            if magnitude[j] < smallest:
                scale[first + j] = grid[first + j] = ZERO


@_compiled
def _exchange_group(x, weights, lowest, highest, need_rest, rounds, codes, xl, l2):
    """``fits.exchange`` for one group; most are done after a round or two."""
    for _ in range(rounds):
        changed = False
        for i in range(len(x)):
            v, w, code = x[i], weights[i], codes[i]
            rest_xl = xl - (w * v) * code
            rest_l2 = l2 - (w * code) * code
            if rest_xl > ZERO:
                new = min(highest, max(lowest, _nearest((v * rest_l2) / rest_xl)))
                if new != code:
                    new_xl, new_l2 = rest_xl + (w * v) * new, rest_l2 + (w * new) * new
                    positive = (rest_l2 if need_rest else new_l2) > ZERO
                    if positive and (new_xl * new_xl) * l2 > (xl * xl) * new_l2:
                        codes[i], xl, l2, changed = new, new_xl, new_l2, True
        if not changed:
            break
    return xl, l2


@_compiled
def _exchange(x, weights, lowest, highest, need_rest, rounds, codes, sum_xl, sum_l2):
    for j in range(x.shape[1]):
        sum_xl[j], sum_l2[j] = _exchange_group(
            x[:, j], weights[:, j], lowest, highest, need_rest, rounds, codes[:, j], sum_xl[j], sum_l2[j]
        )


@_compiled
def _fit_by_exchange(x, levels, smallest, rounds, scale, codes):
    """Groups ``[G, n]`` to scales ``[G]`` and codes uint8 ``[G, n]``, errors weighted by squared weights."""
    weights, found = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for k in range(len(x)):
        group, magnitude, value = x[k], ZERO, ONE
        for v in group:
            if abs(v) > magnitude:
                magnitude, value = abs(v), v
        if magnitude < smallest:
            scale[k], codes[k] = ZERO, np.uint8(0)
            continue
        grid, xl, l2 = -levels / value, ZERO, ZERO
        for i in range(len(group)):
            weights[i] = group[i] * group[i]
        for i in range(len(group)):
            found[i] = min(levels - ONE, max(-levels, _nearest(grid * group[i])))
        for i in range(len(group)):
            xl += (weights[i] * group[i]) * found[i]
            l2 += (weights[i] * found[i]) * found[i]
        xl, l2 = _exchange_group(group, weights, -levels, levels - ONE, False, rounds, found, xl, l2)
        scale[k] = xl / l2 if l2 > ZERO else ZERO
        for i in range(len(group)):
            codes[k, i] = np.uint8(found[i] + levels)


@_compiled
def _round_symmetric(x, step, levels, codes):
    for k in range(len(x)):
        for i in range(x.shape[1]):
            codes[k, i] = np.uint8(min(levels - ONE, max(-levels, _nearest(x[k, i] / step[k]))) + levels)


@_compiled
def _quantize_q8_0(x, scale, codes):
    """Blocks ``[G, 32]`` to scales ``[G]`` and int8 codes ``[G, 32]``, halves away from zero."""
    half = np.float32(0.5)
    for k in range(len(x)):
        block, out, largest = x[k], codes[k], ZERO
        for j in range(len(block)):
            largest = max(largest, abs(block[j]))
        scale[k] = largest / np.float32(127)
        inverse = ONE / scale[k] if scale[k] != ZERO else ZERO
        for j in range(len(block)):
            v = block[j] * inverse
            whole = np.trunc(v)
            out[j] = np.int8(whole + np.copysign(ONE if abs(v - whole) >= half else ZERO, v))


def fit_with_offset(
    x: torch.Tensor, weights: torch.Tensor, levels: int, numerators: list[float], absolute: bool
) -> tuple[torch.Tensor, ...]:
    """scale, low, grid, start of ``fits.OffsetFit``; ``numerators``: of the first grid, then of every step's."""
    result = [torch.empty(x.shape[1]) for _ in range(4)]
    _fit_with_offset(*_arrays(x, weights), np.float32(levels), np.array(numerators, np.float32), absolute, *_arrays(*result))
    return tuple(result)


def fit_symmetric(
    x: torch.Tensor, weights: torch.Tensor, levels: int, numerators: list[float], smallest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and grid of ``fits.fit_symmetric``."""
    scale, grid = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    tops = np.array(numerators, np.float32)
    _fit_symmetric(*_arrays(x, weights), np.float32(levels), tops, np.float32(smallest), *_arrays(scale, grid))
    return scale, grid


def exchange(
    x: torch.Tensor,
    weights: torch.Tensor,
    lowest: int,
    highest: int,
    need_rest: bool,
    rounds: int,
    codes: torch.Tensor,
    sum_xl: torch.Tensor,
    sum_l2: torch.Tensor,
) -> None:
    """The rounds of ``fits.exchange``, in place."""
    _exchange(*_arrays(x, weights), np.float32(lowest), np.float32(highest), need_rest, rounds, *_arrays(codes, sum_xl, sum_l2))


def fit_by_exchange(x: torch.Tensor, levels: int, smallest: float, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and codes of ``fits.fit_by_exchange``."""
    scale, codes = torch.empty(len(x)), torch.empty(x.shape, dtype=torch.uint8)
    _fit_by_exchange(x.numpy(), np.float32(levels), np.float32(smallest), rounds, *_arrays(scale, codes))
    return scale, codes


def round_symmetric(x: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """The codes of ``fits.round_symmetric``, for steps that are not 0."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    _round_symmetric(*_arrays(x, step), np.float32(levels), codes.numpy())
    return codes


def quantize_q8_0(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 blocks ``[G, 32]`` -> scales float32 ``[G]``, codes int8 ``[G, 32]``."""
    scale, codes = torch.empty(len(x)), torch.empty(x.shape, dtype=torch.int8)
    _quantize_q8_0(*_arrays(x.contiguous(), scale, codes))
    return scale, codes


def _arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]
