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


@dataclass(frozen=True)
class Segments:
    """Sequences packed into one row (B = 1): where they begin and end, (count + 1,) int32 from 0, and the longest of them."""

    bounds: Tensor
    longest: int


@dataclass
class AttentionState:
    """What a backward needs besides q, k, v and the output."""

    kernel: str  # see ``kernel_for``
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


def kernel_for(q: Tensor, mask: Tensor | None, window: int | None = None, segments: Segments | None = None) -> str:
    """Which of torch's kernels is fastest for queries like ``q`` (B, H, T, D); "autograd" is whatever torch chooses."""
    if mask is not None or q.dtype == torch.float64:
        return "autograd"
    if not q.is_cuda:
        return "cpu" if window is None else "autograd"
    width, capability = q.shape[-1], torch.cuda.get_device_capability(q.device)
    if q.dtype == torch.float32 or width % 8 or width > 256 or capability < (8, 0):
        return "autograd"
    if window is not None or segments is not None:  # only flash attention knows these without a mask
        return "flash, structured"
    return "cudnn" if capability >= (9, 0) and width <= 128 and torch.backends.cuda.cudnn_sdp_enabled() else "flash"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, AttentionState]:
    """(out (B, H, T, D), what its backward needs), of causal attention within ``window`` and ``segments`` if given.

    With ``mask`` (see ``attention``) the mask alone decides.
    """
    window = None if window is None or window >= q.shape[2] else window
    kernel = kernel_for(q, mask, window, segments)
    if kernel in ("cudnn", "flash"):
        if kernel == "cudnn":
            results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
        else:
            results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
        return results[0], AttentionState(kernel, results[1], results[2:8])
    if kernel == "flash, structured":
        return _attend_structured(q, k, v, scale, window, segments)
    if kernel == "cpu":
        return _attend_on_cpu(q, k, v, scale, segments)
    if mask is None and window is not None:
        mask = structure_mask(q.shape[2], window, segments, q.device)
    with torch.enable_grad():
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out = attention(*leaves, scale, mask=mask)
    return out.detach(), AttentionState(kernel, graph=(*leaves, out))


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: AttentionState, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes, from that of the output (B, H, T, D)."""
    if state.kernel in ("cudnn", "flash"):
        cu_q, cu_k, max_q, max_k, seed, offset = state.extras
        if state.kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, state.rows, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True, scale=scale
            )
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, state.rows, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
    if state.kernel == "flash, structured":
        return _attend_structured_backward(grad, q, k, v, out, state, scale)
    if state.kernel == "cpu":
        return _attend_on_cpu_backward(grad, q, k, v, out, state, scale)
    *leaves, out = state.graph
    return torch.autograd.grad(out, leaves, grad)


def structure_mask(length: int, window: int | None, segments: Segments | None, device: torch.device) -> Tensor:
    """(1, 1, T, T) bool: what each token sees, causally, within its window and its segment."""
    query, key = torch.arange(length, device=device).unsqueeze(1), torch.arange(length, device=device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if segments is not None:
        segment = torch.searchsorted(segments.bounds, torch.arange(length, device=device, dtype=torch.int32), right=True)
        seen &= segment.unsqueeze(1) == segment
    return seen[None, None]


def _attend_structured(q, k, v, scale, window, segments):
    """Through flash attention's own interface: rows (T, H, D) if there are segments, else (B, T, H, D)."""
    bounds, longest = (None, q.shape[2]) if segments is None else (segments.bounds, segments.longest)
    sides = (None, None) if window is None else (window - 1, 0)  # torch's window does not count the token itself
    tensors = [t.transpose(1, 2) if segments is None else t[0].transpose(0, 1) for t in (q, k, v)]
    out, rows, seed, offset, _ = aten._flash_attention_forward(
        *tensors, bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=sides[0], window_size_right=sides[1],
    )  # fmt: skip
    out = out.transpose(1, 2) if segments is None else out.transpose(0, 1)[None]
    return out, AttentionState("flash, structured", rows, (bounds, longest, sides, seed, offset))


def _attend_structured_backward(grad, q, k, v, out, state, scale):
    bounds, longest, sides, seed, offset = state.extras
    tensors = [t.transpose(1, 2) if bounds is None else t[0].transpose(0, 1) for t in (grad, q, k, v, out)]
    gradients = aten._flash_attention_backward(
        *tensors, state.rows, bounds, bounds, longest, longest, 0.0, True, seed, offset,
        scale=scale, window_size_left=sides[0], window_size_right=sides[1],
    )  # fmt: skip
    return tuple(t.transpose(1, 2) if bounds is None else t.transpose(0, 1)[None] for t in gradients)


def _attend_on_cpu(q, k, v, scale, segments):
    """Segment by segment: torch's CPU kernel knows no others."""
    lengths = [q.shape[2]] if segments is None else segments.bounds.diff().tolist()
    pieces = zip(*(t.split(lengths, dim=2) for t in (q, _ungrouped(q, k), _ungrouped(q, v))), strict=True)
    results = [aten._scaled_dot_product_flash_attention_for_cpu(*piece, 0.0, True, scale=scale) for piece in pieces]
    out, rows = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return out, AttentionState("cpu", rows, (lengths,))


def _attend_on_cpu_backward(grad, q, k, v, out, state, scale):
    tensors = grad, q, _ungrouped(q, k), _ungrouped(q, v), out, state.rows
    pieces = zip(*(t.split(state.extras[0], dim=2) for t in tensors), strict=True)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    results = [backward(*piece, 0.0, True, scale=scale) for piece in pieces]
    dq, dk, dv = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return dq, *(t.unflatten(1, (k.shape[1], -1)).sum(2) for t in (dk, dv))


def _ungrouped(q: Tensor, k: Tensor) -> Tensor:
    return k if q.shape[1] == k.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
