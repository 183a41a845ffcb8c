"""Cross-entropy of a linear layer's outputs, chunk by chunk: the logits of all tokens never exist at once.

    logits = cap(scale * (hidden @ weight.T + bias))        cap(z) = softcap * tanh(z / softcap)
    loss   = sum over targets t != ignore_index of  logsumexp(logits) - logits[t]

A chunk's gradient is computed while its logits are there, so nothing is projected twice: three matrix products with a
trained weight, two with a frozen one. The sum is fp32; whoever wants a mean divides it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 28  # of one chunk of logits in fp32: large enough for full-speed products, small beside a model


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The definition, in plain torch. hidden (N, D), weight (V, D), targets (N,) int64 -> fp32 scalar."""
    logits = shape_logits(torch.nn.functional.linear(hidden, weight, bias).float(), softcap, scale)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> Tensor:
    """Summed cross-entropy of ``targets`` under the shaped logits of ``hidden``, as an fp32 scalar.

    hidden (..., D) and weight (V, D) of one floating dtype (under autocast: any), targets (...) int64, already shifted;
    bias (V,). Gradients flow to hidden, weight and bias. Without any valid target the loss is a differentiable zero.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not describe the same tokens")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = chunk_rows or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _LinearCrossEntropy.apply(flat, weight, bias, targets.reshape(-1), softcap, scale, ignore_index, rows)


def shape_logits(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    """From ``hidden @ weight.T + bias`` to what the softmax sees."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, ignore_index, rows):
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for index in (targets != ignore_index).nonzero().squeeze(1).split(rows):
            chunk, target = hidden[index], targets[index]
            logits = torch.nn.functional.linear(chunk, weight, bias)
            loss_sum, grad = _chunk_loss_and_grad(logits, target, softcap, scale)
            loss += loss_sum
            if wants_hidden:
                grad_hidden.index_copy_(0, index, grad @ weight)
            if wants_weight:
                grad_weight += grad.T @ chunk
            if wants_bias:
                grad_bias += grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype),
            *(None,) * 5,
        )


def _chunk_loss_and_grad(raw: Tensor, target: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor]:
    """raw (n, V) logits before shaping, target (n,) -> (summed loss in fp32, its gradient by ``raw`` in raw's dtype)."""
    logits = shape_logits(raw.float(), softcap, scale)
    lse = torch.logsumexp(logits, dim=-1)
    column = target.unsqueeze(1)
    loss = (lse - logits.gather(1, column).squeeze(1)).sum()
    grad = torch.exp(logits - lse.unsqueeze(1))
    grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad.dtype))
    if softcap is not None:
        grad *= 1 - (logits / softcap) ** 2
    if scale != 1.0:
        grad *= scale
    return loss, grad.to(raw.dtype)
