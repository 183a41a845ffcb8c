"""The two halves of a decoder layer as one forward and one backward each, without autograd inside.

    x2 = x  + m * post(o(attention(rotate(qkv(norm(x))))))                AttentionBlock
    x3 = x2 + m * post(down(act(gate) * up)),  gate, up of norm(x2)       MlpBlock (of norm(x), if the two are parallel)

A block keeps what its mode says (``Mode``) and computes the rest again in the backward: what is element-wise always,
products and attention only where the mode gives up memory for them. All tensors are (n, width), n = batch * tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from luthier.ops.attention import AttentionState, attend, attend_backward
from luthier.ops.bands import Padding, Segments
from luthier.ops.fp8 import Rows8
from luthier.ops.gated_mlp import gated_backward_, gated_forward
from luthier.ops.lora_linear import Projection
from luthier.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_gradients
from luthier.ops.rotary import rotate

ROWS = 4096  # rows of the MLP that products and what is element-wise handle at a time: bounds their transients
KEPT_ROWS = 8192  # where gate and up are kept: the transients of as many rows are half as large
NARROW_ROWS = 1 << 14  # of q, k and v, beside which attention itself takes more
TRAINED_ROWS = 1 << 14  # where the weights train: over several chunks their gradients are summed in fp32
BY_HEAD = ("cudnn", "flash", "cpu")  # kernels whose heads may come a few at a time
LONG = 1 << 17  # tokens of a sequence from which on memory is dearer than a product, and attention longer than any copy


class Mode(IntEnum):
    """What a layer keeps for its backward; each keeps what the ones before it do. Bytes are of bf16 at Llama 3.1 8B."""

    RECOMPUTE = 0  # the input: 8 KiB a token
    ATTENTION = 1  # and the attention's output: 16 KiB
    ALL_BUT_GATE_UP = 2  # and q, k, v and the input of the MLP: 36 KiB
    KEEP = 3  # and gate and up: 92 KiB; no product is computed twice


class Gradients(dict):
    """Gradients of trained parameters by the parameter's ``id``, in fp32 or finished."""

    def add(self, more: dict[int, Tensor]) -> None:
        for key, gradient in more.items():
            self[key] = self[key].add_(gradient) if key in self else gradient

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """In the order and the dtypes of the parameters; None for one that does not train any more."""
        return [self[id(p)].to(p.dtype) if id(p) in self else None for p in parameters]


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    eps: float
    flavour: str

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return rms_norm_forward(x, self.weight, self.eps, self.flavour, out)

    def backward(
        self, grad: Tensor, x: Tensor, gradients: Gradients, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The gradient of x, plus ``residual``; that of a trained weight goes to ``gradients``."""
        settings = self.weight, self.eps, self.flavour, residual, out
        if not self.weight.requires_grad:
            return rms_norm_backward(grad, x, *settings)
        grad_x, grad_weight = rms_norm_gradients(grad, x, *settings)
        gradients.add({id(self.weight): grad_weight})
        return grad_x


@dataclass
class Call:
    """The batch, as one layer sees it."""

    batch: int
    cos: Tensor  # (B or 1, T, r/2)
    sin: Tensor
    mask: Tensor | None = None  # decides alone if given
    window: int | None = None
    segments: Segments | Padding | None = None  # padding: the mask says it too

    @property
    def is_long(self) -> bool:
        return (self.segments.longest if isinstance(self.segments, Segments) else self.cos.shape[1]) >= LONG


@dataclass
class Kept:
    """What one layer keeps between its forward and its backward; None: given up, to be computed again."""

    x: Tensor
    is_long: bool = False  # a long sequence: see ``LONG``
    low_qkv: Tensor | None = None
    low_o: Tensor | None = None
    low_gate_up: Tensor | None = None
    low_down: Tensor | None = None
    qkv: Tensor | None = None
    out: Tensor | None = None  # of the attention, (n, heads * width)
    attention: AttentionState | None = None
    branch: Tensor | None = None  # the attention's contribution before its post-norm
    x2: Tensor | None = None
    gate_up: Tensor | None = None
    mlp_branch: Tensor | None = None
    parked: object = None  # offload.Parked: what of it waits in host memory
    before: object = None  # a weak reference to what the layer before keeps

    @property
    def rows(self) -> Tensor | None:
        """The attention's one number a row."""
        return None if self.attention is None else self.attention.rows

    @rows.setter
    def rows(self, value: Tensor | None) -> None:
        if self.attention is not None:
            self.attention.rows = value


@dataclass
class AttentionBlock:
    qkv: Projection
    o: Projection
    heads: int
    kv_heads: int
    width: int  # of one head
    scale: float
    norm: Norm | None
    post_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    rotates: bool
    interleaved: bool
    residual_scale: float = 1.0
    norm_is_wide: bool = False  # q_norm and k_norm run over all heads at once
    softcap: float | None = None
    sinks: Tensor | None = None  # (heads,), frozen

    def norms(self) -> list[Norm]:
        return [norm for norm in (self.norm, self.post_norm, self.q_norm, self.k_norm) if norm]

    def forward(self, x: Tensor, call: Call, kept: Kept, mode: Mode) -> Tensor:
        """x (n, D) -> x2 (n, D)."""
        qkv, out, attention = self._attend(x, call, kept)
        written = self.o.written(x)
        kept.low_o = self.o.low(out, written)
        x2, branch = self._output(x, out, written, kept.low_o)
        if mode >= Mode.ATTENTION and attention.kernel != "autograd":
            kept.out, kept.attention = out, attention
        if mode >= Mode.ALL_BUT_GATE_UP:
            kept.qkv, kept.out, kept.attention, kept.branch = qkv, out, attention, branch
        return x2

    def recompute(self, call: Call, kept: Kept, wants_output: bool) -> Tensor | None:
        """Fill in what the mode gave up; gives x2, unless nobody wants it and no post-norm needs its branch."""
        if kept.attention is None:
            kept.qkv, kept.out, kept.attention = self._attend(kept.x, call, kept)
            if kept.is_long and kept.attention.kernel != "autograd":
                kept.qkv = None  # and once more when its turn comes
        if kept.x2 is None and (wants_output or self.post_norm):
            kept.x2, kept.branch = self._output(kept.x, kept.out, self.o.written(kept.x), kept.low_o)
        return kept.x2

    def backward(
        self, grad: Tensor, room: Tensor | None, call: Call, kept: Kept, gradients: Gradients, wants_x: bool
    ) -> Tensor | None:
        """grad (n, D) of x2 -> that of x, and into ``gradients`` those of what trains here.

        ``room``: the ``new_gradient`` of o that ``grad`` is a part of, if it is.
        """
        room = None if self.post_norm else room
        branch_grad = self.post_norm.backward(grad, kept.branch, gradients) if self.post_norm else grad
        kept.branch = None
        written = self.o.written(grad)
        wide, low = self.o.extended_gradient(branch_grad, written, self.residual_scale, room)
        out_grad = self.o.backward(wide, low, written)
        gradients.add(self.o.gradients(wide[:, : self.o.width_out], kept.out, low, kept.low_o))
        del wide, branch_grad, room
        if kept.qkv is None:
            kept.qkv, _, _ = self._attend(kept.x, call, kept, attends=False)
        self._attention_backward_(out_grad, call, kept, gradients)
        qkv_grad, kept.qkv, kept.out = kept.qkv, None, None
        del out_grad
        written = self.qkv.written(grad)
        norm_trains = self.norm is not None and self.norm.weight.requires_grad
        grad_x = torch.empty_like(kept.x) if wants_x or norm_trains else None
        chunks = _chunks(grad.shape[0], NARROW_ROWS, self.qkv)
        for chunk in chunks:
            own = {"row": chunk.start, "whole": len(chunks) == 1}
            h_grad, low = self.qkv.input_gradient(qkv_grad[chunk], written, chunk.start)
            h = self._normal(kept.x[chunk])
            gradients.add(self.qkv.gradients(qkv_grad[chunk], h, low, _rows(kept.low_qkv, chunk), **own))
            if grad_x is not None and self.norm:
                self.norm.backward(h_grad, kept.x[chunk], gradients, grad[chunk], out=grad_x[chunk])
            elif grad_x is not None:
                torch.add(h_grad, grad[chunk], out=grad_x[chunk])
        return grad_x

    def _attention_backward_(self, out_grad: Tensor, call: Call, kept: Kept, gradients: Gradients) -> None:
        """``kept.qkv`` becomes its gradient, from that of the attention's output (n, H * W); a few heads at a time if long."""
        apart = kept.is_long and call.batch == 1 and kept.attention.kernel in BY_HEAD and not self.norm_is_wide
        groups = self.kv_heads if apart else 1
        columns = *self._split(kept.qkv), kept.out, out_grad
        states = [kept.attention]
        if apart:
            states = [replace(kept.attention, rows=rows) for rows in kept.attention.rows.chunk(groups, dim=1)]
        for state, *parts, out, grad in zip(states, *(part.chunk(groups, dim=1) for part in columns), strict=True):
            heads = self._heads(grad, call.batch), *self._rotated(parts, call), self._heads(out, call.batch)
            turned = attend_backward(*heads, state, self.scale)
            del heads
            for part, gradient, norm in zip(parts, turned, (self.q_norm, self.k_norm, None), strict=True):
                rotates = self.rotates and part is not parts[2]
                self._before_rotation_(part, gradient.transpose(1, 2), norm, call if rotates else None, gradients)

    def _before_rotation_(self, part: Tensor, grad: Tensor, norm: Norm | None, call: Call | None, gradients: Gradients) -> None:
        """``part`` (n, heads * W) becomes its gradient, from that behind norm and rotation, grad (B, T, heads, W)."""
        target = self._tokens(part, grad.shape[0]) if norm is None else grad
        if call is not None:
            rotate(grad, call.cos, call.sin, self.interleaved, out=target, inverse=True)
        elif norm is None:
            target.copy_(grad)
        if norm is not None:
            rows = part.shape if self.norm_is_wide else (-1, self.width)
            part.copy_(norm.backward(grad.reshape(rows), part.reshape(rows), gradients).view(part.shape))

    def _normal(self, x: Tensor) -> Tensor:
        return self.norm.forward(x) if self.norm else x

    def _attend(
        self, x: Tensor, call: Call, kept: Kept, attends: bool = True
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        """(qkv (n, N), the attention's output (n, H * W), what its backward needs); the last two only if ``attends``."""
        written = self.qkv.written(x)
        qkv, lows = torch.empty(x.shape[0], self.qkv.width_out, dtype=x.dtype, device=x.device), []
        for chunk in _chunks(x.shape[0], NARROW_ROWS, self.qkv):
            h, low = _input(self.qkv, self.norm, x[chunk], written, _rows(kept.low_qkv, chunk), chunk.start)
            self.qkv.forward(h, written, qkv[chunk])
            lows.append(low)
        kept.low_qkv = _joined(lows) if kept.low_qkv is None else kept.low_qkv
        if self.rotates and not self.q_norm:  # in place: nothing needs them unrotated
            for part in self._split(qkv)[:2]:
                rotate(self._tokens(part, call.batch), call.cos, call.sin, self.interleaved)
        if not attends:
            return qkv, None, None
        structure = call.mask, call.window, call.segments
        out, attention = attend(*self._rotated(self._split(qkv), call), self.scale, *structure, self.softcap, self.sinks)
        return qkv, out.transpose(1, 2).reshape(x.shape[0], -1), attention

    def _output(self, x: Tensor, out: Tensor, written: Tensor | None, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(x2, the branch before its post-norm if there is one)."""
        if self.post_norm is None:
            return self.o.apply(out, low, written, x, self.residual_scale), None
        y = self.o.apply(out, low, written)
        return torch.add(x, self.post_norm.forward(y), alpha=self.residual_scale), y

    def _rotated(self, parts: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, T, W) as the attention sees them, from columns of qkv."""
        q, k, v = parts
        if self.q_norm:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        views = [self._heads(part, call.batch) for part in (q, k, v)]
        if self.q_norm and self.rotates:
            for view in views[:2]:
                rotate(view.transpose(1, 2), call.cos, call.sin, self.interleaved)
        return tuple(views)

    def _normed(self, part: Tensor, norm: Norm) -> Tensor:
        """q or k (n, heads * W) normed into new memory."""
        if self.norm_is_wide:
            return norm.forward(part, torch.empty(part.shape, dtype=part.dtype, device=part.device))
        return norm.forward(part.reshape(-1, self.width)).view(part.shape)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split([self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width], dim=1)

    def _tokens(self, part: Tensor, batch: int) -> Tensor:
        """(n, heads * W) -> (B, T, heads, W), a view."""
        return part.unflatten(1, (-1, self.width)).unflatten(0, (batch, -1))

    def _heads(self, part: Tensor, batch: int) -> Tensor:
        return self._tokens(part, batch).transpose(1, 2)


@dataclass
class MlpBlock:
    gate_up: Projection
    down: Projection
    activation: str
    norm: Norm | None
    post_norm: Norm | None
    residual_scale: float = 1.0

    def norms(self) -> list[Norm]:
        return [norm for norm in (self.norm, self.post_norm) if norm]

    def forward(self, x: Tensor, residual: Tensor, kept: Kept, mode: Mode) -> Tensor:
        """x (n, D), what the branch reads, and what it is added to (n, D) -> x3 (n, D)."""
        n = x.shape[0]
        gate_up, down = self.gate_up.written(x), self.down.written(x)
        outputs, keeps = torch.empty_like(x), mode >= Mode.KEEP
        kept.gate_up = torch.empty(n, self.gate_up.width_out, dtype=x.dtype, device=x.device) if keeps else None
        kept.mlp_branch = torch.empty_like(x) if keeps and self.post_norm else None
        lows = []
        for chunk in self._chunks(n, keeps):
            h, low = _input(self.gate_up, self.norm, x[chunk], gate_up, row=chunk.start)
            both = self.gate_up.forward(h, gate_up, _rows(kept.gate_up, chunk))
            del h
            act, low_down, rounded = self._activated(both, down, None, chunk.start)
            lows.append((low, low_down))
            del both
            if self.post_norm is None:
                self.down.add_to(residual[chunk], act, down, self.residual_scale, outputs[chunk], rounded)
            else:
                branch = self.down.forward(act, down, _rows(kept.mlp_branch, chunk), rounded)
                torch.add(residual[chunk], self.post_norm.forward(branch), alpha=self.residual_scale, out=outputs[chunk])
            act = rounded = branch = None  # before the next chunk's
        kept.low_gate_up, kept.low_down = map(_joined, zip(*lows, strict=True))
        return outputs

    def backward(self, grad: Tensor, x: Tensor, kept: Kept, gradients: Gradients, adds: bool, grad_x: Tensor) -> None:
        """grad (n, D) of x3 -> that of x into ``grad_x``, and into ``gradients`` those of what trains here.

        ``adds``: x is also what the branch was added to, so its gradient holds ``grad`` itself.
        """
        gate_up, down = self.gate_up.written(grad), self.down.written(grad)
        chunks = self._chunks(grad.shape[0], kept.gate_up is not None)
        for chunk in chunks:
            own = {"row": chunk.start, "whole": len(chunks) == 1}
            low_gate_up, low_down = _rows(kept.low_gate_up, chunk), _rows(kept.low_down, chunk)
            h, _ = _input(self.gate_up, self.norm, x[chunk], gate_up, low_gate_up, chunk.start)
            both = self.gate_up.forward_again(h, gate_up) if kept.gate_up is None else kept.gate_up[chunk]
            branch_grad = grad[chunk]
            if self.post_norm:
                branch = _rows(kept.mlp_branch, chunk)
                if branch is None:
                    act, _, rounded = self._activated(both, down, low_down, chunk.start)
                    branch = self.down.forward(act, down, rounded=rounded)
                    del act, rounded
                branch_grad = self.post_norm.backward(branch_grad, branch, gradients)
                del branch
            wide, low_grad = self.down.extended_gradient(branch_grad, down, self.residual_scale)
            act = self.down.backward(wide, low_grad, down, chunk.start)
            gated_backward_(act, *both.chunk(2, dim=1), self.activation)
            gradients.add(self.down.gradients(wide[:, : self.down.width_out], act, low_grad, low_down, **own))
            del act, wide
            h_grad, low_grad = self.gate_up.input_gradient(both, gate_up, chunk.start)
            gradients.add(self.gate_up.gradients(both, h[:, : self.gate_up.width_in], low_grad, low_gate_up, **own))
            del both, h
            if self.norm:
                self.norm.backward(h_grad, x[chunk], gradients, grad[chunk] if adds else None, out=grad_x[chunk])
            else:
                torch.add(h_grad, grad[chunk], out=grad_x[chunk]) if adds else grad_x[chunk].copy_(h_grad)

    def _chunks(self, n: int, keeps: bool) -> list[slice]:
        return _chunks(n, KEPT_ROWS if keeps else ROWS, self.gate_up, self.down)

    def _activated(
        self, both: Tensor, down: Tensor | None, low: Tensor | None, row: int
    ) -> tuple[Tensor, Tensor | None, Rows8 | None]:
        """gate and up (n, 2 F) -> what ``down`` reads, its adapter's inner activation, and where it is rounded."""
        act, rounded = self.down.new_input(both.shape[0], both), self.down.room_for_input(both.shape[0], both)
        gated_forward(*both.chunk(2, dim=1), self.activation, act[:, : self.down.width_in], rounded)
        return act, self.down.extend(act, down, low, row), rounded


def _input(
    projection: Projection, norm: Norm | None, x: Tensor, written: Tensor | None, low: Tensor | None = None, row: int = 0
) -> tuple[Tensor, Tensor | None]:
    """x (n, D) normed and extended for ``projection``, and its adapters' inner activations."""
    h = projection.new_input(x.shape[0], x)
    narrow = h[:, : projection.width_in]
    norm.forward(x, narrow) if norm else narrow.copy_(x)
    return h, projection.extend(h, written, low, row)


def _chunks(n: int, rows: int, *projections: Projection) -> list[slice]:
    """The rows 0 to n that these projections work on at a time: ``rows``, if they are frozen."""
    rows = TRAINED_ROWS if any(part.trains for projection in projections for part in projection.parts) else rows
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _rows(x: Tensor | None, chunk: slice) -> Tensor | None:
    return None if x is None else x[chunk]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
