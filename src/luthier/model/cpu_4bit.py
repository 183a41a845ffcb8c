"""Two defects of bitsandbytes' 4-bit layers on a CPU, repaired layer by layer in one model.

1. On a CPU with AVX512-BF16 the first forward without gradients (any evaluation, any ``generate``) repacks the weight in
   place: the double quantisation is dropped, later gradients and merges are silently wrong, and output widths that are no
   multiple of 32 fail.
2. Weights are quantised in blocks of 64 over the whole matrix, but expanded as if every row began a new block: a layer
   whose input width is no multiple of 64 computes with wrong weights. A GPU does not.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from luthier.ops.nf4 import Quantised, dequantise, quantised


def repair_cpu_4bit(model: nn.Module) -> None:
    """Make every 4-bit linear layer of ``model`` that is on the CPU compute with the weights it holds, and keep them."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize:
                module.__class__ = Linear4bit


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer (peft knows it by this name) with the weight expanded by our own code."""

    def forward(self, x: Tensor) -> Tensor:
        compute = self.compute_dtype or x.dtype
        y = _FrozenMatmul.apply(x.to(compute), quantised(self.weight))
        return (y if self.bias is None else y + self.bias.to(compute)).to(x.dtype)


def is_misread(module: nn.Module) -> bool:
    """Whether bitsandbytes itself (and so peft, where it expands a weight) would read this repaired layer's weight wrongly."""
    return isinstance(module, Linear4bit)


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T`` with W in 4 bits: the backward expands W again instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantised) -> Tensor:
        ctx.weight = weight
        return x @ dequantise(weight).to(x.dtype).T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantise(ctx.weight).to(grad.dtype), None
