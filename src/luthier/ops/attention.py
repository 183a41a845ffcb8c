"""Scaled dot-product attention with grouped heads, over the fastest kernel that there is for the case: torch's, or ours.

    out[b, h] = softmax(scale * q[b, h] @ k[b, h // group].T + mask) @ v[b, h // group]

A sink is one more score a row, of a key without a value. All kernels get it in the same way, behind them: it adds to
``rows`` and shrinks the output, and any flash backward that is given both so gives the gradients with the sink.

``attend`` and ``attend_backward`` are a forward and its backward without autograd between them, so that a block decides
itself what it keeps: causal attention needs q, k, v, the output and one number a row (``AttentionState.rows``), of
which a block may keep the last two and compute the others again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from luthier.ops.backend import triton
from luthier.ops.bands import Padding, Segments, band
from luthier.ops.flash_attention import (
    ALIKE,
    flash_backward,
    flash_backward_reference,
    flash_forward,
    flash_reference,
)

aten = torch.ops.aten
WIDE_CUDNN = 91000  # the version from which it knows heads of 256, backward too, on Hopper
BLOCK = 32  # of the rows of torch's memory-efficient kernel


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
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, of causal rows. q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D).

    ``window`` counts the token itself.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    query, key = torch.arange(q.shape[2], device=q.device).unsqueeze(1), torch.arange(k.shape[2], device=q.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v
    return scores.softmax(-1).to(v.dtype) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    window: int | None = None,
    segments: Segments | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D); mask (B or 1, 1, T, S) bool (True: seen) or additive.

    Differentiable in q, k, v and ``sinks``. ``window`` and ``segments`` mean something where it is causal without a mask.
    """
    if window is not None or segments is not None or softcap is not None or sinks is not None:
        if mask is None and not causal:
            mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return _Attention.apply(q, k, v, sinks, scale, mask, window, segments, softcap)
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and grouped:  # torch's masked kernels know nothing of groups
        k, v = _ungrouped(q, k), _ungrouped(q, v)
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped)


# capability -> case -> width of a head (at most) -> the fastest kernel; a card takes the row of the largest not above its own
FASTEST: dict[tuple[int, int], dict[str, dict[int, str]]] = {
    (7, 5): {"causal": {256: "efficient"}, "window": {256: "reference"}, "packed": {256: "efficient"}},
    (8, 0): {"causal": {256: "flash"}, "window": {256: "flash, structured"}, "packed": {256: "flash, structured"}},
    (9, 0): {  # measured on an H200 (torch 2.11): see LOG.md
        "causal": {256: "cudnn"},
        "window": {64: "tiles", 96: "flash, structured", 128: "tiles", 256: "flash, structured"},
        "packed": {64: "tiles", 96: "flash, structured", 128: "tiles", 256: "flash, structured"},
    },
    (10, 0): {  # not measured
        "causal": {128: "cudnn", 256: "flash"},
        "window": {256: "flash, structured"},
        "packed": {256: "flash, structured"},
    },
}


def kernel_for(
    q: Tensor,
    mask: Tensor | None = None,
    window: int | None = None,
    segments: Segments | Padding | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> str:
    """The kernel for queries like ``q`` (B, H, T, D): "cpu", one of ``FASTEST``, "reference" (ours, in plain torch), or
    "autograd": whatever torch chooses, for what only a mask can say."""
    tiled = _has_tiles(q)
    if isinstance(segments, Padding) and (tiled or mask is None):
        return "tiles" if tiled else "reference"
    if mask is not None:
        return "autograd" if softcap is None and sinks is None else "reference"
    if softcap is not None:
        return "tiles" if tiled else "reference"
    if not q.is_cuda:
        return "cpu" if window is None and q.dtype != torch.float64 else "reference"
    width, sixteen_bits = q.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
    case = "window" if window is not None else "causal" if segments is None else "packed"
    if not sixteen_bits:
        return "efficient" if case != "window" and q.dtype == torch.float32 and width % 4 == 0 else "reference"
    if width % 8 or width > 256:
        return "tiles" if tiled else "reference"
    capability = torch.cuda.get_device_capability(q.device)
    capability = max(ALIKE.get(capability, capability), (7, 5))
    row = FASTEST[max(known for known in FASTEST if known <= capability)][case]
    kernel = row[min(most for most in row if width <= most)]
    if kernel == "cudnn" and not _has_cudnn(width):
        return "flash"
    return "reference" if kernel == "tiles" and not tiled else kernel


def _has_cudnn(width: int) -> bool:
    """Whether cuDNN may be used, and is new enough for heads of more than 128."""
    return torch.backends.cuda.cudnn_sdp_enabled() and (width <= 128 or (torch.backends.cudnn.version() or 0) >= WIDE_CUDNN)


def _has_tiles(q: Tensor) -> bool:
    """Whether ours in Triton takes ``q``; Turing's tensor cores are beyond Triton's reach."""
    if triton is None or not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    window: int | None = None,
    segments: Segments | Padding | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, AttentionState]:
    """(out (B, H, T, D), what its backward needs), of causal attention within ``window`` and ``segments`` if given.

    With ``mask`` (see ``attention``) the mask alone decides; it may stand beside ``Padding``, for kernels that know only
    masks. ``sinks`` (H,) get no gradient.
    """
    window = None if window is None or window >= q.shape[2] else window
    kernel = kernel_for(q, mask, window, segments, softcap, sinks)
    if kernel == "autograd":
        with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, Tensor.detach):  # not those of a checkpoint around us
            leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
            out = attention(*leaves, scale, mask=mask)
        return out.detach(), AttentionState(kernel, graph=(*leaves, out))
    if kernel in ("tiles", "reference"):
        seen = band(q.shape[2], window, segments, q.device) if mask is None or kernel == "tiles" else mask
        run = flash_forward if kernel == "tiles" else flash_reference
        out, rows = run(q, k, v, scale, seen, softcap)
        state = AttentionState(kernel, rows, (seen, softcap))
    elif kernel == "flash, structured":
        out, state = _attend_structured(q, k, v, scale, window, segments)
    elif kernel in ("cpu", "efficient"):
        out, state = _attend_in_pieces(kernel, q, k, v, scale, segments)
    else:
        out, state = _attend_causally(kernel, q, k, v, scale)
    if sinks is not None:
        _add_sinks(out, state.rows, sinks)
    return out, state


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: AttentionState, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes, from that of the output (B, H, T, D)."""
    if state.kernel == "autograd":
        *leaves, out = state.graph
        return torch.autograd.grad(out, leaves, grad)
    if state.kernel in ("tiles", "reference"):
        run = flash_backward if state.kernel == "tiles" else flash_backward_reference
        seen, softcap = state.extras
        return run(grad, q, k, v, out, state.rows, scale, seen, softcap)
    if state.kernel == "flash, structured":
        return _attend_structured_backward(grad, q, k, v, out, state, scale)
    if state.kernel in ("cpu", "efficient"):
        return _attend_in_pieces_backward(grad, q, k, v, out, state, scale)
    return _attend_causally_backward(grad, q, k, v, out, state, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, scale, mask, window, segments, softcap):
        out, ctx.state = attend(q, k, v, scale, mask, window, segments, softcap, sinks)
        ctx.save_for_backward(q, k, v, sinks, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, sinks, out = ctx.saved_tensors
        gradients = attend_backward(grad, q, k, v, out, ctx.state, ctx.scale)
        of_sinks = None
        if ctx.needs_input_grad[3]:  # a sink has no value: all it does is to shrink the output
            shares = torch.exp(sinks.float()[:, None] - _rows(ctx.state.rows, out))
            of_sinks = -(shares * (grad.float() * out.float()).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return *gradients, of_sinks, None, None, None, None, None


def _add_sinks(out: Tensor, rows: Tensor, sinks: Tensor) -> None:
    """Put ``sinks`` (H,) into the output (B, H, T, D) and its rows, in place."""
    rows = _rows(rows, out)
    with_sink = torch.logaddexp(rows, sinks.to(rows.dtype)[:, None])
    out.mul_((rows - with_sink).exp_().unsqueeze(-1))
    rows.copy_(with_sink)


def _rows(rows: Tensor, out: Tensor) -> Tensor:
    """(B, H, T), a view of what a kernel calls its rows: (H, T) of a packed row, or (B, H, T, 1)."""
    return rows.view(out.shape[:3])


def _attend_causally(kernel, q, k, v, scale):
    if kernel == "cudnn":
        results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    else:
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return results[0], AttentionState(kernel, results[1], results[2:8])


def _attend_causally_backward(grad, q, k, v, out, state, scale):
    cu_q, cu_k, max_q, max_k, seed, offset = state.extras
    if state.kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, state.rows, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True, scale=scale
        )
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, state.rows, cu_q, cu_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
    )


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


def _attend_in_pieces(kernel, q, k, v, scale, segments):
    """Segment by segment, every head with keys of its own: these kernels of torch's know neither segments nor groups."""
    lengths = (q.shape[2],) if segments is None else segments.lengths
    seeds, outputs, rows = (), [], []
    for piece in zip(*(t.split(lengths, dim=2) for t in (q, _ungrouped(q, k), _ungrouped(q, v))), strict=True):
        if kernel == "cpu":
            out, row = aten._scaled_dot_product_flash_attention_for_cpu(*piece, 0.0, True, scale=scale)
        else:
            out, row, *seeds = aten._scaled_dot_product_efficient_attention(*piece, None, True, 0.0, True, scale=scale)
        outputs.append(out)
        rows.append(row[:, :, : out.shape[2]])  # the second kernel's are longer: whole blocks
    return _joined(outputs), AttentionState(kernel, _joined(rows), (lengths, seeds))


def _attend_in_pieces_backward(grad, q, k, v, out, state, scale):
    lengths, seeds = state.extras
    tensors, gradients = (grad, q, _ungrouped(q, k), _ungrouped(q, v), out, state.rows), []
    for *piece, rows in zip(*(t.split(lengths, dim=2) for t in tensors), strict=True):
        if state.kernel == "cpu":
            backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
            gradients.append(backward(*piece, rows, 0.0, True, scale=scale))
        else:
            backward, rows = aten._scaled_dot_product_efficient_attention_backward, F.pad(rows, (0, -rows.shape[2] % BLOCK))
            wanted = [True, True, True, False]
            gradients.append(backward(*piece[:4], None, piece[4], rows, *seeds, 0.0, wanted, True, scale=scale)[:3])
    dq, dk, dv = (_joined(parts) for parts in zip(*gradients, strict=True))
    return dq, _summed(dk, k), _summed(dv, v)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _ungrouped(q: Tensor, k: Tensor) -> Tensor:
    return k if q.shape[1] == k.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _summed(wide: Tensor, k: Tensor) -> Tensor:
    """The gradient of ``k`` from that of ``_ungrouped``."""
    return wide if wide.shape == k.shape else wide.unflatten(1, (k.shape[1], -1)).sum(2)
