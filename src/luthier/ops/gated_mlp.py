"""The activation of gated MLPs: ``act(gate) * up`` with act = silu (SwiGLU), tanh-GELU or exact GELU (GeGLU).

One pass each way. The backward writes the gradients over gate and up and, for the gradient of the next layer's adapter,
the activation again: it is cheaper to compute than to keep. A forward whose result is read in 8 bits rounds it in that pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, triton
from luthier.ops.fp8 import Rows8, _scale_of

# transformers' names of the activation (config.hidden_act) -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
KINDS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024  # elements of a row that one program handles


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (..., F) -> (..., F), as transformers computes it: the activation rounds to the dtype first."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def gated_backward_reference(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad, gate, up (..., F) -> (the activation's output again, grad of gate, grad of up), in fp32 inside."""
    wide, other, outer = gate.float(), up.float(), grad.float()
    if activation == "silu":
        value, grad_gate = F.silu(wide), torch.ops.aten.silu_backward(outer * other, wide)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        value = F.gelu(wide, approximate=how)
        grad_gate = torch.ops.aten.gelu_backward(outer * other, wide, approximate=how)
    return (value * other).to(gate.dtype), grad_gate.to(gate.dtype), (outer * value).to(up.dtype)


def gated_forward(gate: Tensor, up: Tensor, activation: str, out: Tensor, rounded: Rows8 | None = None) -> Tensor:
    """gate, up (N, F) -> ``out`` (N, F); rows of all three may be further apart than F. Not differentiable.

    ``rounded``: ``fp8.room`` for the rows of ``out``, which are written there in 8 bits.
    """
    if not has_kernels(gate):
        return out.copy_(gated_activation_reference(gate, up, activation))
    return launch_forward(gate, up, activation, out, rounded)


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """In place: gate and up (N, F) become their gradients, and ``grad`` (N, F) becomes the activation's output, returned."""
    if not has_kernels(gate):
        out, grad_gate, grad_up = gated_backward_reference(grad, gate, up, activation)
        gate.copy_(grad_gate)
        up.copy_(grad_up)
        return grad.copy_(out)
    return launch_backward_(grad, gate, up, activation)


def launch_forward(gate: Tensor, up: Tensor, activation: str, out: Tensor, rounded: Rows8 | None = None) -> Tensor:
    rows, width = gate.shape
    strides, kind = (gate.stride(0), up.stride(0), out.stride(0)), KINDS.index(activation)
    if rounded is None:
        grid, where, how = (rows, triton.cdiv(width, BLOCK)), (out, out, 0), {"BLOCK": BLOCK, "num_warps": 4}
    else:  # a program has a whole row
        where = rounded.values, rounded.scales, rounded.values.stride(0)
        grid, how = (rows, 1), {"BLOCK": power_of_2(width), "num_warps": 16}
    _gated_forward[grid](gate, up, out, *where, width, *strides, KIND=kind, ROUNDS=rounded is not None, **how)
    return out


def launch_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    rows, width = gate.shape
    strides = grad.stride(0), gate.stride(0), up.stride(0)
    grid = (rows, triton.cdiv(width, BLOCK))
    _gated_backward[grid](grad, gate, up, width, *strides, KIND=KINDS.index(activation), BLOCK=BLOCK, num_warps=4)
    return grad


@jit
def _activation(x, KIND: tl.constexpr):
    """(act(x), act'(x)) in fp32."""
    if KIND == 0:
        sigmoid, rest = 1.0 / (1.0 + tl.exp(-x)), 1.0 / (1.0 + tl.exp(x))  # rest = 1 - sigmoid, without the cancellation
        return x * sigmoid, sigmoid * (1.0 + x * rest)
    elif KIND == 1:
        normal_cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * normal_cdf, normal_cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        twice = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        sigmoid, rest = 1.0 / (1.0 + tl.exp(-twice)), 1.0 / (1.0 + tl.exp(twice))  # (1 + tanh(twice / 2)) / 2
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * sigmoid, sigmoid + x * sigmoid * rest * slope


@jit
def _gated_forward(
    GATE, UP, OUT, VALUES, SCALES, stride_values, width, stride_gate, stride_up, stride_out,
    KIND: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(GATE + row * stride_gate + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(gate, KIND)
    result = (value * up).to(OUT.dtype.element_ty)
    tl.store(OUT + row * stride_out + column, result, mask=inside)
    if ROUNDS:
        wide = result.to(tl.float32)
        scale = _scale_of(tl.max(tl.abs(wide), 0))
        tl.store(SCALES + row, scale)
        small = (wide * tl.div_rn(1.0, scale)).to(VALUES.dtype.element_ty)
        tl.store(VALUES + row * stride_values + column, small, mask=inside)


@jit
def _gated_backward(GRAD, GATE, UP, width, stride_grad, stride_gate, stride_up, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at, up_at, grad_at = (
        GATE + row * stride_gate + column,
        UP + row * stride_up + column,
        GRAD + row * stride_grad + column,
    )
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate, KIND)
    tl.store(grad_at, (value * up).to(GRAD.dtype.element_ty), mask=inside)
    tl.store(gate_at, (grad * up * slope).to(GATE.dtype.element_ty), mask=inside)
    tl.store(up_at, (grad * value).to(UP.dtype.element_ty), mask=inside)
