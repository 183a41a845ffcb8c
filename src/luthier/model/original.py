"""A model that was loaded in 4 or 8 bits, computing with the 16-bit weights of its checkpoint, one of them at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from luthier.model.layout import Group
from luthier.model.merge import Merge


def original_weights(merge: Merge) -> dict[nn.Linear, Callable[[], Tensor]] | None:
    """What reads the original weight of every quantised layer that ``merge`` merges onto it.

    None where such a layer is not one matrix of the checkpoint (experts), so that there is no such view of the model.
    """
    readers = {}
    for group in merge.groups:
        slots = [merge.slots[name] for name in group.parameters if merge.slots[name].is_quantised]
        if not slots or not merge.reads_checkpoint(group):
            continue
        if not group.is_one_to_one or not isinstance(slots[0].owner, nn.Linear):
            return None
        readers[slots[0].owner] = partial(_read, merge, group)
    return readers


def _read(merge: Merge, group: Group) -> Tensor:
    (name,) = group.tensors
    return merge.read(name, group)


@contextlib.contextmanager
def computing_with(weights: dict[nn.Linear, Callable[[], Tensor]]) -> Iterator[None]:
    """While open, each of these layers reads its weight anew for every forward. For evaluation only: the stock forward runs."""
    before = {layer: layer.__dict__.get("forward") for layer in weights}
    for layer, read in weights.items():
        layer.forward = partial(_linear, layer, read)
    try:
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _linear(layer: nn.Linear, read: Callable[[], Tensor], x: Tensor) -> Tensor:
    return F.linear(x, read().to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
