"""The two halves of a decoder layer as one forward and one backward each, without autograd inside.

    x2 = x  + m * post(o(attention(rotate(qkv(norm(x))))))                AttentionBlock
    x3 = x2 + m * post(down(act(gate) * up)),  gate, up of norm(x2)       MlpBlock (of norm(x), if the two are parallel)

A block keeps what its mode says (``Mode``) and computes the rest again in the backward: what is element-wise always,
products and attention only where the mode gives up memory for them. All tensors are (n, width), n = batch * tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from luthier.ops.attention import AttentionState, Segments, attend, attend_backward
from luthier.ops.gated_mlp import gated_backward_, gated_forward
from luthier.ops.lora_linear import Projection
from luthier.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_gradients
from luthier.ops.rotary import rotate

MLP_ROWS = 4096  # rows that the MLP handles at a time: bounds its transients


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

    def of(self, parameters: list[Tensor]) -> list[Tensor]:
        """In the order and the dtypes of the parameters."""
        return [self[id(parameter)].to(parameter.dtype) for parameter in parameters]


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
    segments: Segments | None = None


@dataclass
class Kept:
    """What one layer keeps between its forward and its backward; None: given up, to be computed again."""

    x: Tensor
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
        if kept.qkv is None:
            kept.qkv, out, attention = self._attend(kept.x, call, kept, kept.attention is None)
            if kept.attention is None:
                kept.out, kept.attention = out, attention
        if kept.x2 is None and (wants_output or self.post_norm):
            kept.x2, kept.branch = self._output(kept.x, kept.out, self.o.written(kept.x), kept.low_o)
        return kept.x2

    def backward(self, grad: Tensor, call: Call, kept: Kept, gradients: Gradients, wants_x: bool) -> Tensor | None:
        """grad (n, D) of x2 -> that of x, and into ``gradients`` those of what trains here."""
        branch_grad = self.post_norm.backward(grad, kept.branch, gradients) if self.post_norm else grad
        written = self.o.written(grad)
        wide, low = self.o.extended_gradient(branch_grad, written, self.residual_scale)
        out_grad = self.o.backward(wide, written)
        gradients.add(self.o.gradients(wide[:, : self.o.width_out], kept.out, low, kept.low_o))
        del wide, branch_grad
        q, k, v = self._rotated(kept.qkv, call)
        heads = (self._heads(t, call.batch, n) for t, n in ((out_grad, self.heads), (kept.out, self.heads)))
        dq, dk, dv = attend_backward(next(heads), q, k, v, next(heads), kept.attention, self.scale)
        del out_grad, q, k, v
        qkv_grad = self._gradient_before_rotation(dq, dk, dv, kept.qkv, call, gradients)
        del dq, dk, dv
        written = self.qkv.written(grad)
        h = self._normal(kept.x)
        h_grad, low = self.qkv.input_gradient(qkv_grad, written)
        gradients.add(self.qkv.gradients(qkv_grad, h, low, kept.low_qkv))
        if self.norm and (wants_x or self.norm.weight.requires_grad):
            return self.norm.backward(h_grad, kept.x, gradients, grad)
        return h_grad + grad if wants_x else None

    def _normal(self, x: Tensor) -> Tensor:
        return self.norm.forward(x) if self.norm else x

    def _attend(
        self, x: Tensor, call: Call, kept: Kept, attends: bool = True
    ) -> tuple[Tensor, Tensor | None, AttentionState | None]:
        """(qkv (n, N), the attention's output (n, H * W), what its backward needs); the last two only if ``attends``."""
        written = self.qkv.written(x)
        h = self.qkv.new_input(x.shape[0], x)
        narrow = h[:, : self.qkv.width_in]
        self.norm.forward(x, narrow) if self.norm else narrow.copy_(x)
        kept.low_qkv = self.qkv.extend(h, written, kept.low_qkv)
        qkv = self.qkv.forward(h, written)
        if self.rotates and not self.q_norm:  # in place: nothing needs them unrotated
            for part, heads in zip(self._split(qkv)[:2], (self.heads, self.kv_heads), strict=True):
                rotate(self._tokens(part, call.batch, heads), call.cos, call.sin, self.interleaved)
        if not attends:
            return qkv, None, None
        structure = call.mask, call.window, call.segments
        out, attention = attend(*self._rotated(qkv, call), self.scale, *structure, self.softcap, self.sinks)
        return qkv, out.transpose(1, 2).reshape(x.shape[0], -1), attention

    def _output(self, x: Tensor, out: Tensor, written: Tensor | None, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(x2, the branch before its post-norm if there is one)."""
        if self.post_norm is None:
            return self.o.apply(out, low, written, x, self.residual_scale), None
        y = self.o.apply(out, low, written)
        return torch.add(x, self.post_norm.forward(y), alpha=self.residual_scale), y

    def _rotated(self, qkv: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, T, W) as the attention sees them."""
        q, k, v = self._split(qkv)
        if self.q_norm:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        views = [self._heads(t, call.batch, n) for t, n in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))]
        if self.q_norm and self.rotates:
            for view in views[:2]:
                rotate(view.transpose(1, 2), call.cos, call.sin, self.interleaved)
        return tuple(views)

    def _normed(self, part: Tensor, norm: Norm) -> Tensor:
        """q or k (n, heads * W) normed into new memory."""
        if self.norm_is_wide:
            return norm.forward(part, torch.empty(part.shape, dtype=part.dtype, device=part.device))
        return norm.forward(part.reshape(-1, self.width)).view(part.shape)

    def _gradient_before_rotation(
        self, dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, call: Call, gradients: Gradients
    ) -> Tensor:
        """The gradient of the projections' outputs (n, N)."""
        grad = torch.empty_like(qkv)
        parts, before = self._split(grad), self._split(qkv)
        counts = self.heads, self.kv_heads, self.kv_heads
        for index, norm in enumerate((self.q_norm, self.k_norm, None)):
            part, value, turned = parts[index], before[index], (dq, dk, dv)[index].transpose(1, 2)
            target = self._tokens(part, call.batch, counts[index])
            if self.rotates and index < 2:
                rotate(turned, call.cos, call.sin, self.interleaved, out=target, inverse=True)
            else:
                target.copy_(turned)
            if norm and self.norm_is_wide:
                norm.backward(part, value, gradients, out=part)
            elif norm:
                rows = norm.backward(part.reshape(-1, self.width), value.reshape(-1, self.width), gradients)
                part.copy_(rows.view(part.shape))
        return grad

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split([self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width], dim=1)

    def _tokens(self, part: Tensor, batch: int, heads: int) -> Tensor:
        """(n, heads * W) -> (B, T, heads, W), a view."""
        return part.unflatten(1, (heads, self.width)).unflatten(0, (batch, -1))

    def _heads(self, part: Tensor, batch: int, heads: int) -> Tensor:
        return self._tokens(part, batch, heads).transpose(1, 2)


@dataclass
class MlpBlock:
    gate_up: Projection
    down: Projection
    activation: str
    norm: Norm | None
    post_norm: Norm | None
    residual_scale: float = 1.0
    rows: int = MLP_ROWS

    def norms(self) -> list[Norm]:
        return [norm for norm in (self.norm, self.post_norm) if norm]

    def forward(self, x: Tensor, residual: Tensor, kept: Kept, mode: Mode) -> Tensor:
        """x (n, D), what the branch reads, and what it is added to (n, D) -> x3 (n, D)."""
        n = x.shape[0]
        gate_up, down = self.gate_up.written(x), self.down.written(x)
        h, kept.low_gate_up = self._input(x, gate_up)
        outputs = torch.empty_like(x)
        keeps = mode >= Mode.KEEP
        kept.gate_up = torch.empty(n, self.gate_up.width_out, dtype=x.dtype, device=x.device) if keeps else None
        lows = []
        for start in range(0, n, self.rows):
            chunk = slice(start, start + self.rows)
            both = self.gate_up.forward(h[chunk], gate_up, kept.gate_up[chunk] if keeps else None)
            act = self.down.new_input(both.shape[0], x)
            gated_forward(*both.chunk(2, dim=1), self.activation, act[:, : self.down.width_in])
            del both
            lows.append(self.down.extend(act, down, row=start))
            if self.post_norm:
                self.down.forward(act, down, out=outputs[chunk])
            else:
                self.down.add_to(residual[chunk], act, down, self.residual_scale, out=outputs[chunk])
        kept.low_down = None if lows[0] is None else torch.cat(lows)
        if not self.post_norm:
            return outputs
        kept.mlp_branch = outputs if keeps else None
        return torch.add(residual, self.post_norm.forward(outputs), alpha=self.residual_scale)

    def backward(self, grad: Tensor, x: Tensor, kept: Kept, gradients: Gradients, adds: bool) -> Tensor:
        """grad (n, D) of x3 -> that of x, and into ``gradients`` those of what trains here.

        ``adds``: x is also what the branch was added to, so its gradient holds ``grad`` itself.
        """
        n, gate_up, down = grad.shape[0], self.gate_up.written(grad), self.down.written(grad)
        h, _ = self._input(x, gate_up, kept.low_gate_up)
        branch_grad = grad
        if self.post_norm:
            branch = self._branch(h, kept, gate_up, down) if kept.mlp_branch is None else kept.mlp_branch
            branch_grad = self.post_norm.backward(grad, branch, gradients)
            del branch
        wide, low_down = self.down.extended_gradient(branch_grad, down, self.residual_scale)
        h_grad = torch.empty_like(x) if n > self.rows else None
        for start in range(0, n, self.rows):
            chunk = slice(start, start + self.rows)
            own = {"row": start, "whole": n <= self.rows}
            both = self.gate_up.forward_again(h[chunk], gate_up) if kept.gate_up is None else kept.gate_up[chunk]
            act = self.down.backward(wide[chunk], down, start)
            gated_backward_(act, *both.chunk(2, dim=1), self.activation)
            lows = _rows(low_down, chunk), _rows(kept.low_down, chunk)
            gradients.add(self.down.gradients(wide[chunk, : self.down.width_out], act, *lows, **own))
            del act
            part, low = self.gate_up.input_gradient(both, gate_up, start)
            if h_grad is None:
                h_grad = part
            else:
                h_grad[chunk] = part
            narrow = h[chunk, : self.gate_up.width_in]
            gradients.add(self.gate_up.gradients(both, narrow, low, _rows(kept.low_gate_up, chunk), **own))
        del wide, h, narrow
        if self.norm:
            return self.norm.backward(h_grad, x, gradients, grad if adds else None, out=h_grad)
        return h_grad.add_(grad) if adds else h_grad

    def _input(self, x: Tensor, written: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.gate_up.new_input(x.shape[0], x)
        narrow = h[:, : self.gate_up.width_in]
        self.norm.forward(x, narrow) if self.norm else narrow.copy_(x)
        return h, self.gate_up.extend(h, written, low)

    def _branch(self, h: Tensor, kept: Kept, gate_up: Tensor, down: Tensor) -> Tensor:
        """The output of ``down`` again (n, D), which only a post-norm's backward needs."""
        branch = torch.empty(h.shape[0], self.down.width_out, dtype=h.dtype, device=h.device)
        for start in range(0, h.shape[0], self.rows):
            chunk = slice(start, start + self.rows)
            both = self.gate_up.forward_again(h[chunk], gate_up) if kept.gate_up is None else kept.gate_up[chunk]
            act = self.down.new_input(both.shape[0], h)
            gated_forward(*both.chunk(2, dim=1), self.activation, act[:, : self.down.width_in])
            self.down.extend(act, down, _rows(kept.low_down, chunk), start)
            self.down.forward(act, down, out=branch[chunk])
        return branch


def _rows(x: Tensor | None, chunk: slice) -> Tensor | None:
    return None if x is None else x[chunk]
