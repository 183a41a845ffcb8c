"""``model.generate`` in either mode and with padding on either side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.model.accelerate import base_model


def generate(model: PreTrainedModel, *args: object, **kwargs: object) -> object:
    """transformers' ``generate``, without a switch to evaluation and with left- or right-padded batches.

    A right-padded batch is moved to the left first: a decoder continues from the last position, which must be text.
    The result starts with the prompts as moved.
    """
    if args and isinstance(args[0], torch.Tensor) and "input_ids" not in kwargs:
        kwargs["input_ids"], args = args[0], args[1:]
    with evaluating(model):
        return type(model).generate(model, *args, **_left_padded(kwargs))


def _left_padded(inputs: dict) -> dict:
    """``inputs`` with every tensor of the shape of ``attention_mask`` [batch, length] turned so that padding comes first."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask[:, -1].all()):
        return inputs
    length = mask.shape[1]
    padding = length - 1 - mask.flip(1).int().argmax(dim=1)  # position of each row's last real token
    shift = length - 1 - padding
    order = (torch.arange(length, device=mask.device)[None] - shift[:, None]) % length
    alike = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.shape == mask.shape}
    return inputs | {name: x.gather(1, order.to(x.device)) for name, x in alike.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no recomputation) inside, the modules' own modes restored behind."""
    training = [module for module in model.modules() if module.training]
    base_model(model).eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
