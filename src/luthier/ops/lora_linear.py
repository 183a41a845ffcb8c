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

from luthier.ops.backend import has_kernels, jit, power_of_2, tl, triton
from luthier.ops.dropout import Dropout, add_dropped_, drop, kept_reference
from luthier.ops.fp8 import Rows8
from luthier.ops.nf4 import Quantised, dequantise

TILE_ROWS, TILE_COLUMNS = 64, 1024  # of B and A that one program copies
GRADIENT_ROWS = 16  # of a gradient that one program extends
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


class Workspace:
    """Buffers for written-out weights, one for each shape, reused by every layer of a model in turn.

    All use is on one stream at a time, so the next layer's write waits for this layer's product by itself.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}

    def buffer(self, role: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Uninitialised memory of ``shape`` in the dtype and on the device of ``like``, the same on every call."""
        key = role, shape, like.dtype, like.device
        if key not in self.buffers:
            self.buffers[key] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.buffers[key]

    def inside(self, role: str, shape: tuple[int, int], like: Tensor, start: int, size: int) -> Tensor:
        """The same from byte ``start`` of memory of ``size`` bytes, in which other buffers of that role lie as well."""
        key = role, shape, like.dtype, like.device, start, size
        if key not in self.buffers:
            memory = self.buffer(role, (1, size), like.new_empty(0, dtype=torch.uint8)).view(-1)
            end = start + shape[0] * shape[1] * like.element_size()
            self.buffers[key] = memory[start:end].view(like.dtype).view(shape)
        return self.buffers[key]

    def __deepcopy__(self, memo: dict) -> Workspace:
        return Workspace()  # a copied model gets buffers of its own when it first needs them


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
            launch_adapter(part, columns, rows, rank, self.rank)
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

    def room_for_gradient(self, n: int, like: Tensor) -> Rows8 | None:
        """The same for the gradients of ``n`` outputs, for ``input_gradient``; of two layers as wide as each other."""
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

    def input_gradient(
        self, grad: Tensor, buffer: Tensor | None, row: int = 0, rounded: Rows8 | None = None
    ) -> tuple[Tensor, Tensor | None]:
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
        if 0 < self.rank <= 128 and self.scale is not None and has_kernels(grad):
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
                found[id(part.weight)] = product(own, x, part.weight.dtype if whole else torch.float32)
            if _trains(part.bias):
                found[id(part.bias)] = own.sum(0, dtype=torch.float32)
        if not self.rank:
            return found
        of_a = None if self.drops else product(low_grad, x).split(self.ranks)
        widths = grad.split(self.widths, dim=1), low_grad.split(self.ranks, dim=1), low.split(self.ranks, dim=1)
        for index, (part, own, own_low_grad, own_low) in enumerate(zip(self.parts, *widths, strict=True)):
            if _trains(part.a):
                found[id(part.a)] = product(own_low_grad, _seen(x, part, row)) if of_a is None else of_a[index]
            if _trains(part.b):
                found[id(part.b)] = product(own, own_low)
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


def launch_adapter(part: Part, columns: Tensor, rows: Tensor, rank_start: int, bias_column: int) -> None:
    """``write_adapter`` in one kernel: columns (N, E) and rows (r, K) may be views of one buffer."""
    height, extension = columns.shape
    a, b = (columns, columns) if part.a is None else (part.a, part.b)
    of_b, of_a = triton.cdiv(height, TILE_ROWS), part.rank * triton.cdiv(rows.shape[1], TILE_COLUMNS)
    _adapter_kernel[(of_b + of_a,)](
        a, b, columns if part.bias is None else part.bias, columns, rows, height, rows.shape[1], of_b, rank_start,
        bias_column, a.stride(0), b.stride(0), columns.stride(0), rows.stride(0), RANK=part.rank, EXTENSION=extension,
        BLOCK=power_of_2(extension), HAS_BIAS=part.bias is not None, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip


@jit
def _adapter_kernel(
    A, B, BIAS, OUT_COLUMNS, OUT_ROWS, height, width, programs_of_b, rank_start, bias_column, stride_a, stride_b,
    stride_columns, stride_rows, RANK: tl.constexpr, EXTENSION: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs_of_b:
        row, column = program * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = (row < height)[:, None] & (column < EXTENSION)[None, :]
        value = tl.zeros((ROWS, BLOCK), tl.float32)
        own = column - rank_start
        if RANK > 0:
            mine = inside & ((own >= 0) & (own < RANK))[None, :]
            value += tl.load(B + row[:, None] * stride_b + own[None, :], mask=mine, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(BIAS + row, mask=row < height, other=0.0).to(tl.float32)
            value += tl.where(column == bias_column, 1.0, 0.0)[None, :] * bias[:, None]
        target = OUT_COLUMNS + row.to(tl.int64)[:, None] * stride_columns + column[None, :]
        tl.store(target, value.to(OUT_COLUMNS.dtype.element_ty), mask=inside)
    elif RANK > 0:
        blocks = tl.cdiv(width, COLUMNS)
        rank = ((program - programs_of_b) // blocks).to(tl.int64)
        at = (program - programs_of_b) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        copied = tl.load(A + rank * stride_a + at, mask=at < width, other=0.0)
        tl.store(OUT_ROWS + rank * stride_rows + at, copied.to(OUT_ROWS.dtype.element_ty), mask=at < width)


def launch_gradient(grad: Tensor, b: Tensor, alpha: float, scale: float, wide: Tensor) -> Tensor:
    """``wide`` (n, N + R) becomes [alpha grad | s alpha grad @ b | 0], which gives the second; reads ``grad`` (n, N) once."""
    (rows, width), rank = grad.shape, b.shape[1]
    low = torch.empty(rows, rank, dtype=grad.dtype, device=grad.device)
    block = power_of_2(max(16, wide.shape[1] - width))
    _gradient_kernel[(triton.cdiv(rows, GRADIENT_ROWS),)](
        grad, b, wide, low, rows, width, grad.stride(0), b.stride(0), wide.stride(0), alpha, scale,
        COPIES=alpha != 1.0 or wide.data_ptr() != grad.data_ptr(), RANK=rank, EXTENSION=wide.shape[1] - width,
        RANK_BLOCK=block, ROWS=GRADIENT_ROWS, COLUMNS=min(256, 4096 // block), num_warps=4,
    )  # fmt: skip
    return low


@jit
def _gradient_kernel(
    GRAD, B, WIDE, LOW, rows, width, stride_grad, stride_b, stride_wide, alpha, scale, COPIES: tl.constexpr,
    RANK: tl.constexpr, EXTENSION: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, rank = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, RANK_BLOCK)
    low = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(GRAD + row[:, None] * stride_grad + column[None, :], mask=inside, other=0.0)
        if COPIES:
            grad = (grad.to(tl.float32) * alpha).to(WIDE.dtype.element_ty)
            tl.store(WIDE + row[:, None] * stride_wide + column[None, :], grad, mask=inside)
        mine = (column < width)[:, None] & (rank < RANK)[None, :]
        b = tl.load(B + column.to(tl.int64)[:, None] * stride_b + rank[None, :], mask=mine, other=0.0)
        low = tl.dot(grad, b, low, input_precision="ieee")
    value = (low * scale).to(LOW.dtype.element_ty)
    extension = WIDE + row[:, None] * stride_wide + width + rank[None, :]
    tl.store(extension, value, mask=(row < rows)[:, None] & (rank < EXTENSION)[None, :])
    tl.store(LOW + row[:, None] * RANK + rank[None, :], value, mask=(row < rows)[:, None] & (rank < RANK)[None, :])


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
