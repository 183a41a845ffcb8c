"""Rotary position embedding: pairs of elements of a head turn by an angle that depends on the token's position.

    half:         (x[i], x[i + r/2])   for i < r/2          interleaved:  (x[2i], x[2i + 1])   for i < r/2
    a' = a cos - b sin                 b' = b cos + a sin   elements from r on stay as they are

The angles come as tables of half width (B, T, r/2): one row a token, whatever its position, so packed rows, partial
rotation and Qwen-VL's three-axis positions need nothing of their own here. The gradient turns by the opposite angle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (B, T, H, D), cos and sin (B or 1, T, r/2) with r <= D -> (B, T, H, D) in x's dtype, computed in fp32."""
    turned = 2 * cos.shape[-1]
    cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    head, rest = x[..., :turned].float(), x[..., turned:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the heads of ``x`` (B, T, H, D) by the tables ``cos``, ``sin`` (B or 1, T, r/2)."""
    return rotary_reference(x, cos, sin, interleaved)


def half_tables(cos: Tensor, sin: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    """The tables (B, T, r/2) inside what a transformers model hands to its layers (see adapters.spec.Rotary)."""
    if flavour == "half_width":
        return cos, sin
    if flavour == "interleaved_pairs":
        return cos[..., ::2], sin[..., ::2]
    width = cos.shape[-1] // 2
    return cos[..., :width], sin[..., :width]
