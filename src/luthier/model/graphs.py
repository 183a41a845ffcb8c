"""CUDA graphs of a model's decoder layers, for batches so short that the GPU would wait for Python.

A step launches a few thousand kernels at 20 to 40 us of Python each; below some two thousand tokens that is longer than
what they compute. So once a shape has come a few times, all layers together become two graphs, one of their forward and
one of their backward, which run without Python. What the forward keeps for the backward lies in the graphs' own memory.

The layers are called one by one by a loop that is not ours. While a pass is *deferred* each of them is noted down and
gives back its input untouched, and the last one runs them all: from graphs, or one after the other as if nothing had
happened. A graph does on the same addresses the same again, so its key holds every address, shape, number and flag that
its kernels were launched with: whatever has changed makes another key, and another key runs without a graph.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors  # hundreds of views in one call
from torch.autograd.function import once_differentiable

from luthier.model.dial import Cost, Dial
from luthier.ops.lora_linear import Projection, Workspace
from luthier.ops.nf4 import Quantised

if TYPE_CHECKING:
    from luthier.model.fused_layer import LayerRun

TOKENS = 2048  # of a batch; above, the GPU is busy anyway
REPEATS = 2  # passes of one key without a graph, before its graphs are made
GRAPHS = 24  # keys of a model that get graphs
PLAIN = {int, float, bool, str, type(None), type}
GRADIENT_BYTES = 1 << 30  # of what trains; beyond, the copies of its gradients cost more than Python does


class NotAChain(Exception):
    """Something other than the next layer has touched what a deferred layer gave back."""


class CudaGraph:
    """What ``function`` does on the GPU, recorded without being done, to be done by ``replay``."""

    @staticmethod
    def fits(x: Tensor) -> bool:
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def new_pool() -> object:
        return torch.cuda.graph_pool_handle()

    def __init__(self, function: Callable[[], None], pool: object) -> None:
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # other threads may pin memory
                function()
        except RuntimeError:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # a capture that ends well: random numbers work again
                torch.zeros(1, device="cuda")
            raise

    def replay(self) -> None:
        self.graph.replay()


class Pass:
    """One forward through the layers, as far as it has come."""

    def __init__(self, x: Tensor, deferred: bool) -> None:
        self.x = self.last = x  # what went into the first layer, and what the last one so far gave
        self.version = x._version
        self.deferred = deferred
        self.layers: list[LayerRun] = []
        self.leaves: list[list] = []  # of each layer
        self.flight: Flight | None = None  # if the graph of its forward runs already
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}  # of the rotations: all layers may have one, or a few
        self.which: list[int] = []  # of them each layer uses

    def continues(self, layer: LayerRun, x: Tensor) -> bool:
        return layer.index == len(self.layers) and self.holds(x) and not layer.blocks.are_unique

    def holds(self, x: Tensor) -> bool:
        return x is self.last and x._version == self.version

    def append(self, layer: LayerRun) -> None:
        cos, sin = layer.call.cos, layer.call.sin
        table = cos.data_ptr(), cos.shape, cos.stride(), sin.data_ptr()
        self.tables.setdefault(table, (cos, sin))
        self.which.append(list(self.tables).index(table))
        self.layers.append(layer)
        self.leaves.append(leaves((layer.plan, layer.call.window, layer.blocks), []))

    def gave(self, output: Tensor) -> Tensor:
        self.last, self.version = output, output._version
        return output

    def key(self) -> tuple:
        flags = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        attention = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        return shape_key(self.x), tuple(map(addresses, self.leaves)), tuple(self.which), self.kinds(), flags, attention

    def kinds(self) -> tuple:
        """What a recording has fixed of the tables."""
        length = self.x.shape[1]
        return tuple((t.shape[0], t.shape[1] == length, t.shape[2:], t.dtype) for pair in self.tables.values() for t in pair)

    def parameters(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.blocks.trained()]

    def eager(self) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return x


def padded(length: int) -> int:
    """The length of the graph that runs rows of ``length`` tokens: what is right of them changes nothing in causal rows."""
    step = 64 if length <= 1024 else 128
    return -(-length // step) * step


def shape_key(x: Tensor) -> tuple:
    return x.shape[0], padded(x.shape[1]), x.shape[2], x.dtype, x.device, x.requires_grad


def leaves(values: Iterable[object], found: list) -> list:
    """The tensors, numbers and flags in and below ``values``: all that a kernel can be launched with."""
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            found.append(value)
        elif kind is list or kind is tuple:
            found.append(len(value))
            leaves(value, found)
        elif kind is Quantised or not (isinstance(value, Projection) or is_dataclass(kind)):
            found.append(value)
        else:
            found.append(kind)
            leaves(vars(value).values(), found)
    return found


def addresses(found: list) -> tuple:
    """What of some leaves a captured kernel has fixed."""
    return tuple([leaf if type(leaf) in PLAIN else _address(leaf) for leaf in found])


def _address(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    return id(leaf) if type(leaf) is Quantised else leaf  # whatever a quantised weight knows of itself may be read


def watched(layers: Iterable[nn.Module]) -> bool:
    """Whether somebody's hooks see or change what goes into a layer or comes out of it."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any(
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        for layer in layers
    )  # fmt: skip


class Gradients:
    """Fixed memory for the gradients of ``parameters``, one piece for each dtype."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.layout = [(parameter.shape, parameter.dtype) for parameter in parameters]
        like = {dtype: [p.detach() for p in parameters if p.dtype == dtype] for _, dtype in self.layout}
        self.flat = {dtype: torch.cat([t.flatten() for t in tensors]).zero_() for dtype, tensors in like.items()}
        self.views = self._views(self.flat, parameters)

    def copied(self) -> list[Tensor]:
        """The gradients in memory of their own, which whoever accumulates them may keep."""
        return self._views({dtype: values.clone() for dtype, values in self.flat.items()}, self.views)

    def _views(self, flat: dict[torch.dtype, Tensor], like: list[Tensor]) -> list[Tensor]:
        pieces = {
            dtype: iter(_unflatten_dense_tensors(values, [tensor for tensor in like if tensor.dtype == dtype]))
            for dtype, values in flat.items()
        }
        return [next(pieces[dtype]) for _, dtype in self.layout]


@dataclass
class Buffers:
    """Where a pair of graphs reads and writes: x, output and grad (B, padded T, D), the tables, and the gradients."""

    x: Tensor
    output: Tensor
    grad: Tensor
    grad_x: Tensor | None
    tables: list[tuple[Tensor, Tensor]]
    gradients: Gradients


class Program:
    """The layers' forward and backward over ``buffers``."""

    def __init__(self, taken: Pass, buffers: Buffers) -> None:
        self.buffers = buffers
        self.layers = []
        views = iter(buffers.gradients.views)
        for layer, which in zip(taken.layers, taken.which, strict=True):
            cos, sin = buffers.tables[which]
            targets = [next(views) for _ in layer.blocks.trained()]
            self.layers.append((layer.blocks, replace(layer.call, cos=cos, sin=sin), layer.plan.mode, targets))
        self.kept: list = []

    def forward(self) -> None:
        rows = self.buffers.x.flatten(0, 1)
        self.kept = []
        for unused, call, mode, _ in self.layers:
            blocks = unused.fresh()
            rows, kept = blocks.forward(rows, call, mode)
            self.kept.append((blocks, kept))
        self.buffers.output.flatten(0, 1).copy_(rows)

    def backward(self) -> None:
        grad, grad_x = self.buffers.grad.flatten(0, 1), self.buffers.grad_x
        for index in reversed(range(len(self.layers))):
            _, call, _, targets = self.layers[index]
            blocks, kept = self.kept.pop()
            grad, gradients = blocks.backward(grad, call, kept, index > 0 or grad_x is not None)
            if targets:
                torch._foreach_copy_(targets, gradients)
        if grad_x is not None:
            grad_x.flatten(0, 1).copy_(grad)


class Recording:
    """The two graphs of one key."""

    def __init__(self, taken: Pass, gradients: Gradients, workspace: Workspace, new_graph: type, pool: object) -> None:
        x, (batch, length, width) = taken.x, shape_key(taken.x)[:3]
        rows = [torch.zeros(batch, length, width, dtype=x.dtype, device=x.device) for _ in range(4)]
        tables = [tuple(_longer(table, length) for table in pair) for pair in taken.tables.values()]
        self.buffers = Buffers(*rows[:3], rows[3] if x.requires_grad else None, tables, gradients)
        program = Program(taken, self.buffers)
        program.forward()  # kernels are compiled and libraries choose theirs now: not while a graph is being recorded
        program.backward()
        of_layers = [leaf for leaves in taken.leaves for leaf in leaves]
        self.alive = [leaf.detach() for leaf in of_layers if isinstance(leaf, Tensor)]  # what the graphs read: they may
        self.alive += workspace.buffers.values()  # start before it is known that they are still the right ones
        self.quantised = [leaf for leaf in of_layers if isinstance(leaf, Quantised)]
        self.kinds = taken.kinds()
        before = _emptied(x)
        collects = gc.isenabled()
        gc.disable()  # what is freed in the middle of a recording could end it
        try:
            self.forward_graph = new_graph(program.forward, pool)
            self.backward_graph = new_graph(program.backward, pool)
        finally:
            if collects:
                gc.enable()
        self.bytes = _emptied(x) - before

    @torch.no_grad()
    def start(self, x: Tensor, tables: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Run the forward of x (B, T, D) into ``buffers``."""
        buffers, length = self.buffers, x.shape[1]
        _fill(buffers.x, x)
        for fixed, given in zip(buffers.tables, tables, strict=True):
            fixed[0][:, :length].copy_(given[0])
            fixed[1][:, :length].copy_(given[1])
        self.forward_graph.replay()

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """grad (B, T, D) of the output -> the gradients of x, if wanted, and of what trains, in memory of their own."""
        buffers = self.buffers
        _fill(buffers.grad, grad)
        self.backward_graph.replay()
        grad_x = None if buffers.grad_x is None else buffers.grad_x[:, : grad.shape[1]].clone()
        return grad_x, buffers.gradients.copied()


class Flight:
    """From the start of a recording's forward to its backward: its memory holds this pass's activations, and no other's."""

    def __init__(self, recording: Recording, taken: Pass) -> None:
        self.recording, self.length = recording, taken.x.shape[1]
        self.landed = False
        recording.start(taken.x, taken.tables.values())


class _Stack(torch.autograd.Function):
    """All layers, from a recording."""

    @staticmethod
    def forward(ctx, x, flight, *trained):
        ctx.flight = flight
        return flight.recording.buffers.output[:, : flight.length].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flight = ctx.flight
        if flight.landed:
            raise RuntimeError(
                "The layers were asked for their backward a second time, but the first one used up what they had kept. "
                "Compute the loss again, or call luthier.restore(model) before a backward with retain_graph=True."
            )
        flight.landed = True
        grad_x, gradients = flight.recording.backward(grad)
        return grad_x, None, *gradients


class Graphs:
    """The graphs of one model, and the pass that is under way.

    ``enabled``: whether short batches run from graphs where they can.
    """

    def __init__(self, dial: Dial, workspace: Workspace, new_graph: type = CudaGraph) -> None:
        self.dial, self.workspace, self.new_graph = dial, workspace, new_graph
        self.enabled = True
        self.taken: Pass | None = None
        self.loop: Iterable[nn.Module] | None = None  # the layers of the backbone that runs, if its batch is simple
        self.chains: set[tuple] = set()  # shapes that went from layer to layer, untouched between them
        self.clear()

    @property
    def enabled(self) -> bool:
        return self.dial.graph_tokens > 0

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self.dial.graph_tokens = TOKENS if on else 0

    def clear(self) -> None:
        """Give up all graphs and their memory; new ones are made when shapes come again."""
        self.recordings: dict[tuple, Recording] = {}
        self.latest: dict[tuple, Recording] = {}  # by shape
        self.seen: Counter[tuple] = Counter()
        self.flight: Callable[[], Flight | None] = lambda: None
        self.gradients: Gradients | None = None
        self.pool: object = None
        self.dial.graph_bytes = 0

    def __deepcopy__(self, memo: dict) -> Graphs:
        copied = Graphs(copy.deepcopy(self.dial, memo), copy.deepcopy(self.workspace, memo), self.new_graph)
        copied.enabled = self.enabled
        return copied

    def around(self, forward: Callable[[], object], layers: Iterable[nn.Module], simple: bool) -> object:
        """What ``forward`` of a backbone gives, whose loop over ``layers`` may be deferred if the batch is ``simple``.

        Simple is a batch of rows that are causal from their first token to their last, as ``run``'s callers know.
        """
        self.loop = layers if simple and self.enabled else None
        self.taken = None
        try:
            with contextlib.suppress(NotAChain):
                output = forward()
                if self.taken is None or not self.taken.deferred:
                    return output
        finally:
            self.loop = self.taken = None
        self.enabled = False  # this architecture does something between its layers, though it had not before
        return forward()

    def run(self, layer: LayerRun, x: Tensor) -> Tensor:
        """The output of the next layer, or ``x`` itself if the pass is deferred."""
        if layer.index == 0:
            self.taken = self._begin(layer, x)
        if self.taken is None:
            return layer(x)
        if not self.taken.continues(layer, x):
            return layer(self.interrupt(x))
        self.taken.append(layer)
        self._start_early(self.taken)
        if layer.index < self.dial.layers - 1:
            return x if self.taken.deferred else self.taken.gave(layer(x))
        taken, self.taken = self.taken, None
        if taken.deferred:
            return self._together(taken)
        self.chains.add(shape_key(taken.x))
        self.seen[taken.key()] += 1
        return layer(x)

    def interrupt(self, x: Tensor) -> Tensor:
        """What a layer that is not part of the pass gets for ``x``: the layers that were deferred run now."""
        taken, self.taken = self.taken, None
        if taken is None or not taken.deferred:
            return x
        if not taken.holds(x):
            raise NotAChain
        return taken.eager()

    def _begin(self, layer: LayerRun, x: Tensor) -> Pass | None:
        if self.loop is None or not torch.is_grad_enabled() or layer.plan.host or watched(self.loop):
            return None
        if x.ndim != 3 or x.shape[0] * padded(x.shape[1]) > self.dial.graph_tokens or not self.new_graph.fits(x):
            return None
        return Pass(x, deferred=shape_key(x) in self.chains)

    def _start_early(self, taken: Pass) -> None:
        """Start the graph that such an x took last, once the tables are there, while the other layers are still read.

        Should its key turn out to be another one, nobody looks at what it did to memory of its own.
        """
        recording = self.latest.get(shape_key(taken.x)) if taken.deferred and taken.flight is None else None
        if recording and recording.kinds == taken.kinds() and not self._in_flight():
            taken.flight = Flight(recording, taken)

    def _in_flight(self) -> bool:
        flight = self.flight()
        return flight is not None and not flight.landed

    def _together(self, taken: Pass) -> Tensor:
        key, shape = taken.key(), shape_key(taken.x)
        if self._in_flight() or (key not in self.recordings and not self._record(key, taken)):
            self.latest.pop(shape, None)
            return taken.eager()
        recording = self.latest[shape] = self.recordings[key]
        flight = taken.flight
        if flight is None or flight.recording is not recording:
            flight = Flight(recording, taken)
        self.flight = weakref.ref(flight)
        with torch.autocast(taken.x.device.type, enabled=False):
            return _Stack.apply(taken.x, flight, *taken.parameters())

    def _record(self, key: tuple, taken: Pass) -> bool:
        """Whether there are graphs of ``key`` now."""
        if len(self.seen) > 100:  # something changes in every pass
            self.seen.clear()
        self.seen[key] += 1
        if self.seen[key] <= REPEATS or len(self.recordings) >= GRAPHS or not self._fits(taken):
            return False
        parameters = taken.parameters()
        if self.gradients is None or self.gradients.layout != [(p.shape, p.dtype) for p in parameters]:
            self.gradients = Gradients(parameters)
        self.pool = self.new_graph.new_pool() if self.pool is None else self.pool
        try:
            with torch.no_grad(), torch.autocast(taken.x.device.type, enabled=False):
                recording = Recording(taken, self.gradients, self.workspace, self.new_graph, self.pool)
        except RuntimeError as error:  # out of memory, or a kernel that cannot be recorded
            self.enabled = False
            self.clear()
            message = f"No CUDA graphs for this model: every kernel is launched from Python ({str(error).splitlines()[0]})."
            warnings.warn(message, UserWarning, stacklevel=2)
            return False
        self.recordings[key] = recording
        self.dial.graph_bytes += recording.bytes
        return True

    def _fits(self, taken: Pass) -> bool:
        """Whether the graphs' memory is free, and that of the longest batch so far without graphs beside it."""
        x, plans, parameters = taken.x, [layer.plan for layer in taken.layers], taken.parameters()
        size = sum(parameter.nbytes for parameter in parameters)
        odd_tables = any(table.shape[1] != x.shape[1] for pair in taken.tables.values() for table in pair)
        if size > GRADIENT_BYTES or odd_tables or any(plan.host for plan in plans):
            return False
        if not x.is_cuda:
            return True
        shape, tokens = taken.layers[0].blocks.shape(x, taken.layers[0].state.model.compute), x.shape[0] * padded(x.shape[1])
        of_pool = Cost(shape, tokens).device(plans) + (0 if self.gradients else size)
        longest = Cost(shape, max(tokens, self.dial.planned_tokens)).device(plans) + size
        return max(0, of_pool - self.dial.graph_bytes) + longest <= self.dial.room(x.device)


def _longer(table: Tensor, length: int) -> Tensor:
    return torch.zeros(table.shape[0], length, *table.shape[2:], dtype=table.dtype, device=table.device)


def _fill(fixed: Tensor, values: Tensor) -> None:
    """The first tokens of ``fixed`` (B, padded T, D) are ``values`` (B, T, D), the others zero."""
    length = values.shape[1]
    fixed[:, :length].copy_(values)
    if length < fixed.shape[1]:
        fixed[:, length:].zero_()


def _emptied(x: Tensor) -> int:
    """The bytes that torch holds on the device without its cache: more after a recording by what the graphs' pool took."""
    if not x.is_cuda:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(x.device)
