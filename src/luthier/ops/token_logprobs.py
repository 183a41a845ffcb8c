"""Log-probabilities and entropies of given tokens under a linear head, without the logits of all tokens at once.

    logits = cap(scale * (hidden @ weight.T + bias)) / temperature
    log_probs[n] = logits[n, t] - logsumexp(logits[n])          entropy[n] = logsumexp(logits[n]) - sum_v p_v logits[n, v]

What multiplies a token's log-probability (an advantage, a ratio) is known only after all of them are, so the backward
projects each chunk a second time: four matrix products with a trained weight, three with a frozen one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.ops.linear_cross_entropy import rows_per_chunk, shape_logits


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition. hidden (N, D), weight (V, D), tokens (N,) int64 -> fp32 log_probs (N,), entropy (N,)."""
    raw = torch.nn.functional.linear(hidden, weight, bias).float()
    log_probs = torch.log_softmax(shape_logits(raw, softcap, scale) / temperature, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """fp32 (log_probs, entropy), both of the shape of ``tokens`` and differentiable.

    hidden (..., D), weight (V, D), tokens (...) int64: the token whose probability is asked for at each position.
    """
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and tokens {tuple(tokens.shape)} do not describe the same positions")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    rows = chunk_rows or rows_per_chunk(weight)
    flat, flat_tokens = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    parts = [
        checkpoint(token_logprobs_reference, chunk, weight, token, bias, softcap, scale, temperature, use_reentrant=False)
        for chunk, token in zip(flat.split(rows), flat_tokens.split(rows), strict=True)
    ]
    log_probs, entropy = (torch.cat(values).view(tokens.shape) for values in zip(*parts, strict=True))
    return log_probs, entropy
