"""Experts of a loaded model: transformers keeps all of a layer in one stack, a GGUF file has three tensors of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import bitsandbytes as bnb
import torch
from torch import nn

from luthier.ops.nf4 import dequantise, quantised

SWITCHES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what transformers sets on every module of experts


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(``"blk.<layer>"``, module) of every stack of experts."""
    for path, module in model.named_modules():
        layer = re.search(r"\blayers\.(\d+)\.", path)
        if layer and all(isinstance(getattr(module, switch, None), bool) for switch in SWITCHES):
            yield f"blk.{layer[1]}", module


def expert_tensors(
    prefix: str, experts: nn.Module, added: Mapping[str, torch.Tensor] | None = None
) -> Mapping[str, torch.Tensor]:
    """GGUF tensor name -> that part of the module's stacks, a view ``[experts, out, in]``.

    ``added``: what is added to a stack (by its name in the module) before, as an adapter does.
    """
    stacks = [_stack(experts, name, (added or {}).get(name)) for name in _names(experts)]
    return {f"{prefix}.ffn_{name}_exps.weight": view for name, view in _parts(experts, *stacks).items()}


def expert_biases(prefix: str, experts: nn.Module) -> Mapping[str, torch.Tensor]:
    """GGUF tensor name -> those biases of the module, ``[experts, out]``; empty where it has none."""
    biases = [getattr(experts, f"{name}_bias") for name in _names(experts)] if experts.has_bias else None
    return {f"{prefix}.ffn_{name}_exps.bias": view for name, view in _parts(experts, *biases).items()} if biases else {}


def _parts(experts: nn.Module, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    """What gate and up hold together, apart: ``[experts, out, ...]``."""
    if not experts.has_gate:
        return {"down": down, "up": up}
    gate, up = up.chunk(2, 1) if experts.is_concatenated else (up[:, ::2], up[:, 1::2])
    return {"down": down, "gate": gate, "up": up}


@torch.no_grad()
def squared_inputs(
    experts: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the tokens of every expert: of the squared inputs of its first matrices float32 ``[experts, hidden]`` and of
    its last one ``[experts, inner]``; and how many tokens, ``[experts]``.

    ``hidden``: ``[tokens, hidden]``; ``chosen``: the experts of every token, ``[tokens, k]``. An adapter of 4-bit experts
    is left out of what goes into the last matrix.
    """
    up, down = (_stack(experts, name) for name in _names(experts))
    counts = torch.zeros(experts.num_experts, device=hidden.device)
    first, last = counts.new_zeros(len(counts), up.shape[-1]), counts.new_zeros(len(counts), down.shape[-1])
    for expert in chosen.unique().tolist():
        if expert >= len(counts):  # expert parallelism marks the experts of other devices so
            continue
        x = hidden[(chosen == expert).any(1)]
        inner = x @ up[expert].T.to(x.dtype)
        if experts.has_bias:
            inner = inner + getattr(experts, f"{_names(experts)[0]}_bias")[expert]
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        counts[expert] = len(x)
        first[expert], last[expert] = x.float().square().sum(0), inner.float().square().sum(0)
    return first, last, counts


def _names(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _stack(experts: nn.Module, name: str, added: torch.Tensor | None = None) -> torch.Tensor:
    """A stack ``[experts, out, in]``, expanded if it is in 4 bits."""
    stack = getattr(experts, name)
    if isinstance(stack, bnb.nn.Params4bit):
        stack = dequantise(quantised(stack)).view(stack.quant_state.shape)
    if added is not None:
        stack = stack.float() + added
    return stack.transpose(1, 2) if experts.is_transposed else stack
