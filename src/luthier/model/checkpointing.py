"""Recomputing activations in the backward instead of keeping them, by the name a user gives it."""

from __future__ import annotations

import torch
from torch import nn

from luthier.errors import unknown
from luthier.model.accelerate import base_model

MODES = ("auto", "offload", "unsloth", "True", "False")


def checkpointing_mode(mode: bool | str) -> bool | str:
    """One of True, False, "auto", "offload", or an error that lists them; "unsloth" means "offload"."""
    if mode is None:
        return "auto"
    if isinstance(mode, bool) or mode in ("auto", "offload"):
        return mode
    if mode == "unsloth":
        return "offload"
    if isinstance(mode, str) and mode.lower() in ("true", "false"):
        return mode.lower() == "true"
    raise unknown("use_gradient_checkpointing", mode, MODES)


def set_checkpointing(model: nn.Module, mode: bool | str = "auto") -> nn.Module:
    """Choose what a training step of ``model`` recomputes; gives the model back.

    True: every decoder layer keeps its input only. "offload": and that input waits in pinned host memory (on a CPU-only
    machine there is nothing to offload to: True). False: nothing is recomputed. "auto": as True.
    """
    mode = checkpointing_mode(mode)
    base = base_model(model)
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
    if mode is False or not base.supports_gradient_checkpointing:
        return model
    offload = mode == "offload" and next(base.parameters()).is_cuda and torch.cuda.is_available()
    base.gradient_checkpointing_enable({"use_reentrant": False}, **({"offload": True} if offload else {}))
    return model
