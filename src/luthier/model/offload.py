"""What layers keep, parked in pinned host memory on a side stream between their forward and their backward."""

from __future__ import annotations

import weakref
from enum import IntEnum

import torch
from torch import Tensor

from luthier.model.blocks import Kept
from luthier.model.host_memory import Slab, SlabPool

ALIGNMENT = 256  # bytes
SMALL = 1 << 20  # bytes of a tensor below which a copy costs more time than the memory is worth


class Host(IntEnum):
    """What of the things that a layer keeps waits in host memory; each level holds what the ones before it do."""

    NOTHING = 0
    INPUT = 1  # the layer's input, and the adapters' inner activations
    NARROW = 2  # everything but gate and up, which take longer to move than to compute on most cards
    EVERYTHING = 3


INPUT = ("x", "low_qkv", "low_o", "low_gate_up", "low_down")
NARROW = (*INPUT, "qkv", "out", "branch", "x2", "rows")
NAMES = {Host.INPUT: INPUT, Host.NARROW: NARROW, Host.EVERYTHING: (*NARROW, "gate_up", "mlp_branch")}


class Parked:
    """Tensors of one layer in a slab of host memory; ``ready`` is the event behind which they are ``back``."""

    def __init__(self, tensors: dict[str, Tensor], slab: Slab) -> None:
        self.slab, self.device = slab, next(iter(tensors.values())).device
        layout = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        if layout not in slab.views:  # the same ones in every step
            slab.views = {layout: _views(tensors, slab.memory)}
        self.host = slab.views[layout]
        self.back: dict[str, Tensor] | None = None
        self.ready: torch.cuda.Event | None = None


class Offload:
    """Moves what layers keep to host memory in the forward, and back one layer before it is needed in the backward.

    Long sequences wait for every copy: they have no memory for two layers, and their layers take much longer than a copy.
    """

    DEPTH = 2  # layers whose copies may be under way before the forward waits for the oldest

    def __init__(self) -> None:
        self.pool: SlabPool | None = None
        self.streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}  # out and back
        self.under_way: list[tuple[torch.cuda.Event, list[Tensor]]] = []
        self.chain: list[tuple[int, weakref.ref[Kept]]] = []  # this forward's layers, in order

    def __deepcopy__(self, memo: dict) -> Offload:
        return Offload()  # a copied model has no copies under way

    def prepare(self, sizes: list[int], device: torch.device) -> None:
        """Start to pin slabs for layers that will park ``sizes`` bytes."""
        self.pool = self.pool or SlabPool(device)
        self.pool.prepare(sizes)

    def take_over(self, other: Offload) -> None:
        """The slabs of ``other`` that are free."""
        if other.pool is None:
            return
        with other.pool.lock:
            slabs, other.pool.free = other.pool.free, []
        self.pool = self.pool or SlabPool(other.pool.device)
        with self.pool.lock:
            self.pool.free += slabs

    def park(self, index: int, kept: Kept, host: Host) -> None:
        """Called at the end of a layer's forward. Copies start; the device's memory is free again DEPTH layers later."""
        if self.chain and self.chain[-1][0] >= index:
            self.chain = []
        kept.before = self.chain[-1][1] if self.chain else None
        self.chain.append((index, weakref.ref(kept)))
        if host == Host.NOTHING:
            return
        tensors = {name: value for name in NAMES[host] if (value := getattr(kept, name)) is not None and value.nbytes >= SMALL}
        if not tensors:
            return
        self.pool = self.pool or SlabPool(kept.x.device)
        slab = self.pool.take(sum(_aligned(value.nbytes) for value in tensors.values()))
        kept.parked = Parked(tensors, slab)
        weakref.finalize(kept.parked, _give_back, slab, self.pool).atexit = False
        self._copy_out(tensors, kept.parked, 0 if kept.is_long else self.DEPTH)
        for name in tensors:
            setattr(kept, name, None)

    def settle(self, depth: int = 0) -> None:
        """All copies out but the last ``depth`` are waited for, before what comes next: then their memory is free."""
        while len(self.under_way) > depth:
            done, tensors = self.under_way.pop(0)
            torch.cuda.current_stream(tensors[0].device).wait_event(done)

    def fetch(self, kept: Kept) -> None:
        """Called at the start of a layer's backward: its tensors are there, and those of the layer before are started."""
        self._start(kept)
        parked, kept.parked = kept.parked, None
        if parked is not None:
            if parked.ready is not None:
                torch.cuda.current_stream(parked.device).wait_event(parked.ready)
                parked.slab.waits = None
            for name, value in parked.back.items():
                setattr(kept, name, value)
        before = kept.before and kept.before()
        if before is not None and not kept.is_long:
            self._start(before)

    def _copy_out(self, tensors: dict[str, Tensor], parked: Parked, depth: int) -> None:
        if parked.device.type != "cuda":
            for name, value in tensors.items():
                parked.host[name].copy_(value)
            return
        if parked.device not in self.streams:
            self.streams[parked.device] = torch.cuda.Stream(parked.device), torch.cuda.Stream(parked.device)
        current, up = torch.cuda.current_stream(parked.device), self.streams[parked.device][0]
        up.wait_event(current.record_event())
        if parked.slab.read is not None:
            up.wait_event(parked.slab.read)
        with torch.cuda.stream(up):
            for name, value in tensors.items():
                parked.host[name].copy_(value, non_blocking=True)
            self.under_way.append((up.record_event(), list(tensors.values())))
        self.settle(depth)

    def _start(self, kept: Kept) -> None:
        """Start the copies of one layer back to the device."""
        parked = kept.parked
        if parked is None or parked.back is not None:
            return
        self.settle()
        parked.back = {name: torch.empty_like(value, device=parked.device) for name, value in parked.host.items()}
        if parked.device.type != "cuda":
            for name, value in parked.back.items():
                value.copy_(parked.host[name])
            return
        current, down = torch.cuda.current_stream(parked.device), self.streams[parked.device][1]
        down.wait_event(current.record_event())
        with torch.cuda.stream(down):
            for name, value in parked.back.items():
                value.copy_(parked.host[name], non_blocking=True)
            parked.ready = parked.slab.read = down.record_event()
        parked.slab.waits = current


class GraphOffload(Offload):
    """Copies that CUDA graphs make. All graphs of a model use the same slabs: only one of them is under way at a time."""

    def adopt(self, other: Offload | None, sizes: list[int], device: torch.device) -> None:
        """Have slabs for a recording of layers that park ``sizes`` bytes, those of ``other`` first: all pinned, all at rest.

        What ``other`` has beyond that stays there: passes without graphs would pin as much anew.
        """
        self.pool = self.pool or SlabPool(device)
        self.pool.prepare(sizes, other and other.pool)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for slab in self.pool.free:
            slab.memory  # noqa: B018  # waits: nothing can be pinned while a graph is recorded
        self.rest()

    def rest(self) -> None:
        """Forget what a pass without graphs waited for, or a recording that broke off: another one may not wait for it."""
        self.under_way, self.chain = [], []
        for slab in self.pool.free:
            slab.read = slab.waits = None

    def _start(self, kept: Kept) -> None:
        super()._start(kept)
        if kept.parked is not None:  # nor may anybody else wait for an event of a recording
            kept.parked.slab.read = kept.parked.slab.waits = None


def _give_back(slab: Slab, pool: SlabPool) -> None:
    """Called before ``Parked`` goes. If nobody fetched it (an error in a backward), copies may still be written to tensors
    whose memory is free from now on: what their stream does next comes behind them."""
    if slab.waits is not None:
        slab.waits.wait_event(slab.read)
        slab.waits = None
    pool.give(slab)


def _views(tensors: dict[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
    """Tensors like these, one after the other in ``memory`` (uint8)."""
    views, start = {}, 0
    for name, value in tensors.items():
        views[name] = memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
        start += _aligned(value.nbytes)
    return views


def slab_bytes(size: int) -> int:
    """Bytes of a slab for ``size`` bytes of a layer, with room for alignment."""
    return size + 4096


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
