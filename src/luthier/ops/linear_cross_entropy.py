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

from luthier.ops.backend import has_kernels, jit, power_of_2, tl

CHUNK_BYTES = 1 << 28  # of one chunk of logits: large enough for full-speed products, small beside a model


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
    rows = chunk_rows or rows_per_chunk(weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    with_grad = torch.is_grad_enabled()  # an autograd function sees it off always
    return _LinearCrossEntropy.apply(flat, weight, bias, targets.reshape(-1), softcap, scale, ignore_index, rows, with_grad)


def shape_logits(logits: Tensor, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """From ``hidden @ weight.T + bias`` to what the softmax sees."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def rows_per_chunk(weight: Tensor) -> int:
    """Tokens whose logits under ``weight`` (V, D) fill CHUNK_BYTES: whole tiles of 256 where there are as many."""
    rows = max(1, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
    return rows if rows < 256 else rows // 256 * 256


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, ignore_index, rows, with_grad):
        wants_hidden, wants_weight, wants_bias = wants = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for index in (targets != ignore_index).nonzero().squeeze(1).split(rows):
            chunk, target = hidden[index], targets[index]
            raw = torch.nn.functional.linear(chunk, weight, bias)
            losses, grad = loss_and_grad_(raw, target, softcap, scale, wants_grad=any(wants))
            loss += losses.sum()
            if wants_hidden:
                grad_hidden.index_copy_(0, index, grad @ weight)
            if wants_weight:
                grad_weight += grad.T @ chunk
            if wants_bias:
                grad_bias += grad.sum(0, dtype=torch.float32)
            del raw, grad  # or the next chunk is made beside them
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else scaled(grad_hidden, grad_loss),
            None if grad_weight is None else (grad_weight * grad_loss).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(bias_dtype),
            *(None,) * 6,
        )


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad (N, D) times an fp32 factor, of all rows () or of each (N, 1), which may be above what grad's dtype holds."""
    return torch.mul(grad, factor.reshape(-1, 1), out=torch.empty_like(grad))


def loss_and_grad_(
    raw: Tensor, target: Tensor, softcap: float | None, scale: float, wants_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """raw (n, V) logits before shaping, target (n,) -> (losses (n,) in fp32, their gradient by ``raw``, in its place)."""
    if has_kernels(raw):
        return launch_(raw, target, softcap, scale, wants_grad), raw if wants_grad else None
    return loss_and_grad_reference(raw, target, softcap, scale, wants_grad)


def loss_and_grad_reference(
    raw: Tensor, target: Tensor, softcap: float | None, scale: float, wants_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch, and not in place."""
    logits = shape_logits(raw.float(), softcap, scale)
    column = target.unsqueeze(1)
    log_probs = torch.log_softmax(logits, dim=-1)
    losses = -log_probs.gather(1, column).squeeze(1)
    if not wants_grad:
        return losses, None
    grad = log_probs.exp_()
    grad.scatter_add_(1, column, torch.full_like(column, -1, dtype=grad.dtype))
    if softcap is not None:
        grad *= 1 - torch.tanh(raw.float() * scale / softcap) ** 2
    return losses, (grad * scale).to(raw.dtype)


def launch_(
    raw: Tensor,
    target: Tensor,
    softcap: float | None,
    scale: float,
    wants_grad: bool = True,
    entropy: Tensor | None = None,
    is_top1: Tensor | None = None,
) -> Tensor:
    """The losses (n,) in fp32; ``raw`` (n, V) becomes their gradient, if wanted. Two reads and one write of raw.

    ``entropy`` fp32 (n,) and ``is_top1`` bool (n,) are written on the way: of the distribution, and whether no token is
    likelier than the target.
    """
    losses = torch.empty(raw.shape[0], dtype=torch.float32, device=raw.device)
    constants = {"V": raw.shape[1], "BLOCK": min(8192, power_of_2(raw.shape[1])), "CAPPED": softcap is not None}
    constants |= {"GRAD": wants_grad, "SCORES": entropy is not None}
    scores = (losses, losses) if entropy is None else (entropy, is_top1)
    _cross_entropy_kernel[(raw.shape[0],)](
        raw, target, losses, *scores, raw.stride(0), softcap or 1.0, scale, **constants, num_warps=16
    )
    return losses


@jit
def _tanh(x):
    """Through exp, and near zero, where that cancels, through its series."""
    square = x * x
    series = 1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(square < 0.09, x * series, tl.where(x < 0, -large, large))


@jit
def _shaped(LOGITS, column, softcap, scale, V: tl.constexpr, CAPPED: tl.constexpr):
    return _shaped_and_slope(LOGITS, column, softcap, scale, V, CAPPED)[0]


@jit
def _shaped_and_slope(LOGITS, column, softcap, scale, V: tl.constexpr, CAPPED: tl.constexpr):
    x = tl.load(LOGITS + column, mask=column < V, other=0.0).to(tl.float32) * scale
    slope = scale
    if CAPPED:
        tanh = _tanh(x / softcap)
        x, slope = softcap * tanh, scale * (1.0 - tanh * tanh)
    return tl.where(column < V, x, -float("inf")), slope


@jit
def _cross_entropy_kernel(
    RAW, TARGET, LOSS, ENTROPY, IS_TOP1, stride, softcap, scale,
    V: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, GRAD: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    logits = RAW + row * stride
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    depth = tl.zeros((BLOCK,), tl.float32)  # sum of exp(x - largest) * (x - largest)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _shaped(logits, column, softcap, scale, V, CAPPED)
        new = tl.maximum(largest, x)
        share = tl.exp(x - new)
        if SCORES:
            below = tl.where(column < V, x - new, 0.0)
            depth = (depth + (largest - new) * total) * tl.exp(largest - new) + share * below
        total = total * tl.exp(largest - new) + share
        largest = new
    peak = tl.max(largest, 0)
    sum_exp = tl.sum(total * tl.exp(largest - peak), 0)
    known = tl.where(target < 0, V, target)  # a target that is no token's has an infinite loss
    chosen = tl.sum(_shaped(logits, known + tl.arange(0, 1), softcap, scale, V, CAPPED), 0)
    tl.store(LOSS + row, tl.log(sum_exp) - (chosen - peak))
    if SCORES:
        depth = tl.sum((depth + (largest - peak) * total) * tl.exp(largest - peak), 0)
        tl.store(ENTROPY + row, tl.log(sum_exp) - depth / sum_exp)
        tl.store(IS_TOP1 + row, chosen >= peak)
    if GRAD:
        tl.debug_barrier()  # every thread has read the target's logit before one of them overwrites it
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x, slope = _shaped_and_slope(logits, column, softcap, scale, V, CAPPED)
            grad = tl.exp(x - peak) / sum_exp - tl.where(column == target, 1.0, 0.0)
            tl.store(logits + column, (grad * slope).to(RAW.dtype.element_ty), mask=column < V)
