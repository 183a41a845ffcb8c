"""The memory dial: what each layer of a model keeps between forward and backward, and where.

A plan comes from the user, or is the fastest that a cost model (``model/cost.py``) finds within a budget of device and host
memory. The same loss and gradients come out of any.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from luthier.model.blocks import LONG, Mode
from luthier.model.card import Speeds, card_speeds
from luthier.model.cost import SCRATCH, Cost, LayerPlan, Shape, offload_plan, plan_for
from luthier.model.device_memory import GIB, available_memory, held_by, held_by_others
from luthier.model.host_memory import HostEmbedding, free_host_memory
from luthier.model.offload import Host, Offload, slab_bytes
from luthier.terminal import say

SCRATCH_OF_A_STREAM = 1 << 25  # of ``SCRATCH``, bytes that libraries take for one more stream
HOST_SHARE = 0.5  # of the free host memory that a plan may pin
WORTH = 0.01  # of a step that has to be saved before the embedding table leaves the device
LAUNCHES = 5.5e-3  # seconds of CPU to launch a layer's step: 170 to 250 ms for 32, less a fifth, as ``Work`` is of the GPU's
MORE_IN_8_BITS = 1.35
BUSY = 0.65  # of the time of the GPU; a CPU that takes more of it makes it wait


@dataclass(frozen=True)
class Plan:
    layers: tuple[LayerPlan, ...]
    embedding_in_host_memory: bool = False
    from_graphs: bool | None = None  # whether they run from CUDA graphs; None: whoever made the plan left that open


class Dial:
    """The plans of one model, shared by its layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.host_embedding: HostEmbedding | None = None
        self.embedding: nn.Embedding | None = None  # the backbone says which one could wait in host memory
        self.has_run = False  # buffers and what libraries take are there since the first pass
        self.trained: weakref.ref[Tensor] | None = None  # a weight that tells when the optimizer's moments are there, too,
        self.version = 0  # by what it was at the first pass
        self.follow_flag()

    def follow_flag(self) -> None:
        """No plan: a layer recomputes if its gradient checkpointing flag is set and keeps everything if not."""
        self._choose(lambda batch: None)

    def set_plan(self, plan: list[LayerPlan], embedding_in_host_memory: bool = False) -> None:
        """Run the layers by this plan from now on."""
        if len(plan) != self.layers:
            raise ValueError(f"The plan describes {len(plan)} layers, the model has {self.layers}: give one LayerPlan a layer.")
        given = Plan(tuple(plan), embedding_in_host_memory)
        self._choose(lambda batch: given)

    def set_automatic(self, budget: float | None = None, trainable: int = 0, trained: Tensor | None = None) -> None:
        """Plan at the first training step, and for every length of batch that comes later.

        ``budget`` in GiB, or None for what is free; ``trainable``: bytes of what will still get a gradient and two moments;
        ``trained``: one of those.
        """
        self.trained = None if trained is None else weakref.ref(trained)
        self._choose(partial(self._within, trainable), budget)

    def set_offload(self) -> None:
        """Keep all but gate and up, in host memory; less where that would take more than its share. The embedding too."""
        self._choose(self._in_host_memory)

    def of_layer(self, index: int, shape: Shape, x: Tensor, length: int, flag: bool, graphs: int = 0) -> LayerPlan:
        """What layer ``index`` does in the forward that starts now, with input ``x`` (n, D) of sequences of ``length``.

        ``graphs``: tokens of the CUDA graphs that they may run from, with their padding.
        """
        tokens = bucket(graphs or x.shape[0])
        kind = tokens, length >= LONG, graphs > 0  # a long sequence needs less memory than as many tokens in shorter ones
        default = LayerPlan(Mode.RECOMPUTE if flag else Mode.KEEP)
        if kind not in self.plans:
            self._plan(kind, Batch(shape, tokens, min(length, tokens), x.device, graphs > 0, default))
        self.planned = self.plans[kind]
        return default if self.planned.plan is None else self.planned.layers[index]

    def room(self, device: torch.device) -> float:
        """Bytes that a step may still allocate."""
        return available_memory(device, self.budget) - held_by_others(self, device)

    @property
    def graph_bytes(self) -> int:
        """That CUDA graphs hold without the allocator counting them as allocated; they give way to a plan."""
        return held_by(self)

    def _choose(self, planner: Callable[[Batch], Plan | None], budget: float | None = None) -> None:
        if self.host_embedding is not None:
            self.host_embedding.bring_back()
        self.planner, self.budget, self.host_embedding = planner, budget, None
        self.plans: dict[tuple[int, bool, bool], Planned] = {}  # by tokens, if of a long sequence, if graphs are possible
        self.planned: Planned | None = None  # the one of the forward that runs now
        self.offload: Offload | None = None

    def _plan(self, kind: tuple[int, bool, bool], batch: Batch) -> None:
        """Plan for a kind of batch, and make room in host memory."""
        plan, before = self.planner(batch), {planned.plan for planned in self.plans.values()}
        self.plans[kind], self.has_run = Planned(batch, plan, plan.layers if plan else (batch.default,) * self.layers), True
        if plan is None:
            return
        if plan.embedding_in_host_memory and self.embedding is not None and self.host_embedding is None:
            self.host_embedding = HostEmbedding(self.embedding)
        sizes = [batch.tokens * batch.shape.parked(layer) for layer in plan.layers]
        slabs = [slab_bytes(size) for size in sizes if size]
        if slabs:
            self.offload = self.offload or Offload()
            self.offload.prepare(slabs, batch.device)
        if plan not in before and batch.device.type == "cuda":
            say(describe(plan, batch.tokens, sum(slabs) + (self.table_bytes if self.host_embedding else 0)))

    @property
    def table_bytes(self) -> int:
        return 0 if self.embedding is None else self.embedding.weight.nbytes

    @property
    def host_room(self) -> float:
        """Bytes of host memory that plans may pin, what they have pinned already included."""
        pool = self.offload and self.offload.pool
        return HOST_SHARE * (free_host_memory() + (pool.held if pool else 0))

    def _in_host_memory(self, batch: Batch) -> Plan:
        host = self.host_room - self.table_bytes
        layers, leaves = offload_plan(batch.shape, batch.tokens, self.layers, host), self.embedding is not None and host > 0
        if batch.graphs and batch.device.type == "cuda":  # faster, and the inputs of short batches are few
            inputs = [LayerPlan(Mode.RECOMPUTE)] * self.layers
            if batch.cost(from_graphs=True).device(inputs) <= self.room(batch.device) and batch.prefers_graphs(inputs, layers):
                return Plan(tuple(inputs), leaves, from_graphs=True)
        return Plan(tuple(layers), leaves, from_graphs=False)

    def _within(self, trainable: int, batch: Batch) -> Plan:
        if batch.device.type != "cuda":  # main memory is plenty, and a CPU is slow at computing twice
            return Plan((LayerPlan(Mode.KEEP if self.budget is None else Mode.RECOMPUTE),) * self.layers)
        pending = trainable if self._has_moments() else 3 * trainable
        pending += SCRATCH_OF_A_STREAM - SCRATCH if self.has_run else batch.shape.written()  # what libraries take is there
        device = self.room(batch.device) - pending
        eager, _ = self._fastest(batch, device, from_graphs=False)
        if batch.graphs:
            graphed, fits = self._fastest(batch, device, from_graphs=True, trainable=trainable)
            if fits and batch.prefers_graphs(graphed.layers, eager.layers):
                return graphed
        return eager

    def _has_moments(self) -> bool:
        """Whether the optimizer has stepped. A first step may add up batches of several lengths before it does."""
        weight = self.trained and self.trained()
        if not self.has_run:
            self.version = 0 if weight is None else weight._version
            return False
        return weight is None or weight.grad is None or weight._version != self.version

    def _fastest(self, batch: Batch, device: float, from_graphs: bool, trainable: int = 0) -> tuple[Plan, bool]:
        """A plan for ``device`` bytes, and whether it fits."""
        cost, host = batch.cost(from_graphs, trainable), self.host_room
        staying = plan_for(cost, self.layers, device, host)
        fits = cost.device(staying) <= device
        if self.embedding is None or self.host_embedding is not None or host < self.table_bytes:
            return Plan(tuple(staying), self.host_embedding is not None, from_graphs), fits
        rooms = device + self.table_bytes, host - self.table_bytes
        leaving = plan_for(cost, self.layers, *rooms)
        if fits and cost.seconds(leaving) > (1 - WORTH) * cost.seconds(staying):
            return Plan(tuple(staying), from_graphs=from_graphs), True
        return Plan(tuple(leaving), True, from_graphs), cost.device(leaving) <= rooms[0]


@dataclass(frozen=True)
class Batch:
    """What a planner is asked about: ``tokens`` in all, in sequences of ``length``."""

    shape: Shape
    tokens: int
    length: int
    device: torch.device
    graphs: bool = False  # it may run from CUDA graphs
    default: LayerPlan = LayerPlan(Mode.KEEP)  # what a layer does without a plan

    def cost(self, from_graphs: bool = False, gradients: int = 0) -> Cost:
        speeds = card_speeds(self.device) if self.device.type == "cuda" else Speeds()
        return Cost(self.shape, self.tokens, self.length, speeds, from_graphs, gradients)

    def obstacle(self, layers: Sequence[LayerPlan]) -> str:
        """Why ``layers`` do not run from CUDA graphs, or nothing."""
        if BUSY * self.cost().seconds(layers) > self.launching(layers):
            return "its kernels take longer than their launches"
        return ""

    def launching(self, layers: Sequence[LayerPlan]) -> float:
        """Seconds that a CPU takes, in those of the cost model."""
        return len(layers) * LAUNCHES * (1.0 if self.shape.compute == "bf16" else MORE_IN_8_BITS)

    def prefers_graphs(self, graphed: Sequence[LayerPlan], eager: Sequence[LayerPlan]) -> bool:
        """Whether ``graphed``, from CUDA graphs, are faster than ``eager``, which a CPU launches."""
        cost = self.cost()
        return not self.obstacle(graphed) and cost.seconds(graphed) <= max(cost.seconds(eager), self.launching(eager))


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made for."""

    batch: Batch
    plan: Plan | None
    layers: Sequence[LayerPlan]

    @functools.cached_property
    def obstacle(self) -> str:
        """Why the layers do not run from CUDA graphs, or nothing."""
        if self.plan is None or self.plan.from_graphs is None:
            return self.batch.obstacle(self.layers)
        return "" if self.plan.from_graphs else "another plan is faster, or there is no memory for graphs"

    @functools.cached_property
    def needed(self) -> int:
        """Bytes of a step whose kernels are launched one by one."""
        return self.batch.cost().device(self.layers)


def bucket(tokens: int) -> int:
    """``tokens`` rounded up to one of eight numbers an octave: as many plans there are, however batches vary."""
    step = max(1, 1 << (tokens - 1).bit_length() >> 4)
    return -(-tokens // step) * step


def describe(plan: Plan, tokens: int, host: int = 0) -> str:
    """One line for the person at the terminal; ``host``: bytes of host memory that the plan pins."""
    kept = {
        Mode.RECOMPUTE: "input kept",
        Mode.ATTENTION: "input and attention kept",
        Mode.ALL_BUT_GATE_UP: "all but gate and up kept",
        Mode.KEEP: "everything kept",
    }
    places = {Host.NOTHING: "", Host.INPUT: ", the input in host memory", Host.NARROW: " in host memory"}
    places |= {Host.EVERYTHING: " in host memory"}
    parts = []
    for layer, count in sorted(Counter(plan.layers).items(), key=lambda item: (item[0].mode, item[0].host)):
        partly = layer == LayerPlan(Mode.KEEP, Host.NARROW)
        place = ", all but gate and up in host memory" if partly else places[layer.host]
        parts.append(f"{count} layer{'s' if count > 1 else ''} with {kept[layer.mode]}{place}")
    if plan.embedding_in_host_memory:
        parts.append("embeddings in host memory")
    if plan.from_graphs:
        parts.append("from CUDA graphs")
    return f"Memory plan for {tokens} tokens: {'; '.join(parts)}" + (f" ({host / GIB:.1f} GiB of it)" if host else "")
