"""One forward through the decoder layers, as far as it has come, and what a graph of it depends on.

A graph does on the same addresses the same again, so the key of a pass holds every address, shape, number and flag that its
kernels are launched with: whatever has changed makes another key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.ops.bands import band
from luthier.ops.lora_linear import Projection
from luthier.ops.nf4 import Quantised

if TYPE_CHECKING:
    from luthier.model.backbone import Structure
    from luthier.model.cost import Shape
    from luthier.model.fused_layer import LayerRun
    from luthier.model.recording import Flight
    from luthier.ops.bands import Band

HALVES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
ALIGNED = 256  # bytes, beyond which no kernel asks
PLAIN = {int, float, bool, str, type(None), type}


class Pass:
    """One forward through the layers. While it is ``deferred``, they are noted down and do nothing yet."""

    def __init__(self, x: Tensor, structure: Structure, deferred: bool) -> None:
        self.x = self.last = x  # what went into the first layer, and what the last one so far gave
        self.version = x._version
        self.segments = structure.padding or structure.segments  # of padded or packed rows
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
        return x.shape[0], padded(x.shape[1]), x.shape[2], x.dtype, x.device, x.requires_grad, type(self.segments)

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
        windows = {layer.call.window for layer in self.layers if self.segments is not None}
        return {window if window is not None and window < length else None for window in windows}

    def band(self, window: int | None) -> Band:
        """What each token sees, as a graph pads the rows."""
        return band(padded(self.x.shape[1]), window, replace(self.segments, bands={}), self.x.device)

    @property
    def tokens(self) -> int:
        """With the padding of a graph."""
        return self.x.shape[0] * padded(self.x.shape[1])

    @property
    def parks(self) -> bool:
        """Whether a layer keeps something in host memory."""
        return any(layer.plan.host for layer in self.layers)

    def widths(self) -> Shape:
        first = self.layers[0]
        return first.blocks.shape(self.x, first.state.model.compute)

    def tensors(self) -> list[Tensor]:
        """What the kernels of the layers read, but for quantised weights."""
        return [leaf for leaves in self.leaves for leaf in leaves if isinstance(leaf, Tensor)]

    def quantised(self) -> list[Quantised]:
        return [leaf for leaves in self.leaves for leaf in leaves if isinstance(leaf, Quantised)]

    def operands(self) -> list[Tensor]:
        """What the kernels of the layers read."""
        return [*self.tensors(), *(weight.packed for weight in self.quantised())]

    def parameters(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.blocks.trained()]

    def forms(self) -> list:
        """What of each layer chooses its kernels; in 8 bits all are unlike, for each keeps what it finds out of its weights."""
        if self.layers[0].state.model.compute != "bf16":
            return list(range(len(self.layers)))
        return [(form(leaves), layer.plan.mode) for leaves, layer in zip(self.leaves, self.layers, strict=True)]

    def eager(self) -> Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return x


def padded(length: int) -> int:
    """The length to which a graph pads rows of ``length`` tokens: what is right of them changes nothing in causal rows."""
    step = 64 if length <= 1024 else 128 if length <= 4096 else 256
    return -(-length // step) * step


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


def form(found: Iterable[object]) -> tuple:
    """What of some leaves chooses kernels: not where they lie, but whether kernels find it aligned."""
    return tuple([leaf if type(leaf) in PLAIN else _form(leaf) for leaf in found])


def _form(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad, leaf.data_ptr() % ALIGNED
    return form(vars(leaf).values()) if type(leaf) is Quantised else leaf


def _address(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    return id(leaf) if type(leaf) is Quantised else leaf  # whatever a quantised weight knows of itself may be read
