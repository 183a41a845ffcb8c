"""Mixture-of-experts layers in 4 bits.

transformers keeps all experts of a layer in one 3-D parameter, which bitsandbytes' quantiser passes over: a "4-bit" load
would leave most of the model in 16 bits. Here the stacks are quantised while loading, one expert's weights are expanded
at a time, and the adapter is added to its output, so that no stack ever exists in 16 bits.
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
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from luthier.errors import UnsupportedError
from luthier.ops.nf4 import Quantised, dequantise

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
                stock = type(module)
                module.__class__ = type(stock.__name__, (Nf4Experts, stock), {"__module__": stock.__module__})
                module.lora_factors = {}
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


def _is_quantised(parameter: Tensor) -> bool:
    return isinstance(parameter, bnb.nn.Params4bit)


class Nf4Experts(nn.Module):
    """The forward of a fused experts module over 4-bit stacks; mixed into the module's own class, instance by instance."""

    lora_factors: dict[str, tuple[Tensor, Tensor, float]]  # stack name -> (lhs, rhs, scale), set by ExpertsLora in a forward

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), (tokens, k), (tokens, k) -> (tokens, hidden)."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # expert parallelism marks the experts of other devices so
                continue
            token, choice = torch.where(top_k_index == expert)
            state = self._project("gate_up_proj" if self.has_gate else "up_proj", hidden_states[token], expert)
            state = self._apply_gate(state) if self.has_gate else self.act_fn(state)
            state = self._project("down_proj", state, expert) * top_k_weights[token, choice, None]
            output.index_add_(0, token, state.to(output.dtype))
        return output

    def _project(self, name: str, x: Tensor, expert: int) -> Tensor:
        stack = getattr(self, name)
        if _is_quantised(stack):
            y = FrozenMatmul.apply(x, _one_expert(stack, expert), self.is_transposed)
        else:
            y = x @ (stack[expert] if self.is_transposed else stack[expert].T)
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias")[expert]
        if name in self.lora_factors:
            lhs, rhs, scale = self.lora_factors[name]  # the change of one expert's weight is scale * lhs @ rhs
            first, second = (lhs[expert], rhs[expert]) if self.is_transposed else (rhs[expert].T, lhs[expert].T)
            y = y + (x.to(lhs.dtype) @ first @ second * scale).to(y.dtype)
        return y


def _one_expert(stack: bnb.nn.Params4bit, expert: int) -> Quantised:
    state = stack.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2).float() + state.offset
    shape = torch.Size(state.shape[1:])
    blocks = shape.numel() // state.blocksize
    packed = stack.data.reshape(-1)
    return Quantised(
        packed=packed[expert * shape.numel() // 2 : (expert + 1) * shape.numel() // 2],
        absmax=absmax[expert * blocks : (expert + 1) * blocks],
        code=state.code,
        blocksize=state.blocksize,
        shape=shape,
        kind=state.quant_type,
        dtype=state.dtype,
    )


class FrozenMatmul(torch.autograd.Function):
    """``x @ W`` or ``x @ W.T`` with W in 4 bits: the backward expands W again instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantised, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        full = dequantise(weight).to(x.dtype)
        return x @ (full if transposed else full.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        full = dequantise(ctx.weight).to(grad.dtype)
        return grad @ (full.T if ctx.transposed else full), None, None


class ExpertsLora(ParamWrapper):
    """peft's wrapper of one stack of experts, for a 4-bit stack: same parameters and names in a saved adapter."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, in_features, out_features = self.get_param().quant_state.shape
        self._param_ndim = 3
        return in_features, out_features  # peft swaps them itself where the stack is (experts, out, in)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """``(lhs, rhs, scale)``: the change of the stack is ``scale * lhs @ rhs``, in the adapter's dtype."""
        a = self.lora_A[adapter_name].weight
        b = self.lora_B[adapter_name].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])  # (experts, rank, in)
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (experts, out, rank)
        scale = self.scaling[adapter_name]
        return (b, a, scale) if self._did_swap_in_out_features else (a.mT, b.mT, scale)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [name for name in active_adapters if name in self.lora_A]
        if len(adapters) > 1:
            raise UnsupportedError(f"Several adapters at once ({', '.join(adapters)}) on 4-bit experts: activate one of them.")
        experts = self.get_base_layer()
        if adapters:
            experts.lora_factors[self.parameter_name] = self.get_delta_factors(adapters[0])
        try:
            yield
        finally:
            experts.lora_factors.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedError("4-bit experts cannot take an adapter in place: use model.save_pretrained_merged(...).")


ExpertsLora.__name__ = "ParamWrapper"  # peft recognises its own wrapper, when it adds an adapter, by this name
