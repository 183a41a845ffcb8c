"""A decoder layer of a transformers model run as two fused blocks, or as it stands where they do not cover it.

``layer_class_members`` are the methods of the class that ``accelerate`` gives a decoder layer. In training its forward
reads the layer's modules into blocks (``model/read_layer.py``). Where that is ``Unfused``, the stock forward runs, and the
reason is said once a model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.adapters.spec import Spec
from luthier.model.backbone import CACHE_NAMES, ModelState, cache_of
from luthier.model.blocks import Call, Mode
from luthier.model.cost import LayerPlan
from luthier.model.layer_blocks import Blocks
from luthier.model.read_layer import Unfused, check_call, eps_of, read_blocks, unwrapped
from luthier.ops.backend import has_kernels, rows_of
from luthier.ops.experts import checkpoint_experts
from luthier.ops.rms_norm import rms_norm
from luthier.ops.rotary import half_tables
from luthier.ops.unchanged import Unchanged


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
                check_call(self, hidden_states, kwargs)
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
        return rms_norm(x, self.weight, eps_of(self), spec.norm)

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


def _window(attention: nn.Module, spec: Spec) -> int | None:
    if spec.window is None or (spec.window == "attention" and attention.sliding_window is None):
        return None
    return attention.config.sliding_window  # of which transformers makes its masks


def say_once(layer: nn.Module, reason: str) -> None:
    """Warn that a module runs its stock forward, once a reason and model."""
    said = layer.luthier_state.model.said
    if reason not in said:
        said.add(reason)
        message = f"{type(layer).__name__} runs its stock forward, correctly but slower: {reason}."
        warnings.warn(message, UserWarning, stacklevel=2)
