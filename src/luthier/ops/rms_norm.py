"""RMSNorm in the three ways in which models round it, and Cohere's LayerNorm.

    x_hat = x / sqrt(mean(x^2) + eps)                                        in fp32
    cast_then_scale: w * x_hat.to(x.dtype)       scale_then_cast: (w * x_hat).to(x.dtype)
    one_plus_scale:  ((1 + w) * x_hat).to(x.dtype)
    layer_norm:      (w * (x - mean) / sqrt(var + eps)).to(x.dtype)

One pass over x each way: forward 2 reads and writes of x's bytes, backward 3 (4 with the residual's gradient added).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.ops.backend import has_kernels, jit, power_of_2, rows_of, tl, triton, warps_for

FLAVOURS = ("cast_then_scale", "scale_then_cast", "one_plus_scale", "layer_norm")
TILE = 4096  # elements that one program normalises at a time: one long row or several short ones


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


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, flavour: str, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """grad, x (..., D) -> (gradient of x plus ``residual``, fp32 gradient of weight)."""
    wide, outer = x.float(), grad.float()
    if flavour == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * inverse
    grad_weight = (outer * normal).flatten(0, -2).sum(0)
    outer = outer * (1.0 + weight.float() if flavour == "one_plus_scale" else weight.float())
    if flavour == "layer_norm":
        outer = outer - outer.mean(-1, keepdim=True)
    grad_x = inverse * (outer - normal * (outer * normal).mean(-1, keepdim=True))
    return (grad_x if residual is None else grad_x + residual).to(x.dtype), grad_weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, flavour: str = "cast_then_scale") -> Tensor:
    """Normalise the last dimension of ``x`` (..., D) and scale it by ``weight`` (D,). Differentiable in both."""
    return _RMSNorm.apply(x, weight, eps, flavour) if has_kernels(x) else rms_norm_reference(x, weight, eps, flavour)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, flavour: str, out: Tensor | None = None) -> Tensor:
    """x (N, D) -> (N, D), into ``out`` if given; rows of either may be further apart than D. Not differentiable."""
    if not has_kernels(x):
        values = rms_norm_reference(x, weight, eps, flavour)
        return values if out is None else out.copy_(values)
    return launch_forward(x, weight, eps, flavour, torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, flavour: str, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The gradient of x (N, D) from that of the output, plus ``residual`` (N, D), into ``out`` if given (may be residual)."""
    if not has_kernels(x):
        values = rms_norm_backward_reference(grad, x, weight, eps, flavour, residual)[0]
        return values if out is None else out.copy_(values)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return launch_backward(grad, x, weight, eps, flavour, residual, out)


def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, flavour: str, residual: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``rms_norm_backward``, and the fp32 gradient of the weight (D,)."""
    if not has_kernels(x):
        values, grad_weight = rms_norm_backward_reference(grad, x, weight, eps, flavour, residual)
        return (values if out is None else out.copy_(values)), grad_weight
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return launch_backward(grad, x, weight, eps, flavour, residual, out, wants_weight=True)


def launch_forward(x: Tensor, weight: Tensor, eps: float, flavour: str, out: Tensor) -> Tensor:
    rows, width = x.shape
    block = power_of_2(width)
    tile = max(1, TILE // block)
    grid = (triton.cdiv(rows, tile),)
    constants = {"D": width, "BLOCK": block, "TILE": tile, "FLAVOUR": FLAVOURS.index(flavour)}
    _norm_forward[grid](x, weight, out, rows, x.stride(0), out.stride(0), eps, **constants, num_warps=warps_for(tile * block))
    return out


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, flavour: str, residual: Tensor | None, out: Tensor, wants_weight=False
):
    """``out``, and with ``wants_weight`` also the fp32 gradient of the weight (summed over programs, then in torch)."""
    rows, width = x.shape
    block = power_of_2(width)
    tile = max(1, TILE // block)
    programs = triton.cdiv(rows, tile)
    if wants_weight:
        programs = min(programs, 512)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device) if wants_weight else out
    constants = {"D": width, "BLOCK": block, "TILE": tile, "FLAVOUR": FLAVOURS.index(flavour)}
    constants |= {"RESIDUAL": residual is not None, "WEIGHT": wants_weight}
    other = grad if residual is None else residual
    strides = grad.stride(0), x.stride(0), other.stride(0), out.stride(0)
    _norm_backward[(programs,)](
        grad, x, weight, other, out, partial, rows, *strides, eps, **constants, num_warps=warps_for(tile * block)
    )
    return (out, partial.sum(0)) if wants_weight else out


@jit
def _normal(X, stride, row, column, inside, eps, D: tl.constexpr, CENTRED: tl.constexpr):
    """x_hat (TILE, BLOCK) and 1 / standard deviation (TILE,) of some rows, in fp32."""
    x = tl.load(X + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * inverse[:, None], inverse


@jit
def _norm_forward(
    X, W, OUT, rows, stride_x, stride_out, eps, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FLAVOUR: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    normal, _ = _normal(X, stride_x, row, column, inside, eps, D, FLAVOUR == 3)
    weight = tl.load(W + column, mask=column < D, other=0.0).to(tl.float32)
    if FLAVOUR == 0:
        normal = normal.to(X.dtype.element_ty).to(tl.float32)
    if FLAVOUR == 2:
        weight += 1.0
    value = normal * weight[None, :]
    tl.store(OUT + row[:, None] * stride_out + column[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@jit
def _norm_backward(
    GRAD, X, W, RESIDUAL_GRAD, OUT, PARTIAL, rows, stride_grad, stride_x, stride_residual, stride_out, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, FLAVOUR: tl.constexpr,
    RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(W + column, mask=column < D, other=0.0).to(tl.float32)
    if FLAVOUR == 2:
        weight += 1.0
    weight_grad = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        normal, inverse = _normal(X, stride_x, row, column, inside, eps, D, FLAVOUR == 3)
        grad = tl.load(GRAD + row[:, None] * stride_grad + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            weight_grad += tl.sum(grad * normal, 0)
        grad *= weight[None, :]
        if FLAVOUR == 3:
            grad = tl.where(inside, grad - (tl.sum(grad, 1) / D)[:, None], 0.0)
        grad = inverse[:, None] * (grad - normal * (tl.sum(grad * normal, 1) / D)[:, None])
        if RESIDUAL:
            grad += tl.load(RESIDUAL_GRAD + row[:, None] * stride_residual + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(OUT + row[:, None] * stride_out + column[None, :], grad.to(OUT.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(PARTIAL + tl.program_id(0) * D + column, weight_grad, mask=column < D)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, flavour):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.flavour = eps, flavour
        rows = rows_of(x)
        dtype = torch.promote_types(x.dtype, weight.dtype) if flavour == "cast_then_scale" else x.dtype
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        return launch_forward(rows, weight, eps, flavour, out).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grad_rows = rows_of(x), rows_of(grad)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        if not ctx.needs_input_grad[1]:
            return launch_backward(grad_rows, rows, weight, ctx.eps, ctx.flavour, None, out).view(x.shape), None, None, None
        out, grad_weight = launch_backward(grad_rows, rows, weight, ctx.eps, ctx.flavour, None, out, wants_weight=True)
        return out.view(x.shape), grad_weight.to(weight.dtype), None, None
