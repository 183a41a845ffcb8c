"""The memory dial: what each layer of a model keeps between forward and backward, and where.

A plan is one ``LayerPlan`` a layer: a mode (``blocks.Mode``), and what of the things it keeps waits in pinned host memory
(``offload.Host``). It comes from the user, or is the fastest that a cost model finds within a budget of device and host
memory. The same loss and gradients come out of any.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from luthier.model.blocks import KEPT_ROWS, LONG, ROWS, Mode
from luthier.model.card import Speeds, card_speeds
from luthier.model.device_memory import GIB, available_memory, held_by, held_by_others
from luthier.model.host_memory import HostEmbedding, free_host_memory
from luthier.model.offload import Host, Offload, slab_bytes
from luthier.ops.experts import WRITTEN_BYTES
from luthier.ops.linear_cross_entropy import CHUNK_BYTES
from luthier.terminal import say

SCRATCH = 1 << 27  # bytes that libraries take for themselves,
SCRATCH_OF_A_STREAM = 1 << 25  # and of those, for one more stream
SMALL = 1 << 20  # bytes up to which the allocator puts a tensor into blocks of small ones
HOST_SHARE = 0.5  # of the free host memory that a plan may pin
WORTH = 0.01  # of a step that has to be saved before the embedding table leaves the device
LAUNCHES = 5.5e-3  # seconds of CPU to launch a layer's step: 170 to 250 ms for 32, less a fifth, as ``Work`` is of the GPU's
MORE_IN_8_BITS = 1.35
BUSY = 0.65  # of the time of the GPU; a CPU that takes more of it makes it wait


@dataclass(frozen=True)
class LayerPlan:
    mode: Mode
    host: Host = Host.NOTHING


@dataclass(frozen=True)
class Plan:
    layers: tuple[LayerPlan, ...]
    embedding_in_host_memory: bool = False
    from_graphs: bool | None = None  # whether they run from CUDA graphs; None: whoever made the plan left that open


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
    head_width: int = 128
    choices: int = 0  # experts that a token goes to; ``mlp`` is then the gates of all of them
    compute: str = "bf16"  # how frozen weights are multiplied

    def kept(self, mode: Mode) -> int:
        """Bytes a token that a layer keeps."""
        kept = self.parked(LayerPlan(mode, Host.EVERYTHING))
        if self.choices:  # the half with the experts keeps its own input and, with gate and up, theirs, on the device
            kept += self.size * (self.hidden + (self.hidden + 2 * self.mlp) * (mode == Mode.KEEP))
        return kept

    def parked(self, layer: LayerPlan) -> int:
        """Bytes a token of those that wait in host memory."""
        if layer.host == Host.NOTHING:
            return 0
        width, rows = self.hidden + self.low, 0
        if layer.mode >= Mode.ATTENTION and layer.host >= Host.NARROW:
            width, rows = width + self.heads, 4 * self.heads // self.head_width
        if layer.mode >= Mode.ALL_BUT_GATE_UP and layer.host >= Host.NARROW:
            width += self.attention + self.extra + (0 if self.choices else self.hidden)
        if layer.mode >= Mode.KEEP and layer.host >= Host.EVERYTHING and not self.choices:
            width += 2 * self.mlp + self.extra
        return width * self.size + rows

    def transient(self, tokens: int, mode: Mode, is_long: bool = False) -> int:
        """Bytes that one layer's backward needs at its peak beside what the layer keeps; less for long sequences."""
        groups = (self.attention - self.heads) // (2 * self.head_width) if is_long else 1
        out = self.heads if mode == Mode.RECOMPUTE else 0
        in_attention = 2 * self.hidden + self.heads + out + 2 * (self.attention + self.heads) // groups  # the last: its kernel
        rows = self._rows(tokens, mode)
        in_mlp, chunk = 2 * self.hidden + out, 2 * self.hidden + self.extra + 3 * self.mlp  # in 8 bits other things, as many
        if rows < tokens:
            chunk += self.hidden  # of the rows before
        if mode < Mode.ALL_BUT_GATE_UP:
            in_attention += self.attention
            in_mlp += self.hidden + (self.attention if mode == Mode.RECOMPUTE and not is_long else 0)
        if mode == Mode.KEEP:
            in_attention -= 2 * self.mlp  # given back before
            chunk -= 2 * self.mlp
        return self.size * max(tokens * in_attention, tokens * in_mlp + rows * (chunk + self.choices * self.hidden))

    def forward(self, tokens: int, mode: Mode) -> int:
        """Bytes of the MLP's work in the forward, what goes in and out, and the first layer's input, which lives as long."""
        rows, given = self._rows(tokens, mode), 2 if mode >= Mode.ALL_BUT_GATE_UP else 3  # the MLP's input may be kept
        rounded = rows * self.mlp if self.compute == "fp8" else 0
        return rounded + self.size * (given * tokens * self.hidden + rows * self.mlp * (1 if mode == Mode.KEEP else 3))

    def _rows(self, tokens: int, mode: Mode) -> int:
        """That the MLP works on at a time; experts work on all."""
        return tokens if self.choices else min(tokens, KEPT_ROWS if mode == Mode.KEEP else ROWS)

    def small(self, tokens: int, mode: Mode) -> int:
        """Bytes of what a layer keeps that lie in blocks of small tensors."""
        low, rows = tokens * self.low * self.size, tokens * 4 * self.heads // self.head_width * (mode >= Mode.ATTENTION)
        return low * (low <= 2 * SMALL) + rows * (rows <= SMALL)  # the widest of the four inner activations is about half

    def head(self, tokens: int) -> int:
        """Bytes that the head needs: chunks of logits, and the last hidden states and their gradient with a copy of each."""
        return CHUNK_BYTES + 4 * tokens * self.hidden * self.size

    def written(self) -> int:
        """Bytes of the buffers into which a layer's weights are written out: in 8 bits twice, for each direction."""
        size = {"bf16": self.size, "fp8-backward": max(2, self.size), "fp8": 2}[self.compute]
        attention = size * self.hidden * (self.attention + self.heads)
        return attention + (WRITTEN_BYTES if self.choices else size * self.hidden * 3 * self.mlp)


@dataclass(frozen=True)
class Work:
    """Seconds of one layer: forward, backward with everything kept, and what each mode computes again."""

    forward: float
    backward: float
    again: tuple[float, ...]

    @classmethod
    def of(cls, shape: Shape, tokens: int, length: int, speeds: Speeds) -> Work:
        """``length``: tokens of one sequence."""
        product = lambda width: 2 * tokens * shape.hidden * width / speeds.products  # noqa: E731
        scores = 2 * tokens * min(length, tokens) * shape.heads / speeds.products
        attend, attend_back = scores / Speeds.ATTENTION[0], 2.5 * scores / Speeds.ATTENTION[1]
        forward = Speeds.IN_8_BITS if shape.compute == "fp8" else 1.0
        backward = Speeds.IN_8_BITS if shape.compute != "bf16" else 1.0
        qkv, out, gate_up = product(shape.attention), product(shape.heads), product(2 * shape.mlp)
        linear, narrow = qkv + out + gate_up + product(shape.mlp), (qkv + out) / forward
        again = gate_up / backward + narrow + attend, gate_up / backward + narrow, gate_up / backward, 0.0
        return cls(linear / forward + attend, linear / backward + attend_back, again)


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


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of plans; their layers in any order where only bytes are asked for."""

    shape: Shape
    tokens: int
    length: int | None = None  # of one sequence; None: all tokens are one
    speeds: Speeds = Speeds()
    from_graphs: bool = False
    gradients: int = 0  # bytes of those that graphs hand out

    @functools.cached_property
    def work(self) -> Work:
        return Work.of(self.shape, self.tokens, self.length or self.tokens, self.speeds)

    def host(self, plan: Sequence[LayerPlan]) -> int:
        return self.tokens * sum(count * self.shape.parked(layer) for layer, count in Counter(plan).items())

    def device(self, plan: Sequence[LayerPlan]) -> int:
        """The peak on the device: of the forward, of the head, or of one layer's backward. A graph's memory stays its own."""
        head = self.shape.head(self.tokens)
        if self.from_graphs:
            return SCRATCH + self.pool(plan) + self.beside
        last = self.tokens * (self.shape.kept(plan[-1].mode) - self.shape.parked(plan[-1]))
        return SCRATCH + self._staying(plan) + max(self._working(plan), last + head)

    @property
    def beside(self) -> int:
        """Of a step from graphs, beside their memory: the head, or gradients handed out; an H200 took 0.12 GiB more."""
        return SCRATCH + max(self.shape.head(self.tokens), self.gradients)

    def pool(self, plan: Sequence[LayerPlan]) -> int:
        """What the layers take in graphs: gradients lie where something was kept, what comes in and goes out where a layer's
        input and its gradient are counted. Pieces leave gaps: larger ones behind copies, or if attention alone is kept."""
        row, chunk = self.tokens * self.shape.hidden * self.shape.size, self.tokens * self.shape.mlp * self.shape.size
        gaps = 3 * row // 2 + chunk * any(layer.host or layer.mode == Mode.ATTENTION for layer in plan)
        return max(self._staying(plan), self.gradients) + self._working(plan) + gaps

    def block(self, plan: Sequence[LayerPlan]) -> int:
        """Of the pool, in one piece."""
        return self.pool(plan) - sum(self.shape.small(self.tokens, layer.mode) for layer in plan[:-1] if not layer.host)

    def warming_up(self, plan: Sequence[LayerPlan]) -> int:
        """What one layer alone takes before it is recorded, with what comes in and goes out."""
        return self._working(plan) + 2 * self.tokens * self.shape.hidden * self.shape.size

    def _staying(self, plan: Sequence[LayerPlan]) -> int:
        """What all layers but the last keep on the device."""
        kinds = Counter(plan[:-1]).items()
        return self.tokens * sum(count * (self.shape.kept(layer.mode) - self.shape.parked(layer)) for layer, count in kinds)

    def _working(self, plan: Sequence[LayerPlan]) -> int:
        """What the last layer keeps, and what a layer at work takes beside it: in the forward, or in the backward."""
        shape, tokens, is_long = self.shape, self.tokens, (self.length or self.tokens) >= LONG
        last, parked = shape.kept(plan[-1].mode) - shape.parked(plan[-1]), max(map(shape.parked, {*plan}))
        under_way, ahead = (0, 0) if is_long else (Offload.DEPTH, 1)  # layers whose copies go out, or come back early
        forward = max(tokens * shape.parked(layer) + shape.forward(tokens, layer.mode) for layer in {*plan})
        forward = tokens * under_way * parked + max(forward, tokens * last + shape.forward(tokens, plan[-1].mode))
        backward = max(  # of a layer behind which the last one has given back what it kept, or of the last one
            tokens * kept + shape.transient(tokens, mode, is_long)
            for kept, mode in {(shape.parked(layer), layer.mode) for layer in plan[:-1]} | {(last, plan[-1].mode)}
        )
        return max(forward, tokens * ahead * parked + backward)

    def extra_seconds(self, plan: Sequence[LayerPlan]) -> float:
        """What computing again and copying cost if no copy is waited for."""
        again = sum(count * self.work.again[layer.mode] for layer, count in Counter(plan).items())
        return again + 2 * Speeds.COPYING * self.host(plan) / self.speeds.link

    def seconds(self, plan: Sequence[LayerPlan]) -> float:
        """Of the layers' forward and backward, with copies that run beside them and are waited for where they are late."""
        forward, backward = self.work.forward, self.work.backward
        copies = [self.tokens * self.shape.parked(layer) / self.speeds.link for layer in plan]
        computed, copied = 0.0, [0.0] * Offload.DEPTH
        for seconds in copies:
            computed = max(computed + forward, copied[-Offload.DEPTH] if seconds else 0.0)
            copied.append(max(computed, copied[-1]) + seconds)
        late = sum(
            max(0.0, copy - backward - self.work.again[after.mode]) for copy, after in zip(copies, plan[1:], strict=False)
        )
        return computed + len(plan) * backward + late + self.extra_seconds(plan)


OPTIONS = [
    *(LayerPlan(mode) for mode in Mode),
    *(LayerPlan(mode, Host.NARROW) for mode in Mode),
    LayerPlan(Mode.KEEP, Host.INPUT),
]


def plan_for(cost: Cost, layers: int, device: float, host: float = 0) -> list[LayerPlan]:
    """The fastest plan of at most two kinds of layers within ``device`` and ``host`` bytes; the smallest if none fits."""
    plans = [plan for plan in candidates(layers) if cost.host(plan) <= host]
    fitting = sorted((plan for plan in plans if cost.device(plan) <= device), key=cost.extra_seconds)
    if not fitting:
        return min(plans, key=cost.device)
    best, seconds = fitting[0], float("inf")
    for plan in fitting:
        if layers * (cost.work.forward + cost.work.backward) + cost.extra_seconds(plan) >= seconds:
            break  # the others cannot be faster, even if they wait for no copy
        if cost.seconds(plan) < seconds:
            best, seconds = plan, cost.seconds(plan)
    if cost.from_graphs:  # the last layer's backward comes at once, and takes the less memory the more it has kept
        best = next(plan for mode in reversed(Mode) if cost.device(plan := [*best[:-1], LayerPlan(mode)]) <= device)
    return best


def candidates(layers: int) -> Iterator[list[LayerPlan]]:
    """Every plan of one or two kinds of layers. They alternate, so that the bus has something to do all the time.

    The last layer parks nothing: its backward comes at once.
    """
    for one, other in [(kind, kind) for kind in OPTIONS] + list(combinations(OPTIONS, 2)):
        for count in range(1, layers if one != other else 2):
            plan = [one if (index + 1) * count // layers > index * count // layers else other for index in range(layers)]
            yield [*plan[:-1], replace(one, host=Host.NOTHING)]


def offload_plan(shape: Shape, tokens: int, layers: int, host: float) -> list[LayerPlan]:
    """All layers but the last in host memory, each keeping as much as ``host`` bytes allow for all of them."""
    parked = lambda mode: (layers - 1) * tokens * shape.parked(LayerPlan(mode, Host.NARROW))  # noqa: E731
    modes = [mode for mode in (Mode.ATTENTION, Mode.ALL_BUT_GATE_UP) if parked(mode) <= host]
    best = max(modes, default=Mode.RECOMPUTE)
    return [*[LayerPlan(best, Host.NARROW)] * (layers - 1), LayerPlan(best)]


def bucket(tokens: int) -> int:
    """``tokens`` rounded up to one of eight numbers an octave: as many plans there are, however batches vary."""
    step = max(1, 1 << (tokens - 1).bit_length() >> 4)
    return -(-tokens // step) * step


def padded(length: int) -> int:
    """The length to which a graph pads rows of ``length`` tokens: what is right of them changes nothing in causal rows."""
    step = 64 if length <= 1024 else 128 if length <= 4096 else 256
    return -(-length // step) * step


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
