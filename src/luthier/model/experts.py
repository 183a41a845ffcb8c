"""Mixture-of-experts layers in 4 bits.

transformers keeps all experts of a layer in one 3-D parameter, which bitsandbytes' quantiser passes over: a "4-bit" load
would leave most of the model in 16 bits. Here the stacks are quantised while loading, the weights are expanded for the
products only (ops/experts.py), and the adapter rides in those, so that no model ever holds its experts in 16 bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import _default_apply_gate
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from luthier import adapters
from luthier.errors import UnsupportedError
from luthier.ops.expert_gate import Gate
from luthier.ops.experts import ExpertLinear, experts
from luthier.ops.gated_mlp import ACTIVATIONS
from luthier.ops.nf4 import quantised

Factors = tuple[Tensor, Tensor, float]  # A (experts, rank, in), B (experts, out, rank), the scale of their product
METHOD = "luthier_bnb_4bit"
STACKS = ("gate_up_proj", "up_proj", "down_proj")
SWITCHES = ("is_transposed", "has_bias", "has_gate")  # what transformers sets on every fused experts module
BLOCK = 64


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused expert stacks, whose forward we know how to take."""
    return all(isinstance(getattr(module, switch, None), bool) for switch in SWITCHES)


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every stack of expert weights, ``{parameter name: parameter}``, quantised or not."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if is_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name in STACKS
    }


def routed(config: PreTrainedConfig) -> tuple[int, int]:
    """(how many experts a token goes to, the inner width of one) in a mixture with this config."""
    return config.num_experts_per_tok, getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def quantising_config(**settings: object) -> BitsAndBytesConfig:
    """A ``BitsAndBytesConfig`` under which the expert stacks are quantised too."""
    return _register()(**settings)


@functools.cache
def _register() -> type[BitsAndBytesConfig]:
    """Give transformers our quantiser under our own name, at first use."""

    class ExpertsConfig(BitsAndBytesConfig):
        def __init__(self, **settings: object) -> None:
            super().__init__(**settings)
            self.quant_method = METHOD

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(ExpertsConfig)
        register_quantizer(METHOD)(ExpertsQuantizer)
    return ExpertsConfig


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantiser of linear layers, and of expert stacks."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        module, name = get_module_from_name(model, param_name)
        if is_experts(module) and name in STACKS:
            return math.prod(getattr(module, name).shape[1:]) % BLOCK == 0  # an expert must not share a block with the next
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _QuantiseStack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        for module in model.modules():
            if is_experts(module) and any(_is_quantised(stack) for stack in module.parameters(recurse=False)):
                run_in_4bit(module)
        return super()._process_model_after_weight_loading(model, **kwargs)


class _QuantiseStack(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, list[Tensor]], full_layer_name=None, model=None, **kwargs) -> dict[str, Tensor]:
        stacks, others = {}, {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            (stacks if is_experts(module) else others)[name] = value
        result = super().convert(others, full_layer_name=full_layer_name, model=model, **kwargs)
        settings = self.hf_quantizer.quantization_config
        for name, value in stacks.items():
            value = value[0] if isinstance(value, list) else value
            result[name] = bnb.nn.Params4bit(
                value,
                requires_grad=False,
                blocksize=BLOCK,
                compress_statistics=settings.bnb_4bit_use_double_quant,
                quant_type=settings.bnb_4bit_quant_type,
                quant_storage=torch.uint8,
            ).to(value.device)
        return result


def run_in_4bit(module: nn.Module) -> None:
    """Give a fused experts module, some of whose stacks are ``Params4bit``, a forward that takes them."""
    stock = type(module)
    module.__class__ = type(stock.__name__, (Nf4Experts, stock), {"__module__": stock.__module__})
    module.lora_factors = {}


def _is_quantised(parameter: Tensor) -> bool:
    return isinstance(parameter, bnb.nn.Params4bit)


class Nf4Experts(nn.Module):
    """The forward of a fused experts module over 4-bit stacks; mixed into the module's own class, instance by instance."""

    lora_factors: dict[str, Factors]  # by the stack's name; set by ExpertsLora in a forward

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, self.lora_factors)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, lora_factors: dict[str, Factors]
) -> Tensor:
    """What a fused experts module computes: (tokens, hidden), (tokens, k), (tokens, k) -> (tokens, hidden)."""
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    up, down = (_expert_linear(module, name, lora_factors.get(name, (None, None, 1.0))) for name in names)
    with torch.autocast(device, enabled=False):
        output = experts(hidden_states.to(dtype), top_k_index, top_k_weights, up, down, gate_of(module))
    return output.to(hidden_states.dtype)


def _expert_linear(module: nn.Module, name: str, factors: Factors) -> ExpertLinear:
    stack, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    weight = quantised(stack) if _is_quantised(stack) else stack
    return ExpertLinear(weight, module.is_transposed, bias, *factors)


def gate_of(module: nn.Module) -> Gate:
    """The activation of an experts module, as far as there is a kernel for it."""
    if not module.has_gate:
        return Gate(function=module.act_fn)
    spec = adapters.find(module.config)
    if spec is not None and spec.expert_gate == "clamped":
        return Gate("clamped", alternates=not module.is_concatenated, alpha=module.alpha, limit=module.limit)
    name = getattr(module.config, "hidden_act", None)
    usual = type(module)._apply_gate is _default_apply_gate and module.is_concatenated
    if usual and name in ACTIVATIONS and type(module.act_fn) is type(ACT2FN[name]):
        return Gate(ACTIVATIONS[name])
    return Gate(function=module._apply_gate)


def factors_of(wrapper: ParamWrapper, adapter: str) -> Factors:
    """A and B of peft's adapter of one stack, as views of its parameters, in their own dtype."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    return a, b, wrapper.scaling[adapter]


class ExpertsLora(ParamWrapper):
    """peft's wrapper of one stack of experts, for a 4-bit stack: same parameters and names in a saved adapter."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, in_features, out_features = self.get_param().quant_state.shape
        self._param_ndim = 3
        return in_features, out_features  # peft swaps them itself where the stack is (experts, out, in)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        active = [name for name in active_adapters if name in self.lora_A]
        if len(active) > 1:
            raise UnsupportedError(f"Several adapters at once ({', '.join(active)}) on 4-bit experts: activate one of them.")
        module = self.get_base_layer()
        if active:
            module.lora_factors[self.parameter_name] = factors_of(self, active[0])
        try:
            yield
        finally:
            module.lora_factors.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError("4-bit experts cannot take an adapter in place: use model.save_pretrained_merged(...).")


ExpertsLora.__name__ = "ParamWrapper"  # peft recognises its own wrapper, when it adds an adapter, by this name
