"""The memory dial: what each layer of a model keeps between forward and backward, and where.

A plan is one ``LayerPlan`` a layer: a mode (``blocks.Mode``), and whether what it keeps waits in pinned host memory. It
comes from the user, or from a budget: as little is computed twice as fits. The same loss and gradients come out of any.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from luthier.model.blocks import Kept, Mode
from luthier.terminal import say

GIB = 1 << 30
RESERVE = 0.06  # of the card, for fragmentation and for what other libraries allocate
HOST_SHARE = 0.5  # of the free host memory that an automatic plan may pin
OFFLOADED = ("x", "qkv", "out", "x2")  # what a layer parks in host memory; gate and up would take longer than they save


@dataclass(frozen=True)
class LayerPlan:
    mode: Mode
    offload: bool = False


@dataclass(frozen=True)
class Shape:
    """The widths that decide what a layer keeps and needs; ``size`` is bytes of one element."""

    hidden: int
    attention: int  # q, k and v together
    heads: int  # the attention's output
    mlp: int  # of gate alone
    low: int  # all adapters' inner activations
    size: int
    extra: int = 0  # branches kept for post-norms

    def kept(self, mode: Mode) -> int:
        """Bytes a token that a layer keeps."""
        width = self.hidden + self.low
        if mode >= Mode.ATTENTION:
            width += self.heads
        if mode >= Mode.ALL_BUT_GATE_UP:
            width += self.attention + self.hidden + self.extra
        if mode >= Mode.KEEP:
            width += 2 * self.mlp + self.extra
        return width * self.size

    def transient(self, tokens: int, chunk: int) -> int:
        """Bytes that one layer's backward needs at its peak, with everything computed again."""
        per_token = 6 * self.hidden + 2 * self.attention + self.heads
        return self.size * (tokens * per_token + min(tokens, chunk) * 4 * self.mlp)

    def written(self) -> int:
        """Bytes of the buffers into which a layer's weights are written out."""
        return self.size * self.hidden * (self.attention + self.heads + 3 * self.mlp)


class Dial:
    """The plan of one model, shared by its layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.graph_bytes = 0  # of device memory that CUDA graphs hold without the allocator counting it as allocated
        self.follow_flag()

    def follow_flag(self) -> None:
        """No plan: a layer recomputes if its gradient checkpointing flag is set and keeps everything if not."""
        self._choose(self._no_plan)

    def set_plan(self, plan: list[LayerPlan]) -> None:
        """Run the layers by this plan from now on."""
        if len(plan) != self.layers:
            raise ValueError(f"The plan describes {len(plan)} layers, the model has {self.layers}: give one LayerPlan a layer.")
        self._choose(partial(self._given, list(plan)))

    def set_automatic(self, budget: float | None = None, trainable: int = 0) -> None:
        """Plan at the first training step, and again when a longer batch comes.

        ``budget`` in GiB, or None for what is free; ``trainable``: parameters that will still get gradients and moments.
        """
        self._choose(partial(self._within, trainable), budget)

    def set_offload(self) -> None:
        """Keep all but gate and up, in host memory; less where that would take more than its share."""
        self._choose(self._in_host_memory)

    def of_layer(self, index: int, shape: Shape, x: Tensor, flag: bool) -> LayerPlan:
        """What layer ``index`` does in the forward that starts now, with input ``x`` (n, D)."""
        if x.shape[0] > self.planned_tokens:
            before, self.plan = self.plan, self.planner(shape, x)
            self.planned_tokens = x.shape[0]
            if self.plan and self.offload is None and any(layer.offload for layer in self.plan):
                self.offload = Offload()
            if self.plan and self.plan != before and x.is_cuda:
                say(describe(self.plan, x.shape[0]))
        if self.plan is None:
            return LayerPlan(Mode.RECOMPUTE if flag else Mode.KEEP)
        return self.plan[index]

    def room(self, device: torch.device) -> float:
        """Bytes that a step may still allocate."""
        return available_memory(device, self.budget) - self.graph_bytes

    def _choose(self, planner: Callable[[Shape, Tensor], list[LayerPlan] | None], budget: float | None = None) -> None:
        self.planner, self.planned_tokens, self.budget = planner, 0, budget
        self.plan: list[LayerPlan] | None = None
        self.offload: Offload | None = None

    def _no_plan(self, shape: Shape, x: Tensor) -> None:
        return None

    def _given(self, plan: list[LayerPlan], shape: Shape, x: Tensor) -> list[LayerPlan]:
        return plan

    def _in_host_memory(self, shape: Shape, x: Tensor) -> list[LayerPlan]:
        return offload_plan(shape, x.shape[0], self.layers, free_host_memory() * HOST_SHARE)

    def _within(self, trainable: int, shape: Shape, x: Tensor) -> list[LayerPlan]:
        if not x.is_cuda:  # main memory is plenty, and a CPU is slow at computing twice
            return [LayerPlan(Mode.KEEP if self.budget is None else Mode.RECOMPUTE)] * self.layers
        pending = trainable * (4 if self.planned_tokens else 12)  # gradients, and before the first step two moments
        available = self.room(x.device) - pending - head_memory(x) - shape.written()
        return plan_for(shape, x.shape[0], self.layers, available)


def plan_for(shape: Shape, tokens: int, layers: int, available: float) -> list[LayerPlan]:
    """The plan that computes least again within ``available`` bytes on the device.

    First every layer keeps its attention (which costs most a byte to compute again), then layer by layer everything but
    gate and up, then those too. If not even every layer's input fits, the inputs go to host memory.
    """
    free = available - shape.transient(tokens, 4096) - layers * tokens * shape.kept(Mode.RECOMPUTE)
    if free < 0:
        return [LayerPlan(Mode.RECOMPUTE, offload=index < layers - 1) for index in range(layers)]
    modes = [Mode.RECOMPUTE] * layers
    for mode in (Mode.ATTENTION, Mode.ALL_BUT_GATE_UP, Mode.KEEP):
        cost = tokens * (shape.kept(mode) - shape.kept(Mode(mode - 1)))
        for index in reversed(range(layers)):
            if modes[index] == mode - 1 and cost <= free:
                modes[index], free = mode, free - cost
    return [LayerPlan(mode) for mode in modes]


def offload_plan(shape: Shape, tokens: int, layers: int, host: float) -> list[LayerPlan]:
    """All layers but the last in host memory, each keeping as much as ``host`` bytes allow for all of them."""
    best = Mode.RECOMPUTE
    for mode in (Mode.ATTENTION, Mode.ALL_BUT_GATE_UP):
        if (layers - 1) * tokens * shape.kept(mode) <= host:
            best = mode
    return [LayerPlan(best, offload=index < layers - 1) for index in range(layers)]


def describe(plan: list[LayerPlan], tokens: int) -> str:
    words = {
        Mode.RECOMPUTE: "keep their input",
        Mode.ATTENTION: "keep attention",
        Mode.ALL_BUT_GATE_UP: "keep all but gate and up",
        Mode.KEEP: "keep everything",
    }
    counts = {mode: sum(layer.mode == mode for layer in plan) for mode in words}
    parked = sum(layer.offload for layer in plan)
    parts = [f"{count} layers {words[mode]}" for mode, count in counts.items() if count]
    return f"Memory plan for {tokens} tokens: {', '.join(parts)}" + (f"; {parked} of them in host memory" if parked else "")


def available_memory(device: torch.device, budget: float | None) -> float:
    """Bytes that a step may still allocate: what the device has free less a reserve, or what the budget leaves."""
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    available = free + reserved - allocated - RESERVE * total
    return available if budget is None else min(available, budget * GIB - allocated)


def head_memory(x: Tensor) -> int:
    """Bytes for the head: its chunk of logits, the gradient of the last hidden states and a copy of those."""
    return GIB // 2 + 2 * x.numel() * x.element_size()


def free_host_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Parked:
    """Tensors of one layer in host memory; ``ready`` is the event behind which they are back on the device."""

    def __init__(self, host: dict[str, Tensor], device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: dict[str, Tensor] | None = None
        self.ready: torch.cuda.Event | None = None


class Offload:
    """Moves what layers keep to pinned host memory on a side stream, and back one layer before it is needed."""

    DEPTH = 2  # layers whose copies may be under way before the forward waits for the oldest

    def __init__(self) -> None:
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self.under_way: list[tuple[torch.cuda.Event, list[Tensor]]] = []
        self.chain: list[tuple[int, weakref.ref[Kept]]] = []  # this forward's layers, in order

    def __deepcopy__(self, memo: dict) -> Offload:
        return Offload()  # a copied model has no copies under way

    def park(self, index: int, kept: Kept, offload: bool) -> None:
        """Called at the end of a layer's forward. Copies start; the device's memory is free again DEPTH layers later."""
        if self.chain and self.chain[-1][0] >= index:
            self.chain = []
        kept.before = self.chain[-1][1] if self.chain else None
        self.chain.append((index, weakref.ref(kept)))
        if not offload:
            return
        tensors = {name: value for name in OFFLOADED if (value := getattr(kept, name)) is not None}
        if not kept.x.is_cuda:
            kept.parked = Parked({name: value.clone() for name, value in tensors.items()}, kept.x.device)
        else:
            kept.parked = self._copy_out(tensors)
        for name in tensors:
            setattr(kept, name, None)

    def fetch(self, kept: Kept) -> None:
        """Called at the start of a layer's backward: its tensors are there, and those of the layer before are started."""
        self._start(kept)
        parked, kept.parked = kept.parked, None
        if parked is not None:
            if parked.ready is not None:
                torch.cuda.current_stream(parked.device).wait_event(parked.ready)
            for name, value in parked.back.items():
                setattr(kept, name, value)
        before = kept.before and kept.before()
        if before is not None:
            self._start(before)

    def _copy_out(self, tensors: dict[str, Tensor]) -> Parked:
        device = next(iter(tensors.values())).device
        if self.streams is None:
            self.streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        current, up = torch.cuda.current_stream(device), self.streams[0]
        up.wait_event(current.record_event())
        with torch.cuda.stream(up):
            host = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in tensors.items()}
            for name, value in tensors.items():
                host[name].copy_(value, non_blocking=True)
            done = up.record_event()
        self.under_way.append((done, list(tensors.values())))
        while len(self.under_way) > self.DEPTH:
            current.wait_event(self.under_way.pop(0)[0])
        return Parked(host, device)

    def _start(self, kept: Kept) -> None:
        parked = kept.parked
        if parked is None or parked.back is not None:
            return
        if parked.device.type == "cpu":
            parked.back = parked.host
            return
        current, down = torch.cuda.current_stream(parked.device), self.streams[1]
        for done, _ in self.under_way:  # the forward is over: nothing waits for these any more
            current.wait_event(done)
        self.under_way.clear()
        parked.back = {
            name: torch.empty(value.shape, dtype=value.dtype, device=parked.device) for name, value in parked.host.items()
        }
        down.wait_event(current.record_event())
        with torch.cuda.stream(down):
            for name, value in parked.back.items():
                value.copy_(parked.host[name], non_blocking=True)
            parked.ready = down.record_event()
