"""CUDA graphs of a model's decoder layers, for batches so short that the GPU would wait for Python.

A step launches a few thousand kernels at 20 to 40 us of Python each, 170 to 250 ms of CPU for 32 layers. Where the GPU
does not take much longer (``dial.Batch.obstacle``), all layers together become two graphs (``model/recording.py``), one
of their forward and one of their backward, which run without Python.

The layers are called one by one by a loop that is not ours. While a pass is *deferred* each of them is noted down and
gives back its input untouched, and the last one runs them all: from graphs, or one after the other as if nothing had
happened. The graphs are those of the pass' key, which holds all that they depend on (``model/passes.py``); a pass whose
key is new, or that no graph can do (``model/graph_rules.py``), runs without.

What layers keep between a graph's forward and its backward lies in memory that the graphs hold for good, all in the same.
A pass without a graph that needs this memory makes them give it back.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.model.arena import Arena
from luthier.model.cost import Cost
from luthier.model.device_memory import available_memory, held_by_others, hold, release
from luthier.model.dial import Dial
from luthier.model.graph_rules import obstacle
from luthier.model.offload import GraphOffload, slab_bytes
from luthier.model.passes import Pass, padded
from luthier.model.recording import Flight, Program, Recording, Stack
from luthier.ops.workspace import Workspace

if TYPE_CHECKING:
    from luthier.model.backbone import Structure
    from luthier.model.fused_layer import LayerRun
    from luthier.model.layer_blocks import Blocks

REPEATS = 2  # passes without a graph, before graphs are made; twice as many each time that they had to give way
GRAPHS = 32  # keys of a model that get graphs


class NotAChain(Exception):
    """Something other than the next layer has touched what a deferred layer gave back."""


def _weight_went(graphs: weakref.ref[Graphs], weight: weakref.ref[Tensor], ends: Callable = sys.is_finalizing) -> None:
    owner = graphs()
    if owner is not None and not owner.loop and not ends():  # garbage may be collected in the middle of a pass, and at the end
        owner.clear()


class Graphs:
    """The graphs of one model, and the pass that is under way.

    ``enabled``: whether short batches run from graphs where they can; ``why``: why the last one did not, or nothing.
    """

    def __init__(self, dial: Dial, workspace: Workspace, arena_class: type = Arena) -> None:
        self.dial, self.workspace, self.arena_class = dial, workspace, arena_class
        self.enabled, self.why, self.broken = True, "nothing has run yet", ""  # and why they turned themselves off
        self.uncopied = ""  # why there are none for plans that keep something in host memory, if those failed
        self.expected = 0
        self.taken: Pass | None = None
        self.loop: Iterable[nn.Module] = ()  # the layers of the backbone that runs
        self.structure: Structure | None = None  # of its batch
        self.flight: Callable[[], Flight | None] = lambda: None
        self.copies = GraphOffload()
        self.is_chain = False  # a pass went from layer to layer, untouched between them
        self.clear()

    def clear(self) -> None:
        """Give up all graphs and their memory; new ones are made when batches come again."""
        self.retreats = 0  # times that graphs gave way to a pass without
        self._give_back()

    def _give_back(self) -> None:
        if self.dial.offload is not None and not self._in_flight():
            self.dial.offload.take_over(self.copies)
        self.copies = GraphOffload()
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

    def _note_owners(self) -> None:
        """Whose memory the graphs read: they would keep it where a merge or a load has put other weights in its place."""
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
        if not self.arena_class.fits(x):
            return "its device has none"
        return obstacle(x, blocks, self.loop, self.structure, self.dial.layers)

    def _begin(self, x: Tensor) -> Pass | None:
        if self.expected and not self.dial.planned.obstacle:
            return Pass(x, self.structure, deferred=self.is_chain)
        if torch.is_grad_enabled():
            self.why = self.why or self.dial.planned.obstacle
            self._make_room()
        return None

    def _make_room(self) -> None:
        """For a pass without a graph, if it does not fit beside those there are."""
        if self.arena is None or self._in_flight():
            return
        if self.dial.planned.needed > self.dial.room(self.arena.device) - self.dial.graph_bytes:
            self._retreat()

    def _count(self, key: tuple) -> None:
        if len(self.seen) > 100:  # something changes in every pass
            self.seen.clear()
        self.seen[key[-1]] += 1

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
            self._count(key)
            self.why = self._too_early(key, taken) or self._record(key, taken)
        if self.why:
            self.latest.pop(shape, None)
            return self._eagerly(taken)
        recording = self.latest[shape] = self.recordings[key] = self.recordings.pop(key)  # the last is the one used last
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

    def _too_early(self, key: tuple, taken: Pass) -> str:
        """Why ``key`` gets no graphs in this pass, or nothing."""
        if taken.parks and self.uncopied:
            return self.uncopied
        if self.seen[key[-1]] <= REPEATS << min(self.retreats, 10):
            return "its weights and adapters have not come often enough"
        if any(table.shape[1] != taken.x.shape[1] for pair in taken.tables.values() for table in pair):
            return "its rotations are not those of its tokens"
        return ""

    def _make_place(self, state: tuple) -> None:
        """For one recording more: those of other weights or settings go, which the model may have no more, and the one that was
        used longest ago.
        """
        own = [(key, recording) for key, recording in self.recordings.items() if key[-1] == state]
        self.recordings = dict(own[1 - GRAPHS :])
        self.warmed = {key: held for key, held in self.warmed.items() if key[-1] == state}
        left = {id(recording) for recording in self.recordings.values()}
        self.latest = {shape: recording for shape, recording in self.latest.items() if id(recording) in left}

    def _record(self, key: tuple, taken: Pass) -> str:
        """Make graphs of ``key``; why that failed, or nothing."""
        if self._have_moved():  # what the others read is nobody's any more
            self.warmed.clear()
            self._forget()
        gradients = sum(parameter.nbytes for parameter in taken.parameters())
        cost = Cost(taken.widths(), taken.tokens, self.dial.planned.batch.length, from_graphs=True, gradients=gradients)
        plans = [layer.plan for layer in taken.layers]
        if taken.x.is_cuda and cost.device(plans) > self._room(taken.x.device):
            return "the device has no memory for them"
        if len(self.recordings) >= GRAPHS:
            self._make_place(key[-1])
        try:
            with torch.no_grad(), torch.autocast(taken.x.device.type, enabled=False):
                self._record_within(cost.block(plans), cost.warming_up(plans), key, taken)
        except torch.OutOfMemoryError:
            self._retreat()
            return "the device had no memory for them"
        except RuntimeError as error:  # a kernel that cannot be recorded, or a copy: where no memory may be pinned, for one
            return self._give_up(str(error).partition("\n")[0], taken.parks)
        return ""

    def _record_within(self, block: int, warming_up: int, key: tuple, taken: Pass) -> None:
        """Over an arena of ``block`` bytes, once the layers have been warmed up, in so many."""
        if self.arena is not None and self.arena.size < block:  # the others are made again in the larger one
            self._forget()
        self._warm_up(key, taken, warming_up)
        self._note_owners()
        copies = self._copies(taken) if taken.parks else None
        self.arena = self.arena or self.arena_class(block, taken.x.device)
        try:
            self.recordings[key] = Recording(taken, self.arena, self.workspace, copies)
        finally:  # an interrupted one has taken memory too
            hold(self.dial, self.arena.device, self.arena.bytes)

    def _give_up(self, reason: str, parks: bool) -> str:
        """No graphs from now on: for plans that keep something in host memory if this one ``parks``, else for the model."""
        self.clear()
        if parks:
            self.uncopied, whose = reason, "plans that keep something in host memory"
        else:
            self.enabled, self.broken, whose = False, reason, "this model"
        message = f"No CUDA graphs for {whose}: every kernel is launched from Python ({reason})."
        warnings.warn(message, UserWarning, stacklevel=2)
        return reason

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
        self.warmed[key] = taken.quantised()

    def _copies(self, taken: Pass) -> GraphOffload:
        """With the host memory that these layers want, that of the passes before first."""
        widths = taken.widths()
        sizes = [taken.tokens * widths.parked(layer.plan) for layer in taken.layers]
        self.copies.adopt(self.dial.offload, [slab_bytes(size) for size in sizes if size], taken.x.device)
        return self.copies
