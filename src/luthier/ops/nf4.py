"""4-bit weights of bitsandbytes (NF4 and FP4): two codes a byte, one scale for 64 weights, and that scale in 8 bits.

    weight[i]  = code[nibble i] * absmax[i // blocksize]                          the high nibble comes first
    absmax[j]  = code2[byte j] * absmax2[j // blocksize2] + offset                with double quantisation

in fp32, rounded once to the dtype asked for: bit for bit what ``bitsandbytes.functional.dequantize_4bit`` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantised:
    """A 4-bit matrix as bitsandbytes stores it. ``packed`` holds rows * columns / 2 bytes, in row-major order."""

    packed: Tensor  # uint8
    absmax: Tensor  # (blocks,) uint8 if nested, else fp32
    code: Tensor  # (16,) fp32
    blocksize: int
    shape: torch.Size  # (rows, columns)
    dtype: torch.dtype
    nested_absmax: Tensor | None = None  # (ceil(blocks / nested_blocksize),) fp32
    nested_code: Tensor | None = None  # (256,) fp32
    nested_blocksize: int = 256
    offset: Tensor | None = None  # () fp32


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
        dtype=state.dtype,
        nested_absmax=nested.absmax if nested else None,
        nested_code=nested.code if nested else None,
        nested_blocksize=nested.blocksize if nested else 256,
        offset=state.offset if nested else None,
    )


def dequantise_reference(weight: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in plain torch -> (rows, columns) in ``dtype`` (default: the dtype it was quantised from)."""
    absmax = weight.absmax
    if weight.nested_absmax is not None:
        scales = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
        absmax = weight.nested_code[absmax.long()] * scales + weight.offset
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).reshape(-1)
    scales = absmax.float().repeat_interleave(weight.blocksize)[: nibbles.numel()]
    values = weight.code[nibbles.long()] * scales
    return values[: weight.shape.numel()].to(dtype or weight.dtype).view(weight.shape)


def dequantise(weight: Quantised, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Write the weights to ``out`` (rows, columns), whose rows may be longer than the matrix's, or to a new tensor."""
    values = dequantise_reference(weight, dtype if out is None else out.dtype)
    return values if out is None else out.copy_(values)
