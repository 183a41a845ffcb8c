"""Linear layers with LoRA adapters:  y = x @ W.T + bias + scale * (drop(x) @ A.T) @ B.T

W stays in 4 bits (or 16): it is written out for the product and again for the backward, never kept. A and B may be fp32
masters; the products run in x's dtype, the gradients of A and B are summed and returned in fp32. W and the bias may train.

Layers that read the same input (q, k, v; gate, up) are one product, and the adapters ride in it: the weight is written
into a buffer with columns B and rows A beside it, so that adding them costs no pass over the outputs.

              K        E                         forward    [x | s t | 1] @ buffer[:N].T       t = x @ A.T
        N  [  W  |  B  bias ]                    backward   dx = dy @ W + s (dy @ B) @ A
        R  [  A  |     ]                                    dA = (s dy @ B).T @ x     dB = dy.T @ (s t)

Writing out 16-bit weights costs two passes over W, adding adapters to the outputs would cost two passes over those: more,
from some 4,000 tokens on. Layers of 16 bits without adapters (full fine-tuning) are multiplied as they are, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier.ops.backend import has_kernels
from luthier.ops.dropout import Dropout, add_dropped_, drop, kept_reference
from luthier.ops.fp8 import Rows8
from luthier.ops.lora_kernels import WIDEST, launch_adapter, launch_gradient, launch_sum
from luthier.ops.nf4 import Quantised, dequantise
from luthier.ops.workspace import Workspace

ALIGNMENT = 16  # elements to which E and R are padded: products with odd widths leave the fast kernels


@dataclass(frozen=True)
class Part:
    """One linear layer. weight (N, K) as a tensor or in 4 bits; a (r, K) and b (N, r) or both None.

    ``scale`` has 1 / (1 - p) in it where there is ``dropout``.
    """

    weight: Tensor | Quantised
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: Dropout | None = None  # of what the adapter reads

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def trains(self) -> bool:
        """Whether the weight itself does."""
        return _trains(self.weight)

    @property
    def trained(self) -> list[Tensor]:
        tensors = (self.weight, self.bias, self.a, self.b)
        return [tensor for tensor in tensors if _trains(tensor)]


def lora_linear_reference(x: Tensor, part: Part) -> Tensor:
    """The layer in plain, differentiable torch: x (n, K) -> (n, N) in x's dtype."""
    weight = dequantise(part.weight, dtype=x.dtype) if isinstance(part.weight, Quantised) else part.weight.to(x.dtype)
    y = F.linear(x, weight, None if part.bias is None else part.bias.to(x.dtype))
    if not part.rank:
        return y
    seen = x * kept_reference(*x.shape, part.dropout, device=x.device) if part.dropout else x
    return y + part.scale * F.linear(F.linear(seen, part.a.to(x.dtype)), part.b.to(x.dtype))


class Projection:
    """Linear layers side by side that read the same input (n, K): outputs (n, N), the layers' one after the other."""

    multiplies_in_place = True  # weights of 16 bits without adapters

    def __init__(self, role: str, parts: list[Part], workspace: Workspace) -> None:
        self.role, self.parts, self.workspace = role, parts, workspace
        shapes = [part.weight.shape for part in parts]
        self.width_in, self.widths = shapes[0][1], [shape[0] for shape in shapes]
        self.width_out = sum(self.widths)
        self.ranks = [part.rank for part in parts]
        self.rank = sum(self.ranks)
        self.has_bias = any(part.bias is not None for part in parts)
        in_16_bits = all(isinstance(part.weight, Tensor) for part in parts)
        self.is_plain = self.multiplies_in_place and in_16_bits and not self.rank  # nothing is written out
        self.drops = any(part.dropout for part in parts)
        self.extension = 0 if self.is_plain else _padded(self.rank + self.has_bias)
        self.rank_rows = _padded(self.rank)
        scales = {part.scale for part in parts if part.rank}
        self.is_written = False
        self.scale = scales.pop() if len(scales) == 1 else None  # None: they differ

    def written(self, like: Tensor) -> Tensor | None:
        """The buffer of the drawing above (N + R, K + E), filled, unless that was done since ``forget``; None: not needed."""
        if self.is_plain:
            return None
        buffer = self.buffer(like)
        if self.is_written:
            return buffer
        self.is_written = True
        row, rank = 0, 0
        for part, height in zip(self.parts, self.widths, strict=True):
            target = buffer[row : row + height, : self.width_in]
            dequantise(part.weight, target) if isinstance(part.weight, Quantised) else target.copy_(part.weight)
            if self.extension:
                columns = buffer[row : row + height, self.width_in :]
                rows = buffer[self.width_out + rank : self.width_out + rank + part.rank, : self.width_in]
                self.write_adapter(part, columns, rows, rank)
            row, rank = row + height, rank + part.rank
        return buffer

    def buffer(self, like: Tensor) -> Tensor:
        """That buffer, with whatever is in it."""
        return self.workspace.buffer(self.role, (self.width_out + self.rank_rows, self.width_in + self.extension), like)

    def forget(self) -> None:
        """Other layers have used the buffer: ``written`` has to write it again."""
        self.is_written = False

    def write_adapter(self, part: Part, columns: Tensor, rows: Tensor, rank: int) -> None:
        """One part's columns (N_i, E) of B and bias, with zeros where the other parts' are, and its rows (r_i, K) of A."""
        if has_kernels(columns):
            launch_adapter(part.a, part.b, part.bias, columns, rows, rank, self.rank)
            return
        columns.zero_()
        if part.rank:
            columns[:, rank : rank + part.rank].copy_(part.b)
            rows.copy_(part.a)
        if part.bias is not None:
            columns[:, self.rank].copy_(part.bias)

    def new_input(self, n: int, like: Tensor) -> Tensor:
        """Room for ``n`` inputs and their extension (n, K + E); whoever fills the first K columns calls ``extend`` next."""
        return torch.empty(n, self.width_in + self.extension, dtype=like.dtype, device=like.device)

    def extend(self, x: Tensor, buffer: Tensor | None, low: Tensor | None = None, row: int = 0) -> Tensor | None:
        """Write ``[s t | 1 | 0]`` behind the inputs in ``x`` (n, K + E); gives s t (n, R), or takes it as ``low``.

        ``row``: the number of the first of these rows among those of the batch, here and below.
        """
        if self.is_plain:
            return None
        if self.rank and low is None:
            low = self.low(x[:, : self.width_in], buffer, row)
        if self.extension > self.rank:
            x[:, self.width_in + self.rank :].zero_()
        if self.rank:
            x[:, self.width_in : self.width_in + self.rank].copy_(low)
        if self.has_bias:
            x[:, self.width_in + self.rank] = 1.0
        return low

    def low(self, x: Tensor, buffer: Tensor | None, row: int = 0) -> Tensor | None:
        """s t (n, R): the adapters' inner activations, scaled."""
        if not self.rank:
            return None
        a = self.a(buffer)
        if not self.drops:
            return self._scaled(x @ a.T)
        parts = zip(self.parts, a.split(self.ranks), strict=True)
        return self._scaled(torch.cat([_seen(x, part, row) @ rows.T for part, rows in parts if part.rank], dim=1))

    def room_for_input(self, n: int, like: Tensor) -> Rows8 | None:
        """Where a kernel that computes ``n`` inputs also rounds them, for ``forward`` or ``add_to``; None: it does not."""
        return None

    def forward(self, x: Tensor, buffer: Tensor | None, out: Tensor | None = None, rounded: Rows8 | None = None) -> Tensor:
        """x (n, K + E) extended -> (n, N)."""
        if buffer is not None:
            return torch.mm(x, buffer[: self.width_out].T, out=out)
        out = torch.empty(x.shape[0], self.width_out, dtype=x.dtype, device=x.device) if out is None else out
        for part, columns in zip(self.parts, out.split(self.widths, dim=1), strict=True):
            torch.mm(x, part.weight.to(x.dtype).T, out=columns)
            if part.bias is not None:
                columns.add_(part.bias)
        return out

    def add_to(
        self,
        residual: Tensor,
        x: Tensor,
        buffer: Tensor | None,
        alpha: float = 1.0,
        out: Tensor | None = None,
        rounded: Rows8 | None = None,
    ) -> Tensor:
        """residual + alpha * the layer, x (n, K + E) extended; the sum is rounded once. Of one layer alone."""
        if buffer is not None:
            return torch.addmm(residual, x, buffer[: self.width_out].T, alpha=alpha, out=out)
        (part,) = self.parts
        out = torch.addmm(residual, x, part.weight.to(x.dtype).T, alpha=alpha, out=out)
        return out if part.bias is None else out.add_(part.bias, alpha=alpha)

    def apply(
        self, x: Tensor, low: Tensor | None, buffer: Tensor | None, residual: Tensor | None = None, alpha: float = 1.0
    ) -> Tensor:
        """residual + alpha * the layer, or the layer itself, for an x (n, K) without room for its extension ``low``."""
        if buffer is None:
            return self.forward(x, None) if residual is None else self.add_to(residual, x, None, alpha)
        weight, columns = buffer[: self.width_out, : self.width_in], buffer[: self.width_out, self.width_in :]
        alpha = 1.0 if residual is None else alpha
        if residual is not None and low is not None and self.rank <= WIDEST and has_kernels(x):
            y = launch_sum(residual, low, columns[:, : self.rank], alpha)  # addmm would copy the residual first
            y.addmm_(x, weight.T, alpha=alpha)
        else:
            y = x @ weight.T if residual is None else torch.addmm(residual, x, weight.T, alpha=alpha)
            if low is not None:
                y.addmm_(low, columns[:, : self.rank].T, alpha=alpha)
        return y.add_(columns[:, self.rank], alpha=alpha) if self.has_bias else y

    def forward_again(self, x: Tensor, buffer: Tensor | None) -> Tensor:
        """``forward`` in a backward, which had not kept its result."""
        return self.forward(x, buffer)

    def a(self, buffer: Tensor) -> Tensor:
        """A of every part (R, K), one below the other."""
        return buffer[self.width_out : self.width_out + self.rank, : self.width_in]

    def b(self, buffer: Tensor) -> Tensor:
        """B of every part (N, R), each in its own rows and columns."""
        return buffer[: self.width_out, self.width_in : self.width_in + self.rank]

    def low_gradient(self, grad: Tensor, buffer: Tensor | None) -> Tensor | None:
        """s dy @ B (n, R) from grad (n, N)."""
        if not self.rank:
            return None
        return self._scaled(grad @ self.b(buffer))

    def input_gradient(self, grad: Tensor, buffer: Tensor | None, row: int = 0) -> tuple[Tensor, Tensor | None]:
        """(dx (n, K), s dy @ B (n, R)) from grad (n, N), for wide N: both from one product, then the adapters' added."""
        if buffer is None:
            return self._plain_input_gradient(grad), None
        both = grad @ buffer[: self.width_out, : self.width_in + self.rank]
        dx = both[:, : self.width_in]
        if not self.rank:
            return dx, None
        low = self._scaled(both[:, self.width_in :].contiguous())
        return self.add_adapters_(dx, low, buffer, row), low

    def new_gradient(self, n: int, like: Tensor) -> Tensor:
        """Room for ``n`` gradients of outputs and their extension (n, N + R): ``extended_gradient`` fills in the second."""
        return torch.empty(n, self.width_out + self.rank_rows, dtype=like.dtype, device=like.device)

    def extended_gradient(
        self, grad: Tensor, buffer: Tensor | None, alpha: float = 1.0, wide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """([alpha dy | s alpha dy @ B] (n, N + R), the second of them), for wide K: what ``backward`` takes.

        ``wide``: the ``new_gradient`` of which ``grad`` is a part, if it is. Its copy is not needed then.
        """
        if not self.rank_rows and alpha == 1.0:
            return grad, None
        if wide is None or alpha != 1.0:
            wide = self.new_gradient(grad.shape[0], grad)
        if 0 < self.rank <= WIDEST and self.scale is not None and has_kernels(grad):
            return wide, launch_gradient(grad, self.b(buffer), alpha, self.scale, wide)
        own = wide[:, : self.width_out]
        if own.data_ptr() != grad.data_ptr():
            torch.mul(grad, alpha, out=own) if alpha != 1.0 else own.copy_(grad)
        low = self.low_gradient(own, buffer)
        if self.rank_rows > self.rank:
            wide[:, self.width_out + self.rank :].zero_()
        if low is not None:
            wide[:, self.width_out : self.width_out + self.rank].copy_(low)
        return wide, low

    def backward(self, wide: Tensor, low: Tensor | None, buffer: Tensor | None, row: int = 0) -> Tensor:
        """dx (n, K) from what ``extended_gradient`` gave, for rows from number ``row`` on."""
        if buffer is None:
            return self._plain_input_gradient(wide)
        if not self.drops:
            return wide @ buffer[:, : self.width_in]
        dx = wide[:, : self.width_out] @ buffer[: self.width_out, : self.width_in]
        return self.add_adapters_(dx, low, buffer, row)

    def gradients(
        self, grad: Tensor, x: Tensor, low_grad: Tensor | None, low: Tensor | None, row: int = 0, whole: bool = True
    ) -> dict[int, Tensor]:
        """The gradient of everything that trains, by its ``id``, from grad (n, N), x (n, K), s dy @ B and s t (n, R).

        In fp32, except that a weight's is in its own dtype if these are the ``whole`` batch's rows.
        """
        found = {}
        for part, own in zip(self.parts, grad.split(self.widths, dim=1), strict=True):
            if part.trains:
                add(found, part.weight, product(own, x, part.weight.dtype if whole else torch.float32))
            if _trains(part.bias):
                add(found, part.bias, own.sum(0, dtype=torch.float32))
        if not self.rank:
            return found
        of_a = None if self.drops else product(low_grad, x).split(self.ranks)
        widths = grad.split(self.widths, dim=1), low_grad.split(self.ranks, dim=1), low.split(self.ranks, dim=1)
        for index, (part, own, own_low_grad, own_low) in enumerate(zip(self.parts, *widths, strict=True)):
            if _trains(part.a):
                add(found, part.a, product(own_low_grad, _seen(x, part, row)) if of_a is None else of_a[index])
            if _trains(part.b):
                add(found, part.b, product(own, own_low))
        return found

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.trained]

    def add_adapters_(self, dx: Tensor, low: Tensor, buffer: Tensor, row: int) -> Tensor:
        """dx (n, K) += what comes through the adapters, low = s dy @ B (n, R)."""
        a = self.a(buffer)
        if not self.drops:
            return dx.addmm_(low, a)
        for part, columns, rows in zip(self.parts, low.split(self.ranks, dim=1), a.split(self.ranks), strict=True):
            if part.dropout:
                add_dropped_(dx, columns @ rows, part.dropout, row)
            elif part.rank:
                dx.addmm_(columns, rows)
        return dx

    def _plain_input_gradient(self, grad: Tensor) -> Tensor:
        dx = None
        for part, own in zip(self.parts, grad.split(self.widths, dim=1), strict=True):
            weight = part.weight.to(grad.dtype)
            dx = own @ weight if dx is None else dx.addmm_(own, weight)
        return dx

    def _scaled(self, low: Tensor) -> Tensor:
        if self.scale is not None:
            return low if self.scale == 1.0 else low.mul_(self.scale)
        for part, columns in zip(self.parts, low.split(self.ranks, dim=1), strict=True):
            columns.mul_(part.scale)
        return low


def add(found: dict[int, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    """To what ``parameter`` has got already, from another layer that shares it."""
    key = id(parameter)
    found[key] = found[key] + gradient if key in found else gradient


def product(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x.T @ y, summed in fp32 and rounded to ``dtype``: x (n, r), y (n, k) -> (r, k)."""
    if x.dtype == dtype:
        return x.T @ y
    if x.is_cuda and dtype == torch.float32:
        return torch.mm(x.T, y, out_dtype=dtype)
    return (x.T.float() @ y.float()).to(dtype)


def _seen(x: Tensor, part: Part, row: int) -> Tensor:
    """What of x (n, K) the adapter of ``part`` reads."""
    return drop(x, part.dropout, row) if part.dropout else x


def _trains(tensor: Tensor | Quantised | None) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad


def _padded(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT
