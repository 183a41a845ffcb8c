"""The decoder layers' forward and backward as two CUDA graphs, in device memory that all graphs of a model share.

No two graphs of a model are ever under way at the same time: from the start of one's forward to the end of its backward
the memory is its own (``Flight``). So all of them are recorded over the same block (``model/arena.py``), which is as large
as the longest batch needs. What goes in and comes out of them lies there too, and is copied.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors  # hundreds of views in one call
from torch.autograd.function import once_differentiable
from torch.utils import deterministic

from luthier.model.passes import Pass, padded
from luthier.ops.bands import Band, Padding
from luthier.ops.unchanged import Unchanged

if TYPE_CHECKING:
    from luthier.model.arena import Arena
    from luthier.model.blocks import Call
    from luthier.model.host_memory import Slab
    from luthier.model.offload import GraphOffload
    from luthier.ops.workspace import Workspace


@dataclass
class Buffers:
    """Where graphs read and write: x, and rows (B, padded T, D) for the output, its gradient and that of x in turn.

    ``bands``: what tokens see within each window, of packed or padded rows.
    """

    x: Tensor
    rows: Tensor
    tables: list[tuple[Tensor, Tensor]]
    bands: dict[int | None, Band]

    @classmethod
    def of(cls, taken: Pass) -> Buffers:
        x = taken.x
        length = padded(x.shape[1])
        rows = [torch.empty(x.shape[0], length, x.shape[2], dtype=x.dtype, device=x.device) for _ in range(2)]
        tables = [tuple(_longer(table, length) for table in pair) for pair in taken.tables.values()]
        numbers = partial(torch.empty, x.shape[0], length, dtype=torch.int32, device=x.device)
        return cls(*rows, tables, {window: Band(*(numbers() for _ in range(4))) for window in taken.windows()})

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Buffers:
        tables = [tuple(map(function, pair)) for pair in self.tables]
        return Buffers(
            function(self.x), function(self.rows), tables, {w: _mapped(function, seen) for w, seen in self.bands.items()}
        )


class Program:
    """The layers' forward and backward over ``buffers``, which the first forward makes."""

    def __init__(self, taken: Pass, copies: GraphOffload | None = None) -> None:
        self.copies = copies  # to host memory and back, where the plan wants some
        self.new_buffers = partial(Buffers.of, taken)
        self.wants_x = taken.x.requires_grad
        self.layers = [
            (run.blocks, replace(run.call, cos=None, sin=None, mask=None, segments=None), run.plan, which)
            for run, which in zip(taken.layers, taken.which, strict=True)
        ]
        self.trained = [run.blocks.trained() for run in taken.layers]
        self.forms = taken.forms()
        self.buffers: Buffers | None = None
        self.kept: list = []
        self.gradients: list[Gradients] = []  # of each layer

    def warm_up(self) -> None:
        """A layer of each form by itself: kernels are compiled and libraries choose theirs now, not while they are recorded."""
        buffers, done = self.new_buffers().mapped(Tensor.zero_), set()
        rows, grad = buffers.x.flatten(0, 1), buffers.rows.flatten(0, 1)
        for (unused, call, plan, which), trained, form in zip(self.layers, self.trained, self.forms, strict=True):
            if (form, which) in done:
                continue
            done.add((form, which))
            call, blocks = _on(buffers, call, which), unused.fresh()
            blocks.backward(grad, call, blocks.forward(rows, call, plan.mode)[1], wants_x=True, trained=trained)

    def forward(self) -> None:
        self.buffers = self.buffers or self.new_buffers()
        rows = self.buffers.x.flatten(0, 1)
        self.kept = []
        for index, (unused, call, plan, which) in enumerate(self.layers):
            blocks = unused.fresh()
            rows, kept = blocks.forward(rows, _on(self.buffers, call, which), plan.mode)
            self.kept.append((blocks, kept))
            if self.copies is not None:
                self.copies.park(index, kept, plan.host)
        if self.copies is not None:
            self.copies.settle()
        self.buffers.rows.flatten(0, 1).copy_(rows)

    def backward(self) -> None:
        grad, found = self.buffers.rows.flatten(0, 1), []
        for index in reversed(range(len(self.layers))):
            _, call, _, which = self.layers[index]
            blocks, kept = self.kept.pop()
            if self.copies is not None:
                self.copies.fetch(kept)
            call, wants_x = _on(self.buffers, call, which), index > 0 or self.wants_x
            grad, gradients = blocks.backward(grad, call, kept, wants_x, self.trained[index])
            found.insert(0, Gradients(gradients))
        if self.wants_x:
            self.buffers.rows.flatten(0, 1).copy_(grad)
        self.gradients = found

    def slabs(self) -> list[Slab]:
        """Host memory that the forward writes to and the backward reads."""
        return [kept.parked.slab for _, kept in self.kept if kept.parked is not None]

    def let_go(self, alias: Callable[[Tensor], Tensor]) -> None:
        """Leave the memory to the recordings that follow, and the batch at hand to its own pass."""
        self.new_buffers, self.layers, self.trained = None, [], []  # parameters that the model gives up are nobody's then
        self.buffers = self.buffers.mapped(alias)
        for layer in self.gradients:
            layer.pieces = {dtype: alias(piece) for dtype, piece in layer.pieces.items()}


class Recording:
    """The two graphs of one key, whose layers have been warmed up."""

    def __init__(self, taken: Pass, arena: Arena, workspace: Workspace, copies: GraphOffload | None = None) -> None:
        self.program = Program(taken, copies)
        self.kinds, self.workspace, self.quantised = taken.kinds(), workspace, taken.quantised()
        alive = [tensor.detach() for tensor in taken.tensors()]
        # what the graphs read stays alive: they may start before it is known that it is still the right thing
        self.read = [*alive, *workspace.buffers.values(), *(weight.packed for weight in self.quantised)]
        self.where = _where(self.read)
        with _undisturbed():
            self.forward_graph = arena.record(self.program.forward)
            self.slabs = self.program.slabs()
            self.backward_graph = arena.record(self.program.backward)
        self.program.let_go(arena.alias)

    def is_intact(self) -> bool:
        """Whether all that the graphs read is still where it was: a storage can be freed under its tensors."""
        return self.where == _where(self.read)

    @torch.no_grad()
    def start(self, taken: Pass) -> None:
        """Run the forward of x (B, T, D)."""
        buffers = self.program.buffers
        self.workspace.follow(taken.x.device)
        _fill(buffers.x, taken.x)
        for fixed, given in zip(buffers.tables, taken.tables.values(), strict=True):
            _fill(fixed[0], given[0])
            _fill(fixed[1], given[1])
        for window in buffers.bands:
            given = taken.band(window)
            for name, value in vars(given).items():
                getattr(buffers.bands[window], name).copy_(value)
        self.forward_graph.replay()

    def output(self, length: int) -> Tensor:
        return self.program.buffers.rows[:, :length].clone()

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """grad (B, T, D) of the output -> the gradients of x, if wanted, and of what trains, in memory of their own."""
        program = self.program
        self.workspace.follow(grad.device)
        _fill(program.buffers.rows, grad)
        self.backward_graph.replay()
        return (self.output(grad.shape[1]) if program.wants_x else None), handed_out(program.gradients)


class Flight:
    """From the start of a recording's forward to its backward: the arena holds this pass's activations, and no other's."""

    def __init__(self, recording: Recording, taken: Pass) -> None:
        self.recording, self.length = recording, taken.x.shape[1]
        self.landed = False
        self.operands: list[Tensor] = []
        self.where: list[int] = []
        recording.start(taken)

    def watch(self, operands: list[Tensor]) -> None:
        """These are what the forward has read, and what the backward reads again, where they lie now."""
        self.operands, self.where = operands, _where(operands)

    def land(self) -> Recording:
        """The recording, for its backward, which comes now."""
        if self.landed:
            raise RuntimeError(
                "The layers were asked for their backward a second time, but the first one used up what they had kept. "
                "Compute the loss again, or call luthier.restore(model) before a backward with retain_graph=True."
            )
        recording, operands, self.landed = self.recording, self.operands, True
        self.recording, self.operands = None, []  # who keeps a loss keeps no graphs
        if _where(operands) != self.where:
            raise RuntimeError(
                "Weights were moved, replaced or freed between a forward and its backward, which reads them again where they "
                "were. Call backward() first, compute the loss again, or turn graphs off (graphs_of(model).enabled = False)."
            )
        return recording


class Stack(torch.autograd.Function):
    """All layers, from a recording."""

    @staticmethod
    def forward(ctx, x, flight, *trained):
        ctx.flight, ctx.trained = flight, Unchanged(trained)
        return flight.recording.output(flight.length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        recording = ctx.flight.land()
        ctx.trained.check()
        grad_x, gradients = recording.backward(grad)
        return grad_x, None, *gradients


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """While open, nothing is freed in the middle of a recording, which could end it, and new memory is left as it is: with
    deterministic algorithms torch fills it with NaN, and a graph would fill its inputs in every replay.
    """
    collects, fills = gc.isenabled(), deterministic.fill_uninitialized_memory
    gc.disable()
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        if collects:
            gc.enable()


def _where(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class Gradients:
    """Of what one layer trains, in one piece for each dtype: many small ones would not find room in the arena."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.like = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
        self.pieces = {dtype: torch.cat([t.flatten() for t in tensors if t.dtype == dtype]) for dtype in _dtypes(tensors)}

    def views(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Those of one dtype."""
        like = [tensor for tensor in self.like if tensor.dtype == dtype]
        return _unflatten_dense_tensors(self.pieces[dtype], like) if like else ()


def handed_out(layers: list[Gradients]) -> list[Tensor]:
    """The gradients of all layers, each in memory of its own: what is saved, freed or resized is one of them, not all."""
    like, found = [tensor for layer in layers for tensor in layer.like], {}
    for dtype in _dtypes(like):
        views = [view for layer in layers for view in layer.views(dtype)]
        found[dtype] = iter(torch._foreach_mul(views, 1.0))  # a copy in a few launches, bit for bit
    return [next(found[tensor.dtype]) for tensor in like]


def _dtypes(tensors: list[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors}


def _on(buffers: Buffers, call: Call, which: int) -> Call:
    """The call with the tables and the bands of ``buffers``."""
    cos, sin = buffers.tables[which]
    segments = Padding(None, None, buffers.bands) if buffers.bands else None  # known by its bands: of packed rows too
    return replace(call, cos=cos, sin=sin, segments=segments)


def _mapped(function: Callable[[Tensor], Tensor], seen: Band) -> Band:
    return Band(*map(function, vars(seen).values()))


def _longer(table: Tensor, length: int) -> Tensor:
    return torch.empty(table.shape[0], length, *table.shape[2:], dtype=table.dtype, device=table.device)


def _fill(fixed: Tensor, values: Tensor) -> None:
    """The first tokens of ``fixed`` (B, padded T, ...) are ``values`` (B, T, ...), the others zero, and so finite."""
    length = values.shape[1]
    fixed[:, :length].copy_(values)
    if length < fixed.shape[1]:
        fixed[:, length:].zero_()
