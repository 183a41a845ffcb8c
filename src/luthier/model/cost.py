"""What a plan of the memory dial costs, in bytes and seconds, and the fastest one by it.

A plan is one ``LayerPlan`` a layer. All of this is arithmetic: nothing is allocated, and no device is asked.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from luthier.model.blocks import KEPT_ROWS, LONG, ROWS, Mode
from luthier.model.card import Speeds
from luthier.model.offload import Host, Offload
from luthier.ops.experts import WRITTEN_BYTES
from luthier.ops.linear_cross_entropy import CHUNK_BYTES

SCRATCH = 1 << 27  # bytes that libraries take for themselves
SMALL = 1 << 20  # bytes up to which the allocator puts a tensor into blocks of small ones


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps for its backward, and what of it waits in pinned host memory."""

    mode: Mode
    host: Host = Host.NOTHING


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
