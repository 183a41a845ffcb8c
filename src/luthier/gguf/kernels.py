"""The searches of ``fits.py`` as Triton kernels: a thread for each group, which holds its weights in registers.

The same operations in the same order on float32 as in the torch code, so the same bytes: nothing is fused or reordered
(launch with ``enable_fp_fusion=False``), divisions are IEEE's, and denormals are kept. Groups are ``[n, G]`` as in
``blocks.py``, in memory one after the other (`blocks.groups_of`) or weight by weight.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from luthier.ops.backend import jit, tl, triton

LANES = 128  # groups of a program, one for each of its threads
LONGEST = 32  # weights that a thread loads at once


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum float32 ``[n, G]`` over n, first to last, rounding after each addition."""
    total = _of_groups(terms)
    _launch(_ordered_sum, total, *_strided(terms), total, len(terms), N=math.gcd(len(terms), LONGEST))
    return total


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``blocks.largest`` gives."""
    magnitude, value = _of_groups(x), _of_groups(x)
    _launch(_largest_of, value, *_strided(x), magnitude, value, N=len(x))
    return magnitude, value


def fit_with_offset(x: Tensor, weights: Tensor, levels: int, numerators: list[float], absolute: bool) -> tuple[Tensor, ...]:
    """scale, low, grid, start of ``fits.OffsetFit``; ``numerators``: of the first grid, then of every step's."""
    result = tuple(_of_groups(x) for _ in range(4))
    numbers = _on_device(tuple(numerators), x.device), *result, float(levels), len(numerators)
    _launch(_fit_with_offset, result[0], *_strided(x, weights), *numbers, N=len(x), ABSOLUTE=absolute)
    return result


def fit_symmetric(x: Tensor, weights: Tensor, levels: int, numerators: list[float], smallest: float) -> tuple[Tensor, Tensor]:
    """scale and grid of ``fits.fit_symmetric``."""
    scale, grid = _of_groups(x), _of_groups(x)
    numbers = _on_device(tuple(numerators), x.device), scale, grid, float(levels), smallest, len(numerators)
    _launch(_fit_symmetric, scale, *_strided(x, weights), *numbers, N=len(x))
    return scale, grid


def fit_by_exchange(x: Tensor, levels: int, smallest: float, rounds: int) -> tuple[Tensor, Tensor]:
    """scale and codes of ``fits.fit_by_exchange``."""
    scale, codes = torch.empty(len(x), device=x.device), torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _launch(_fit_by_exchange, scale, *_strided(x.t()), scale, codes, float(levels), smallest, rounds, N=x.shape[1])
    return scale, codes


def exchange(
    x: Tensor,
    weights: Tensor,
    lowest: int,
    highest: int,
    need_rest: bool,
    rounds: int,
    codes: Tensor,
    sum_xl: Tensor,
    sum_l2: Tensor,
) -> None:
    """The rounds of ``fits.exchange``, in place."""
    numbers = sum_xl, sum_l2, float(lowest), float(highest), rounds
    _launch(_exchange, sum_xl, *_strided(x, weights, codes), *numbers, N=len(x), NEED_REST=need_rest)


def search_scales(x: Tensor, weights: Tensor, levels: int, tops: list[float], smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """What ``weighted._search_scales`` gives."""
    codes, sum_xl, sum_l2 = torch.empty_like(x), _of_groups(x), _of_groups(x)
    numbers = _on_device(tuple(tops), x.device), sum_xl, sum_l2, float(levels), smallest, len(tops)
    _launch(_search_scales, sum_xl, *_strided(x, weights, codes), *numbers, N=len(x))
    return codes, sum_xl, sum_l2


def round_symmetric(x: Tensor, step: Tensor, levels: int) -> Tensor:
    """The codes of ``fits.round_symmetric``, for steps that are not 0."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    _round_codes(x.t(), None, step, codes, -levels, levels - 1)
    return codes


def round_with_offset(x: Tensor, offset: Tensor, step: Tensor, levels: int) -> Tensor:
    """Codes uint8 ``[G, n]`` of ``(x + offset) / step``, for ``x`` ``[n, G]`` and steps that are not 0."""
    codes = torch.empty(x.shape[::-1], dtype=torch.uint8, device=x.device)
    _round_codes(x, offset, step, codes, 0, levels)
    return codes


def _round_codes(x: Tensor, offset: Tensor | None, step: Tensor, codes: Tensor, lowest: int, highest: int) -> None:
    has_offset, limits = offset is not None, (float(lowest), float(highest))
    parts = offset if has_offset else step, step, codes
    _launch(_round, step, *_strided(x), *parts, *limits, lanes=LANES // 4, N=len(x), HAS_OFFSET=has_offset)


def _of_groups(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], device=x.device)


def _strided(*groups: Tensor) -> list[Tensor | int]:
    """Each ``[n, G]`` with how far its weights and its groups are apart."""
    return [argument for tensor in groups for argument in (tensor, *tensor.stride())]


def _launch(kernel, one_a_group: Tensor, *arguments, lanes: int | None = None, **constants) -> None:
    count, lanes = len(one_a_group), lanes or LANES
    kernel[(triton.cdiv(count, lanes),)](*arguments, count, LANES=lanes, **constants, num_warps=4, enable_fp_fusion=False)


@functools.lru_cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@jit
def _lanes(count, LANES: tl.constexpr):
    """The groups of this program's threads, and which of them there are."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane < count


@jit
def _places(GROUPS, apart, groups_apart, lane, N: tl.constexpr):
    return GROUPS + (tl.arange(0, N)[None, :].to(tl.int64) * apart + lane[:, None] * groups_apart)


@jit
def _load_groups(GROUPS, apart, groups_apart, lane, inside, N: tl.constexpr, LANES: tl.constexpr):
    """The N weights of every thread's group, as a tuple: one load, then halves of halves. N loads would compile for long."""
    parts = (tl.load(_places(GROUPS, apart, groups_apart, lane, N), mask=inside[:, None], other=0.0),)
    for level in tl.static_range(N.bit_length() - 1):
        halves = ()
        for i in tl.static_range(1 << level):
            half = tl.reshape(parts[i], (LANES, 2, N >> (level + 1)))
            first, second = tl.split(tl.permute(half, (0, 2, 1)))
            halves = halves + (first, second)
        parts = halves
    weights = ()
    for i in tl.static_range(N):
        weights = weights + (tl.reshape(parts[i], (LANES,)),)
    return weights


@jit
def _store_groups(weights, GROUPS, apart, groups_apart, lane, inside, N: tl.constexpr, LANES: tl.constexpr):
    """What `_load_groups` made, written back the same way."""
    parts = ()
    for i in tl.static_range(N):
        parts = parts + (tl.reshape(weights[i], (LANES, 1)),)
    for level in tl.static_range(N.bit_length() - 1):
        wholes = ()
        for i in tl.static_range(N >> (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            wholes = wholes + (tl.reshape(pair, (LANES, 2 << level)),)
        parts = wholes
    place = _places(GROUPS, apart, groups_apart, lane, N)
    tl.store(place, parts[0].to(GROUPS.dtype.element_ty), mask=inside[:, None])


@jit
def _nearest(x):
    """See ``fits.nearest``; as float32, and without a conversion from integers, which are slow on a GPU."""
    bits = (x + 12582912.0).to(tl.int32, bitcast=True)
    bits = tl.where(x == x, (bits & 0x007FFFFF) | 0x4B000000, 0x4B400000)
    return bits.to(tl.float32, bitcast=True) - 12582912.0


@jit
def _code(x, lowest, highest):
    return tl.minimum(tl.maximum(_nearest(x), lowest), highest)


@jit
def _code_above(x, highest):
    """From 0 on: what is far below 0 does not wrap."""
    return _code(tl.maximum(x, 0.0), 0.0, highest)


@jit
def _ordered_sum(TERMS, apart, groups_apart, TOTAL, n, count, N: tl.constexpr, LANES: tl.constexpr):
    lane, inside = _lanes(count, LANES)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, n, N):
        terms = _load_groups(TERMS + first * apart, apart, groups_apart, lane, inside, N, LANES)
        for i in tl.static_range(N):
            total += terms[i]
    tl.store(TOTAL + lane, total, mask=inside)


@jit
def _round(
    X, apart, groups_apart, OFFSET, STEP, CODES, lowest, highest, count,
    N: tl.constexpr, HAS_OFFSET: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = tl.load(_places(X, apart, groups_apart, lane, N), mask=inside[:, None], other=0.0)
    if HAS_OFFSET:
        x += tl.load(OFFSET + lane, mask=inside, other=0.0)[:, None]
    code = _code(tl.div_rn(x, tl.load(STEP + lane, mask=inside, other=1.0)[:, None]), lowest, highest)
    tl.store(_places(CODES, 1, N, lane, N), (code - lowest).to(tl.uint8), mask=inside[:, None])


@jit
def _error(x, weights, start, grid, scale, offset, levels, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    """What is lost with the codes that ``grid`` and ``start`` give, if they stand for ``code * scale + offset``."""
    error = tl.zeros_like(start)
    for i in tl.static_range(N):
        gap = _code_above((x[i] - start) * grid, levels) * scale + offset - x[i]
        if ABSOLUTE:
            error += tl.abs(gap) * weights[i]
        else:
            error += gap * gap * weights[i]
    return error


@jit
def _fit_with_offset(
    X, x_apart, x_groups, WEIGHTS, w_apart, w_groups, TOPS, SCALE, LOW, GRID, START, levels, steps, count,
    N: tl.constexpr, ABSOLUTE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = _load_groups(X, x_apart, x_groups, lane, inside, N, LANES)
    weights = _load_groups(WEIGHTS, w_apart, w_groups, lane, inside, N, LANES)
    lowest, high = x[0], x[0]
    sum_w, sum_x = tl.zeros_like(lowest), tl.zeros_like(lowest)
    for i in tl.static_range(N):
        lowest = tl.where(x[i] < lowest, x[i], lowest)
        high = tl.where(x[i] > high, x[i], high)
        sum_w += weights[i]
        sum_x += weights[i] * x[i]
    lowest = tl.where(lowest > 0, 0.0, lowest)
    flat = high == lowest
    offset, start = lowest, lowest
    grid = tl.div_rn(tl.load(TOPS), tl.where(flat, 1.0, high - lowest))
    scale = tl.div_rn(1.0, grid)
    best = _error(x, weights, start, grid, scale, offset, levels, N, ABSOLUTE)
    for step in range(1, steps):
        new_grid = tl.div_rn(tl.load(TOPS + step), tl.where(flat, 1.0, high - offset))
        sum_l, sum_l2, sum_xl = tl.zeros_like(scale), tl.zeros_like(scale), tl.zeros_like(scale)
        for i in tl.static_range(N):
            code = _code_above((x[i] - offset) * new_grid, levels)
            sum_l += weights[i] * code
            sum_l2 += (weights[i] * code) * code
            sum_xl += (weights[i] * code) * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_offset = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        new_scale = tl.where(new_offset > 0, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_offset = tl.where(new_offset > 0, 0.0, new_offset)
        error = _error(x, weights, offset, new_grid, new_scale, new_offset, levels, N, ABSOLUTE)
        better = (determinant > 0) & (error < best)
        best, scale = tl.where(better, error, best), tl.where(better, new_scale, scale)
        grid, start = tl.where(better, new_grid, grid), tl.where(better, offset, start)
        offset = tl.where(better, new_offset, offset)
    tl.store(SCALE + lane, tl.where(flat, 0.0, scale), mask=inside)
    tl.store(LOW + lane, tl.where(flat, lowest, offset) * -1.0, mask=inside)  # Triton's minus makes 0.0 of 0.0, not -0.0
    tl.store(GRID + lane, tl.where(flat, 0.0, grid), mask=inside)
    tl.store(START + lane, start, mask=inside)


@jit
def _largest(x, N: tl.constexpr):
    """The largest magnitude of every group and, with its sign, the first weight that has it."""
    magnitude, value = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    for i in tl.static_range(N):
        larger = tl.abs(x[i]) > magnitude
        magnitude, value = tl.where(larger, tl.abs(x[i]), magnitude), tl.where(larger, x[i], value)
    return magnitude, value


@jit
def _largest_of(X, x_apart, x_groups, MAGNITUDE, VALUE, count, N: tl.constexpr, LANES: tl.constexpr):
    lane, inside = _lanes(count, LANES)
    magnitude, value = _largest(_load_groups(X, x_apart, x_groups, lane, inside, N, LANES), N)
    tl.store(MAGNITUDE + lane, magnitude, mask=inside)
    tl.store(VALUE + lane, value, mask=inside)


@jit
def _symmetric_sums(x, weights, grid, levels, N: tl.constexpr):
    """The weighted sums of weight times code and of code squared."""
    sum_xl, sum_l2 = tl.zeros_like(grid), tl.zeros_like(grid)
    for i in tl.static_range(N):
        code = _code(x[i] * grid, -levels, levels - 1.0)
        sum_xl += (weights[i] * x[i]) * code
        sum_l2 += (weights[i] * code) * code
    return sum_xl, sum_l2


@jit
def _fit_symmetric(
    X, x_apart, x_groups, WEIGHTS, w_apart, w_groups, TOPS, SCALE, GRID, levels, smallest, steps, count,
    N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = _load_groups(X, x_apart, x_groups, lane, inside, N, LANES)
    weights = _load_groups(WEIGHTS, w_apart, w_groups, lane, inside, N, LANES)
    magnitude, value = _largest(x, N)
    zero = magnitude < smallest
    value = tl.where(zero, 1.0, value)
    grid = tl.div_rn(tl.load(TOPS), value)
    sum_xl, sum_l2 = _symmetric_sums(x, weights, grid, levels, N)
    scale = tl.where(sum_l2 != 0, tl.div_rn(sum_xl, sum_l2), 0.0)
    best = scale * sum_xl
    for step in range(1, steps):
        new_grid = tl.div_rn(tl.load(TOPS + step), value)
        sum_xl, sum_l2 = _symmetric_sums(x, weights, new_grid, levels, N)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        new_scale = tl.div_rn(sum_xl, sum_l2)
        scale, best = tl.where(better, new_scale, scale), tl.where(better, new_scale * sum_xl, best)
        grid = tl.where(better, new_grid, grid)
    tl.store(SCALE + lane, tl.where(zero, 0.0, scale), mask=inside)
    tl.store(GRID + lane, tl.where(zero, 0.0, grid), mask=inside)


@jit
def _exchanged(x, weights, codes, sum_xl, sum_l2, lowest, highest, N: tl.constexpr, NEED_REST: tl.constexpr):
    """One round of ``fits.exchange``."""
    new_codes = ()
    for i in tl.static_range(N):
        rest_xl = sum_xl - (weights[i] * x[i]) * codes[i]
        rest_l2 = sum_l2 - (weights[i] * codes[i]) * codes[i]
        new = _code(tl.div_rn(x[i] * rest_l2, rest_xl), lowest, highest)
        new_xl, new_l2 = rest_xl + (weights[i] * x[i]) * new, rest_l2 + (weights[i] * new) * new
        positive = rest_l2 > 0 if NEED_REST else new_l2 > 0
        better = (rest_xl > 0) & (new != codes[i]) & positive
        better = better & ((new_xl * new_xl) * sum_l2 > (sum_xl * sum_xl) * new_l2)
        new_codes = new_codes + (tl.where(better, new, codes[i]),)
        sum_xl, sum_l2 = tl.where(better, new_xl, sum_xl), tl.where(better, new_l2, sum_l2)
    return new_codes, sum_xl, sum_l2


@jit
def _exchange(
    X, x_apart, x_groups, WEIGHTS, w_apart, w_groups, CODES, apart, groups_apart, SUM_XL, SUM_L2, lowest, highest, rounds,
    count, N: tl.constexpr, NEED_REST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = _load_groups(X, x_apart, x_groups, lane, inside, N, LANES)
    weights = _load_groups(WEIGHTS, w_apart, w_groups, lane, inside, N, LANES)
    codes = _load_groups(CODES, apart, groups_apart, lane, inside, N, LANES)
    sum_xl = tl.load(SUM_XL + lane, mask=inside, other=0.0)
    sum_l2 = tl.load(SUM_L2 + lane, mask=inside, other=0.0)
    for _ in range(rounds):
        codes, sum_xl, sum_l2 = _exchanged(x, weights, codes, sum_xl, sum_l2, lowest, highest, N, NEED_REST)
    _store_groups(codes, CODES, apart, groups_apart, lane, inside, N, LANES)
    tl.store(SUM_XL + lane, sum_xl, mask=inside)
    tl.store(SUM_L2 + lane, sum_l2, mask=inside)


@jit
def _fit_by_exchange(
    X, x_apart, x_groups, SCALE, CODES, levels, smallest, rounds, count, N: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = _load_groups(X, x_apart, x_groups, lane, inside, N, LANES)
    magnitude, value = _largest(x, N)
    zero = magnitude < smallest
    grid = tl.div_rn(-levels, tl.where(zero, 1.0, value))
    weights, codes = (), ()
    sum_xl, sum_l2 = tl.zeros_like(grid), tl.zeros_like(grid)
    for i in tl.static_range(N):
        weight, code = x[i] * x[i], _code(grid * x[i], -levels, levels - 1.0)
        sum_xl += (weight * x[i]) * code
        sum_l2 += (weight * code) * code
        weights, codes = weights + (weight,), codes + (code,)
    for _ in range(rounds):
        codes, sum_xl, sum_l2 = _exchanged(x, weights, codes, sum_xl, sum_l2, -levels, levels - 1.0, N, False)
    stored = ()
    for i in tl.static_range(N):
        stored = stored + (tl.where(zero, 0.0, codes[i] + levels),)
    _store_groups(stored, CODES, 1, N, lane, inside, N, LANES)
    tl.store(SCALE + lane, tl.where((sum_l2 > 0) & ~zero, tl.div_rn(sum_xl, sum_l2), 0.0), mask=inside)


@jit
def _lowest_byte(code):
    return (code.to(tl.int32) & 255).to(tl.float32)


@jit
def _scale_error(x, weights, grid, highest, N: tl.constexpr):
    error = tl.zeros_like(grid)
    for i in tl.static_range(N):
        gap = x[i] - tl.div_rn(1.0, grid) * tl.minimum(_nearest(grid * x[i]), highest)
        error += (weights[i] * gap) * gap
    return error


@jit
def _search_scales(
    X, x_apart, x_groups, WEIGHTS, w_apart, w_groups, CODES, apart, groups_apart, TOPS, SUM_XL, SUM_L2, levels, smallest,
    steps, count, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane, inside = _lanes(count, LANES)
    x = _load_groups(X, x_apart, x_groups, lane, inside, N, LANES)
    weights = _load_groups(WEIGHTS, w_apart, w_groups, lane, inside, N, LANES)
    top = x[0]
    for i in tl.static_range(1, N):
        top = tl.where(x[i] > top, x[i], top)
    top = tl.where(top >= smallest, top, 1.0)
    grid = tl.div_rn(tl.load(TOPS), top)
    best = tl.zeros_like(grid)
    for i in tl.static_range(N):
        gap = x[i] - tl.div_rn(1.0, grid) * _lowest_byte(_nearest(grid * x[i]))
        best += (weights[i] * gap) * gap
    for step in range(1, steps):
        other = tl.div_rn(tl.load(TOPS + step), top)
        error = _scale_error(x, weights, other, levels, N)
        better = error < best
        best, grid = tl.where(better, error, best), tl.where(better, other, grid)
    sum_xl, sum_l2, codes = tl.zeros_like(grid), tl.zeros_like(grid), ()
    for i in tl.static_range(N):
        code = tl.minimum(_nearest(grid * x[i]), levels)
        sum_xl += (weights[i] * x[i]) * code
        sum_l2 += (weights[i] * code) * code
        codes = codes + (_lowest_byte(code),)
    _store_groups(codes, CODES, apart, groups_apart, lane, inside, N, LANES)
    tl.store(SUM_XL + lane, sum_xl, mask=inside)
    tl.store(SUM_L2 + lane, sum_l2, mask=inside)
