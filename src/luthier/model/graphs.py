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
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.model.cost import Cost
from luthier.model.device_memory import available_memory, held_by_others, hold, release
from luthier.model.dial import Dial
from luthier.model.offload import Recorded, slab_bytes
from luthier.model.recording import Arena, Flight, Program, Recording, Stack, padded
from luthier.ops.attention import band, kernel_for
from luthier.ops.lora_linear import Projection, Workspace
from luthier.ops.nf4 import Quantised

if TYPE_CHECKING:
    from luthier.model.backbone import Structure
    from luthier.model.blocks import AttentionBlock
    from luthier.model.fused_layer import Blocks, LayerRun
    from luthier.ops.flash_attention import Band

REPEATS = 2  # passes without a graph, before graphs are made; twice as many each time that they had to give way
VISITS = 3  # of a shape until it gets graphs, if it may run without beside those of others: they cost what some passes save
GRAPHS = 32  # keys of a model that get graphs
HALVES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
PLAIN = {int, float, bool, str, type(None), type}
GRADIENT_BYTES = 1 << 30  # of what trains; beyond, the copies of its gradients cost more than Python does


class NotAChain(Exception):
    """Something other than the next layer has touched what a deferred layer gave back."""


class Pass:
    """One forward through the layers, as far as it has come."""

    def __init__(self, x: Tensor, structure: Structure, deferred: bool) -> None:
        self.x = self.last = x  # what went into the first layer, and what the last one so far gave
        self.version = x._version
        self.structure = structure.padding or structure.segments  # of packed or padded rows
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
        return self.shape(), tuple(layer.plan for layer in self.layers), self.state()

    def shape(self) -> tuple:
        x = self.x
        return x.shape[0], padded(x.shape[1]), x.shape[2], x.dtype, x.device, x.requires_grad, type(self.structure)

    def state(self) -> tuple:
        """All of the key that is not of the batch alone."""
        return tuple(map(addresses, self.leaves)), tuple(self.which), self.kinds(), flags()

    def kinds(self) -> tuple:
        """What a recording has fixed of the tables."""
        length = self.x.shape[1]
        return tuple((t.shape[0], t.shape[1] == length, t.shape[2:], t.dtype) for pair in self.tables.values() for t in pair)

    def windows(self) -> set[int | None]:
        """Of the layers, where the rows are packed or padded: what a token sees is another thing in every batch."""
        length = padded(self.x.shape[1])
        windows = {layer.call.window for layer in self.layers if self.structure is not None}
        return {window if window is not None and window < length else None for window in windows}

    def band(self, window: int | None) -> Band:
        """What each token sees, as a graph pads the rows."""
        return band(padded(self.x.shape[1]), window, replace(self.structure, bands={}), self.x.device)

    def operands(self) -> list[Tensor]:
        """What the kernels of the layers read."""
        found = [leaf for leaves in self.leaves for leaf in leaves]
        return [leaf.packed if type(leaf) is Quantised else leaf for leaf in found if isinstance(leaf, Tensor | Quantised)]

    def parameters(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.blocks.trained()]

    def eager(self) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return x


def flags() -> tuple:
    """Settings of torch that choose kernels, or what they sum in."""
    cuda = torch.backends.cuda
    fixed = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    attention = cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    sums = [getattr(cuda.matmul, name, None) for name in HALVES]
    return fixed + attention + (*sums, cuda.preferred_blas_library())


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


def sharded(layers: Iterable[nn.Module]) -> bool:
    """Whether FSDP gathers their weights for each pass, into memory that it frees behind it."""
    return any(getattr(layer, "_is_fsdp_managed_module", False) for layer in layers)


def reads_bands(attention: AttentionBlock, x: Tensor, structure: Structure) -> bool:
    """Whether the kernel reads on the device what tokens of packed or padded rows see, or they are neither."""
    segments = structure.padding or structure.segments
    if segments is None:
        return True
    q, rest = x.new_empty(1, 1, 0, attention.width), (segments, attention.softcap, attention.sinks)
    kernels = {kernel_for(q, None, window, *rest) for window in (None, 1)}
    return kernels == {"tiles" if x.is_cuda else "reference"}


def _weight_went(graphs: weakref.ref[Graphs], weight: weakref.ref[Tensor]) -> None:
    owner = graphs()
    if owner is not None and not owner.loop:  # a collection of garbage may come in the middle of a pass
        owner.clear()


class Graphs:
    """The graphs of one model, and the pass that is under way.

    ``enabled``: whether short batches run from graphs where they can; ``why``: why the last one did not, or nothing.
    """

    def __init__(self, dial: Dial, workspace: Workspace, arena_class: type = Arena) -> None:
        self.dial, self.workspace, self.arena_class = dial, workspace, arena_class
        self.enabled, self.why, self.broken = True, "nothing has run yet", ""  # and why they turned themselves off
        self.uncopied = ""  # why there are none for plans that keep something in host memory, if those failed
        self.came: Counter[tuple] = Counter()  # passes of one shape and plan until they have a graph
        self.expected = 0
        self.taken: Pass | None = None
        self.loop: Iterable[nn.Module] = ()  # the layers of the backbone that runs
        self.structure: Structure | None = None  # of its batch
        self.flight: Callable[[], Flight | None] = lambda: None
        self.copies = Recorded()
        self.is_chain = False  # a pass went from layer to layer, untouched between them
        self.clear()

    def clear(self) -> None:
        """Give up all graphs and their memory; new ones are made when batches come again."""
        self.retreats = 0  # times that graphs gave way to a pass without
        self._give_back()

    def _give_back(self) -> None:
        if self.dial.offload is not None and not self._in_flight():
            self.dial.offload.take_over(self.copies)
        self.copies = Recorded()
        self.seen: Counter[tuple] = Counter()  # passes of one state without a graph
        self.flight = lambda: None
        self.has_trained = False
        self.warmed: dict[tuple, list] = {}  # what a key names by its id, once its layers have been warmed up
        self._forget()

    def _retreat(self) -> None:
        self.retreats += 1
        self._give_back()

    def _forget(self) -> None:
        self.recordings: dict[tuple, Recording] = {}
        self.latest: dict[tuple, Recording] = {}  # by shape
        self.arena: Arena | None = None
        self.owners: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # of the memory that they read, and where it lay
        release(self.dial)

    def __deepcopy__(self, memo: dict) -> Graphs:
        copied = Graphs(copy.deepcopy(self.dial, memo), copy.deepcopy(self.workspace, memo), self.arena_class)
        copied.enabled = self.enabled
        return copied

    def around(self, forward: Callable[[], object], layers: Iterable[nn.Module], structure: Structure | None) -> object:
        """What ``forward`` of a backbone gives, whose loop over ``layers`` may be deferred if the batch has a ``structure``."""
        self.loop, self.structure = layers, structure
        self.taken, self.expected = None, 0
        self.has_trained |= torch.is_grad_enabled()
        try:
            with contextlib.suppress(NotAChain):
                output = forward()
                if self.taken is None or not self.taken.deferred:
                    return output
        finally:
            self.loop, self.structure, self.taken = (), None, None
        self.clear()
        self.enabled, self.broken = False, "something happens between the layers"  # though it had not before
        return forward()

    def expect(self, index: int, blocks: Blocks, x: Tensor) -> int:
        """Tokens of the graphs that the pass which runs now, at layer ``index``, may come from if its plan permits; or 0."""
        if index == 0:
            self.expected = 0
            if torch.is_grad_enabled():
                self.why = self._obstacle(blocks, x)
                self.expected = 0 if self.why else x.shape[0] * padded(x.shape[1])
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
        self._count(taken.key())
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
        if self._have_moved() or self._room(self.arena.device) < 2 * self.dial.graph_bytes:
            self._give_back()

    def _room(self, device: torch.device) -> float:
        """Bytes that are free for this model, those of its own graphs among them."""
        return available_memory(device, None) - held_by_others(self.dial, device)

    def _own(self) -> None:
        """Note whose memory the graphs read: they would keep it where a merge or a load has put other weights in its place."""
        went = partial(_weight_went, weakref.ref(self))
        for layer in self.loop:
            for weight in layer.parameters():
                if id(weight) not in self.owners:
                    self.owners[id(weight)] = weakref.ref(weight, went), weight.data_ptr()

    def _have_moved(self) -> bool:
        owners = [(ref(), where) for ref, where in self.owners.values()]
        return any(weight is None or weight.data_ptr() != where for weight, where in owners)

    def _obstacle(self, blocks: Blocks, x: Tensor) -> str:
        if not self.enabled:
            return self.broken or "they are turned off"
        if self.structure is None:
            return "only a mask tells what its tokens see"
        if blocks.mlp is None:
            return "its experts have none"
        if watched(self.loop):
            return "hooks are attached to layers"
        if sharded(self.loop):
            return "its weights are sharded: they lie elsewhere in every pass"
        if blocks.are_unique:
            return "the masks of dropout, or several adapters as one, are made anew in every pass"
        if x.ndim != 3 or not self.arena_class.fits(x):
            return "its device has none"
        if not reads_bands(blocks.attention, x, self.structure):
            return "its rows are packed or padded, and the kernel of its attention reads their lengths on the CPU"
        if self._gradient_bytes(blocks) > GRADIENT_BYTES:
            return "copying the gradients of so much that trains would take longer"
        return ""

    def _gradient_bytes(self, blocks: Blocks) -> int:
        return self.dial.layers * sum(parameter.nbytes for parameter in blocks.trained())

    def _begin(self, x: Tensor) -> Pass | None:
        if self.expected and not self.dial.planned.obstacle:
            return Pass(x, self.structure, deferred=self.is_chain)
        if torch.is_grad_enabled():
            self.why = self.why or self.dial.planned.obstacle
            self._make_room()
        return None

    def _make_room(self) -> None:
        """For a pass without a graph."""
        if not self._in_flight() and not self._leaves_room():
            self._retreat()

    def _leaves_room(self) -> bool:
        """Whether a pass without a graph fits beside those there are."""
        if self.arena is None:
            return True
        return self.dial.planned.needed <= self.dial.room(self.arena.device) - self.dial.graph_bytes

    def _count(self, key: tuple) -> None:
        if len(self.seen) > 100:  # something changes in every pass
            self.seen.clear()
        *kind, state = key
        self.seen[state] += 1
        self.came[tuple(kind)] += 1

    def _start_early(self, taken: Pass) -> None:
        """Start the graph that such an x took last, once the tables are there, while the other layers are still read.

        Should its key turn out to be another one, nobody looks at what it did to the graphs' memory.
        """
        recording = self.latest.get(taken.shape()) if taken.deferred and taken.flight is None else None
        if recording and recording.kinds == taken.kinds() and recording.is_intact() and not self._in_flight():
            taken.flight = Flight(recording, taken)

    def _in_flight(self) -> bool:
        flight = self.flight()
        return flight is not None and not flight.landed

    def _together(self, taken: Pass) -> Tensor:
        key, shape = taken.key(), taken.shape()
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
        flight.watch(taken.operands())
        self.flight = weakref.ref(flight)
        with torch.autocast(taken.x.device.type, enabled=False):
            return Stack.apply(taken.x, flight, *taken.parameters())

    def _eagerly(self, taken: Pass) -> Tensor:
        taken.flight = None
        self._make_room()
        return taken.eager()

    def _record(self, key: tuple, taken: Pass) -> str:
        """Why there are no graphs of ``key`` now, or nothing."""
        self._count(key)
        *kind, state = key
        parks = any(layer.plan.host for layer in taken.layers)
        if parks and self.uncopied:
            return self.uncopied
        if self.seen[state] <= REPEATS << min(self.retreats, 10):
            return "its weights and adapters have not come often enough"
        if self.came[tuple(kind)] < VISITS and self._leaves_room():
            return "its shape has not come often enough"
        if len(self.recordings) >= GRAPHS:  # those of weights or settings that the model has no more, perhaps
            self.recordings = {known: recording for known, recording in self.recordings.items() if known[-1] == state}
            left = {id(recording) for recording in self.recordings.values()}
            self.warmed = {known: held for known, held in self.warmed.items() if known[-1] == state}
            self.latest = {shape: recording for shape, recording in self.latest.items() if id(recording) in left}
        if len(self.recordings) >= GRAPHS:
            return f"{GRAPHS} other shapes or states have graphs"
        if any(table.shape[1] != taken.x.shape[1] for pair in taken.tables.values() for table in pair):
            return "its rotations are not those of its tokens"
        if self._have_moved():  # what the others read is nobody's any more
            self.warmed.clear()
            self._forget()
        block, whole, warming_up = self._sizes(taken)
        if taken.x.is_cuda and whole > self._room(taken.x.device):
            return "the device has no memory for them"
        try:
            with torch.no_grad(), torch.autocast(taken.x.device.type, enabled=False):
                if self.arena is not None and self.arena.size < block:  # the others are made again in the larger one
                    self._forget()
                self._warm_up(key, taken, warming_up)
                self._own()
                copies = self._copies(taken) if parks else None
                self.arena = self.arena or self.arena_class(block, taken.x.device)
                try:
                    self.recordings[key] = Recording(taken, self.arena, self.workspace, copies)
                finally:  # an interrupted one has taken memory too
                    hold(self.dial, self.arena.device, self.arena.bytes)
        except torch.OutOfMemoryError:
            self._retreat()
            return "the device had no memory for them"
        except RuntimeError as error:  # a kernel that cannot be recorded, or a copy: where no memory may be pinned, for one
            self.clear()
            reason = str(error).partition("\n")[0]
            if parks:
                self.uncopied, whose = reason, "plans that keep something in host memory"
            else:
                self.enabled, self.broken, whose = False, reason, "this model"
            message = f"No CUDA graphs for {whose}: every kernel is launched from Python ({reason})."
            warnings.warn(message, UserWarning, stacklevel=2)
            return reason
        return ""

    def _warm_up(self, key: tuple, taken: Pass, size: int) -> None:
        """Run the layers before they are recorded, which takes ``size`` bytes: if they find no room beside the arena it goes.

        What has been warmed up once is warm: two shapes that find no room beside each other's arena do not take turns.
        """
        key = threading.get_ident(), *key  # libraries keep something for every thread
        if self.arena is not None and self.arena.bytes + size > self.dial.room(self.arena.device):
            if key in self.warmed:
                return
            self._forget()
        self.arena_class.aside(Program(taken).warm_up, taken.x.device)
        if len(self.warmed) >= 2 * GRAPHS:
            self.warmed.clear()
        self.warmed[key] = [leaf for leaves in taken.leaves for leaf in leaves if isinstance(leaf, Quantised)]

    def _copies(self, taken: Pass) -> Recorded:
        """With the host memory that these layers want, that of the passes before first."""
        x, first = taken.x, taken.layers[0]
        shape, tokens = first.blocks.shape(x, first.state.model.compute), x.shape[0] * padded(x.shape[1])
        sizes = [tokens * shape.parked(layer.plan) for layer in taken.layers]
        self.copies.adopt(self.dial.offload, [slab_bytes(size) for size in sizes if size], x.device)
        return self.copies

    def _sizes(self, taken: Pass) -> tuple[int, int, int]:
        """Bytes of the graphs' block, of a step that runs from them, and of a layer that warms up."""
        x, first = taken.x, taken.layers[0]
        shape, length = first.blocks.shape(x, first.state.model.compute), self.dial.planned.batch.length
        gradients = sum(parameter.nbytes for parameter in taken.parameters())
        cost = Cost(shape, x.shape[0] * padded(x.shape[1]), length, from_graphs=True, gradients=gradients)
        plans = [layer.plan for layer in taken.layers]
        return cost.block(plans), cost.device(plans), cost.warming_up(plans)
