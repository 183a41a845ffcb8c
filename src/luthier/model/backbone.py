"""What the rows of a batch look like, found once a forward instead of in every layer.

A layer gets its mask from transformers as a matrix of tokens by tokens wherever rows are packed or a window is shorter
than them. The fast kernels want the structure itself: a window, and where sequences begin. The backbone's own arguments
tell it, so the class that ``accelerate`` gives a backbone reads them, and the fused layers ignore the matrix.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from luthier.errors import UnsupportedError
from luthier.model.clock import Clock
from luthier.model.dial import Dial
from luthier.model.graphs import Graphs
from luthier.model.host_memory import movable
from luthier.ops.bands import Padding, Segments
from luthier.ops.workspace import Workspace

CACHE_NAMES = ("past_key_values", "cache")  # what transformers calls a key-value cache; the second from 5.24 on


@dataclass(frozen=True)
class Structure:
    """Every row is causal, within its layer's window, and within ``segments`` if it holds several sequences."""

    segments: Segments | None = None
    padding: Padding | None = None  # what the mask says too


@dataclass
class ModelState:
    """What all fused layers of a model share."""

    dial: Dial
    workspace: Workspace = field(default_factory=Workspace)
    compute: str = "bf16"  # how frozen weights are multiplied: one of model.compute.COMPUTE
    said: set[str] = field(default_factory=set)  # reasons for stock forwards that this model has already given
    clock: Clock | None = None  # of a model that was loaded here, until its first step
    structure: Structure | None = None  # of the batch in the forward that runs now; None: only the mask knows
    tied: bool = False  # the head reads the embedding table
    graphs: Graphs = field(init=False)

    def __post_init__(self) -> None:
        self.graphs = Graphs(self.dial, self.workspace)


def backbone_class_members(stock: type[nn.Module]) -> dict:
    """The methods that make a subclass of a backbone (LlamaModel) tell its layers the structure of the batch."""
    signature = inspect.signature(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        if not self.training or not torch.is_grad_enabled():
            self.luthier_state.graphs.step_aside()
        if not self.training:
            return stock.forward(self, *args, **kwargs)
        if getattr(self, "_is_replica", False):
            raise UnsupportedError(
                "torch.nn.DataParallel trains on several GPUs in threads of one process, which would share this batch's state. "
                "Start one process a GPU (torchrun --nproc-per-node=N script.py), or show it one (CUDA_VISIBLE_DEVICES=0)."
            )
        state = self.luthier_state
        if state.clock is not None and torch.is_grad_enabled():
            state.clock.forward_begins(self.device)
        call = signature.bind(self, *args, **kwargs).arguments
        extra = next((call[name] for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD and name in call), {})
        asked = cache_of({**call, **extra}) is not None or call.get("use_cache") is not None
        if torch.is_grad_enabled() and "use_cache" in signature.parameters and not asked:
            kwargs["use_cache"] = False  # nobody who trains has use for a cache, which fused layers do without
        state.dial.embedding = movable(self.get_input_embeddings(), state.tied)
        try:
            structure = state.structure = find_structure({**call, **extra})
            return state.graphs.around(functools.partial(stock.forward, self, *args, **kwargs), self.layers, structure)
        finally:
            state.structure = None
            if state.dial.offload is not None:
                state.dial.offload.settle()

    def _apply(self, *args, **kwargs):
        self.luthier_state.graphs.clear()  # parameters move: graphs would keep the memory that they leave
        return stock._apply(self, *args, **kwargs)

    return {"forward": forward, "_apply": _apply}


def cache_of(call: dict) -> object:
    """The key-value cache among the arguments of a forward, or None."""
    return next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)


def find_structure(call: dict) -> Structure | None:
    """The structure that a backbone's arguments describe, or None where only a mask can say it (images).

    As transformers does, positions that start again mean a new sequence only where there is no attention mask.
    """
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if cache_of(call) is not None:
        return None
    if mask is not None:
        return _padded(mask.bool()) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if call.get("cu_seq_lens_q") is not None:
        return Structure(Segments(call["cu_seq_lens_q"].int(), int(call["max_length_q"])))
    if positions is None or (positions.ndim == 3 and positions.shape[0] == 3):
        return Structure()
    if positions.ndim != 2:
        return None
    starts = positions.diff(dim=-1) != 1
    if not bool(starts.any()):
        return Structure()
    rows = next((len(call[name]) for name in ("input_ids", "inputs_embeds") if call.get(name) is not None), 1)
    return Structure(_segments(starts[0])) if rows == 1 else None  # one row of positions may be that of several rows of tokens


def _padded(mask: Tensor) -> Structure | None:
    """From an attention mask (B, T): whole rows, or padding at their ends; None if there are holes."""
    first, after = mask.int().argmax(1), mask.shape[1] - mask.flip(1).int().argmax(1)
    width = mask.sum(1)
    is_whole, has_holes = torch.stack((mask.all(), (after - first != width).any())).tolist()
    if is_whole:
        return Structure()
    return None if has_holes else Structure(padding=Padding(first.int(), after.int() - 1))


def _segments(starts: Tensor) -> Segments:
    """From whether token i + 1 begins a sequence, (T - 1,) bool."""
    inner = starts.nonzero().squeeze(1) + 1
    ends = torch.tensor([0, starts.shape[0] + 1], device=starts.device)
    bounds = torch.cat((ends[:1], inner, ends[1:])).int()
    return Segments(bounds, int(bounds.diff().max()))
