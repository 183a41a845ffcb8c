"""Frozen linear layers whose big products run in e4m3; their adapters stay as exact as bf16.

    forward    y  = x8 @ W8.T   + s t @ B.T + bias          t = x @ A.T             rows of x and of W have a scale each
    backward   dx = dy8 @ W8    + s (dy @ B) @ A                                    rows of dy and columns of W do

Either both, or only the backward, whose errors a loss does not see. What the adapters add rides in the same product (fp8.py
has the drawing). The gradients of A and B come from x and dy themselves.
"""

from __future__ import annotations

from functools import cached_property, reduce

import torch
from torch import Tensor

from luthier.ops.fp8 import (
    E4M3,
    Rows8,
    columns_of_one_scale,
    product,
    quantise_rows,
    ride,
    rider_width,
    room,
    weight_bounds,
    write_riders,
    write_weight,
)
from luthier.ops.lora_linear import Part, Projection
from luthier.ops.workspace import Workspace

ALIGNMENT = 256  # bytes
WRITTEN = ("exact", "rows", "columns", "adapters")  # what an ``Fp8Projection`` has written since ``forget``


class Fp8Projection(Projection):
    """A ``Projection`` that multiplies in 8 bits in its backward, and in its forward too if ``everywhere``.

    What its products read is written when it is first asked for since ``forget``, into memory that all layers share:

        [ columns, in 8 bits | rows, in 8 bits ]      the transposed weight first, for the backward
        [ exact                                ]      in the activations' dtype, over both

    ``written`` gives the projection itself, which lives from a forward to its backward: it holds no activations.
    """

    multiplies_in_place = False

    def __init__(self, role: str, parts: list[Part], workspace: Workspace, everywhere: bool) -> None:
        super().__init__(role, parts, workspace)
        self.everywhere = everywhere
        self.in_backward = False
        self.like: Tensor | None = None  # without elements: dtype and device of the activations

    def written(self, like: Tensor) -> Fp8Projection:
        self.like = like.new_empty(0) if self.like is None else self.like
        return self

    def forget(self) -> None:
        super().forget()
        self.in_backward = True
        for name in WRITTEN:
            self.__dict__.pop(name, None)

    def room_for_input(self, n: int, like: Tensor) -> Rows8 | None:
        return room(n, self.width_in, self.rank, like) if self.everywhere else None

    def forward(self, x: Tensor, written: Fp8Projection, out: Tensor | None = None, rounded: Rows8 | None = None) -> Tensor:
        if self.everywhere:
            return self.forward_again(x, written, out, rounded)
        return super().forward(x, written.exact, out)

    def forward_again(
        self, x: Tensor, written: Fp8Projection, out: Tensor | None = None, rounded: Rows8 | None = None
    ) -> Tensor:
        low = x[:, self.width_in : self.width_in + self.rank] if self.rank else None
        return self._forward(x[:, : self.width_in], low, written, out, rounded)

    def add_to(
        self,
        residual: Tensor,
        x: Tensor,
        written: Fp8Projection,
        alpha: float = 1.0,
        out: Tensor | None = None,
        rounded: Rows8 | None = None,
    ) -> Tensor:
        if self.everywhere:
            return torch.add(residual, self.forward_again(x, written, None, rounded), alpha=alpha, out=out)
        return super().add_to(residual, x, written.exact, alpha, out)

    def apply(
        self, x: Tensor, low: Tensor | None, written: Fp8Projection, residual: Tensor | None = None, alpha: float = 1.0
    ) -> Tensor:
        if not self.everywhere:
            return super().apply(x, low, written.exact, residual, alpha)
        y = self._forward(x, low, written)
        return y if residual is None else torch.add(residual, y, alpha=alpha)

    def input_gradient(self, grad: Tensor, written: Fp8Projection, row: int = 0) -> tuple[Tensor, Tensor | None]:
        low = self.low_gradient(grad, written)
        return self._input_gradient(grad, low, written, row), low

    def new_gradient(self, n: int, like: Tensor) -> Tensor:
        """Without the extension, which is rounded apart: here and below."""
        return torch.empty(n, self.width_out, dtype=like.dtype, device=like.device)

    def extended_gradient(
        self, grad: Tensor, written: Fp8Projection, alpha: float = 1.0, wide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        grad = grad if alpha == 1.0 else grad * alpha
        return grad, self.low_gradient(grad, written)

    def backward(self, wide: Tensor, low: Tensor | None, written: Fp8Projection, row: int = 0) -> Tensor:
        return self._input_gradient(wide, low, written, row)

    def a(self, written: Fp8Projection) -> Tensor:
        return super().a(written.exact) if self.is_exact else written.adapters[1]

    def b(self, written: Fp8Projection) -> Tensor:
        return super().b(written.exact) if self.is_exact else written.adapters[0][:, : self.rank]

    @property
    def is_exact(self) -> bool:
        """Whether the weights are written out in the activations' dtype now, with the adapters beside them."""
        return not (self.everywhere or self.in_backward)

    def _forward(
        self, x: Tensor, low: Tensor | None, written: Fp8Projection, out: Tensor | None = None, rounded: Rows8 | None = None
    ) -> Tensor:
        if rounded is None:
            rounded = quantise_rows(x, low)
        elif low is not None:
            rounded = ride(rounded, x, low)
        y = product(rounded, written.rows, x.dtype, out)
        return y.add_(written.adapters[0][:, self.rank]) if self.has_bias else y

    def _input_gradient(self, grad: Tensor, low: Tensor | None, written: Fp8Projection, row: int) -> Tensor:
        dx = product(quantise_rows(grad, None if self.drops else low), written.columns, grad.dtype)
        return self.add_adapters_(dx, low, written, row) if self.drops else dx

    @cached_property
    def exact(self) -> Tensor:
        """The buffer of ``lora_linear``'s drawing."""
        self._overwrite("rows", "columns")
        return super().written(self.like)

    @cached_property
    def rows(self) -> Rows8:
        """W (N, K), with a scale for each row."""
        return self._weights(transposed=False)

    @cached_property
    def columns(self) -> Rows8:
        """W transposed (K, N), with a scale for each column of W."""
        return self._weights(transposed=True)

    @cached_property
    def adapters(self) -> tuple[Tensor, Tensor]:
        """[B | bias | 0] (N, E) and A (R, K), in the dtype of the activations."""
        columns = self.workspace.buffer(f"{self.role} B", (self.width_out, self.extension), self.like)
        rows = self.workspace.buffer(f"{self.role} A", (self.rank, self.width_in), self.like)
        row, rank = 0, 0
        for part, height in zip(self.parts, self.widths, strict=True):
            self.write_adapter(part, columns[row : row + height], rows[rank : rank + part.rank], rank)
            row, rank = row + height, rank + part.rank
        return columns, rows

    def buffer(self, like: Tensor) -> Tensor:
        return self._inside((self.width_out + self.rank_rows, self.width_in + self.extension), like, start=0)

    def _weights(self, transposed: bool) -> Rows8:
        assert not self.is_exact, "the adapters would be read from memory that is written to"
        self._overwrite("exact")
        rides = bool(self.rank) and not (transposed and self.drops)  # what was dropped differs from token to token
        wide, high = self._shapes_in_8_bits()
        like = self.like.new_empty(0, dtype=E4M3)
        buffer = self._inside(high if transposed else wide, like, start=0 if transposed else _aligned(high))
        bounds = [weight_bounds(part.weight)[transposed] for part in self.parts]
        bounds = reduce(torch.maximum, bounds) if transposed else torch.cat(bounds)
        riders = (self.a(self).T if transposed else self.b(self)) if rides else None
        group = max(columns_of_one_scale(part.weight) for part in self.parts) if transposed else 1
        scales = write_riders(bounds, riders, buffer, group)
        start = 0
        for part, height in zip(self.parts, self.widths, strict=True):
            here = slice(start, start + height)
            out = buffer[:, here] if transposed else buffer[here, : self.width_in]
            write_weight(part.weight, scales if transposed else scales[here], out, transposed)
            start += height
        return Rows8(buffer, scales)

    def _shapes_in_8_bits(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the weight, and of the weight transposed."""
        riders = rider_width(self.rank)
        return (self.width_out, self.width_in + riders), (self.width_in, self.width_out + (0 if self.drops else riders))

    def _inside(self, shape: tuple[int, int], like: Tensor, start: int) -> Tensor:
        exact = 0 if self.everywhere else (self.width_out + self.rank_rows) * (self.width_in + self.extension)
        size = max(exact * self.like.element_size(), sum(map(_aligned, self._shapes_in_8_bits())))
        return self.workspace.inside(self.role, shape, like, start, size)

    def _overwrite(self, *names: str) -> None:
        """What lies where something is going to be written is gone."""
        super().forget()
        for name in names:
            self.__dict__.pop(name, None)


def _aligned(shape: tuple[int, int]) -> int:
    """Bytes of a matrix in 8 bits, up to where the next one may begin."""
    return -(-shape[0] * shape[1] // ALIGNMENT) * ALIGNMENT
