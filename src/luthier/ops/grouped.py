"""Products of many matrices with the tokens routed to each: the algebra of a mixture of experts.

Every token goes to ``k`` of ``E`` experts. ``route`` sorts these S = n * k choices by expert; "sorted rows" below are in
that order, an expert's own one after the other. How many each expert has is known on the device only, so a launch is
sized for the worst case and a tile looks up whose it is: nothing waits for the host, and a hot expert is no special case.

    product    out[row] = x[row] @ weight[expert of row]  (+ low[row] @ other[expert])  (+ bias[expert])
    gradient   out[expert] = x[rows of expert].T @ y[rows of expert]
    combine    out[token] = sum over its choices of  weight * y[row of the choice]

An expert number of E or more (what expert parallelism gives the choices of other devices) takes part in none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, triton

ROWS = 128  # sorted rows of one tile; a tile never goes over the end of an expert's
ROUTE_BLOCK, ROUTE_RATIO = 1024, 64  # choices that one program of ``route`` places, and how many more than tiles those are
BLOCK = 1024  # columns that one program of ``combine`` adds up


@dataclass(frozen=True)
class Routing:
    """Which sorted row is which choice; all but ``experts`` and ``top_k`` int32 on the device."""

    order: Tensor  # (S,): sorted row -> choice, token * k + j
    position: Tensor  # (n, k): choice -> sorted row
    offsets: Tensor  # (E + 1,): expert -> its first sorted row
    tiles: Tensor  # (E + 1,): expert -> its first tile
    tile_expert: Tensor  # (the most tiles there can be,): tile -> expert
    experts: int
    top_k: int

    def spans(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, slice]]:
        """(expert, its sorted rows) of those in use among ``first`` to ``last``. On a GPU this waits for the device."""
        bounds = self.offsets.tolist()
        for expert in range(first, self.experts if last is None else last):
            if bounds[expert] < bounds[expert + 1]:
                yield expert, slice(bounds[expert], bounds[expert + 1])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.order, self.position, self.offsets, self.tiles, self.tile_expert

    @property
    def token(self) -> Tensor:
        """(S,): sorted row -> token."""
        return self.order // self.top_k


def route(index: Tensor, experts: int) -> Routing:
    """index (n, k): the experts of every token -> the choices sorted by expert, a token's earlier ones first."""
    keys, order = index.reshape(-1).to(torch.int16).sort(stable=True)  # 16 bits sort four times as fast as 64
    routed = launch_route(keys, order, experts) if has_kernels(index) else route_reference(keys, order, experts)
    order, position, *counts = routed
    return Routing(order, position.view(index.shape), *counts, experts, index.shape[1])


def route_reference(keys: Tensor, order: Tensor, experts: int) -> tuple[Tensor, ...]:
    """Sorted keys (S,) and the choices they belong to -> the tensors of a Routing, ``position`` as (S,)."""
    device, choices = keys.device, keys.numel()
    numbers = torch.arange(max(experts + 1, choices // ROWS + experts), device=device, dtype=torch.int32)
    offsets = torch.searchsorted(keys, numbers[: experts + 1].to(torch.int16), out_int32=True)
    tiles = torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + (ROWS - 1)) // ROWS, 0, dtype=torch.int32, out=tiles[1:])
    tile_expert = torch.searchsorted(tiles, numbers[: choices // ROWS + experts], right=True, out_int32=True).sub_(1)
    position = torch.empty(choices, device=device, dtype=torch.int32)
    position[order] = torch.arange(choices, device=device, dtype=torch.int32)
    return order.int(), position, offsets, tiles, tile_expert


def product_reference(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor,
    first: int = 0,
    gather: bool = False,
    low: Tensor | None = None,
    other: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition of ``product``, expert by expert."""
    source = routing.token if gather else None
    for expert, rows in routing.spans(first, first + weight.shape[0]):
        y = (x[rows] if source is None else x[source[rows]]) @ weight[expert - first]
        if low is not None:
            y = y + low[rows] @ other[expert]
        out[rows] = y if bias is None else y + bias[expert]
    return out


def product(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor,
    first: int = 0,
    gather: bool = False,
    low: Tensor | None = None,
    other: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Write the rows of ``out`` (S, N) that belong to the experts from ``first`` on, as many as ``weight`` (e, K, N) has.

    x (S, K) sorted, or with ``gather`` (n, K) by token; low (S, R) and other (E, R, N): a second, thin product on top, R a
    power of two from 16 on; bias (E, N). All in one dtype, sums in fp32, rounded once.
    """
    if not has_kernels(x):
        return product_reference(x, weight, routing, out, first, gather, low, other, bias)
    return launch_product(x, weight, routing, out, first, gather, low, other, bias)


def gradient_reference(x: Tensor, y: Tensor, routing: Routing, gather: bool = False, scale: float = 1.0) -> Tensor:
    """The definition of ``gradient``, expert by expert."""
    out = torch.zeros(routing.experts, x.shape[1], y.shape[1], dtype=torch.float32, device=x.device)
    source = routing.token if gather else None
    for expert, rows in routing.spans():
        mine = x[rows] if source is None else x[source[rows]]
        torch.mm(mine.T.float(), y[rows].float(), out=out[expert])
    return out.mul_(scale)


def gradient(x: Tensor, y: Tensor, routing: Routing, gather: bool = False, scale: float = 1.0) -> Tensor:
    """fp32 (E, K, R): ``scale * x.T @ y`` over each expert's rows; x (S, K), or (n, K) with ``gather``; y (S, R) thin."""
    if not has_kernels(x):
        return gradient_reference(x, y, routing, gather, scale)
    return launch_gradient(x, y, routing, gather, scale)


def combine_reference(y: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """The definition of ``combine``."""
    inside = (routing.position < routing.offsets[-1])[..., None]
    chosen = torch.where(inside, y[routing.position], 0.0).float()
    chosen = chosen if weights is None else chosen * weights[..., None].float()
    return chosen.sum(1).to(y.dtype)


def combine(y: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """y (S, D) sorted, weights (n, k) or None for ones -> (n, D), summed in fp32 in the order of a token's choices."""
    if not has_kernels(y):
        return combine_reference(y, routing, weights)
    return launch_combine(y, routing, weights)


def launch_route(keys: Tensor, order: Tensor, experts: int) -> tuple[Tensor, ...]:
    choices, most_tiles = keys.numel(), keys.numel() // ROWS + experts
    sizes = choices, choices, experts + 1, experts + 1, most_tiles
    tensors = tuple(torch.empty(size, dtype=torch.int32, device=keys.device) for size in sizes)
    _route_kernel[(triton.cdiv(max(choices, most_tiles * ROUTE_RATIO), ROUTE_BLOCK),)](
        keys, order, *tensors, choices, most_tiles, E=experts, LANES=power_of_2(experts + 1), STEPS=choices.bit_length(),
        ROWS=ROWS, BLOCK=ROUTE_BLOCK, TILES_BLOCK=ROUTE_BLOCK // ROUTE_RATIO, num_warps=4,
    )  # fmt: skip
    return tensors


@jit
def _first_at_least(KEYS, wanted, choices, STEPS: tl.constexpr):
    """For each of ``wanted`` the index of the first of the sorted keys that is not below it."""
    low, high = tl.zeros_like(wanted), tl.zeros_like(wanted) + choices
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(KEYS + middle, mask=low < high, other=0).to(tl.int32) < wanted
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where((low < high) & ~below, middle, high)
    return low


@jit
def _route_kernel(
    KEYS, SORTED, ORDER, POSITION, OFFSETS, TILES, TILE_EXPERT, choices, most_tiles,
    E: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program counts for itself, which is cheaper than a second launch, and writes a share of the rest."""
    program, expert = tl.program_id(0), tl.arange(0, LANES)
    offset = _first_at_least(KEYS, expert, choices, STEPS)
    rows = tl.where(expert < E, _first_at_least(KEYS, expert + 1, choices, STEPS) - offset, 0)
    mine = (rows + ROWS - 1) // ROWS
    last_tile = tl.cumsum(mine, 0)
    if program == 0:
        tl.store(OFFSETS + expert, offset, mask=expert <= E)
        tl.store(TILES + expert, last_tile - mine, mask=expert <= E)
    tile = program * TILES_BLOCK + tl.arange(0, TILES_BLOCK)
    before = (last_tile[None, :] <= tile[:, None]) & (expert < E)[None, :]
    tl.store(TILE_EXPERT + tile, tl.sum(before.to(tl.int32), 1), mask=tile < most_tiles)
    row = program * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(SORTED + row, mask=row < choices, other=0).to(tl.int32)
    tl.store(ORDER + row, choice, mask=row < choices)
    tl.store(POSITION + choice, row, mask=row < choices)


def launch_product(x, weight, routing, out, first, gather, low, other, bias) -> Tensor:
    count, depth, width = weight.shape
    rank = 0 if low is None else low.shape[1]
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    columns, step, warps, stages = tile_shape(capability, x.element_size(), width)
    grid = (routing.tile_expert.shape[0] * triton.cdiv(width, columns),)
    _product_kernel[grid](
        x, weight, x if low is None else low, weight if low is None else other, x if bias is None else bias, out,
        routing.order, routing.offsets, routing.tiles, routing.tile_expert, first, first + count,
        x.stride(0), *weight.stride(), *((0, 0, 0) if low is None else other.stride()), out.stride(0),
        K=depth, N=width, TOP_K=routing.top_k if gather else 0, RANK=rank, HAS_BIAS=bias is not None,
        ROWS=ROWS, COLUMNS=columns, STEP=step, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def tile_shape(capability: tuple[int, int], size: int, width: int) -> tuple[int, int, int, int]:
    """(columns, step over K, warps, stages) of a tile of ``product``; ``size``: bytes of an element, ``width``: N."""
    if width <= 64:  # thin: all that counts is reading x
        return max(16, power_of_2(width)), 128 // size, 4, 3
    if size == 4:
        return 64, 32, 8, 2
    if capability < (8, 0):
        return 128, 32, 8, 2
    if capability in ((8, 6), (8, 9), (12, 0)):  # 99 KiB of shared memory
        return 128, 64, 8, 3
    return 256 if width > 512 else 128, 64, 8, 4 if capability >= (9, 0) else 3


@jit
def _product_kernel(
    X, W, LOW, OTHER, BIAS, OUT, ORDER, OFFSETS, TILES, TILE_EXPERT, first, last,
    stride_x, stride_expert, stride_k, stride_n, stride_other, stride_rank, stride_other_n, stride_out,
    K: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS sorted rows times COLUMNS outputs. TOP_K > 0: the rows are gathered from x by token."""
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = tl.load(TILES + first) + tl.program_id(0) // across
    if tile < tl.load(TILES + last):
        expert = tl.load(TILE_EXPERT + tile)
        end = tl.load(OFFSETS + expert + 1)
        row = tl.load(OFFSETS + expert) + (tile - tl.load(TILES + expert)) * ROWS + tl.arange(0, ROWS)
        inside = row < end
        row = tl.minimum(row, end - 1).to(tl.int64)  # rows past the end are computed from the last one and not stored
        source = row
        if TOP_K > 0:
            source = (tl.load(ORDER + row) // TOP_K).to(tl.int64)
        column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        deep = tl.arange(0, STEP)
        x_at = X + source[:, None] * stride_x + deep[None, :]
        w_at = W + (expert - first).to(tl.int64) * stride_expert + deep[:, None] * stride_k + column[None, :] * stride_n
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in range(0, K, STEP):
            if K % STEP == 0 and N % COLUMNS == 0:
                x = tl.load(x_at)
                w = tl.load(w_at)
            else:
                x = tl.load(x_at, mask=(done + deep < K)[None, :], other=0.0)
                w = tl.load(w_at, mask=(done + deep < K)[:, None] & (column < N)[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
            x_at += STEP
            w_at += STEP * stride_k
        if RANK > 0:
            rank = tl.arange(0, RANK)
            low = tl.load(LOW + row[:, None] * RANK + rank[None, :])
            other_at = OTHER + expert.to(tl.int64) * stride_other + rank[:, None] * stride_rank
            other = tl.load(other_at + column[None, :] * stride_other_n, mask=(column < N)[None, :], other=0.0)
            total = tl.dot(low, other, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(BIAS + expert * N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        at = OUT + row[:, None] * stride_out + column[None, :]
        tl.store(at, total.to(OUT.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


def launch_gradient(x: Tensor, y: Tensor, routing: Routing, gather: bool, scale: float) -> Tensor:
    width, rank = x.shape[1], y.shape[1]
    out = torch.empty(routing.experts, width, rank, dtype=torch.float32, device=x.device)
    columns = 128 if width >= 128 else max(16, power_of_2(width))
    _gradient_kernel[(routing.experts * triton.cdiv(width, columns),)](
        x, y, out, routing.order, routing.offsets, x.stride(0), scale, N=width, TOP_K=routing.top_k if gather else 0,
        RANK=rank, ROWS=64, COLUMNS=columns, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@jit
def _gradient_kernel(
    X, Y, OUT, ORDER, OFFSETS, stride_x, scale,
    N: tl.constexpr, TOP_K: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of x against all of y, over all rows of one expert; zeros for one without rows."""
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // across
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    end = tl.load(OFFSETS + expert + 1)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(tl.load(OFFSETS + expert), end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        source = row
        if TOP_K > 0:
            source = tl.load(ORDER + row, mask=inside, other=0) // TOP_K
        x_at = X + source.to(tl.int64)[:, None] * stride_x + column[None, :]
        x = tl.load(x_at, mask=inside[:, None] & (column < N)[None, :], other=0.0)
        y = tl.load(Y + row.to(tl.int64)[:, None] * RANK + rank[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
    at = OUT + (expert.to(tl.int64) * N + column)[:, None] * RANK + rank[None, :]
    tl.store(at, total * scale, mask=(column < N)[:, None])


def launch_combine(y: Tensor, routing: Routing, weights: Tensor | None) -> Tensor:
    tokens, width = routing.position.shape[0], y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    _combine_kernel[(tokens, triton.cdiv(width, BLOCK))](
        y, routing.position, y if weights is None else weights, out, routing.offsets, width, y.stride(0),
        E=routing.experts, TOP_K=routing.top_k, WEIGHTED=weights is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@jit
def _combine_kernel(
    Y, POSITION, WEIGHTS, OUT, OFFSETS, width, stride_y,
    E: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(OFFSETS + E)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(POSITION + token * TOP_K + choice)
        value = tl.load(Y + row.to(tl.int64) * stride_y + column, mask=(column < width) & (row < rows), other=0.0)
        if WEIGHTED:
            total += value.to(tl.float32) * tl.load(WEIGHTS + token * TOP_K + choice).to(tl.float32)
        else:
            total += value.to(tl.float32)
    tl.store(OUT + token * width + column, total.to(OUT.dtype.element_ty), mask=column < width)
