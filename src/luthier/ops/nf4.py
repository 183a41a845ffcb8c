"""4-bit weights of bitsandbytes (NF4 and FP4): two codes a byte, one scale for 64 weights, and that scale in 8 bits.

    weight[i]  = code[nibble i] * absmax[i // blocksize]                          the high nibble comes first
    absmax[j]  = code2[byte j] * absmax2[j // blocksize2] + offset                with double quantisation

in fp32, rounded once to the dtype asked for: bit for bit what ``bitsandbytes.functional.dequantize_4bit`` gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, tl, triton

TILE = 4096  # weights that one program dequantises at most
WORDS = 128  # of 8 weights that a program handles at a time, a word a thread
STEPS = 8  # times that it does at most
PAIRED = {torch.bfloat16: "cvt.rn.bf16x2.f32 $0, $1, $2;", torch.float16: "cvt.rn.f16x2.f32 $0, $1, $2;"}  # upper half first


@dataclass(frozen=True)
class Quantised:
    """A 4-bit matrix as bitsandbytes stores it. ``packed`` holds rows * columns / 2 bytes, in row-major order."""

    packed: Tensor  # uint8
    absmax: Tensor  # (blocks,) uint8 if nested, else fp32
    code: Tensor  # (16,) fp32
    blocksize: int
    shape: torch.Size  # (rows, columns), or (experts, rows, columns)
    kind: str  # "nf4" or "fp4"
    dtype: torch.dtype
    nested_absmax: Tensor | None = None  # (ceil(blocks / nested_blocksize),) fp32
    nested_code: Tensor | None = None  # (256,) fp32
    nested_blocksize: int = 256
    offset: Tensor | None = None  # () fp32

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(rows,) and (columns,) fp32 of a matrix: no weight in that row or column is larger. A block's columns share one."""
        if self.shape[1] % self.blocksize:
            weights = dequantise(self, dtype=torch.float32).abs()
            return weights.amax(1), weights.amax(0)
        largest = scales_of_blocks(self).abs().view(self.shape[0], -1) * self.code.abs().max()
        return largest.amax(1), largest.amax(0).repeat_interleave(self.blocksize)

    def experts(self, first: int, last: int) -> Quantised:
        """Those from ``first`` to ``last`` of a stack (experts, rows, columns), each of whole blocks."""
        size = self.shape[1:].numel()
        start, stop = first * size // self.blocksize, last * size // self.blocksize
        packed, absmax = self.packed[first * size // 2 : last * size // 2], self.absmax[start:stop]
        part = replace(self, packed=packed, absmax=absmax, shape=torch.Size((last - first, *self.shape[1:])))
        if self.nested_absmax is None:
            return part
        if start % self.nested_blocksize == 0:
            return replace(part, nested_absmax=self.nested_absmax[start // self.nested_blocksize :])
        return self._plain(part, torch.arange(start, stop, device=absmax.device))

    def chosen(self, index: Tensor) -> Quantised:
        """The experts (n,) of a stack, copied: a stack of n."""
        blocks = self.shape[1:].numel() // self.blocksize
        packed, absmax = (t.view(self.shape[0], -1).index_select(0, index).view(-1) for t in (self.packed, self.absmax))
        part = replace(self, packed=packed, absmax=absmax, shape=torch.Size((len(index), *self.shape[1:])))
        if self.nested_absmax is None:
            return part
        return self._plain(part, (index[:, None] * blocks + torch.arange(blocks, device=index.device)).view(-1))

    def _plain(self, part: Quantised, blocks: Tensor) -> Quantised:
        """A part that holds these blocks, with their scales in fp32."""
        absmax = self.nested_code[part.absmax.int()] * self.nested_absmax[blocks // self.nested_blocksize] + self.offset
        return replace(part, absmax=absmax, nested_absmax=None)


def quantised(weight: Tensor) -> Quantised:
    """The parts of a bitsandbytes ``Params4bit`` that is on its device (its ``quant_state`` is set)."""
    state = weight.quant_state
    nested = state.state2
    return Quantised(
        packed=weight.data.view(torch.uint8).reshape(-1),
        absmax=state.absmax,
        code=state.code,
        blocksize=state.blocksize,
        shape=torch.Size(state.shape),
        kind=state.quant_type,
        dtype=state.dtype,
        nested_absmax=nested.absmax if nested else None,
        nested_code=nested.code if nested else None,
        nested_blocksize=nested.blocksize if nested else 256,
        offset=state.offset if nested else None,
    )


def dequantise_reference(weight: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in plain torch -> (rows, columns) in ``dtype`` (default: the dtype it was quantised from)."""
    pairs = torch.cartesian_prod(weight.code, weight.code)  # row b: what the two nibbles of byte b stand for
    values = pairs.index_select(0, weight.packed.int()).reshape(-1)
    scales = scales_of_blocks(weight).repeat_interleave(weight.blocksize)[: values.numel()]
    return values.mul_(scales)[: weight.shape.numel()].to(dtype or weight.dtype).view(weight.shape)


def scales_of_blocks(weight: Quantised) -> Tensor:
    """(blocks,) fp32."""
    if weight.nested_absmax is None:
        return weight.absmax.float()
    outer = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.long()] * outer + weight.offset


def dequantise(weight: Quantised, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Write the weights to ``out`` (rows, columns), whose rows may be further apart than that, or to a new tensor."""
    if has_kernels(weight.packed):
        if out is None:
            out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.packed.device)
        return launch(weight, out)
    dtype = (dtype or weight.dtype) if out is None else out.dtype
    values = _through_bitsandbytes(weight, dtype) if _bitsandbytes_is_right(weight) else dequantise_reference(weight, dtype)
    return values if out is None else out.copy_(values)


def _bitsandbytes_is_right(weight: Quantised) -> bool:
    """Its CPU kernel is ten times faster than the reference, but takes wrong scales where blocks go over the end of a row."""
    return weight.packed.device.type == "cpu" and weight.shape[-1] % weight.blocksize == 0 and weight.blocksize < 2048


def _through_bitsandbytes(weight: Quantised, dtype: torch.dtype) -> Tensor:
    ops, absmax = torch.ops.bitsandbytes, weight.absmax
    if weight.nested_absmax is not None:
        outer = weight.nested_absmax, weight.nested_code, weight.nested_blocksize, torch.float32
        absmax = ops.dequantize_blockwise(absmax, *outer).add_(weight.offset)
    return ops.dequantize_4bit(weight.packed, absmax, weight.blocksize, weight.kind, weight.shape, dtype)


def launch(weight: Quantised, out: Tensor) -> Tensor:
    total, size = weight.shape.numel(), weight.blocksize
    columns = total if out.is_contiguous() else weight.shape[-1]  # without gaps it is one long row
    whole = columns % size == 0
    nested = weight.nested_absmax is not None
    scales = (weight.nested_absmax, weight.nested_code, weight.offset) if nested else (weight.absmax,) * 3
    per_program = blocks_of_a_program(columns // size if whole else triton.cdiv(total, size), size)
    programs = total // columns * triton.cdiv(columns // size, per_program) if whole else triton.cdiv(total, size * per_program)
    pairs = whole and out.element_size() == 2 and out.stride(-2) % 2 == 0 and out.data_ptr() % 4 == 0
    step = 8 * WORDS  # weights; a step has whole blocks, and lies within one block of scales
    in_steps = columns % step == 0 and step % size == 0 and (not nested or weight.nested_blocksize * size % step == 0)
    aligned = out.data_ptr() % 16 == 0 and out.stride(-2) % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    if pairs and in_steps and aligned and _has_pairs(out.device):
        most = max(count for count in range(1, STEPS + 1) if columns // step % count == 0)
        _nf4_words_kernel[(total // (step * most),)](
            weight.packed, weight.absmax, weight.code, *scales, out, columns, out.stride(-2),
            NESTED=weight.nested_blocksize if nested else 0, SIZE=size, STEPS=most, WORDS=WORDS,
            PAIRED=PAIRED[out.dtype], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
    _nf4_kernel[(programs,)](
        weight.packed, weight.absmax, weight.code, *scales, out, total, columns, out.stride(-2),
        NESTED=weight.nested_blocksize if nested else 0, SIZE=size, BLOCKS=per_program, WHOLE=whole, PAIRS=pairs,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@cache
def _has_pairs(device: torch.device) -> bool:
    """Whether its instructions round two numbers at once: NVIDIA's from Ampere on. Where kernels are interpreted, they do."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


def blocks_of_a_program(blocks: int, size: int) -> int:
    """Up to ``TILE`` weights, a power of two of blocks: the one that wastes least on a run of ``blocks``, the largest such."""
    largest = max(1, TILE // size)
    return min((largest, max(1, largest // 2), max(1, largest // 4)), key=lambda n: triton.cdiv(blocks, n) * n)


@jit
def _nf4_kernel(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, OUT, total, columns, stride,
    NESTED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """``BLOCKS`` runs of ``SIZE`` weights a program. ``WHOLE``: all of one row. ``PAIRS``: two weights are a word."""
    lane = tl.arange(0, BLOCKS)
    if WHOLE:
        programs = tl.cdiv(columns, BLOCKS * SIZE)
        row = (tl.program_id(0) // programs).to(tl.int64)
        within = tl.program_id(0) % programs * BLOCKS + lane
        inside = within * SIZE < columns
        block = row * (columns // SIZE) + within
        start = row * stride + within * SIZE
    else:
        block = tl.program_id(0).to(tl.int64) * BLOCKS + lane
        inside = block * SIZE < total
        start = block * SIZE
    scale = tl.load(ABSMAX + block, mask=inside, other=0)
    if NESTED > 0:
        outer = tl.load(NESTED_ABSMAX + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(NESTED_CODE + scale.to(tl.int32)) * outer + tl.load(OFFSET)
    byte = tl.arange(0, SIZE // 2)
    at = block[:, None] * (SIZE // 2) + byte[None, :]
    pair = tl.load(PACKED + at, mask=inside[:, None] & (2 * at < total), other=0).to(tl.int32)
    high = (tl.load(CODE + (pair >> 4)) * scale[:, None]).to(OUT.dtype.element_ty)
    low = (tl.load(CODE + (pair & 15)) * scale[:, None]).to(OUT.dtype.element_ty)
    if PAIRS:
        word = high.to(tl.uint16, bitcast=True).to(tl.uint32) | (low.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
        words = OUT.to(tl.pointer_type(tl.uint32))
        tl.store(words + (start // 2)[:, None] + byte[None, :], word, mask=inside[:, None])
    else:
        value = tl.reshape(tl.join(high, low), (BLOCKS, SIZE))
        index = start[:, None] + tl.arange(0, SIZE)[None, :]
        if WHOLE:
            tl.store(OUT + index, value, mask=inside[:, None])
        else:
            tl.store(OUT + index // columns * stride + index % columns, value, mask=index < total)


@jit
def _nf4_words_kernel(
    PACKED, ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, OFFSET, OUT, columns, stride,
    NESTED: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The same for rows of whole steps of ``WORDS`` words: a thread reads 8 weights at once, and writes them at once."""
    weights: tl.constexpr = 8 * WORDS
    programs = columns // (STEPS * weights)
    row, start = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * (STEPS * weights)
    words = PACKED.to(tl.pointer_type(tl.int32)) + (row * columns + start) // 8
    target = OUT.to(tl.pointer_type(tl.int32)) + (row * stride + start) // 2
    lane, pair = tl.arange(0, WORDS), tl.arange(0, 4 * WORDS)
    for step in tl.static_range(STEPS):
        first = (row * columns + start) // SIZE + step * (weights // SIZE)
        scale = tl.load(ABSMAX + first + lane // (SIZE // 8))
        if NESTED > 0:
            scale = tl.load(NESTED_CODE + scale.to(tl.int32)) * tl.load(NESTED_ABSMAX + first // NESTED) + tl.load(OFFSET)
        word = tl.load(words + step * WORDS + lane)
        a, b = _two_weights(CODE, word, scale, 0, PAIRED), _two_weights(CODE, word, scale, 8, PAIRED)
        c, d = _two_weights(CODE, word, scale, 16, PAIRED), _two_weights(CODE, word, scale, 24, PAIRED)
        tl.store(target + step * 4 * WORDS + pair, tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * WORDS,)))


@jit
def _two_weights(CODE, word, scale, SHIFT: tl.constexpr, PAIRED: tl.constexpr):
    """Those of the byte at ``SHIFT``, side by side as they are stored: the high nibble's first."""
    first = tl.load(CODE + (word >> (SHIFT + 4) & 15)) * scale
    second = tl.load(CODE + (word >> SHIFT & 15)) * scale
    return tl.inline_asm_elementwise(PAIRED, "=r,f,f", [second, first], dtype=tl.int32, is_pure=True, pack=1)
