"""Matrices and products in 8 bits: e4m3 (3 bits of mantissa, largest value 448) with one fp32 scale for each row.

    x (n, K)  ~  values * scales[:, None]        scale = max |row| / 448; values round to nearest, ties to even
    x @ w.T   ~  (values of x @ values of w.T) * scales of x * scales of w

A value keeps 4 significant bits: one product of random numbers is off by 3.6 % (2.6 % from each side). A row that holds
inf or NaN becomes NaN, so that its product is NaN; a row of zeros stays zeros. A frozen weight is written from its 4 bits
(or 16) straight into e4m3, for its forward with scales of its rows and for its backward transposed, with scales of what
are its columns: a scale only has to bound its row, for e4m3 is exact to the same share over five orders of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, triton, warps_for
from luthier.ops.nf4 import Quantised, dequantise

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 1e-30  # the least bound of a row: its scale stays a normal number
ROW_BLOCK = 16384  # elements of a row that a program holds at a time
WIDE_TILE, SQUARE_TILE = (8, 256), (128, 128)  # rows and columns of a weight that one program writes; transposed
ALIGNMENT = 16  # what the tensor cores' product wants widths to be multiples of


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


def quantise_rows_reference(x: Tensor) -> Rows8:
    """The definition, in plain torch: x (n, K) of any float dtype -> e4m3 with a scale for each row."""
    wide = x.float()
    scales = scales_of(wide.abs().amax(1))
    return Rows8(_rounded(wide * (1.0 / scales)[:, None]), scales)


def quantise_rows(x: Tensor) -> Rows8:
    """x (n, K), whose rows may be further apart than K -> e4m3 in new memory."""
    return launch_quantise(x) if has_kernels(x) else quantise_rows_reference(x)


def scales_of(bounds: Tensor) -> Tensor:
    """The scales (n,) of rows in which no value is larger than ``bounds`` (n,)."""
    return bounds.clamp_min(TINY) / LARGEST


def weight_bounds(weight: Tensor | Quantised) -> tuple[Tensor, Tensor]:
    """(N,) and (K,) fp32: bounds of the rows and of the columns of a weight (N, K)."""
    if isinstance(weight, Quantised):
        return weight.bounds
    return tuple(torch.linalg.vector_norm(weight, float("inf"), dim=dim, dtype=torch.float32) for dim in (1, 0))


def write_weight(weight: Tensor | Quantised, scales: Tensor, out: Tensor, transposed: bool = False) -> Tensor:
    """Write a weight (N, K) to ``out`` in e4m3: (N, K) with ``scales`` (N,), or ``transposed`` (K, N) with ``scales`` (K,).

    The rows of ``out`` may be further apart than they are wide.
    """
    if isinstance(weight, Quantised) and weight.shape[1] % weight.blocksize:
        weight = dequantise(weight, dtype=torch.float32)
    if has_kernels(out):
        return launch_write(weight, scales, out, transposed)
    wide = dequantise(weight, dtype=torch.float32) if isinstance(weight, Quantised) else weight.float()
    return out.copy_(_rounded((wide.T if transposed else wide) * (1.0 / scales)[:, None]))


def product(x: Rows8, weight: Rows8, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """x (n, K) @ weight (N, K).T -> (n, N) in ``dtype``, summed in fp32; on tensor cores if there are any."""
    widths_fit = not (x.values.shape[1] % ALIGNMENT or weight.values.shape[0] % ALIGNMENT)
    if has_tensor_cores(x.values.device) and widths_fit:
        scales = {"scale_a": x.scales[:, None], "scale_b": weight.scales[None, :], "out_dtype": torch.bfloat16}
        if dtype == torch.bfloat16:
            return torch._scaled_mm(x.values, weight.values.T, **scales, out=out)
        y = torch._scaled_mm(x.values, weight.values.T, **scales).to(dtype)
    else:
        y = (x.dequantised() @ weight.dequantised().T).to(dtype)
    return y if out is None else out.copy_(y)


def _rounded(x: Tensor) -> Tensor:
    """fp32 -> e4m3; what is too large becomes 448 instead of what the version of torch at hand makes of it."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def launch_quantise(x: Tensor) -> Rows8:
    n, width = x.shape
    values = torch.empty(n, width, dtype=E4M3, device=x.device)
    scales = torch.empty(n, dtype=torch.float32, device=x.device)
    block = min(power_of_2(width), ROW_BLOCK)
    _quantise_kernel[(n,)](
        x, values, scales, width, x.stride(0), STEPS=triton.cdiv(width, block), BLOCK=block, num_warps=warps_for(block)
    )
    return Rows8(values, scales)


def launch_write(weight: Tensor | Quantised, scales: Tensor, out: Tensor, transposed: bool) -> Tensor:
    (rows, columns), tile = weight.shape, SQUARE_TILE if transposed else WIDE_TILE
    grid = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    shape = {"TRANSPOSED": transposed, "ROWS": tile[0], "COLUMNS": tile[1], "num_warps": 8 if transposed else 4}
    if not isinstance(weight, Quantised):
        _write_kernel[grid](weight, scales, out, rows, columns, weight.stride(0), out.stride(0), **shape)
        return out
    nested = weight.nested_absmax is not None
    outer = (weight.nested_absmax, weight.nested_code, weight.offset) if nested else (weight.absmax,) * 3
    _write_nf4_kernel[grid](
        weight.packed, weight.absmax, weight.code, *outer, scales, out, rows, columns, out.stride(0), SIZE=weight.blocksize,
        NESTED=weight.nested_blocksize if nested else 0, **shape, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@jit
def _quantise_kernel(X, VALUES, SCALES, width, stride, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: once through it for the largest value, once to write it (from the cache where STEPS > 1)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + column
        largest = tl.maximum(largest, tl.abs(tl.load(X + row * stride + at, mask=at < width, other=0.0).to(tl.float32)))
    scale = tl.div_rn(tl.maximum(tl.max(largest, 0), 1e-30), 448.0)
    inverse = tl.div_rn(1.0, scale)
    for step in tl.static_range(STEPS):
        at = step * BLOCK + column
        x = tl.load(X + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
        tl.store(VALUES + row * width + at, (x * inverse).to(VALUES.dtype.element_ty), mask=at < width)
    tl.store(SCALES + row, scale)


@jit
def _write_kernel(
    WEIGHT, SCALES, OUT, rows, columns, stride, stride_out,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a weight in 16 or 32 bits."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
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


@jit
def _write_nf4_kernel(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, SCALES, OUT, rows, columns, stride_out,
    SIZE: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a weight in 4 bits (nf4.py); the two weights of a byte go to neighbouring columns, or to rows of their own."""
    row, byte = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (row < rows)[:, None] & (2 * byte < columns)[None, :]
    block = row.to(tl.int64)[:, None] * (columns // SIZE) + (byte // (SIZE // 2))[None, :]
    scale = tl.load(ABSMAX + block, mask=inside, other=0)
    if NESTED > 0:
        outer = tl.load(NESTED_ABSMAX + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(NESTED_CODE + scale.to(tl.int32)) * outer + tl.load(OFFSET)
    at = row.to(tl.int64)[:, None] * (columns // 2) + byte[None, :]
    pair = tl.load(PACKED + at, mask=inside, other=0).to(tl.int32)
    high, low = tl.load(CODE + (pair >> 4)) * scale, tl.load(CODE + (pair & 15)) * scale
    if TRANSPOSED:
        exists = 2 * byte < columns
        high *= tl.div_rn(1.0, tl.load(SCALES + 2 * byte, mask=exists, other=1.0))[None, :]
        low *= tl.div_rn(1.0, tl.load(SCALES + 2 * byte + 1, mask=exists, other=1.0))[None, :]
        target = OUT + 2 * byte.to(tl.int64)[:, None] * stride_out + row[None, :]
        tl.store(target, tl.trans(high.to(OUT.dtype.element_ty)), mask=tl.trans(inside))
        tl.store(target + stride_out, tl.trans(low.to(OUT.dtype.element_ty)), mask=tl.trans(inside))
    else:
        inverse = tl.div_rn(1.0, tl.load(SCALES + row, mask=row < rows, other=1.0))[:, None]
        values = tl.join((high * inverse).to(OUT.dtype.element_ty), (low * inverse).to(OUT.dtype.element_ty))
        target = OUT + row.to(tl.int64)[:, None, None] * stride_out + 2 * byte[None, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(target, values, mask=tl.broadcast_to(inside[:, :, None], values.shape))
