"""A frozen linear layer with a LoRA adapter:  y = x @ W.T + bias + scale * (drop(x) @ A.T) @ B.T

W stays in 4 bits (or 16): it is dequantised for the product and again for the backward, never kept. A and B may be fp32
masters; the products run in x's dtype.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from luthier.ops.nf4 import Quantised, dequantise


def lora_linear_reference(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """x (..., K), weight (N, K), a (r, K), b (N, r) -> (..., N) in x's dtype."""
    if isinstance(weight, Quantised):
        weight = dequantise(weight, dtype=x.dtype)
    low = F.linear(F.dropout(x, dropout) if dropout else x, a.to(x.dtype))
    return F.linear(x, weight, bias) + scale * F.linear(low, b.to(x.dtype))
