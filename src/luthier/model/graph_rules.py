"""Which batches cannot run from CUDA graphs, whatever their length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.ops.attention import kernel_for

if TYPE_CHECKING:
    from luthier.model.backbone import Structure
    from luthier.model.blocks import AttentionBlock
    from luthier.model.layer_blocks import Blocks

GRADIENT_BYTES = 1 << 30  # of what trains; beyond, the copies of its gradients cost more than Python does


def obstacle(x: Tensor, first: Blocks, layers: Iterable[nn.Module], structure: Structure | None, fused: int) -> str:
    """Why x (B, T, D) goes through ``layers`` without graphs, or nothing.

    ``first``: the blocks of the first layer; ``fused``: how many of the layers have some.
    """
    if structure is None:
        return "only a mask tells what its tokens see"
    if first.mlp is None:
        return "its experts have none"
    if watched(layers):
        return "hooks are attached to layers"
    if sharded(layers):
        return "its weights are sharded: they lie elsewhere in every pass"
    if first.are_unique:
        return "the masks of dropout, or several adapters as one, are made anew in every pass"
    if x.ndim != 3:
        return "its input is not (rows, tokens, width)"
    if not reads_bands(first.attention, x, structure):
        return "its rows are packed or padded, and the kernel of its attention reads their lengths on the CPU"
    if fused * sum(parameter.nbytes for parameter in first.trained()) > GRADIENT_BYTES:
        return "copying the gradients of so much that trains would take longer"
    return ""


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
