"""The activation of gated MLPs: ``act(gate) * up`` with act = silu (SwiGLU), tanh-GELU or exact GELU (GeGLU)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# transformers' names of the activation (config.hidden_act) -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (..., F) -> (..., F), as transformers computes it: the activation rounds to the dtype first."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def gated_activation_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, gate, up (..., F) -> (the activation's output again, grad of gate, grad of up), in fp32 inside."""
    with torch.enable_grad():
        leaves = gate.float().detach().requires_grad_(), up.float().detach().requires_grad_()
        out = gated_activation_reference(*leaves, activation)
        grads = torch.autograd.grad(out, leaves, grad.float())
    return out.detach().to(gate.dtype), grads[0].to(gate.dtype), grads[1].to(up.dtype)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` for one of ``silu``, ``gelu``, ``gelu_tanh``."""
    return gated_activation_reference(gate, up, activation)
