"""Rotary position embedding: pairs of elements of a head turn by an angle that depends on the token's position.

    half:         (x[i], x[i + r/2])   for i < r/2          interleaved:  (x[2i], x[2i + 1])   for i < r/2
    a' = a cos - b sin                 b' = b cos + a sin   elements from r on stay as they are

The angles come as tables of half width (B, T, r/2): one row a token, whatever its position, so packed rows, partial
rotation and Qwen-VL's three-axis positions need nothing of their own here. The gradient turns by the opposite angle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, warps_for


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (B, T, H, D), cos and sin (B or 1, T, r/2) with r <= D -> (B, T, H, D) in x's dtype, computed in fp32."""
    turned = 2 * cos.shape[-1]
    cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    head, rest = x[..., :turned].float(), x[..., turned:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, out: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """``x`` (B, T, H, D) turned, or with ``inverse`` turned back, into ``out``: x itself by default.

    Strides may be any as long as a head's elements lie side by side. Not differentiable.
    """
    out = x if out is None else out
    if not has_kernels(x):
        return out.copy_(rotary_reference(x, cos, -sin if inverse else sin, interleaved))
    return launch(x, cos, sin, interleaved, out, inverse)


def half_tables(cos: Tensor, sin: Tensor, flavour: str) -> tuple[Tensor, Tensor]:
    """The tables (B, T, r/2) inside what a transformers model hands to its layers (see adapters.spec.Rotary)."""
    if flavour == "half_width":
        return cos, sin
    if flavour == "interleaved_pairs":
        return cos[..., ::2], sin[..., ::2]
    width = cos.shape[-1] // 2
    return cos[..., :width], sin[..., :width]


def launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor, inverse: bool) -> Tensor:
    batch, tokens, heads, width = x.shape
    half = cos.shape[-1]
    strides = *x.stride()[:3], *out.stride()[:3], *_broadcast(cos), *_broadcast(sin)
    rest = width - 2 * half if out.data_ptr() != x.data_ptr() else 0
    constants = {"HEADS": heads, "HEAD_BLOCK": power_of_2(heads), "HALF": half, "HALF_BLOCK": power_of_2(half)}
    constants |= {"REST": rest, "REST_BLOCK": power_of_2(max(rest, 1)), "INTERLEAVED": interleaved, "INVERSE": inverse}
    warps = min(8, warps_for(constants["HEAD_BLOCK"] * constants["HALF_BLOCK"]))
    _rotary_kernel[(batch * tokens,)](x, out, cos, sin, tokens, *strides, **constants, num_warps=warps)
    return out


def _broadcast(table: Tensor) -> tuple[int, int, int]:
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1), table.stride(2)


@jit
def _rotary_kernel(
    X, OUT, COS, SIN, tokens, x_batch, x_token, x_head, out_batch, out_token, out_head,
    cos_batch, cos_token, cos_pair, sin_batch, sin_token, sin_pair,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head, pair = tl.arange(0, HEAD_BLOCK), tl.arange(0, HALF_BLOCK)
    cos = tl.load(COS + batch * cos_batch + token * cos_token + pair * cos_pair, mask=pair < HALF, other=0.0).to(tl.float32)[
        None, :
    ]
    sin = tl.load(SIN + batch * sin_batch + token * sin_token + pair * sin_pair, mask=pair < HALF, other=0.0).to(tl.float32)[
        None, :
    ]
    if INVERSE:
        sin = -sin
    inside = (head < HEADS)[:, None] & (pair < HALF)[None, :]
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else HALF
    source = X + batch * x_batch + token * x_token + head[:, None] * x_head
    target = OUT + batch * out_batch + token * out_token + head[:, None] * out_head
    a = tl.load(source + step * pair[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + step * pair[None, :] + other, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + step * pair[None, :], (a * cos - b * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(target + step * pair[None, :] + other, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=inside)
    if REST > 0:
        column = tl.arange(0, REST_BLOCK)
        inside_rest = (head < HEADS)[:, None] & (column < REST)[None, :]
        value = tl.load(source + 2 * HALF + column[None, :], mask=inside_rest, other=0.0)
        tl.store(target + 2 * HALF + column[None, :], value, mask=inside_rest)
