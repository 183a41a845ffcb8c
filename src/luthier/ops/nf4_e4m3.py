"""4-bit weights written as e4m3, as they lie or transposed, without passing through a wider number.

A block of 64 weights has one scale, so it holds 16 numbers: these are rounded, packed into four words of four bytes, and
each weight's byte is looked up there by its code, four bytes an instruction (``prmt``: each of four selectors picks one of
the eight bytes of two words). That takes a third of the instructions that rounding every weight takes.

Transposed, the numbers have to be the same for all columns of a block: their scales must be.
"""

from __future__ import annotations

from torch import Tensor

from luthier.ops.backend import jit, tl, triton
from luthier.ops.nf4 import Quantised, blocks_of_a_program

LARGEST_BLOCK = 128  # weights; one scale for more columns than that would be too coarse
QUADS, BLOCKS, WARPS = 32, 2, 4  # of a transposing program: four rows each, and blocks of each row
BLOCKS_OF_A_WARP = 32  # where rows stay rows


def fits(weight: Quantised) -> bool:
    """Whether ``launch`` can write it: rows of whole blocks, and a number of rows that four divides."""
    rows, columns = weight.shape
    is_aligned = weight.packed.data_ptr() % 16 == 0
    return is_aligned and columns % weight.blocksize == 0 and rows % 4 == 0 and weight.blocksize <= LARGEST_BLOCK


def launch(weight: Quantised, scales: Tensor, out: Tensor, transposed: bool) -> Tensor:
    """Write a weight (N, K) to ``out`` (N, K), divided by ``scales`` (N,), or to (K, N), by ``scales`` (K,).

    ``out``'s rows begin at multiples of four bytes. ``transposed``: the columns of a block have the same scale.
    """
    (rows, columns), size, nested = weight.shape, weight.blocksize, weight.nested_absmax is not None
    outer = (weight.nested_absmax, weight.nested_code, weight.offset) if nested else (weight.absmax,) * 3
    source = weight.packed, weight.absmax, weight.code, *outer, scales, out
    how = {"SIZE": size, "NESTED": weight.nested_blocksize if nested else 0, "enable_fp_fusion": False}
    if transposed:
        grid = triton.cdiv(rows, 4 * QUADS), triton.cdiv(columns, BLOCKS * size)
        tile = {"ROWS": QUADS, "BLOCKS": BLOCKS, "num_warps": WARPS}
        _columns_kernel[grid](*source, rows, columns, out.stride(0), **how, **tile)
    else:
        blocks = blocks_of_a_program(columns // size, size)
        grid = (rows * triton.cdiv(columns // size, blocks),)
        warps = max(1, blocks // BLOCKS_OF_A_WARP)
        _rows_kernel[grid](*source, columns, out.stride(0), **how, BLOCKS=blocks, num_warps=warps)
    return out


@jit
def _two_bytes(first, second):
    """Two fp32 numbers -> the bytes of the nearest values of e4m3 as one int32, the first's in the lowest 8 bits.

    Written out as one instruction: ptxas 12.8 loses bytes that Triton converts and then packs into words.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, $2, $1; cvt.u32.u16 $0, both; }",
        "=r,f,f",
        [first, second],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@jit
def _four_numbers(CODE, FIRST: tl.constexpr, scale, inverse):
    """The bytes of four of a block's numbers, from code ``FIRST`` on."""
    zero, one = tl.load(CODE + FIRST) * scale * inverse, tl.load(CODE + FIRST + 1) * scale * inverse
    two, three = tl.load(CODE + FIRST + 2) * scale * inverse, tl.load(CODE + FIRST + 3) * scale * inverse
    return _two_bytes(zero, one) | (_two_bytes(two, three) << 16)


@jit
def _looked_up(CODE, codes, scale, inverse):
    """A word of eight codes -> the bytes of the first four weights, and of the last four.

    ``high`` are the codes, in the order of the weights; ``low``, their lower three bits, picks from the numbers 0 to 7 and
    from 8 to 15; ``high``, made of the fourth bits, picks the one or the other.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 low, high, x, y, z;"
        "and.b32 low, $2, 0x0f0f0f0f; shl.b32 low, low, 4; shr.u32 high, $2, 4; and.b32 high, high, 0x0f0f0f0f;"
        "or.b32 high, high, low; and.b32 low, high, 0x77777777;"
        "shr.u32 high, high, 1; and.b32 high, high, 0x44444444; or.b32 high, high, 0x32103210;"
        "prmt.b32 x, $3, $4, low; prmt.b32 y, $5, $6, low; prmt.b32 z, x, y, high;"
        "shr.u32 low, low, 16; shr.u32 high, high, 16;"
        "prmt.b32 x, $3, $4, low; prmt.b32 y, $5, $6, low; mov.b32 $0, z; prmt.b32 $1, x, y, high; }",
        "=&r,=&r,r,r,r,r,r",
        [
            codes,
            _four_numbers(CODE, 0, scale, inverse),
            _four_numbers(CODE, 4, scale, inverse),
            _four_numbers(CODE, 8, scale, inverse),
            _four_numbers(CODE, 12, scale, inverse),
        ],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@jit
def _turned(a, b, c, d):
    """The four words of a matrix of 4 by 4 bytes, a row each -> those of its columns."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 x, y, z, w;"
        "prmt.b32 x, $4, $5, 0x5140; prmt.b32 y, $6, $7, 0x5140; prmt.b32 z, $4, $5, 0x7362; prmt.b32 w, $6, $7, 0x7362;"
        "prmt.b32 $0, x, y, 0x5410; prmt.b32 $1, x, y, 0x7632; prmt.b32 $2, z, w, 0x5410; prmt.b32 $3, z, w, 0x7632; }",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [a, b, c, d],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@jit
def _block_scale(ABSMAX, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, NESTED: tl.constexpr):
    scale = tl.load(ABSMAX + block, mask=inside, other=0)
    if NESTED > 0:
        outer = tl.load(NESTED_ABSMAX + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(NESTED_CODE + scale.to(tl.int32)) * outer + tl.load(OFFSET)
    return scale


@jit
def _rows_kernel(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, SCALES, OUT, columns, stride_out,
    SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``BLOCKS`` blocks of one row a program."""
    programs = tl.cdiv(columns, BLOCKS * SIZE)
    row = (tl.program_id(0) // programs).to(tl.int64)
    within = tl.program_id(0) % programs * BLOCKS + tl.arange(0, BLOCKS)
    inside = within * SIZE < columns
    block = row * (columns // SIZE) + within
    scale = _block_scale(ABSMAX, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, NESTED)[:, None]
    at = block[:, None] * (SIZE // 8) + tl.arange(0, SIZE // 8)[None, :]
    codes = tl.load(PACKED.to(tl.pointer_type(tl.int32)) + at, mask=inside[:, None], other=0)
    first, second = _looked_up(CODE, codes, scale, tl.div_rn(1.0, tl.load(SCALES + row)))
    words = tl.reshape(tl.join(first, second), (BLOCKS, SIZE // 4))
    target = (row * stride_out + within * SIZE)[:, None] // 4 + tl.arange(0, SIZE // 4)[None, :]
    tl.store(OUT.to(tl.pointer_type(tl.int32)) + target, words, mask=inside[:, None])


@jit
def _one_of_four(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, inverse, SIZE: tl.constexpr, NESTED: tl.constexpr
):
    """One row of each four, of the blocks (ROWS, BLOCKS): its bytes (ROWS, BLOCKS, SIZE / 8) as ``_looked_up`` gives them."""
    scale = _block_scale(ABSMAX, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, NESTED)[:, :, None]
    at = block[:, :, None] * (SIZE // 8) + tl.arange(0, SIZE // 8)[None, None, :]
    codes = tl.load(PACKED.to(tl.pointer_type(tl.int32)) + at, mask=inside[:, :, None], other=0)
    return _looked_up(CODE, codes, scale, inverse)


@jit
def _store_columns(word, target, inside):
    """``word`` (ROWS, BLOCKS, SIZE / 8), four bytes of a column each, to ``target`` (BLOCKS * SIZE / 8, ROWS)."""
    tl.store(target, tl.trans(tl.reshape(word, (inside.shape[1], inside.shape[0]))), mask=inside)


@jit
def _columns_kernel(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, SCALES, OUT, rows, columns, stride_out,
    SIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A tile of 4 * ``ROWS`` rows and ``BLOCKS`` blocks of each: four rows of a column are stored as one word."""
    quad = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    exists, blocks = within * SIZE < columns, columns // SIZE
    inside = (4 * quad < rows)[:, None] & exists[None, :]
    inverse = tl.div_rn(1.0, tl.load(SCALES + within * SIZE, mask=exists, other=1.0))[None, :, None]
    block = (4 * quad).to(tl.int64)[:, None] * blocks + within[None, :]
    a, e = _one_of_four(PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, inverse, SIZE, NESTED)
    block += blocks
    b, f = _one_of_four(PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, inverse, SIZE, NESTED)
    block += blocks
    c, g = _one_of_four(PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, inverse, SIZE, NESTED)
    block += blocks
    d, h = _one_of_four(PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, block, inside, inverse, SIZE, NESTED)
    column = tl.program_id(1) * BLOCKS * SIZE + 8 * tl.arange(0, BLOCKS * SIZE // 8)
    inside = (column < columns)[:, None] & (4 * quad < rows)[None, :]
    line = stride_out // 4
    target = OUT.to(tl.pointer_type(tl.int32)) + column.to(tl.int64)[:, None] * line + quad[None, :]
    a, b, c, d = _turned(a, b, c, d)
    _store_columns(a, target, inside)
    _store_columns(b, target + line, inside)
    _store_columns(c, target + 2 * line, inside)
    _store_columns(d, target + 3 * line, inside)
    e, f, g, h = _turned(e, f, g, h)
    _store_columns(e, target + 4 * line, inside)
    _store_columns(f, target + 5 * line, inside)
    _store_columns(g, target + 6 * line, inside)
    _store_columns(h, target + 7 * line, inside)
