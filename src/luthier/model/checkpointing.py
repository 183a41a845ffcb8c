"""Recomputing activations in the backward instead of keeping them, by the name a user gives it."""

from __future__ import annotations

from torch import nn

from luthier.errors import unknown
from luthier.model.accelerate import base_model, state_of

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


def set_checkpointing(model: nn.Module, mode: bool | str = "auto", memory_budget: float | None = None) -> nn.Module:
    """Choose what a training step of ``model`` computes again instead of keeping it; gives the model back.

    "auto": as little as ``memory_budget`` allows (GiB on the device; None: what the model was loaded with, or all that is
    free; without a GPU nothing, unless a budget is given). True: every layer keeps only its input. False: nothing is
    computed again. "offload": layers keep what they can in pinned host memory. The loss and the gradients are the same.
    Layers that run stock are checkpointed by transformers, unless nothing is to be computed again.
    """
    mode = checkpointing_mode(mode)
    if memory_budget is not None and (isinstance(memory_budget, bool) or memory_budget <= 0):
        raise ValueError(
            f"memory_budget={memory_budget} must be a number of GiB above 0, or None for what the device has free."
        )
    base, state = base_model(model), state_of(model)
    dial = None if state is None else state.dial
    if memory_budget is None and hasattr(base, "luthier"):
        memory_budget = base.luthier.memory_budget
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
    if dial is not None:
        state.graphs.clear()  # they hold the memory of plans that are over
        dial.follow_flag()
        if mode == "auto":
            trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
            dial.set_automatic(memory_budget, sum(parameter.nbytes for parameter in trained), next(iter(trained), None))
        elif mode == "offload":
            dial.set_offload()
    on_gpu = next(base.parameters()).is_cuda
    if mode == "auto" and not on_gpu and memory_budget is None:
        mode = False
    if mode is not False and base.supports_gradient_checkpointing:
        stock_offload = mode == "offload" and dial is None and on_gpu
        base.gradient_checkpointing_enable({"use_reentrant": False}, **({"offload": True} if stock_offload else {}))
    return model
