"""In which precision the frozen weights of a model are multiplied in training, by the name a user gives it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from luthier.errors import UnsupportedError, unknown
from luthier.model.accelerate import base_model, state_of
from luthier.ops.fp8 import has_tensor_cores

COMPUTE = ("bf16", "fp8-backward", "fp8")
IN_8_BITS = {"fp8-backward": "the frozen weights' products of the backward", "fp8": "all products with frozen weights"}


def require_compute(compute: str, full_finetuning: bool = False) -> None:
    """Raise unless ``compute`` is one of ``COMPUTE`` and the current device can do it (a CPU emulates it)."""
    if compute not in COMPUTE:
        raise unknown("compute", compute, COMPUTE)
    if compute == "bf16":
        return
    if full_finetuning:
        raise UnsupportedError(
            f"compute={compute!r} is for frozen weights, and full_finetuning=True trains them all. Use compute='bf16'."
        )
    if torch.cuda.is_available() and not has_tensor_cores(torch.device("cuda", torch.cuda.current_device())):
        major, minor = torch.cuda.get_device_capability()
        raise UnsupportedError(
            f"compute={compute!r} needs a GPU that multiplies 8-bit floats (NVIDIA Ada, Hopper, Blackwell: sm_89 and later); "
            f"{torch.cuda.get_device_name()} is sm_{major}{minor}. Use compute='bf16', which is exact."
        )


def set_compute(model: nn.Module, compute: str = "bf16") -> nn.Module:
    """Choose how ``model``, which is accelerated, multiplies its frozen weights in training; gives the model back.

    "bf16": in the dtype of the activations, exactly. "fp8-backward": the loss stays the same, the backward multiplies in
    8 bits. "fp8": the forward too. The head, embeddings, trained weights and layers that run stock are never touched,
    and evaluation is exact. Turning on anything but "bf16" warns of what it costs.
    """
    require_compute(compute)
    state = state_of(model)
    if state is None:
        if compute == "bf16":
            return model
        raise UnsupportedError(
            f"compute={compute!r} works in Luthier's layers, and {type(base_model(model)).__name__} runs stock. "
            "Use compute='bf16', or an architecture of docs/architectures.md."
        )
    if compute not in ("bf16", state.compute):
        warnings.warn(
            f"compute={compute!r}: {IN_8_BITS[compute]} run in 8 bits, faster and less exact. docs/speed.md says what it "
            "costs and when not to use it; compare a short run with compute='bf16'.",
            UserWarning,
            stacklevel=2,
        )
    if compute != state.compute:
        state.compute = compute
        state.dial.plans.clear()  # they were made for other speeds and buffers
        state.graphs.clear()
        state.workspace.buffers.clear()
    return model
