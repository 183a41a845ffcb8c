"""Log-probabilities of given tokens under a linear head, without the logits of all tokens at once.

    logits = cap(scale * (hidden @ weight.T + bias)) / temperature
    log_probs[n] = logits[n, t] - logsumexp(logits[n])          entropy[n] = logsumexp(logits[n]) - sum_v p_v logits[n, v]

What a token's log-probability is multiplied by (an advantage, a ratio, a mask) is known only after all of them are, but it
multiplies that token's gradient by ``hidden`` as a whole. So this gradient is made while the logits are there: two matrix
products with a frozen weight. A trained one needs the logits again in the backward: four.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.ops.backend import has_kernels
from luthier.ops.linear_cross_entropy import (
    launch_,
    loss_and_grad_,
    loss_and_grad_reference,
    rows_per_chunk,
    scaled,
    shape_logits,
)


class TokenScores(NamedTuple):
    """Of each token: its log-probability in fp32, the entropy of its distribution in fp32, and whether no other is likelier.

    Gradients flow through ``log_probs`` alone.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> TokenScores:
    """The definition. hidden (N, D), weight (V, D), tokens (N,) int64."""
    return token_logprobs_of(torch.nn.functional.linear(hidden, weight, bias), tokens, softcap, scale, temperature)


def token_logprobs_of(
    raw: Tensor, tokens: Tensor, softcap: float | None = None, scale: float = 1.0, temperature: float = 1.0
) -> TokenScores:
    """The same from raw (N, V), the logits before shaping."""
    logits = shape_logits(raw if raw.dtype == torch.float64 else raw.float(), softcap, scale) / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
    chosen, column = log_probs.detach(), tokens.unsqueeze(1)
    return TokenScores(log_probs.gather(1, column).squeeze(1), entropy, (chosen.gather(1, column) >= chosen).all(1))


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> TokenScores:
    """Scores of the shape of ``tokens``.

    hidden (..., D) and weight (V, D) of one floating dtype (under autocast: any), tokens (...) int64: the token whose
    probability is asked for at each position; bias (V,). Gradients flow to hidden, weight and bias.
    """
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and tokens {tuple(tokens.shape)} do not describe the same positions")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    shaping = None if softcap is None else softcap / temperature, scale / temperature
    rows, with_grad = chunk_rows or rows_per_chunk(weight), torch.is_grad_enabled()
    flat = hidden.reshape(-1, hidden.shape[-1])
    found = _TokenLogprobs.apply(flat, weight, bias, tokens.reshape(-1), *shaping, rows, with_grad)
    return TokenScores(*(values.view(tokens.shape) for values in found))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, softcap, scale, rows, with_grad):
        wants_hidden, *trained = wants = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        log_probs, entropy = (torch.empty(len(tokens), dtype=torch.float32, device=hidden.device) for _ in range(2))
        is_top1 = torch.empty(len(tokens), dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        for part in _parts(tokens, rows):
            raw = torch.nn.functional.linear(hidden[part], weight, bias)
            losses, grad = scores_and_grad_(raw, tokens[part], softcap, scale, entropy[part], is_top1[part], wants_hidden)
            torch.neg(losses, out=log_probs[part])
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[part])
            del raw, grad  # or the next chunk is made beside them
        ctx.save_for_backward(grad_hidden, *((hidden, weight, bias, tokens) if any(trained) else (None,) * 4))
        ctx.wants, ctx.settings = wants, (softcap, scale, rows)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, *_):
        grad_hidden, hidden, weight, bias, tokens = ctx.saved_tensors
        factor = -grad_log_probs.unsqueeze(1)
        softcap, scale, rows = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.wants
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for part in _parts(tokens, rows) if wants_weight or wants_bias else ():
            raw = torch.nn.functional.linear(hidden[part], weight, bias)
            grad = scaled(loss_and_grad_(raw, tokens[part], softcap, scale)[1], factor[part])
            if wants_weight:
                grad_weight += grad.T @ hidden[part]
            if wants_bias:
                grad_bias += grad.sum(0, dtype=torch.float32)
            del raw, grad
        return (
            scaled(grad_hidden, factor) if wants_hidden else None,
            grad_weight.to(weight.dtype) if wants_weight else None,
            grad_bias.to(bias.dtype) if wants_bias else None,
            *(None,) * 5,
        )


def _parts(tokens: Tensor, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, len(tokens), rows)]


def scores_and_grad_(
    raw: Tensor, target: Tensor, softcap: float | None, scale: float, entropy: Tensor, is_top1: Tensor, wants_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`linear_cross_entropy.loss_and_grad_`, which also writes ``entropy`` fp32 (n,) and ``is_top1`` bool (n,)."""
    if has_kernels(raw):
        return launch_(raw, target, softcap, scale, wants_grad, entropy, is_top1), raw if wants_grad else None
    scores = token_logprobs_of(raw, target, softcap, scale)
    entropy.copy_(scores.entropy)
    is_top1.copy_(scores.is_top1)
    return loss_and_grad_reference(raw, target, softcap, scale, wants_grad)
