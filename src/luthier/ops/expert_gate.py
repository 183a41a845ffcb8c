"""The activation between an expert's two products, and its backward with the router's weight of every row.

    act = f(gate) * up                     f: silu, gelu, tanh-gelu           gate and up side by side
    act = clamp(gate) * sigmoid(alpha * clamp(gate)) * (clamp(up) + 1)        gpt_oss, where they alternate

The router scales what comes behind the second product; its gradient is <u, act>, u being the gradient of act *before*
that scale, so that the second product's output need not be kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, triton
from luthier.ops.gated_mlp import KINDS, _activation, gated_activation_reference
from luthier.ops.grouped import Routing

CLAMPED = len(KINDS)  # the kernels' number for the clamped one
BLOCK = 1024  # columns of a row that are in flight at a time


@dataclass(frozen=True)
class Gate:
    """``kind``: one of ``gated_mlp.KINDS``, "clamped", or None for ``function``, which is run as it is."""

    kind: str | None = None
    alternates: bool = False  # gate, up, gate, up, ... in a row
    alpha: float = 1.702
    limit: float = 7.0
    function: Callable[[Tensor], Tensor] | None = None  # (S, 2F) -> (S, F), or (S, F) -> (S, F)

    @property
    def number(self) -> int:
        return CLAMPED if self.kind == "clamped" else KINDS.index(self.kind)


def gated_reference(gate_up: Tensor, gate: Gate) -> Tensor:
    """gate_up (S, 2F) -> (S, F), as transformers computes it."""
    if gate.kind is None:
        return gate.function(gate_up)
    left, right = (gate_up[:, ::2], gate_up[:, 1::2]) if gate.alternates else gate_up.chunk(2, dim=1)
    if gate.kind != "clamped":
        return gated_activation_reference(left, right, gate.kind)
    left, right = left.clamp(max=gate.limit), right.clamp(min=-gate.limit, max=gate.limit)
    return (right + 1) * (left * torch.sigmoid(left * gate.alpha))


def gated_backward_reference_(u: Tensor, gate_up: Tensor, weights: Tensor, routing: Routing, gate: Gate) -> Tensor:
    """The definition of ``gated_backward_``, by autograd."""
    rows = int(routing.offsets[-1])
    scale = weights.reshape(-1)[routing.order[:rows]].float()[:, None]
    with torch.enable_grad():
        leaf = gate_up[:rows].float().requires_grad_()
        act = gated_reference(leaf, gate)
        (gradient,) = torch.autograd.grad(act, leaf, scale * u[:rows].float())
    router = torch.zeros(weights.numel(), dtype=torch.float32, device=u.device)
    router[routing.order[:rows]] = (act.detach() * u[:rows].float()).sum(1)
    gate_up[:rows] = gradient.to(gate_up.dtype)
    u[:rows] = (scale * act.detach()).to(u.dtype)
    return router.view(weights.shape)


@functools.cache
def clamp_passes_at_its_bound() -> bool:
    """Whether torch's clamp has a derivative where a value is just the bound: 1 up to torch 2.13, 0 from 2.14 on."""
    bound = torch.ones((), requires_grad=True)
    with torch.enable_grad():
        return bool(torch.autograd.grad(bound.clamp(max=1.0), bound)[0])


def gated(gate_up: Tensor, gate: Gate) -> Tensor:
    """gate_up (S, 2F) -> (S, F). Not differentiable."""
    if gate.kind is None or not has_kernels(gate_up):
        return gated_reference(gate_up, gate)
    return launch(gate_up, gate)


def gated_backward_(u: Tensor, gate_up: Tensor, weights: Tensor, routing: Routing, gate: Gate) -> Tensor:
    """In place, with w the router's weight of a row: gate_up (S, 2F) becomes its gradient under w * u, and u (S, F), the
    gradient of act before w, becomes w * act. Gives the fp32 gradient (n, k) of ``weights`` (n, k)."""
    if gate.kind is None or not has_kernels(gate_up):
        return gated_backward_reference_(u, gate_up, weights, routing, gate)
    return launch_backward_(u, gate_up, weights, routing, gate)


def launch(gate_up: Tensor, gate: Gate) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK, power_of_2(width))
    _gate_forward[(rows, triton.cdiv(width, block))](
        gate_up, out, width, gate.alpha, gate.limit, KIND=gate.number, ALTERNATES=gate.alternates, BLOCK=block, num_warps=4
    )
    return out


def launch_backward_(u: Tensor, gate_up: Tensor, weights: Tensor, routing: Routing, gate: Gate) -> Tensor:
    rows, width = u.shape
    router = torch.zeros(weights.shape, dtype=torch.float32, device=u.device)
    _gate_backward[(rows,)](
        u, gate_up, weights, router, routing.order, routing.offsets, width, gate.alpha, gate.limit, E=routing.experts,
        KIND=gate.number, ALTERNATES=gate.alternates, EDGE=clamp_passes_at_its_bound(), BLOCK=min(BLOCK, power_of_2(width)),
        num_warps=4,
    )  # fmt: skip
    return router


@jit
def _gate_up(AT, start, width, ALTERNATES: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of gate and of up, from ``start`` on, in fp32; the row begins at AT."""
    column = start + tl.arange(0, BLOCK)
    if ALTERNATES:  # one contiguous read
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        pairs = tl.reshape(tl.load(AT + both, mask=both < 2 * width, other=0.0), (BLOCK, 2))
        gate, up = tl.split(pairs)
    else:
        gate = tl.load(AT + column, mask=column < width, other=0.0)
        up = tl.load(AT + width + column, mask=column < width, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@jit
def _act(gate, up, alpha, limit, KIND: tl.constexpr, EDGE: tl.constexpr):
    """(act, its derivative by gate, by up); ``EDGE``: the derivative at the limit is that of what lies within, else 0."""
    if KIND == 3:  # CLAMPED
        low, high = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
        sigmoid = 1.0 / (1.0 + tl.exp(-alpha * low))
        slope = sigmoid * (1.0 + alpha * low * (1.0 - sigmoid))
        value = low * sigmoid
        gate_within, up_within = gate < limit, tl.abs(up) < limit
        if EDGE:
            gate_within, up_within = gate <= limit, tl.abs(up) <= limit
        by_gate = tl.where(gate_within, (high + 1.0) * slope, 0.0)
        return value * (high + 1.0), by_gate, tl.where(up_within, value, 0.0)
    else:
        value, slope = _activation(gate, KIND)
        return value * up, slope * up, value


@jit
def _gate_forward(
    GATE_UP, OUT, width, alpha, limit, KIND: tl.constexpr, ALTERNATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = _gate_up(GATE_UP + row * 2 * width, tl.program_id(1) * BLOCK, width, ALTERNATES, BLOCK)
    act, _, _ = _act(gate, up, alpha, limit, KIND, True)
    tl.store(OUT + row * width + column, act.to(OUT.dtype.element_ty), mask=column < width)


@jit
def _gate_backward(
    U, GATE_UP, WEIGHTS, ROUTER, ORDER, OFFSETS, width, alpha, limit,
    E: tl.constexpr, KIND: tl.constexpr, ALTERNATES: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(OFFSETS + E):
        choice = tl.load(ORDER + row)
        weight = tl.load(WEIGHTS + choice).to(tl.float32)
        at = GATE_UP + row * 2 * width
        router = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            gate, up = _gate_up(at, start, width, ALTERNATES, BLOCK)
            u = tl.load(U + row * width + column, mask=inside, other=0.0).to(tl.float32)
            act, by_gate, by_up = _act(gate, up, alpha, limit, KIND, EDGE)
            router += u * act
            grad_gate = (weight * u * by_gate).to(GATE_UP.dtype.element_ty)
            grad_up = (weight * u * by_up).to(GATE_UP.dtype.element_ty)
            if ALTERNATES:
                both = 2 * start + tl.arange(0, 2 * BLOCK)
                tl.store(at + both, tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,)), mask=both < 2 * width)
            else:
                tl.store(at + column, grad_gate, mask=inside)
                tl.store(at + width + column, grad_up, mask=inside)
            tl.store(U + row * width + column, (weight * act).to(U.dtype.element_ty), mask=inside)
        tl.store(ROUTER + choice, tl.sum(router))
