"""A model that was loaded in 4 or 8 bits, computing with the 16-bit weights of its checkpoint, one of them at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from peft.tuners.lora.layer import LoraLayer
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
def computing_with(model: nn.Module, weights: dict[nn.Linear, Callable[[], Tensor]]) -> Iterator[None]:
    """While open, each of these layers of ``model`` reads its weight anew for every forward.

    For evaluation only: the stock forward runs.
    """
    methods = [(layer, "forward", partial(_linear, layer, read)) for layer, read in weights.items()]
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.get_base_layer() in weights:  # DoRA takes the norms of a weight that it reads
            norms = partial(_norms, weights[layer.get_base_layer()])
            methods += [(dora, "get_weight_norm", partial(norms, dora)) for dora in layer.lora_magnitude_vector.values()]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in methods]
    for owner, name, method in methods:
        setattr(owner, name, method)
    try:
        yield
    finally:
        for owner, name, method in before:
            delattr(owner, name)
            if method is not None:
                setattr(owner, name, method)


def _linear(layer: nn.Linear, read: Callable[[], Tensor], x: Tensor) -> Tensor:
    return F.linear(x, read().to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _norms(read: Callable[[], Tensor], dora: nn.Module, weight: Tensor, lora_weight: Tensor, scaling: float, **given) -> Tensor:
    return type(dora).get_weight_norm(dora, read().to(weight), lora_weight, scaling, **given)
