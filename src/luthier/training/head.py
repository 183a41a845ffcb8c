"""Our answer to what TRL's trainers ask of a model: ``model(..., labels=labels, fused_lm_head=True)``.

TRL's own projects every token once more in the backward, keeps a mask of padding that changes nothing, and multiplies by
``lm_head.weight``, which does not see a LoRA on the head: it refuses one. Ours goes through ``ops.token_logprobs``, and calls
an adapted head as the module it is. What it does not know (a trained head, router losses, gradients of entropies) stays TRL's,
and so does a model whose layers are stock.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from luthier import adapters
from luthier.adapters.spec import Spec
from luthier.errors import UnsupportedError
from luthier.model.accelerate import base_model, is_accelerated
from luthier.model.head import head_values, needed_mask, plain_linear
from luthier.ops.linear_cross_entropy import CHUNK_BYTES
from luthier.ops.token_logprobs import TokenScores, token_logprobs, token_logprobs_of

IGNORED = -100


@contextmanager
def own_head(model: nn.Module, temperature: float = 1.0) -> Iterator[None]:
    """Around TRL's constructor: behind it the model answers here, and a LoRA on its head is let through.

    Raises ``UnsupportedError`` for such a LoRA where the model does more with its logits than is known here.
    """
    head, base = model.get_output_embeddings(), base_model(model)
    spec, is_adapted = adapters.find(base.config), isinstance(head, BaseTunerLayer)
    if is_adapted and (spec is None or getattr(base.config.get_text_config(), "output_router_logits", False)):
        raise UnsupportedError(
            f"A LoRA on the head of {base.config.model_type} is not supported: take lm_head out of target_modules, and train "
            "it whole with modules_to_save=['lm_head'] if it must learn."
        )
    if is_adapted:
        model.get_output_embeddings = lambda: head.get_base_layer()  # on this instance, while TRL looks
    try:
        yield
    finally:
        if is_adapted:
            del model.get_output_embeddings
    if is_adapted or (spec is not None and is_accelerated(base)):
        _answer_here(base, spec, temperature)


def _answer_here(base: PreTrainedModel, spec: Spec, temperature: float) -> None:
    trl_forward, config = base.forward, base.config.get_text_config()
    shaping = {**head_values(config, spec.head), "temperature": temperature}

    @functools.wraps(type(base).forward)  # generate reads its signature
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        asks_more = kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits", _routes(config))
        head = self.get_output_embeddings()
        if not fused_lm_head or not isinstance(head, BaseTunerLayer) and (asks_more or _frozen_linear(head) is None):
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs = {**kwargs, "use_cache": False}
        kwargs.pop("num_items_in_batch", None)
        if spec.vision is None and kwargs.get("position_ids") is None:
            kwargs["attention_mask"] = needed_mask(kwargs.get("attention_mask"), labels, IGNORED)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != IGNORED
        scores = _scores(head, hidden[mask], targets[mask], shaping)
        # which keeps the graph where no label is valid
        spread = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in scores)
        return FusedCausalLMOutput(**dict(zip(TokenScores._fields, spread, strict=True)), label_mask=mask)

    base.forward = MethodType(forward, base)


def _routes(config) -> bool:
    return bool(getattr(config, "output_router_logits", False))


def _frozen_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that a head is, if it does not train and lies whole on this device."""
    linear = plain_linear(head)
    if linear is None or isinstance(linear.weight, DTensor):
        return None
    return None if any(parameter.requires_grad for parameter in linear.parameters()) else linear


def _scores(head: nn.Module, hidden: Tensor, targets: Tensor, shaping: dict) -> TokenScores:
    """Of hidden (N, D) and targets (N,)."""
    if not isinstance(head, BaseTunerLayer):
        linear = _frozen_linear(head)
        hidden, targets = hidden.to(linear.weight.device), targets.to(linear.weight.device)
        return token_logprobs(hidden, linear.weight, targets, linear.bias, **shaping)

    def score(part: Tensor, target: Tensor) -> TokenScores:
        return token_logprobs_of(head(part), target, **shaping)

    rows = max(1, CHUNK_BYTES // (4 * head.out_features))
    parts = [
        checkpoint(score, *chunk, use_reentrant=False) for chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))
