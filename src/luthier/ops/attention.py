"""Scaled dot-product attention with grouped heads, over whatever torch has that is fastest for the case.

    out[b, h] = softmax(scale * q[b, h] @ k[b, h // group].T + mask) @ v[b, h // group]

``attend`` and ``attend_backward`` are a forward and its backward without autograd between them, so that a block decides
itself what it keeps: causal attention needs q, k, v, the output and one number a row (``AttentionState.rows``), of
which a block may keep the last two and compute the others again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


@dataclass
class AttentionState:
    """What a backward needs besides q, k, v and the output."""

    kernel: str  # "cudnn", "flash", "cpu", "autograd"
    rows: Tensor | None = None  # (B, H, T) fp32: log of each row's softmax denominator
    extras: tuple = ()  # small things that the kernel hands to its own backward
    graph: tuple = field(default=(), repr=False)  # autograd: the leaves and the output with its graph


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
    if mask is not None and grouped:  # torch's masked kernels know nothing of groups
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped)


def kernel_for(q: Tensor, mask: Tensor | None) -> str:
    """Which of torch's causal kernels is fastest for queries like ``q`` (B, H, T, D); "autograd" is any of torch's own."""
    if mask is not None or q.dtype == torch.float64:
        return "autograd"
    if not q.is_cuda:
        return "cpu"
    width, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    if q.dtype == torch.float32 or width % 8 or capability < (8, 0):
        return "autograd"
    if capability >= (9, 0) and width <= 128 and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn"
    return "flash" if width <= 256 else "autograd"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, AttentionState]:
    """Causal attention, or under ``mask`` (see ``attention``): (out (B, H, T, D), what its backward needs)."""
    kernel = kernel_for(q, mask)
    if kernel == "cudnn":
        out, rows, cu_q, cu_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
        return out, AttentionState(kernel, rows, (cu_q, cu_k, max_q, max_k, seed, offset))
    if kernel == "flash":
        out, rows, cu_q, cu_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
        return out, AttentionState(kernel, rows, (cu_q, cu_k, max_q, max_k, seed, offset))
    if kernel == "cpu":
        k, v = _ungrouped(q, k), _ungrouped(q, v)
        out, rows = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, AttentionState(kernel, rows)
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out = attention(*leaves, scale, mask=mask)
    return out.detach(), AttentionState(kernel, graph=(*leaves, out))


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: AttentionState, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes, from that of the output (B, H, T, D)."""
    if state.kernel == "cudnn":
        cu_q, cu_k, max_q, max_k, seed, offset = state.extras
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, state.rows, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True, scale=scale
        )
    if state.kernel == "flash":
        cu_q, cu_k, max_q, max_k, seed, offset = state.extras
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, state.rows, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
    if state.kernel == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, _ungrouped(q, k), _ungrouped(q, v), out, state.rows, 0.0, True, scale=scale
        )
        return dq, *(t.unflatten(1, (k.shape[1], -1)).sum(2) for t in (dk, dv))
    *leaves, out = state.graph
    return torch.autograd.grad(out, leaves, grad)


def _ungrouped(q: Tensor, k: Tensor) -> Tensor:
    return k if q.shape[1] == k.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
