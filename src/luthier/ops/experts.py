"""The experts of a mixture, forward and backward, with frozen weights in 4 or 16 bits and a LoRA adapter each.

    out[token] = sum over its k experts of  w * (down(act(gate_up(x))) + bias),   gate_up(x) = x @ W.T + (x @ (s A).T) @ B.T

No weight is kept written out: a few experts' at a time are expanded for a product, and again in the backward. Kept are x
and the routing, and unless memory is short, gate and up. Everything is on the device: no step waits for a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.ops import lora_linear
from luthier.ops.backend import has_kernels, power_of_2
from luthier.ops.expert_gate import Gate, gated, gated_backward_
from luthier.ops.grouped import Routing, combine, gradient, product, route
from luthier.ops.nf4 import Quantised, dequantise
from luthier.ops.unchanged import Unchanged

WRITTEN_BYTES = 1 << 29  # of weights that are expanded at a time
_keeps = ContextVar("keeps", default=True)  # gate and up stay for the backward
_computes = ContextVar("computes", default=True)  # False: only what the backward starts from is wanted


@dataclass(frozen=True)
class ExpertLinear:
    """One linear layer of every expert. weight (E, N, K), or ``transposed`` (E, K, N); bias (E, N); a (E, r, K) and
    b (E, N, r) in any float dtype, or both None."""

    weight: Tensor | Quantised
    transposed: bool = False
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    def chosen(self, index: Tensor) -> ExpertLinear:
        """The layer of the experts (n,) alone; A and B stay differentiable."""
        parts = {name: value[index] for name in ("bias", "a", "b") if (value := getattr(self, name)) is not None}
        weight = self.weight.chosen(index) if isinstance(self.weight, Quantised) else self.weight[index]
        return replace(self, weight=weight, **parts)

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    @property
    def width_in(self) -> int:
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def width_out(self) -> int:
        return self.weight.shape[2 if self.transposed else 1]


def experts(x: Tensor, index: Tensor, weights: Tensor, up: ExpertLinear, down: ExpertLinear, gate: Gate) -> Tensor:
    """x (n, D), the chosen experts ``index`` and their ``weights`` (n, k) -> (n, D) in x's dtype.

    Differentiable, once, in x, the weights and the adapters.
    """
    if has_kernels(x) and 2 * index.numel() <= up.experts:
        index, up, down = _only_chosen(index, up, down)
    return _Experts.apply(x.contiguous(), index, weights.contiguous(), up, down, gate, up.a, up.b, down.a, down.b)


def _only_chosen(index: Tensor, up: ExpertLinear, down: ExpertLinear) -> tuple[Tensor, ExpertLinear, ExpertLinear]:
    """A few tokens, as in generation: stacks of their experts alone, one for every choice, so that no other is expanded."""
    chosen = index.reshape(-1)
    numbers = torch.arange(len(chosen), device=index.device)
    numbers = torch.where(chosen < up.experts, numbers, len(chosen)).view(index.shape)
    return numbers, *(layer.chosen(chosen.clamp(max=up.experts - 1)) for layer in (up, down))


def checkpoint_experts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, with ``experts`` somewhere in it, keeping x only.

    The second run gives ``experts`` its inputs again and no more than that: its backward computes what it needs itself, so
    nothing may read the values of its output but sums, products with constants and views.
    """
    contexts = _Setting(_keeps, False), _Setting(_computes, False)
    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)


class _Setting:
    """Inside, ``variable`` is ``value``. Every backward through one graph enters it again."""

    def __init__(self, variable: ContextVar, value: bool) -> None:
        self.variable, self.value = variable, value

    def __enter__(self) -> None:
        self.token = self.variable.set(self.value)

    def __exit__(self, *error: object) -> None:
        self.variable.reset(self.token)


class _Experts(torch.autograd.Function):
    """What is kept goes through ``save_for_backward``, so that a checkpoint around this can drop it."""

    @staticmethod
    def forward(ctx, x, index, weights, up_layer, down_layer, gate, *adapters):
        ctx.layers, ctx.gate = (up_layer, down_layer), gate
        ctx.adapters = Unchanged([factor for factor in adapters if factor is not None])
        if not _computes.get():
            ctx.save_for_backward(x, index, weights)
            return torch.empty_like(x)
        routing = route(index, up_layer.experts)
        up, down = _Products(up_layer, routing, x.dtype), _Products(down_layer, routing, x.dtype)
        low_up = up.low(x, gather=True)
        gate_up = up.forward(x, low_up, gather=True)
        act = gated(gate_up, gate)
        kept = (gate_up, low_up, *routing.tensors()) if _keeps.get() else ()
        ctx.save_for_backward(x, index, weights, *kept)
        return combine(down.forward(act, down.low(act)), routing, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.adapters.check()
        x, index, weights, *kept = ctx.saved_tensors
        grad, number = grad.contiguous(), ctx.layers[0].experts
        gate_up, low_up, *routed = kept or (None, None)
        routing = Routing(*routed, number, index.shape[1]) if kept else route(index, number)
        up, down = (_Products(layer, routing, x.dtype) for layer in ctx.layers)
        if not kept:
            low_up = up.low(x, gather=True)
            gate_up = up.forward(x, low_up, gather=True)
        low_grad = down.low_gradient(grad, gather=True)
        u = down.input_gradient(grad, low_grad, gather=True)
        grad_weights = gated_backward_(u, gate_up, weights, routing, ctx.gate)
        weighted = u  # it is the activation times the router's weight from here on, where the gradients of down's A and B begin
        torch.autograd.graph.increment_version(gate_up)  # a second backward over it is an error
        if down.layer.bias is not None:
            grad_weights += down.router_gradient(grad, index)
        of_down = of_up = (None, None)
        if down.layer.a is not None:
            of_b = down.gradient_of_b(grad, down.low(weighted), gather=True)
            of_down = down.gradient_of_a(weighted, low_grad), of_b
        del u, weighted
        low_grad = up.low_gradient(gate_up)
        if up.layer.a is not None:
            of_up = up.gradient_of_a(x, low_grad, gather=True), up.gradient_of_b(gate_up, low_up)
        grad_x = combine(up.input_gradient(gate_up, low_grad), routing) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_weights.to(weights.dtype), None, None, None, *of_up, *of_down


class _Products:
    """The products of one layer with the choices sorted by ``routing``. Inputs are (S, width), or with ``gather`` (n, width).

    The adapter is brought into the form of the products: in their dtype, its rank R a power of two from 16 on.
    """

    def __init__(self, layer: ExpertLinear, routing: Routing, dtype: torch.dtype) -> None:
        self.layer, self.routing = layer, routing
        self.bias = None if layer.bias is None else layer.bias.to(dtype)
        if layer.a is not None:
            self.a = _padded(layer.a, 1, dtype, layer.scale)  # (E, R, K)
            self.b = _padded(layer.b, 2, dtype)  # (E, N, R)

    def low(self, x: Tensor, gather: bool = False) -> Tensor | None:
        """x @ (s A).T (S, R)."""
        return None if self.layer.a is None else self._thin(x, self.a.mT, gather)

    def low_gradient(self, grad: Tensor, gather: bool = False) -> Tensor | None:
        """grad @ B (S, R)."""
        return None if self.layer.a is None else self._thin(grad, self.b, gather)

    def forward(self, x: Tensor, low: Tensor | None, gather: bool = False) -> Tensor:
        """(S, N), low = ``self.low(x)``."""
        out = torch.empty(self.routing.order.shape[0], self.layer.width_out, dtype=x.dtype, device=x.device)
        other = None if low is None else self.b.mT
        for first, weight in self._written(x):
            matrix = weight if self.layer.transposed else weight.mT
            product(x, matrix, self.routing, out, first, gather, low, other, self.bias)
        return out

    def input_gradient(self, grad: Tensor, low: Tensor | None, gather: bool = False) -> Tensor:
        """(S, K), low = ``self.low_gradient(grad)``."""
        out = torch.empty(self.routing.order.shape[0], self.layer.width_in, dtype=grad.dtype, device=grad.device)
        other = None if low is None else self.a
        for first, weight in self._written(grad):
            product(grad, weight.mT if self.layer.transposed else weight, self.routing, out, first, gather, low, other)
        return out

    def gradient_of_a(self, x: Tensor, low_grad: Tensor, gather: bool = False) -> Tensor:
        """fp32 (E, r, K)."""
        return gradient(x, low_grad, self.routing, gather, self.layer.scale).mT[:, : self.layer.a.shape[1]]

    def gradient_of_b(self, grad: Tensor, low: Tensor, gather: bool = False) -> Tensor:
        """fp32 (E, N, r)."""
        return gradient(grad, low, self.routing, gather)[..., : self.layer.b.shape[2]]

    def router_gradient(self, grad: Tensor, index: Tensor) -> Tensor:
        """<grad of the token, bias of the expert> (n, k) in fp32: the bias's part in the gradient of the router's weights."""
        every = lora_linear.product(grad.T, self.bias.T)
        return every.gather(1, index.clamp(max=self.layer.experts - 1)) * (index < self.layer.experts)

    def _thin(self, x: Tensor, weight: Tensor, gather: bool) -> Tensor:
        out = torch.empty(self.routing.order.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
        return product(x, weight, self.routing, out, gather=gather)

    def _written(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first expert, the weights of it and of some that follow) in the dtype of ``like``."""
        weight = self.layer.weight
        if isinstance(weight, Tensor) and weight.dtype == like.dtype:
            yield 0, weight
        elif not has_kernels(like):  # the counts are at hand: no expert is expanded that has no token
            for expert, _ in self.routing.spans():
                yield expert, _expand(weight, expert, expert + 1, like)
        else:
            parts = -(-weight.shape.numel() * like.element_size() // WRITTEN_BYTES)
            size = -(-self.layer.experts // parts)
            for first in range(0, self.layer.experts, size):
                yield first, _expand(weight, first, min(first + size, self.layer.experts), like)


def _padded(factor: Tensor, axis: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """``scale * factor`` in ``dtype`` and contiguous, with zeros behind the ranks, which lie along ``axis``."""
    rank = factor.shape[axis]
    shape = list(factor.shape)
    shape[axis] = max(16, power_of_2(rank))
    padded = (torch.empty if shape[axis] == rank else torch.zeros)(shape, dtype=dtype, device=factor.device)
    torch.mul(factor, scale, out=padded.narrow(axis, 0, rank))
    return padded


def _expand(weight: Tensor | Quantised, first: int, last: int, like: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[first:last].to(like.dtype)
    return dequantise(weight.experts(first, last), dtype=like.dtype)
