"""What llama.cpp computes otherwise than a model and no file can change: named, measured, and not held against the file.

So far one thing: llama.cpp rounds the ramp of YaRN, between waves that are kept and waves that are stretched, to whole
dimensions. A model with ``truncate: false``, as gpt-oss is published, does not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FAR = 4096  # position at which the angles are compared


@contextlib.contextmanager
def as_llama_cpp(model: nn.Module) -> Iterator[str]:
    """Inside, ``model`` computes what llama.cpp can; the value says what that changes, "" where it is nothing."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or rope.get("truncate", True):
        yield ""
        return
    rounded = copy.deepcopy(config)
    rounded.rope_parameters = {**rope, "truncate": True}
    rotary = [module for module in model.modules() if getattr(module, "rope_type", None) == "yarn"]
    kept = [module.inv_freq for module in rotary]
    try:
        for module, frequencies in zip(rotary, kept, strict=True):
            module.inv_freq = ROPE_INIT_FUNCTIONS["yarn"](rounded, frequencies.device)[0].to(frequencies.dtype)
        off = FAR * (rotary[0].inv_freq - kept[0]).abs().max().item()
        yield (
            f"llama.cpp rounds the ramp of YaRN to whole dimensions in every GGUF file of {config.model_type}; the model does "
            f"not (truncate: false). At position {FAR} angles are off by up to {off:.1f} radians"
        )
    finally:
        for module, frequencies in zip(rotary, kept, strict=True):
            module.inv_freq = frequencies


def measured(what: str, model: list[torch.Tensor], llama_cpp: list[torch.Tensor]) -> str:
    """``what``, with how far the logits ``[length, vocabulary]`` of the two lie apart."""
    p, q = (torch.cat(logits).double() for logits in (model, llama_cpp))
    divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return (
        f"{what}; on these prompts logits differ by up to {(p - q).abs().max():.2g}, KL {divergence:.1e}, "
        f"and the first choice is the same at {same:.1%} of positions"
    )
