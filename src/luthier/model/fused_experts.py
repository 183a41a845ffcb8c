"""Experts in 16 bits by grouped products in training, and peft's adapters on them without a change to any weight.

peft adds its adapter to a whole stack of experts in every forward, and the backward makes the gradient of all of it. The
classes that ``accelerate`` gives the experts and peft's wrappers hand A and B to the products instead. (4-bit experts are
``experts.Nf4Experts``, which never do anything else.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from luthier.model.backbone import ModelState
from luthier.model.experts import Factors, Nf4Experts, experts_forward, factors_of, is_experts
from luthier.model.fused_layer import say_once


@dataclass
class ExpertsState:
    """What ``accelerate`` gives an experts module besides its class."""

    model: ModelState
    factors: dict[str, Factors] = field(default_factory=dict)  # by the stack's name; set by the wrappers in a forward


def is_stock_experts(module: nn.Module) -> bool:
    return is_experts(module) and not isinstance(module, Nf4Experts)


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's own wrapper of a stack of experts."""
    return type(module) is ParamWrapper and is_stock_experts(module.get_base_layer())


def experts_class_members(stock: type[nn.Module]) -> dict:
    """The methods that make a subclass of a fused experts class (Qwen3MoeExperts) run by grouped products in training."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.training:
            reason = why_stock(self)
            if reason is None:
                return experts_forward(self, hidden_states, top_k_index, top_k_weights, self.luthier_state.factors)
            say_once(self, reason)
        return stock.forward(self, hidden_states, top_k_index, top_k_weights)

    return {"forward": forward}


def wrapper_class_members(stock: type[ParamWrapper]) -> dict:
    """The methods that make a subclass of peft's wrapper give its factors to experts of the class above."""

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        module, active = self.get_base_layer(), [name for name in active_adapters if name in self.lora_A]
        if not module.training or why_stock(module) or len(active) != 1:
            with stock._activate_lora(self, active_adapters):
                yield
            return
        factors = module.luthier_state.factors
        factors[self.parameter_name] = factors_of(self, active[0])
        try:
            yield
        finally:
            del factors[self.parameter_name]

    return {"_activate_lora": _activate_lora}


def why_stock(module: nn.Module) -> str | None:
    """What of an experts module the grouped products do not cover, now."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return "its own weights are trained"
    if nn.utils.parametrize.is_parametrized(module):
        return "peft itself adds the adapter to its weights (several are active, or accelerate() was not called since)"
    return None
