"""A decoder layer of a transformers model run as two fused blocks, or as it stands where they do not cover it.

``layer_class_members`` are the methods of the class that ``accelerate`` gives a decoder layer. In training its forward
reads the layer's modules as they are at that moment (adapters come and go) into blocks; whatever they do not cover is
an ``Unfused`` with the reason, and the stock forward runs. The reason is said once a model.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.activations import ACT2FN

from luthier.adapters.spec import Spec
from luthier.model.attention_interface import NAME
from luthier.model.backbone import CACHE_NAMES, ModelState, cache_of
from luthier.model.blocks import AttentionBlock, Call, Gradients, Kept, MlpBlock, Mode, Norm
from luthier.model.cost import LayerPlan, Shape
from luthier.model.experts import routed
from luthier.ops.backend import has_kernels, rows_of
from luthier.ops.dropout import Dropout
from luthier.ops.experts import checkpoint_experts
from luthier.ops.fp8_linear import Fp8Projection
from luthier.ops.gated_mlp import ACTIVATIONS
from luthier.ops.lora_linear import Part, Projection
from luthier.ops.nf4 import Quantised, quantised
from luthier.ops.rms_norm import rms_norm
from luthier.ops.rotary import half_tables
from luthier.ops.unchanged import Unchanged

LORA = "peft.tuners.lora."
CAPTURES = "transformers.utils.output_capturing"  # hooks that only record outputs, and only when they are asked for


class Unfused(Exception):
    """Why a layer runs its stock forward."""


@dataclass
class Blocks:
    attention: AttentionBlock
    mlp: MlpBlock | None  # None: a mixture of experts, whose stock module runs behind the attention
    parallel: bool = False  # attention and MLP read the same input
    experts: tuple[int, int] = (0, 0)  # of a mixture: how many a token goes to, and the width of one's activation

    def fresh(self) -> Blocks:
        """The same blocks, which have not written anything into the workspace."""
        attention = replace(self.attention, qkv=copy.copy(self.attention.qkv), o=copy.copy(self.attention.o))
        mlp = self.mlp and replace(self.mlp, gate_up=copy.copy(self.mlp.gate_up), down=copy.copy(self.mlp.down))
        return replace(self, attention=attention, mlp=mlp)

    def trained(self) -> list[Tensor]:
        """Every parameter that gets a gradient."""
        halves = (self.attention, self.mlp) if self.mlp else (self.attention,)
        tensors = [tensor for projection in self.projections() for tensor in projection.trained]
        tensors += [norm.weight for half in halves for norm in half.norms() if norm.weight.requires_grad]
        return list({id(tensor): tensor for tensor in tensors}.values())  # parallel halves share a norm, projections an A

    @property
    def are_unique(self) -> bool:
        """Whether they hold what only this pass has: the seeds of masks, adapters put side by side."""
        drops = any(projection.drops for projection in self.projections())
        return drops or not all(tensor.is_leaf for tensor in self.trained())

    def projections(self) -> tuple[Projection, ...]:
        mlp = (self.mlp.gate_up, self.mlp.down) if self.mlp else ()
        return self.attention.qkv, self.attention.o, *mlp

    def forward(self, x: Tensor, call: Call, mode: Mode) -> tuple[Tensor, Kept]:
        """x (n, D) -> (the layer's output (n, D), what its backward needs)."""
        kept = Kept(x, call.is_long)
        x2 = x3 = self.attention.forward(x, call, kept, mode)
        if self.mlp is not None:
            x3 = self.mlp.forward(x if self.parallel else x2, x2, kept, mode)
            kept.x2 = x2 if mode >= Mode.ALL_BUT_GATE_UP and not self.parallel else None
        return x3, kept

    def backward(
        self, grad: Tensor, call: Call, kept: Kept, wants_x: bool, trained: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """grad (n, D) of the output -> (the gradient of x, if wanted, those of ``trained``). Uses up what was kept.

        ``trained``: as the forward found it. What has been frozen since then gets no gradient.
        """
        self.forget()
        gradients = Gradients()
        sequential = self.mlp is not None and not self.parallel
        x2 = self.attention.recompute(call, kept, wants_output=sequential)
        grad_mlp, room = grad, None
        if self.mlp is not None:
            room = self.attention.o.new_gradient(grad.shape[0], grad)
            grad_mlp = room[:, : grad.shape[1]]
            self.mlp.backward(grad, x2 if sequential else kept.x, kept, gradients, sequential, grad_mlp)
        kept.gate_up = kept.mlp_branch = kept.x2 = x2 = None
        attention_grad = (grad, None) if self.parallel else (grad_mlp, room)
        grad_x = self.attention.backward(*attention_grad, call, kept, gradients, wants_x)
        if self.parallel and wants_x:
            grad_x = grad_x + grad_mlp
        return (grad_x if wants_x else None), gradients.of(trained)

    def forget(self) -> None:
        """What the projections wrote into the workspace is another layer's by now."""
        for projection in self.projections():
            projection.forget()

    def shape(self, x: Tensor, compute: str) -> Shape:
        """The widths from which the dial computes what this layer keeps."""
        attention = self.attention
        low = sum(projection.rank for projection in self.projections())
        extra = x.shape[-1] if attention.post_norm else 0
        choices, width = self.experts
        widths = attention.qkv.width_out, attention.o.width_in, self.mlp.down.width_in if self.mlp else choices * width
        return Shape(x.shape[-1], *widths, low, x.element_size(), extra, attention.width, choices, compute)


@dataclass
class LayerState:
    """What ``accelerate`` gives a layer besides its class."""

    index: int
    model: ModelState


@dataclass
class LayerRun:
    """A layer of the forward that runs now, ready to be called."""

    state: LayerState
    blocks: Blocks
    call: Call
    plan: LayerPlan

    @property
    def index(self) -> int:
        return self.state.index

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _Layer.apply(x, self.blocks, self.call, self.state, self.plan, *self.blocks.trained())


def layer_class_members(stock: type[nn.Module], spec: Spec) -> dict:
    """The methods that make a subclass of ``stock`` run fused."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        generates = cache_of(kwargs) is not None and not torch.is_grad_enabled()
        if self.training and not args and not generates:
            try:
                _check_call(self, hidden_states, kwargs)
                blocks = read_blocks(self, spec)
            except Unfused as reason:
                say_once(self, str(reason))
            else:
                return run(self, blocks, spec, hidden_states, kwargs)
        hidden_states = self.luthier_state.model.graphs.interrupt(hidden_states)
        if self.training and self.gradient_checkpointing and not generates:
            kwargs |= {name: None for name in CACHE_NAMES if name in kwargs} | {"use_cache": False}
            return self._gradient_checkpointing_func(partial(stock.forward, self, **kwargs), hidden_states, *args)
        return stock.forward(self, hidden_states, *args, **kwargs)

    return {"forward": forward, "__call__": nn.Module.__call__}


def norm_class_members(stock: type[nn.Module], spec: Spec) -> dict:
    """The methods that make a norm outside of fused blocks one kernel in training, which keeps its input only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not has_kernels(x):
            return stock.forward(self, x)
        return rms_norm(x, self.weight, _eps(self), spec.norm)

    return {"forward": forward}


def run(layer: nn.Module, blocks: Blocks, spec: Spec, hidden_states: Tensor, kwargs: dict) -> Tensor:
    state = layer.luthier_state
    rows, structure = hidden_states.flatten(0, -2), state.model.structure
    longest = hidden_states.shape[1] if structure is None or structure.segments is None else structure.segments.longest
    plan, from_graphs = LayerPlan(Mode.RECOMPUTE), state.model.graphs.expect(state.index, blocks, hidden_states)
    if torch.is_grad_enabled():  # else there is no backward: nothing to keep, or to park
        shape = blocks.shape(hidden_states, state.model.compute)
        plan = state.model.dial.of_layer(state.index, shape, rows, longest, layer.gradient_checkpointing, from_graphs)
    tables = kwargs["position_embeddings"]
    cos, sin = half_tables(*tables, spec.rotary) if blocks.attention.rotates else tables
    call = Call(hidden_states.shape[0], cos, sin)
    if structure is None or structure.padding is not None:
        call.mask = kwargs.get("attention_mask")
    if structure is not None:
        call.window, call.segments = _window(unwrapped(layer.self_attn), spec), structure.padding or structure.segments
    layer_run = LayerRun(state, blocks, call, plan)
    if blocks.mlp is not None:
        return state.model.graphs.run(layer_run, hidden_states)
    output = layer_run(hidden_states)
    experts = partial(_experts, layer, spec)
    return checkpoint_experts(experts, output) if plan.mode < Mode.KEEP else experts(output)


def _experts(layer: nn.Module, spec: Spec, x2: Tensor) -> Tensor:
    """The second half of a layer with experts, through its own modules."""
    branch = layer.mlp(getattr(layer, spec.mlp_norms[0])(x2))
    return x2 + (branch[0] if isinstance(branch, tuple) else branch)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, call, state, plan, *trained):
        state.model.workspace.follow(x.device)
        x3, kept = blocks.forward(rows_of(x), call, plan.mode)
        ctx.blocks, ctx.call, ctx.kept, ctx.offload = blocks, call, kept, state.model.dial.offload
        ctx.trained, ctx.workspace = Unchanged(trained), state.model.workspace
        if ctx.offload is not None and any(ctx.needs_input_grad):
            ctx.offload.park(state.index, kept, plan.host)
        return torch.ops.aten._unsafe_view(x3, x.shape)  # not a view to autograd: FSDP warns of what is one

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.kept is None:
            raise RuntimeError(
                "A fused layer was asked for its backward a second time, but the first one used up what it had kept. "
                "Compute the loss again, or call luthier.restore(model) before a backward with retain_graph=True."
            )
        ctx.trained.check()
        blocks, call, kept, ctx.kept = ctx.blocks, ctx.call, ctx.kept, None
        ctx.workspace.follow(grad.device)
        if ctx.offload is not None:
            ctx.offload.fetch(kept)
        grad_x, gradients = blocks.backward(rows_of(grad), call, kept, ctx.needs_input_grad[0], ctx.trained.tensors)
        return (None if grad_x is None else grad_x.view(grad.shape)), None, None, None, None, *gradients


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
    return Norm(module.weight, _eps(module), spec.norm)


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


def _eps(norm: nn.Module) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # transformers has both names


def _weight(linear: nn.Module) -> tuple[Tensor | Quantised, Tensor | None]:
    weight, bias = linear.weight, linear.bias
    _check_whole(weight)
    if type(linear) is nn.Linear:
        return weight, bias
    if type(linear) is not bnb.nn.Linear4bit:  # peft's layers around one have this name too
        raise Unfused(f"it holds a layer of kind {type(linear).__name__}")
    fix_4bit_weight_quant_state_from_module(linear)  # FSDP2 hands out plain parameters; bitsandbytes' own forward does this
    known, state = weight.__dict__.get("luthier_quantised"), weight.quant_state
    if known is None or known.absmax is not state.absmax or known.packed.data_ptr() != weight.data_ptr():
        known = weight.luthier_quantised = quantised(weight)
    if known.packed.device.type == "cpu" and known.shape[1] % known.blocksize:
        raise Unfused("its width is no multiple of the 4-bit block, where bitsandbytes' CPU kernel takes other scales")
    return known, bias


def _window(attention: nn.Module, spec: Spec) -> int | None:
    if spec.window is None or (spec.window == "attention" and attention.sliding_window is None):
        return None
    return attention.config.sliding_window  # of which transformers makes its masks


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


def _check_call(layer: nn.Module, hidden_states: Tensor, kwargs: dict) -> None:
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


def say_once(layer: nn.Module, reason: str) -> None:
    """Warn that a module runs its stock forward, once a reason and model."""
    said = layer.luthier_state.model.said
    if reason not in said:
        said.add(reason)
        message = f"{type(layer).__name__} runs its stock forward, correctly but slower: {reason}."
        warnings.warn(message, UserWarning, stacklevel=2)
