"""A LoRA on the language-model head, which TRL refuses: its loss multiplies by ``lm_head.weight`` and would not see it.

Here the head is called as the module it is, a chunk of tokens at a time, so that all logits never exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from luthier import adapters
from luthier.errors import UnsupportedError
from luthier.model.accelerate import base_model
from luthier.model.head import head_values
from luthier.ops.linear_cross_entropy import CHUNK_BYTES, shape_logits


@contextmanager
def adapted_head_allowed(model: nn.Module) -> Iterator[None]:
    """Around TRL's constructor: a LoRA on the head is let through, and what it computes is scored right.

    Raises ``UnsupportedError`` where the model does more with its logits than is known here.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    base = base_model(model)
    spec = adapters.find(base.config)
    if spec is None or getattr(base.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedError(
            f"A LoRA on the head of {base.config.model_type} is not supported: take lm_head out of target_modules, and train "
            "it whole with modules_to_save=['lm_head'] if it must learn."
        )
    model.get_output_embeddings = lambda: head.get_base_layer()  # on this instance, while TRL looks
    try:
        yield
    finally:
        del model.get_output_embeddings
    _score_through_head(base, head_values(base.config.get_text_config(), spec.head))


def _score_through_head(base: PreTrainedModel, shaping: dict) -> None:
    """Give the forward that TRL put on ``base`` our answer to ``fused_lm_head=True``."""
    trl_forward = base.forward

    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return trl_forward(*args, fused_lm_head=False, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        scores = token_scores(hidden[mask], self.get_output_embeddings(), targets[mask], shaping)
        zeros = hidden.sum(-1).float() * 0.0  # keeps the graph where no label is valid
        log_probs, entropy, is_top1 = (zeros.to(score.dtype).masked_scatter(mask, score) for score in scores)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    base.forward = MethodType(forward, base)


def token_scores(hidden: Tensor, head: nn.Module, targets: Tensor, shaping: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden (N, D) and targets (N,): log-probability and entropy in fp32, and whether the target is the top-1 token."""

    def score(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = shape_logits(head(part).float(), **shaping).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
        return log_probs.gather(-1, target[:, None])[:, 0], entropy, log_probs.argmax(-1) == target

    rows = max(1, CHUNK_BYTES // (4 * head.out_features))
    parts = [
        checkpoint(score, *chunk, use_reentrant=False) for chunk in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
