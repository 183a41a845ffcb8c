"""The plain 32-weight block formats in torch: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, bit for bit what llama.cpp writes.

A quantiser takes float32 ``[G, n]``: G blocks of n weights, and gives uint8 ``[G, bytes of a block]``.

With an importance matrix, see ``weighted.py``.

Equal bits need equal roundings. llama.cpp loops over a block in float32 without fused multiply-add, so sums here run over
the weights in order (`ordered_sum`), never through a reduction whose order torch chooses; the layout inside is
``[n, G]``, weights first, so that each step of such a sum is one contiguous addition. Constants that divide or are
divided are tensors: with Python numbers, CUDA multiplies by the reciprocal. Denormal weights overflow on the way, and what
becomes of that is taken from x86 (`whole`, `half_bytes`, ``fits.nearest``).
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import torch

from luthier.gguf import kernels
from luthier.ops.backend import has_kernels

if importlib.util.find_spec("numba") is not None:
    from luthier.gguf import compiled
else:
    compiled = None

X86_NAN = -512  # 0xFE00, the float16 that x86 makes of what is undefined
INT32_END = 2.0**31


def loops(x: torch.Tensor) -> ModuleType | None:
    """What runs a search on ``x`` as one loop over the weights of its groups, where there is something; else torch does."""
    if has_kernels(x):
        return kernels
    return compiled if x.device.type == "cpu" else None


def groups_of(x: torch.Tensor, n: int) -> torch.Tensor:
    """Groups ``[n, G]`` of n weights that follow each other in ``x``. Kernels read them where they are, without a copy."""
    groups = x.reshape(-1, n).t()
    return groups if has_kernels(x) else groups.contiguous()


def ordered_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum ``[n, G]`` over n, first to last, rounding after each addition."""
    if has_kernels(terms):
        return kernels.ordered_sum(terms)
    if terms.device.type == "cpu" and terms.is_contiguous() and terms.shape[1] > 1:
        with np.errstate(all="ignore"):  # NaN and overflow are the caller's: weights near 1e38
            return torch.from_numpy(np.add.reduce(terms.numpy(), axis=0))  # in order along all but the fast axis, it says
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``[n, G]``: the largest magnitude and, with its sign, the first weight that has it, each ``[G]``."""
    if has_kernels(x):
        return kernels.largest(x)
    high, low = x.amax(0), x.amin(0)
    value = torch.where(high > -low, high, low)
    unclear = (~(high > -low) & ~(high < -low)).nonzero().squeeze(1)  # of 1 and -1 the first, of NaN and 1 the 1
    if len(unclear):
        best = torch.zeros_like(x[0, unclear])
        for row in x[:, unclear]:
            best = torch.where(row.abs() > best.abs(), row, best)
        value[unclear] = best
    return value.abs(), value


def smallest(x: torch.Tensor) -> torch.Tensor:
    """The smallest weight of each group of ``[n, G]``; of 0.0 and -0.0 the first."""
    value = x[0]
    for row in x[1:]:
        value = torch.where(row < value, row, value)
    return value


def ratio(numerator: float, denominator: torch.Tensor) -> torch.Tensor:
    """``numerator / denominator`` in float32, 0 where the denominator is 0."""
    zero = denominator == 0
    quotient = torch.full_like(denominator, numerator) / torch.where(zero, torch.ones_like(denominator), denominator)
    return torch.where(zero, torch.zeros_like(denominator), quotient)


def half_bytes(*values: torch.Tensor) -> torch.Tensor:
    """float32 ``[G]`` each, as little-endian float16: uint8 ``[G, 2 * len(values)]``."""
    halves = torch.stack([value.half() for value in values], 1)
    bits = halves.view(torch.int16).masked_fill(halves.isnan(), X86_NAN)
    return bits.view(torch.uint8)


def whole(x: torch.Tensor) -> torch.Tensor:
    """float32 to int32 as x86 does it: what int32 cannot hold, NaN too, becomes the smallest. A GPU takes the nearest."""
    return torch.where(x.abs() < INT32_END, x, torch.full_like(x, -INT32_END)).to(torch.int32)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The low 4 bits of uint8 ``[G, 32]``, code i with code i + 16 in one byte: uint8 ``[G, 16]``."""
    low = codes & 15
    return low[:, :16] | (low[:, 16:] << 4)


def fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """Bit 4 of uint8 ``[G, 32]`` codes, 8 to a byte: uint8 ``[G, 4]``."""
    bits = (codes >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return bits.sum(2, dtype=torch.uint8)


def quantize_q8_0(x: torch.Tensor) -> torch.Tensor:
    if compiled is not None and x.device.type == "cpu":
        scale, codes = compiled.quantize_q8_0(x)
    else:
        scale = x.abs().amax(1) / torch.full_like(x[:, 0], 127.0)
        scaled = x * ratio(1.0, scale)[:, None]
        # the nearest, halves away from zero: the fraction is exact in float32, where adding 0.5 would not be
        codes = scaled.trunc() + (scaled.frac().abs() >= 0.5) * scaled.sign()
        codes = whole(codes).to(torch.int8)
    return torch.cat([half_bytes(scale), codes.view(torch.uint8)], 1)


def _symmetric(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale ``[G]`` and codes uint8 ``[G, 32]``: the weight of largest magnitude gets code 0."""
    _, value = largest(groups_of(x, x.shape[1]))
    scale = value / torch.full_like(value, -levels / 2)
    codes = whole(x * ratio(1.0, scale)[:, None] + (levels / 2 + 0.5)).clamp_max_(levels - 1)
    return scale, codes.to(torch.uint8)


def _with_offset(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and smallest weight ``[G]``, codes uint8 ``[G, 32]``: from the smallest weight to the largest."""
    low = smallest(x.t().contiguous())
    scale = (x.amax(1) - low).abs() / torch.full_like(low, levels - 1)  # abs: 0.0 also where both are -0.0 and 0.0
    codes = whole((x - low[:, None]) * ratio(1.0, scale)[:, None] + 0.5).clamp_max_(levels - 1)
    return scale, low, codes.to(torch.uint8)


def quantize_q4_0(x: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric(x, 16)
    return torch.cat([half_bytes(scale), nibbles(codes)], 1)


def quantize_q5_0(x: torch.Tensor) -> torch.Tensor:
    scale, codes = _symmetric(x, 32)
    return torch.cat([half_bytes(scale), fifth_bits(codes), nibbles(codes)], 1)


def quantize_q4_1(x: torch.Tensor) -> torch.Tensor:
    scale, low, codes = _with_offset(x, 16)
    return torch.cat([half_bytes(scale, low), nibbles(codes)], 1)


def quantize_q5_1(x: torch.Tensor) -> torch.Tensor:
    scale, low, codes = _with_offset(x, 32)
    return torch.cat([half_bytes(scale, low), fifth_bits(codes), nibbles(codes)], 1)
