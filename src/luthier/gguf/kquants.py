"""The K formats in torch: superblocks of 256 weights, cut into groups with a small scale (and offset) each.

A quantiser takes float32 ``[B, 256]`` and gives uint8 ``[B, bytes]``, bit for bit what llama.cpp writes. How that is
reached, and the layout ``[n, G]`` used inside (n weights of G groups), is told in ``blocks.py``.

Each works in two passes: fit a scale for every group, store the scales themselves in few bits, then round every weight
with the scale as it was stored. A group whose stored scale is 0 keeps the codes of the first pass, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from luthier.gguf.blocks import groups_of, half_bytes, largest, loops, ordered_sum, ratio
from luthier.gguf.fits import (
    SMALLEST,
    OffsetFit,
    divided,
    first_codes,
    first_codes_above,
    fit_by_exchange,
    fit_symmetric,
    fit_with_offset,
    nearest,
    round_symmetric,
)


def signed_bytes(codes: torch.Tensor) -> torch.Tensor:
    """What is left of int32 codes when they are kept in an int8."""
    return ((codes + 128) & 255) - 128


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
    """Two times 8 numbers of 6 bits, int32 ``[B, 8]`` each: uint8 ``[B, 12]``.

    A number that has more bits, a negative one, spoils what shares its byte: `_unpack_6_bit` says what is left.
    """
    parts = [
        scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
        lows[:, :4] | ((lows[:, 4:] >> 4) << 6),
        (scales[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4),
    ]
    return (torch.cat(parts, 1) & 255).to(torch.uint8)


def _unpack_6_bit(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, lows, rest = packed.int().split(4, dim=1)
    return (
        torch.cat([scales & 63, (rest & 15) | ((scales >> 6) << 4)], 1),
        torch.cat([lows & 63, (rest >> 4) | ((lows >> 6) << 4)], 1),
    )


def _fit_eight_groups(x: torch.Tensor, levels: int, first: float, steps: int) -> tuple[torch.Tensor, ...]:
    """The first pass of Q4_K and Q5_K: what `store_q4_k` and `store_q5_k` take."""
    groups = groups_of(x, 32)
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
    step = torch.where(zero, torch.ones_like(step), step)
    if in_one := getattr(loops(groups), "round_with_offset", None):
        codes = in_one(groups, offset, step, levels)
    else:
        codes = nearest((groups + offset) / step).clamp_(0, levels).to(torch.uint8).t()
    if zero.any():
        first_pass = first_codes_above(groups, fit, levels).to(torch.uint8).t()
        codes = torch.where(zero[:, None], first_pass, codes)
    return codes.reshape(-1, 8, 32)


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
    packed = _pack_6_bit(scale_codes, low_codes)
    scale_codes, low_codes = _unpack_6_bit(packed)
    codes = round_with_stored(groups, fit, scale, scale_codes, low, low_codes, 15)
    return torch.cat([half_bytes(scale, low), packed, _pack_nibbles(codes)], 1)


def quantize_q5_k(x: torch.Tensor) -> torch.Tensor:
    return store_q5_k(*_fit_eight_groups(x, 31, -0.5, 15))


def store_q5_k(groups, fit, scale, scale_codes, low, low_codes) -> torch.Tensor:
    packed = _pack_6_bit(scale_codes, low_codes)
    scale_codes, low_codes = _unpack_6_bit(packed)
    codes = round_with_stored(groups, fit, scale, scale_codes, low, low_codes, 31)
    parts = [half_bytes(scale, low), packed, _pack_top_bits(codes, 4), _pack_nibbles(codes & 15)]
    return torch.cat(parts, 1)


def quantize_q2_k(x: torch.Tensor) -> torch.Tensor:
    groups = groups_of(x, 16)
    fit = fit_with_offset(groups, groups.abs(), 3, -0.5, 0.1, 15, absolute=True)
    scale, scale_codes = _scale_codes(fit.scale.view(-1, 16), 15)
    low, low_codes = _scale_codes(fit.low.view(-1, 16), 15)
    return store_q2_k(groups, fit, scale, scale_codes, low, low_codes)


def store_q2_k(groups, fit, scale, scale_codes, low, low_codes) -> torch.Tensor:
    both = (scale_codes | (low_codes << 4)) & 255
    codes = round_with_stored(groups, fit, scale, both & 15, low, both >> 4, 3)
    return torch.cat([both.to(torch.uint8), _pack_pairs(codes), half_bytes(scale, low)], 1)


def quantize_q6_k(x: torch.Tensor) -> torch.Tensor:
    groups = groups_of(x, 16)
    return store_q6_k(x, *fit_symmetric(groups, groups * groups, 32))


def store_q6_k(x: torch.Tensor, scale: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The second pass and the packing; ``scale`` and ``grid`` are those of groups of 16, ``[16 * B]``."""
    groups, scale, count = x.reshape(-1, 16), scale.view(-1, 16), len(x)
    top, value = largest(groups_of(scale, 16))
    empty = top < SMALLEST
    inverse = divided(-128.0, torch.where(empty, torch.ones_like(value), value))
    scale_codes = nearest(inverse[:, None] * scale).clamp_max(127)
    stored = divided(1.0, inverse).half()
    step = (stored.float()[:, None] * scale_codes.float()).view(-1)
    codes = round_symmetric(groups, step, 32, lambda: first_codes(groups, grid[:, None], 32).to(torch.uint8))
    codes = codes.reshape(count, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    low = torch.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2).reshape(count, 128)
    high = (high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)).reshape(count, 64)
    packed = torch.cat([low, high, scale_codes.to(torch.int8).view(torch.uint8), stored[:, None].view(torch.uint8)], 1)
    return torch.where(empty[:, None], torch.zeros_like(packed), packed)


def quantize_q3_k(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(-1, 16)
    scale, first_pass = fit_by_exchange(groups, 4)
    scale = scale.view(-1, 16)
    _, value = largest(groups_of(scale, 16))
    inverse = ratio(-32.0, value)
    scale_codes = signed_bytes(nearest(inverse[:, None] * scale)).clamp_(-32, 31) + 32
    scale_codes = torch.where(value[:, None] != 0, scale_codes, torch.zeros_like(scale_codes))
    # weights from 1e12 on may have an infinite scale, and its inverse is 0
    scale = torch.where(value != 0, divided(1.0, inverse), torch.zeros_like(value))
    return store_q3_k(groups, lambda: first_pass, scale, scale_codes)


def store_q3_k(
    groups: torch.Tensor, first_pass: Callable[[], torch.Tensor], scale: torch.Tensor, codes_of_scales: torch.Tensor
) -> torch.Tensor:
    """The second pass and the packing; ``groups`` ``[16 * B, 16]``, ``scale`` ``[B]``, its codes int32 ``[B, 16]`` in 0..63."""
    step = (scale.half().float()[:, None] * (codes_of_scales - 32).float()).view(-1)
    codes = round_symmetric(groups, step, 4, first_pass).reshape(-1, 8, 32)
    low, high = codes_of_scales & 15, codes_of_scales >> 4
    high = high[:, 0:4] | (high[:, 4:8] << 2) | (high[:, 8:12] << 4) | (high[:, 12:] << 6)
    packed_scales = torch.cat([low[:, :8] | (low[:, 8:] << 4), high], 1).to(torch.uint8)
    return torch.cat([_pack_top_bits(codes, 2), _pack_pairs(codes & 3), packed_scales, half_bytes(scale)], 1)
