"""Scaled dot-product attention with grouped heads, over whatever torch has that is fastest for the case.

out[b, h] = softmax(scale * q[b, h] @ k[b, h // group].T + mask) @ v[b, h // group]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D); ``window`` counts the token itself."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = torch.arange(q.shape[2], device=q.device).unsqueeze(1), torch.arange(k.shape[2], device=q.device)
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        hidden |= key > query
    if window is not None:
        hidden |= key <= query - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v
    return scores.softmax(-1).to(v.dtype) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D); mask (B or 1, 1, T, T) bool (True: seen) or additive."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped)
