"""Matrices and products in 8 bits: e4m3 (3 bits of mantissa, largest value 448) with one fp32 scale for each row.

    x (n, K)  ~  values * scales[:, None]        scale = max |row| / 448; values round to nearest, ties to even
    x @ w.T   ~  (values of x @ values of w.T) * scales of x * scales of w

A value keeps 4 significant bits: one product of random numbers is off by 3.6 % (2.6 % from each side). A row that holds
inf or NaN becomes NaN, so that its product is NaN; a row of zeros stays zeros. A frozen weight is written from its 4 bits
(or 16) straight into e4m3, for its forward with scales of its rows and for its backward transposed, with scales of what
are its columns: a scale only has to bound its row, for e4m3 is exact to the same share over four orders of magnitude.

What has to be as exact as bf16 rides behind in two numbers, a high one and what that leaves, 8 bits together:

    x = [x8 | high t  low t  high t | 0]         x @ w.T  =  x8 @ w8.T + t @ b.T   but for low t times low b
    w = [w8 | high b  high b  low b | 0]         a row's scale bounds all of it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops import nf4_e4m3
from luthier.ops.backend import has_kernels, jit, power_of_2, side_by_side, tl, triton, warps_for
from luthier.ops.nf4 import Quantised, dequantise
from luthier.ops.nf4_e4m3 import _two_bytes

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-30  # the least bound of a row: its scale stays a normal number
RIDER_ROWS = 32  # of a weight that one program adds riders to
ROW_BLOCK = 16384  # elements of a row that a program holds at a time
RIDE_BLOCK = 1024  # the same, of a row that is rounded again
TILE = 64  # rows and columns of a weight that one program writes
ALIGNMENT = 16  # what the tensor cores' product wants widths to be multiples of
RIDER_ALIGNMENT = 64  # riders are padded to it: other inner widths are a third slower


@dataclass(frozen=True)
class Rows8:
    """A matrix in e4m3."""

    values: Tensor  # (n, K) float8_e4m3fn
    scales: Tensor  # (n,) fp32

    def dequantised(self) -> Tensor:
        """(n, K) fp32."""
        return self.values.float() * self.scales[:, None]


def has_tensor_cores(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 in hardware: NVIDIA's Ada, Hopper, Blackwell and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def rider_width(rank: int) -> int:
    """Columns that riders of ``rank`` take."""
    return -(-3 * rank // RIDER_ALIGNMENT) * RIDER_ALIGNMENT


def quantise_rows_reference(x: Tensor, riders: Tensor | None = None) -> Rows8:
    """The definition, in plain torch: x (n, K) of any float dtype, and ``riders`` (n, R) behind it."""
    wide = x.float() if riders is None else torch.cat((x, riders), dim=1).float()
    scales = scales_of(wide.abs().amax(1))
    wide = wide * (1.0 / scales)[:, None]
    values = _rounded(wide[:, : x.shape[1]])
    return Rows8(values if riders is None else torch.cat((values, _in_two(wide[:, x.shape[1] :], low=1)), dim=1), scales)


def quantise_rows(x: Tensor, riders: Tensor | None = None) -> Rows8:
    """x (n, K), whose rows may be further apart than K, with ``riders`` (n, R) -> (n, K + ``rider_width``) in new memory."""
    return launch_quantise(x, riders) if has_kernels(x) else quantise_rows_reference(x, riders)


def room(n: int, width: int, rank: int, like: Tensor) -> Rows8 | None:
    """Memory for rows (n, width) that a kernel rounds while it computes them, and for riders behind.

    They are complete when ``ride`` has added the riders. None where ``quantise_rows`` has to round them later.
    """
    if not has_kernels(like) or width > ROW_BLOCK:
        return None
    values = torch.empty(n, width + rider_width(rank), dtype=E4M3, device=like.device)
    return Rows8(values, torch.empty(n, dtype=torch.float32, device=like.device))


def ride(rows: Rows8, x: Tensor, riders: Tensor) -> Rows8:
    """Add ``riders`` (n, R) to ``rows``, which are x (n, K) rounded; gives what ``quantise_rows`` of both would."""
    (n, width), rank = x.shape, riders.shape[1]
    _ride_kernel[(n,)](
        x, riders, rows.values, rows.scales, width, x.stride(0), riders.stride(0), RANK=rank, WIDTH=rider_width(rank),
        RIDERS=power_of_2(rider_width(rank)), BLOCK=RIDE_BLOCK, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return rows


def scales_of(bounds: Tensor) -> Tensor:
    """The scales (n,) of rows in which no value is larger than ``bounds`` (n,)."""
    return bounds.clamp_min(TINY) * (1 / LARGEST)


def write_riders(bounds: Tensor, riders: Tensor | None, out: Tensor, group: int = 1) -> Tensor:
    """Scales (N,) of a weight's rows, which ``bounds`` (N,) bound, and of ``riders`` (N, R), written to the end of ``out``.

    ``group``: rows that follow each other and get one scale.
    """
    if has_kernels(out):
        return launch_riders(bounds, riders, out, group)
    if riders is not None:
        bounds = torch.maximum(bounds, riders.float().abs().amax(1))
    scales = scales_of(bounds.view(-1, group).amax(1).repeat_interleave(group))
    if riders is not None:
        out[:, -rider_width(riders.shape[1]) :] = _in_two(riders.float() * (1.0 / scales)[:, None], low=2)
    return scales


def columns_of_one_scale(weight: Tensor | Quantised) -> int:
    """How many columns in succession need one scale where ``weight`` is written transposed."""
    return weight.blocksize if isinstance(weight, Quantised) and nf4_e4m3.fits(weight) else 1


def weight_bounds(weight: Tensor | Quantised) -> tuple[Tensor, Tensor]:
    """(N,) and (K,) fp32: bounds of the rows and of the columns of a weight (N, K)."""
    if isinstance(weight, Quantised):
        return weight.bounds
    return tuple(torch.linalg.vector_norm(weight, float("inf"), dim=dim, dtype=torch.float32) for dim in (1, 0))


def write_weight(weight: Tensor | Quantised, scales: Tensor, out: Tensor, transposed: bool = False) -> Tensor:
    """Write a weight (N, K) to ``out`` in e4m3: (N, K) with ``scales`` (N,), or ``transposed`` (K, N) with ``scales`` (K,).

    Those of ``columns_of_one_scale`` are the same.
    The rows of ``out`` may be further apart than they are wide.
    """
    in_words = out.data_ptr() % 4 == 0 and out.stride(0) % 4 == 0  # not behind a layer of an odd width
    if isinstance(weight, Quantised) and not (in_words and nf4_e4m3.fits(weight)):
        weight = dequantise(weight, dtype=torch.float32)
    if has_kernels(out):
        return launch_write(weight, scales, out, transposed)
    wide = dequantise(weight, dtype=torch.float32) if isinstance(weight, Quantised) else weight.float()
    return out.copy_(_rounded((wide.T if transposed else wide) * (1.0 / scales)[:, None]))


def product(x: Rows8, weight: Rows8, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x (n, K) @ weight (N, K).T -> (n, N) in ``dtype``; on tensor cores if there are any.

    These sum in a little less than fp32 (``use_fast_accum``): off by 0.2 to 0.4 %, at up to 28,672 summands, and 10 % faster.
    """
    widths_fit = not (x.values.shape[1] % ALIGNMENT or weight.values.shape[0] % ALIGNMENT)
    if has_tensor_cores(x.values.device) and widths_fit:
        settings = {"scale_a": x.scales[:, None], "scale_b": weight.scales[None, :], "out_dtype": torch.bfloat16}
        if dtype == torch.bfloat16:
            return torch._scaled_mm(x.values, weight.values.T, **settings, use_fast_accum=True, out=out)
        y = torch._scaled_mm(x.values, weight.values.T, **settings, use_fast_accum=True).to(dtype)
    else:
        y = (x.dequantised() @ weight.dequantised().T).to(dtype)
    return y if out is None else out.copy_(y)


def _rounded(x: Tensor) -> Tensor:
    """fp32 -> e4m3; what is too large becomes 448 instead of what the version of torch at hand makes of it."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def _in_two(x: Tensor, low: int) -> Tensor:
    """fp32 (n, R) -> e4m3 (n, ``rider_width``): x three times and zeros; of number ``low``, what rounding it had left."""
    high = _rounded(x)
    thrice = [high, high, high]
    thrice[low] = _rounded(x - high.float())
    zeros = high.new_zeros(x.shape[0], rider_width(x.shape[1]) - 3 * x.shape[1])
    return torch.cat((*thrice, zeros), dim=1)


def launch_quantise(x: Tensor, riders: Tensor | None) -> Rows8:
    (n, width), rank = x.shape, 0 if riders is None else riders.shape[1]
    values = torch.empty(n, width + rider_width(rank), dtype=E4M3, device=x.device)
    scales = torch.empty(n, dtype=torch.float32, device=x.device)
    block, stride = min(power_of_2(width), ROW_BLOCK), 0 if riders is None else riders.stride(0)
    _quantise_kernel[(n,)](
        x, x if riders is None else riders, values, scales, width, x.stride(0), stride, RANK=rank, WIDTH=rider_width(rank),
        RIDERS=power_of_2(rider_width(rank)), STEPS=triton.cdiv(width, block), BLOCK=block, num_warps=warps_for(block),
        enable_fp_fusion=False,
    )  # fmt: skip
    return Rows8(values, scales)


def launch_riders(bounds: Tensor, riders: Tensor | None, out: Tensor, group: int) -> Tensor:
    rows, rank = out.shape[0], 0 if riders is None else riders.shape[1]
    scales, strides = torch.empty_like(bounds), (0, 0) if riders is None else riders.stride()
    columns, block = out[:, out.shape[1] - rider_width(rank) :], max(RIDER_ROWS, group)
    _riders_kernel[(triton.cdiv(rows, block),)](
        bounds, bounds if riders is None else riders, scales, columns, rows, *strides, out.stride(0),
        RANK=rank, WIDTH=rider_width(rank), RIDERS=power_of_2(rider_width(rank)), ROWS=block, GROUP=group, num_warps=block // 8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return scales


def launch_write(weight: Tensor | Quantised, scales: Tensor, out: Tensor, transposed: bool) -> Tensor:
    if isinstance(weight, Quantised):
        return nf4_e4m3.launch(weight, scales, out, transposed)
    weight = side_by_side(weight)
    (rows, columns), strides = weight.shape, (weight.stride(0), out.stride(0))
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    _write_kernel[grid](weight, scales, out, rows, columns, *strides, TRANSPOSED=transposed, TILE=TILE, num_warps=8)
    return out


@jit
def _on_grid(x):
    """fp32 -> the nearest value of e4m3, still in fp32: adding and taking away 1.5 * 2^23 of its steps rounds to one of them.

    No conversion back from e4m3: ptxas 12.8 reads a wrong register for one behind a conversion in the same kernel.
    """
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # below 2^-6 steps stay as they are
    magic = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + magic) - magic


@jit
def _scale_of(bound):
    """``scales_of`` in a kernel."""
    return tl.maximum(bound, 1e-30) * 0.002232142857142857


@jit
def _riding(x, column, RANK: tl.constexpr, LOW: tl.constexpr):
    """The byte in ``column`` of riders, as int8: x, scaled and in fp32, is that of ``column % RANK``.

    The zeros behind are chosen among bytes: ptxas 12.8 loses a register where zeros are what is converted.
    """
    high = _on_grid(x)
    value = tl.where(column // RANK == LOW, x - high, high)
    return tl.where(column < 3 * RANK, _two_bytes(value, value) & 255, 0).to(tl.int8)


@jit
def _quantise_kernel(
    X, LOW, VALUES, SCALES, width, stride, stride_low,
    RANK: tl.constexpr, WIDTH: tl.constexpr, RIDERS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: once through it for the largest value, once to write it (from the cache where STEPS > 1)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + column
        largest = tl.maximum(largest, tl.abs(tl.load(X + row * stride + at, mask=at < width, other=0.0).to(tl.float32)))
    bound = tl.max(largest, 0)
    if RANK > 0:
        rider = tl.arange(0, RIDERS)
        low = tl.load(LOW + row * stride_low + rider % RANK).to(tl.float32)
        bound = tl.maximum(bound, tl.max(tl.abs(low), 0))
    scale = _scale_of(bound)
    inverse = tl.div_rn(1.0, scale)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + column
        x = tl.load(X + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(VALUES + row * (width + WIDTH) + at, (x * inverse).to(VALUES.dtype.element_ty), mask=at < width)
    if RANK > 0:
        target = VALUES.to(tl.pointer_type(tl.int8)) + row * (width + WIDTH) + width + rider
        tl.store(target, _riding(low * inverse, rider, RANK, 1), mask=rider < WIDTH)
    tl.store(SCALES + row, scale)


@jit
def _ride_kernel(
    X, LOW, VALUES, SCALES, width, stride, stride_low,
    RANK: tl.constexpr, WIDTH: tl.constexpr, RIDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Riders of one row a program. A row whose scale does not bound them is rounded again: few do."""
    row, rider = tl.program_id(0).to(tl.int64), tl.arange(0, RIDERS)
    low = tl.load(LOW + row * stride_low + rider % RANK).to(tl.float32)
    target = VALUES + row * (width + WIDTH)
    scale, needed = tl.load(SCALES + row), _scale_of(tl.max(tl.abs(low), 0))
    if needed > scale:
        scale = needed
        tl.store(SCALES + row, scale)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
            tl.store(target + column, (x * tl.div_rn(1.0, scale)).to(VALUES.dtype.element_ty), mask=column < width)
    value = _riding(low * tl.div_rn(1.0, scale), rider, RANK, 1)
    tl.store(target.to(tl.pointer_type(tl.int8)) + width + rider, value, mask=rider < WIDTH)


@jit
def _riders_kernel(
    BOUNDS, B, SCALES, OUT, rows, stride_row, stride_column, stride_out,
    RANK: tl.constexpr, WIDTH: tl.constexpr, RIDERS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    bound = tl.load(BOUNDS + row, mask=inside, other=0.0)
    if RANK > 0:
        rider = tl.arange(0, RIDERS)
        at = row.to(tl.int64)[:, None] * stride_row + (rider % RANK)[None, :] * stride_column
        b = tl.load(B + at, mask=inside[:, None], other=0.0).to(tl.float32)
        bound = tl.maximum(bound, tl.max(tl.abs(b), 1))
    if GROUP > 1:
        largest = tl.max(tl.reshape(bound, (ROWS // GROUP, GROUP)), 1)
        bound = tl.reshape(tl.broadcast_to(largest[:, None], (ROWS // GROUP, GROUP)), (ROWS,))
    scale = _scale_of(bound)
    tl.store(SCALES + row, scale, mask=inside)
    if RANK > 0:
        value = _riding(b * tl.div_rn(1.0, scale)[:, None], rider[None, :], RANK, 2)
        target = OUT.to(tl.pointer_type(tl.int8)) + row.to(tl.int64)[:, None] * stride_out + rider[None, :]
        tl.store(target, value, mask=inside[:, None] & (rider < WIDTH)[None, :])


@jit
def _write_kernel(
    WEIGHT, SCALES, OUT, rows, columns, stride, stride_out, TRANSPOSED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """A tile of a weight in 16 or 32 bits."""
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(WEIGHT + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        value *= tl.div_rn(1.0, tl.load(SCALES + column, mask=column < columns, other=1.0))[None, :]
        target = OUT + column.to(tl.int64)[:, None] * stride_out + row[None, :]
        tl.store(target, tl.trans(value.to(OUT.dtype.element_ty)), mask=tl.trans(inside))
    else:
        value *= tl.div_rn(1.0, tl.load(SCALES + row, mask=row < rows, other=1.0))[:, None]
        target = OUT + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        tl.store(target, value.to(OUT.dtype.element_ty), mask=inside)
