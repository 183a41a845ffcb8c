"""CUDA graphs of a model's decoder layers, for batches so short that the GPU would wait for Python.

A step launches a few thousand kernels at 20 to 40 us of Python each, 170 to 250 ms of CPU for 32 layers. Where the GPU
does not take much longer (``dial.Batch.obstacle``), all layers together become two graphs (``model/recording.py``), one
of their forward and one of their backward, which run without Python.

The layers are called one by one by a loop that is not ours. While a pass is *deferred* each of them is noted down and
gives back its input untouched, and the last one runs them all: from graphs, or one after the other as if nothing had
happened. A graph does on the same addresses the same again, so its key holds every address, shape, number and flag that
its kernels were launched with: whatever has changed makes another key, and another key runs without a graph.

What layers keep between a graph's forward and its backward lies in memory that the graphs hold for good, all in the same.
A pass without a graph that needs this memory makes them give it back.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.model.dial import Cost, Dial, available_memory, padded
from luthier.model.recording import Arena, Flight, Recording, Stack
from luthier.ops.lora_linear import Projection, Workspace
from luthier.ops.nf4 import Quantised

if TYPE_CHECKING:
    from luthier.model.fused_layer import Blocks, LayerRun

REPEATS = 2  # passes without a graph, before graphs are made; twice as many each time that they had to give way
GRAPHS = 32  # keys of a model that get graphs
PLAIN = {int, float, bool, str, type(None), type}
GRADIENT_BYTES = 1 << 30  # of what trains; beyond, the copies of its gradients cost more than Python does


class NotAChain(Exception):
    """Something other than the next layer has touched what a deferred layer gave back."""


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
        self.leaves.append(leaves((layer.call.window, layer.blocks), []))

    def gave(self, output: Tensor) -> Tensor:
        self.last, self.version = output, output._version
        return output

    def key(self) -> tuple:
        return shape_key(self.x), tuple(layer.plan for layer in self.layers), self.state()

    def state(self) -> tuple:
        """All of the key that is not of the batch alone."""
        flags = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        attention = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        return tuple(map(addresses, self.leaves)), tuple(self.which), self.kinds(), flags, attention

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


class Graphs:
    """The graphs of one model, and the pass that is under way.

    ``enabled``: whether short batches run from graphs where they can. ``why``: why the last batch did not, or nothing.
    """

    def __init__(self, dial: Dial, workspace: Workspace, arena_class: type = Arena) -> None:
        self.dial, self.workspace, self.arena_class = dial, workspace, arena_class
        self.enabled, self.why, self.broken = True, "nothing has run yet", ""  # and why they turned themselves off
        self.expected = False  # by what is known without a plan, of the pass that runs now
        self.taken: Pass | None = None
        self.loop: Iterable[nn.Module] | None = None  # the layers of the backbone that runs, if its batch is simple
        self.is_chain = False  # a pass went from layer to layer, untouched between them
        self.retreats = 0  # times that graphs gave way to a pass without
        self.clear()

    def clear(self) -> None:
        """Give up all graphs and their memory; new ones are made when shapes come again."""
        self.seen: Counter[tuple] = Counter()  # passes of one state without a graph
        self.flight: Callable[[], Flight | None] = lambda: None
        self.has_trained = False
        self._leave()

    def _leave(self) -> None:
        self.recordings: dict[tuple, Recording] = {}
        self.latest: dict[tuple, Recording] = {}  # by shape
        self.arena: Arena | None = None
        self.dial.graph_bytes = 0

    def __deepcopy__(self, memo: dict) -> Graphs:
        copied = Graphs(copy.deepcopy(self.dial, memo), copy.deepcopy(self.workspace, memo), self.arena_class)
        copied.enabled = self.enabled
        return copied

    def around(self, forward: Callable[[], object], layers: Iterable[nn.Module], simple: bool) -> object:
        """What ``forward`` of a backbone gives, whose loop over ``layers`` may be deferred if the batch is ``simple``.

        Simple is a batch of rows that are causal from their first token to their last, as ``run``'s callers know.
        """
        self.loop = layers if simple else None
        self.taken, self.expected = None, False
        self.has_trained |= torch.is_grad_enabled()
        try:
            with contextlib.suppress(NotAChain):
                output = forward()
                if self.taken is None or not self.taken.deferred:
                    return output
        finally:
            self.loop = self.taken = None
        self.enabled, self.broken = False, "something happens between the layers"  # though it had not before
        return forward()

    def expect(self, index: int, blocks: Blocks, x: Tensor) -> bool:
        """Whether the pass that runs now, at layer ``index``, may come from graphs, its plan permitting."""
        if index == 0:
            self.expected = False
            if torch.is_grad_enabled():
                self.why = self._obstacle(blocks, x)
                self.expected = not self.why
        return self.expected

    def run(self, layer: LayerRun, x: Tensor) -> Tensor:
        """The output of the next layer, or ``x`` itself if the pass is deferred."""
        if layer.index == 0:
            self.taken = self._begin(x)
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
        self.is_chain = True
        self.seen[taken.state()] += 1
        return layer(x)

    def interrupt(self, x: Tensor) -> Tensor:
        """What a layer that is not part of the pass gets for ``x``: the layers that were deferred run now."""
        taken, self.taken = self.taken, None
        if taken is None or not taken.deferred:
            return x
        if not taken.holds(x):
            raise NotAChain
        self.why = "a layer runs its stock forward, or other adapters than the one before it"
        return self._eagerly(taken)

    def step_aside(self) -> None:
        """Leave the memory to evaluation, generation or what else comes after training, if it is most of what is free."""
        if self.arena is None or not self.has_trained or self._in_flight():
            return
        self.has_trained = False
        if available_memory(self.arena.device, None) < 2 * self.dial.graph_bytes:
            self.clear()

    def _obstacle(self, blocks: Blocks, x: Tensor) -> str:
        if not self.enabled:
            return self.broken or "they are turned off"
        if self.loop is None:
            return "the rows of the batch are packed or padded, or only a mask tells what they see"
        if blocks.mlp is None:
            return "its experts have none"
        if watched(self.loop):
            return "hooks are attached to layers"
        if blocks.are_unique:
            return "the masks of dropout, or several adapters as one, are made anew in every pass"
        if x.ndim != 3 or not self.arena_class.fits(x):
            return "its device has none"
        if self._gradient_bytes(blocks) > GRADIENT_BYTES:
            return "copying the gradients of so much that trains would take longer"
        return ""

    def _gradient_bytes(self, blocks: Blocks) -> int:
        return self.dial.layers * sum(parameter.nbytes for parameter in blocks.trained())

    def _begin(self, x: Tensor) -> Pass | None:
        if self.expected and not self.dial.planned.obstacle:
            return Pass(x, deferred=self.is_chain)
        if torch.is_grad_enabled():
            self.why = self.why or self.dial.planned.obstacle
            self._make_room()
        return None

    def _make_room(self) -> None:
        """For a pass without a graph."""
        if self.arena is None or self._in_flight():
            return
        if self.dial.planned.needed > self.dial.room(self.arena.device) - self.dial.graph_bytes:
            self.retreats += 1
            self.clear()

    def _start_early(self, taken: Pass) -> None:
        """Start the graph that such an x took last, once the tables are there, while the other layers are still read.

        Should its key turn out to be another one, nobody looks at what it did to the graphs' memory.
        """
        recording = self.latest.get(shape_key(taken.x)) if taken.deferred and taken.flight is None else None
        if recording and recording.kinds == taken.kinds() and not self._in_flight():
            taken.flight = Flight(recording, taken)

    def _in_flight(self) -> bool:
        flight = self.flight()
        return flight is not None and not flight.landed

    def _together(self, taken: Pass) -> Tensor:
        key, shape = taken.key(), shape_key(taken.x)
        if self._in_flight():
            self.why = "the backward of the pass before it has not come yet"
        elif key not in self.recordings:
            taken.flight = None
            self.why = self._record(key, taken)
        if self.why:
            self.latest.pop(shape, None)
            return self._eagerly(taken)
        recording = self.latest[shape] = self.recordings[key]
        flight = taken.flight
        if flight is None or flight.recording is not recording:
            flight = Flight(recording, taken)
        self.flight = weakref.ref(flight)
        with torch.autocast(taken.x.device.type, enabled=False):
            return Stack.apply(taken.x, flight, *taken.parameters())

    def _eagerly(self, taken: Pass) -> Tensor:
        taken.flight = None
        self._make_room()
        return taken.eager()

    def _record(self, key: tuple, taken: Pass) -> str:
        """Why there are no graphs of ``key`` now, or nothing."""
        if len(self.seen) > 100:  # something changes in every pass
            self.seen.clear()
        *_, state = key
        self.seen[state] += 1
        if self.seen[state] <= REPEATS << min(self.retreats, 10):
            return "its weights and adapters have not come often enough"
        if len(self.recordings) >= GRAPHS:
            return f"{GRAPHS} other shapes or states have graphs"
        if any(table.shape[1] != taken.x.shape[1] for pair in taken.tables.values() for table in pair):
            return "its rotations are not those of its tokens"
        needed, whole = self._sizes(taken)
        if taken.x.is_cuda and whole > available_memory(taken.x.device, None):
            return "the device has no memory for them"
        try:
            with torch.no_grad(), torch.autocast(taken.x.device.type, enabled=False):
                if self.arena is None or self.arena.size < needed:  # the others are made again in the larger one
                    self._leave()
                    self.arena = self.arena_class(needed, taken.x.device)
                self.recordings[key] = Recording(taken, self.arena, self.workspace)
                self.dial.graph_bytes = self.arena.bytes
        except torch.OutOfMemoryError:
            self.retreats += 1
            self.clear()
            return "the device had no memory for them"
        except RuntimeError as error:  # a kernel that cannot be recorded
            self.clear()
            self.enabled, self.broken = False, str(error).splitlines()[0]
            message = f"No CUDA graphs for this model: every kernel is launched from Python ({self.broken})."
            warnings.warn(message, UserWarning, stacklevel=2)
            return self.broken
        return ""

    def _sizes(self, taken: Pass) -> tuple[int, int]:
        """Bytes of the graphs' memory, and of a step that runs from them."""
        x, first = taken.x, taken.layers[0]
        shape, length = first.blocks.shape(x, first.state.model.compute), padded(x.shape[1])
        gradients = sum(parameter.nbytes for parameter in taken.parameters())
        cost = Cost(shape, x.shape[0] * length, length, from_graphs=True, gradients=gradients)
        plans = [layer.plan for layer in taken.layers]
        return cost.pool(plans), cost.device(plans)
