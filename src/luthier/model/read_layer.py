"""Reading a layer of transformers, its adapters and its hooks as the blocks that compute the same.

Adapters come and go, so a layer is read anew in every forward. Whatever blocks do not cover is ``Unfused``, with the reason.
"""

from __future__ import annotations

import functools

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from luthier.adapters.spec import Spec
from luthier.model.attention_interface import NAME
from luthier.model.backbone import ModelState, cache_of
from luthier.model.blocks import AttentionBlock, MlpBlock, Norm
from luthier.model.cpu_4bit import is_misread
from luthier.model.experts import routed
from luthier.model.layer_blocks import Blocks
from luthier.ops.dropout import Dropout
from luthier.ops.fp8_linear import Fp8Projection
from luthier.ops.gated_mlp import ACTIVATIONS
from luthier.ops.lora_linear import Part, Projection
from luthier.ops.nf4 import Quantised, quantised

LORA = "peft.tuners.lora."
CAPTURES = "transformers.utils.output_capturing"  # hooks that only record outputs, and only when they are asked for


class Unfused(Exception):
    """Why a layer runs its stock forward."""


def check_call(layer: nn.Module, hidden_states: Tensor, kwargs: dict) -> None:
    device, mask = hidden_states.device.type, kwargs.get("attention_mask")
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != hidden_states.dtype:
        raise Unfused(f"autocast to {torch.get_autocast_dtype(device)} over activations in {hidden_states.dtype}")
    if cache_of(kwargs) is not None and not layer.gradient_checkpointing:
        raise Unfused("a key-value cache is in use: pass use_cache=False")
    if kwargs.get("output_attentions"):
        raise Unfused("attention weights were asked for")
    if mask is not None and not isinstance(mask, Tensor):
        raise Unfused(f"its attention mask is a {type(mask).__name__}")
    if kwargs.get("position_embeddings") is None:
        raise Unfused("it was called without position embeddings")
    given = [tensor for tensor in (mask, *kwargs["position_embeddings"]) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise Unfused("its attention mask or its rotation is trained")
    if nn.modules.module._has_any_global_hook():
        raise Unfused("hooks are attached to all modules")


def read_blocks(layer: nn.Module, spec: Spec) -> Blocks:
    """The layer's modules, as they are now, as blocks for one call; Unfused where that is not what they compute."""
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' weights answer each question through Python
        return _read_blocks(layer, spec)


def _read_blocks(layer: nn.Module, spec: Spec) -> Blocks:
    attention, state = _half(layer, "self_attn"), layer.luthier_state.model
    _check_structure(layer, attention, spec)
    residual_scale = getattr(layer, spec.residual_scale) if spec.residual_scale else 1.0
    names = ("qkv_proj",) if spec.qkv == "fused" else ("q_proj", "k_proj", "v_proj")
    qkv = _projection("qkv", [read_part(getattr(attention, name)) for name in names], state)
    o = _projection("o", [read_part(attention.o_proj)], state)
    width = attention.head_dim
    heads = o.width_in // width
    before, after = (read_norm(layer, name, spec) for name in spec.attention_norms)
    attention_block = AttentionBlock(
        qkv=qkv,
        o=o,
        heads=heads,
        kv_heads=(qkv.width_out // width - heads) // 2,
        width=width,
        scale=attention.scaling,
        norm=before,
        post_norm=after,
        q_norm=read_norm(attention, "q_norm" if spec.qk_norm else None, spec),
        k_norm=read_norm(attention, "k_norm" if spec.qk_norm else None, spec),
        rotates=spec.rotary_switch is None or bool(getattr(attention, spec.rotary_switch)),
        interleaved=spec.rotary.startswith("interleaved"),
        residual_scale=residual_scale,
        norm_is_wide=spec.qk_norm == "width",
        softcap=getattr(attention, spec.softcap) if spec.softcap else None,
        sinks=getattr(attention, spec.sinks) if spec.sinks else None,
    )
    if hasattr(layer.mlp, "experts"):
        return Blocks(attention_block, None, experts=routed(attention.config))
    mlp = _half(layer, "mlp")
    names = ("gate_up_proj",) if spec.mlp == "fused" else ("gate_proj", "up_proj")
    gate_up = _projection("gate_up", [read_part(getattr(mlp, name)) for name in names], state)
    down = _projection("down", [read_part(mlp.down_proj)], state)
    before, after = (read_norm(layer, name, spec) for name in (spec.attention_norms if spec.parallel else spec.mlp_norms))
    mlp_block = MlpBlock(gate_up, down, _activation(mlp, attention.config), before, after, residual_scale)
    return Blocks(attention_block, mlp_block, spec.parallel)


def _projection(role: str, parts: list[Part], state: ModelState) -> Projection:
    if state.compute == "bf16" or any(part.trains for part in parts):
        return Projection(role, parts, state.workspace)
    return Fp8Projection(role, parts, state.workspace, everywhere=state.compute == "fp8")


def read_part(module: nn.Module) -> Part:
    """A linear layer with the adapters that are active on it now. Each call draws the seed of its dropout."""
    module = _bare(module)
    if not isinstance(module, LoraLayer):
        return Part(*_weight(module))
    if not type(module).__module__.startswith(LORA):
        raise Unfused(f"it holds an adapter of kind {type(module).__name__}")
    base, merged, disabled, adapters = module.base_layer, module.merged, module.disable_adapters, module.lora_A
    if isinstance(base, LoraLayer):
        raise Unfused("an adapter is attached to an adapter")
    _check_hooks(base)
    weight, bias = _weight(base)
    if merged and disabled:
        raise Unfused("a merged adapter is disabled")
    active = [] if merged or disabled else [name for name in module.active_adapters if name in adapters]
    if not active:
        return Part(weight, bias)
    found = [(adapters[name], module.lora_B[name], module.scaling[name], _dropped(module, name)) for name in active]
    for a, b, scale, _ in found:
        for linear in (a, b):
            _check_hooks(linear)
            if type(linear) is not nn.Linear:
                raise Unfused(f"it holds an adapter's layer of kind {type(linear).__name__}")
        if b.bias is not None:
            bias = scale * b.bias if bias is None else bias + scale * b.bias
    a, b, scale, p = found[0]
    if len(found) == 1:
        return Part(weight, bias, a.weight, b.weight, scale / (1 - p), Dropout.draw(p) if p else None)
    if any(p for *_, p in found):
        raise Unfused(f"several adapters are active and have dropout: {', '.join(active)}")
    # one adapter of all ranks; autograd takes its gradients apart
    a, b = torch.cat([a.weight for a, *_ in found]), torch.cat([scale * b.weight for _, b, scale, _ in found], dim=1)
    return Part(weight, bias, a, b)


def _dropped(module: LoraLayer, name: str) -> float:
    """The share of its input that an adapter drops; Unfused if it is no plain LoRA."""
    if name in module.lora_variant:
        raise Unfused(f"the adapter {name!r} is a variant of LoRA (DoRA or another)")
    dropout = module.lora_dropout[name]
    _check_hooks(dropout)
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, or the copy of it that trains through peft's ``modules_to_save``."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = [] if module.disable_adapters else module.active_adapters
    return module.modules_to_save[active[0]] if active else module.original_module


def read_norm(owner: nn.Module, name: str | None, spec: Spec) -> Norm | None:
    if name is None:
        return None
    module = _bare(getattr(owner, name))
    if type(module).__name__ not in spec.norm_classes:
        raise Unfused(f"it holds a norm of kind {type(module).__name__}")
    _check_whole(module.weight)
    return Norm(module.weight, eps_of(module), spec.norm)


def _bare(module: nn.Module) -> nn.Module:
    """``unwrapped``; Unfused where hooks are on the wrapper, or within it."""
    _check_hooks(module)
    inner = unwrapped(module)
    if inner is not module:
        _check_hooks(inner)
    return inner


def _half(layer: nn.Module, name: str) -> nn.Module:
    """A layer's attention or MLP; Unfused if it is not of the kind that its architecture has."""
    module = _bare(getattr(layer, name))
    if type(module).__module__ != type(layer)._luthier_stock.__module__:
        raise Unfused(f"its {name} is a {type(module).__name__}")
    return module


def _check_whole(weight: Tensor) -> None:
    if isinstance(weight, DTensor):
        raise Unfused("its weights are spread over devices (DTensor)")


def eps_of(norm: nn.Module) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # transformers has both names


def _weight(linear: nn.Module) -> tuple[Tensor | Quantised, Tensor | None]:
    weight, bias = linear.weight, linear.bias
    _check_whole(weight)
    if type(linear) is nn.Linear:
        return weight, bias
    if type(linear) is not bnb.nn.Linear4bit and not is_misread(linear):  # peft's layers around one have this name too
        raise Unfused(f"it holds a layer of kind {type(linear).__name__}")
    fix_4bit_weight_quant_state_from_module(linear)  # FSDP2 hands out plain parameters; bitsandbytes' own forward does this
    known, state = weight.__dict__.get("luthier_quantised"), weight.quant_state
    if known is None or known.absmax is not state.absmax or known.packed.data_ptr() != weight.data_ptr():
        known = weight.luthier_quantised = quantised(weight)
    if known.packed.device.type == "cpu" and known.shape[1] % known.blocksize and not is_misread(linear):
        raise Unfused("its width is no multiple of the 4-bit block, where bitsandbytes' CPU kernel takes other scales")
    return known, bias


def _activation(mlp: nn.Module, config) -> str:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    function = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn  # transformers has both names
    _check_hooks(function)
    if name not in ACTIVATIONS:
        raise Unfused(f"its activation is {name}")
    if type(function) is not _activation_class(name):
        raise Unfused(f"its activation is a {type(function).__name__}, and its configuration says {name}")
    return ACTIVATIONS[name]


@functools.cache
def _activation_class(name: str) -> type[nn.Module]:
    return type(ACT2FN[name])


def _check_structure(layer: nn.Module, attention: nn.Module, spec: Spec) -> None:
    implementation = attention.config._attn_implementation
    own_scores = spec.softcap or spec.sinks  # which transformers' sdpa knows nothing of: eager is its only exact one
    if implementation not in ("sdpa", NAME) and not (implementation == "eager" and own_scores):
        raise Unfused(f"attn_implementation is {implementation!r}")
    if not attention.is_causal:
        raise Unfused("its attention is bidirectional")
    if spec.sinks and getattr(attention, spec.sinks).requires_grad:
        raise Unfused("its attention sinks are trained")
    dropout = attention.attention_dropout if hasattr(attention, "attention_dropout") else attention.dropout
    if dropout or any(isinstance(child, nn.Dropout) and child.p for child in layer.children()):
        raise Unfused("it drops activations")


def _check_hooks(module: nn.Module) -> None:
    if is_hooked(module):
        raise Unfused(f"hooks are attached to one of its {type(module).__name__}")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says, or somebody looks on."""
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if "forward" in module.__dict__:
        return True
    return any(kinds) and any(hook.__module__ != CAPTURES for kind in kinds for hook in kind.values())
