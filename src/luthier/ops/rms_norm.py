"""RMSNorm in the three ways in which models round it, and Cohere's LayerNorm.

x_hat = x / sqrt(mean(x^2) + eps)                                        in fp32
cast_then_scale: w * x_hat.to(x.dtype)       scale_then_cast: (w * x_hat).to(x.dtype)
one_plus_scale:  ((1 + w) * x_hat).to(x.dtype)
layer_norm:      (w * (x - mean) / sqrt(var + eps)).to(x.dtype)
"""

from __future__ import annotations

import torch
from torch import Tensor

FLAVOURS = ("cast_then_scale", "scale_then_cast", "one_plus_scale", "layer_norm")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, flavour: str) -> Tensor:
    """x (..., D), weight (D,) -> (..., D); bit for bit what transformers' modules of that flavour give."""
    wide = x.float()
    if flavour == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if flavour == "cast_then_scale":
        return weight * normal.to(x.dtype)
    if flavour == "scale_then_cast":
        return (weight * normal).to(x.dtype)
    scale = 1.0 + weight.float() if flavour == "one_plus_scale" else weight.float()
    return (normal * scale).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, flavour: str = "cast_then_scale") -> Tensor:
    """Normalise the last dimension of ``x`` (..., D) and scale it by ``weight`` (D,)."""
    return rms_norm_reference(x, weight, eps, flavour)
