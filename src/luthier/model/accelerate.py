"""Making one model fast, and undoing it: instances change, never modules or classes of other packages.

A module of a model gets the class ``our mixin + its own class`` under the same name. Parameters, names, state_dict,
hooks, quantised children and ``save_pretrained`` stay what they were, and another model in the process is untouched.
"""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from types import MethodType

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from luthier import adapters
from luthier.model.attention_interface import implementation_for
from luthier.model.backbone import ModelState, backbone_class_members
from luthier.model.dial import Dial
from luthier.model.fused_experts import (
    ExpertsState,
    experts_class_members,
    is_stock_experts,
    is_wrapper,
    wrapper_class_members,
)
from luthier.model.fused_layer import LayerState, layer_class_members, norm_class_members
from luthier.model.graphs import Graphs
from luthier.model.head import head_class_members
from luthier.terminal import notice_once


def accelerate(model: nn.Module) -> nn.Module:
    """Put Luthier's forward passes into this model, plain or PeftModel, and give it back. A second call changes nothing.

    An architecture without a file in ``adapters`` stays stock and says so once; one that has a file but none of whose
    layers was found is an error.
    """
    base = base_model(model)
    spec = adapters.find(base.config)
    if spec is None:
        notice_once(base, "architecture", _unknown_architecture(base))
        return model
    layers = [module for module in base.modules() if _stock_class(module).__name__ in spec.layer_classes]
    if not layers:
        raise ValueError(
            f"{type(base).__name__} says it is {base.config.model_type!r}, but holds none of the layers of that architecture: "
            f"{', '.join(sorted(spec.layer_classes))}. Load it with transformers' own class, or train it without accelerate()."
        )
    if not any("luthier_state" in layer.__dict__ for layer in layers):
        head = base.get_output_embeddings()
        tied = head is not None and getattr(base.get_input_embeddings(), "weight", None) is getattr(head, "weight", None)
        state = ModelState(Dial(len(layers)), tied=tied)
        for index, layer in enumerate(layers):
            _swap(layer, _class(type(layer), layer_class_members, spec), LayerState(index, state))
        backbone = next(module for module in base.modules() if any(child in layers for child in _layer_list(module)))
        _swap(backbone, _class(type(backbone), backbone_class_members), state)
        for norm in [module for module in backbone.modules() if type(module).__name__ in spec.norm_classes]:
            _swap(norm, _class(type(norm), norm_class_members, spec))
    attention = implementation_for(base.config)
    if attention is not None and base.config.get_text_config()._attn_implementation == "sdpa":
        base.set_attn_implementation(attention)
        base.__dict__["luthier_attention_before"] = "sdpa"
        notice_once(base, "attention", f"sdpa leaves out this model's soft caps: attn_implementation is {attention!r} now.")
    _accelerate_experts(base, layers[0].luthier_state.model)
    if base.get_output_embeddings() is not None and "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        _swap(base, _class(_stock_class(base), head_class_members, spec))
    return model


def _accelerate_experts(base: PreTrainedModel, state: ModelState) -> None:
    """The stacks of experts, and the wrappers that an adapter put around them since the last call."""
    for module in list(base.modules()):
        if is_stock_experts(module) and "luthier_state" not in module.__dict__:
            _swap(module, _class(type(module), experts_class_members), ExpertsState(state))
        elif is_wrapper(module):
            _swap(module, _class(type(module), wrapper_class_members))


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every module of the model has its stock class again. Gives the model back."""
    base = base_model(model)
    dial = dial_of(model)
    if dial is not None:
        dial.follow_flag()  # gives its host memory back
        graphs_of(model).clear()
    for module in base.modules():
        if _stock_class(module) is not type(module):
            _swap(module, _stock_class(module))
    before = base.__dict__.pop("luthier_attention_before", None)
    if before is not None:
        base.set_attn_implementation(before)
    return model


def is_accelerated(model: nn.Module) -> bool:
    base = base_model(model)
    return _stock_class(base) is not type(base)


def state_of(model: nn.Module) -> ModelState | None:
    """What the layers of an accelerated model share; None for a stock one."""
    states = (module.__dict__.get("luthier_state") for module in base_model(model).modules())
    return next((state for state in states if isinstance(state, ModelState)), None)


def dial_of(model: nn.Module) -> Dial | None:
    """The memory dial of an accelerated model; None for a stock one."""
    state = state_of(model)
    return None if state is None else state.dial


def graphs_of(model: nn.Module) -> Graphs | None:
    """The CUDA graphs of an accelerated model, with their switch ``enabled``; None for a stock one."""
    state = state_of(model)
    return None if state is None else state.graphs


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PeftModel around one, got {type(model).__name__}.")
    return base


def _swap(module: nn.Module, new_class: type, state: object = None) -> None:
    module.__class__ = new_class
    module.__dict__.pop("luthier_state", None)
    if state is not None:
        module.__dict__["luthier_state"] = state
    if "_old_forward" in module.__dict__:  # accelerate's device hooks call the forward that they found on the instance
        module._old_forward = MethodType(new_class.forward, module)


def _stock_class(module: nn.Module) -> type:
    return getattr(type(module), "_luthier_stock", type(module))


def subclass(stock: type, **members: object) -> type:
    """A class that is ``stock`` with some members replaced, under the same name: configs and reports show that name."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    made = type(stock.__name__, (stock,), {**names, "_luthier_stock": stock, "__reduce_ex__": _reduce, **members})
    if "forward" in members:
        made.forward = members["forward"]  # transformers 5.24 checkpoints the forward of every subclass of a layer
    return made


class _New:
    """Makes an empty module of a class, for copies; pickle, which would look for the class by its name, is told why not."""

    def __init__(self, made: type[nn.Module]) -> None:
        self.made = made

    def __call__(self) -> nn.Module:
        return self.made.__new__(self.made)

    def __reduce__(self) -> None:
        raise pickle.PicklingError(
            f"A {self.made.__name__} with Luthier's forward passes cannot be pickled (by torch.save of a whole model, or to "
            "reach another process): call luthier.restore(model) first, or save its weights with model.save_pretrained."
        )


def _reduce(self: nn.Module, protocol: int) -> tuple:
    _, _, *state = object.__reduce_ex__(self, protocol)
    return _New(type(self)), (), *state


@functools.cache
def _class(stock: type[nn.Module], members: Callable[..., dict], *arguments: object) -> type[nn.Module]:
    return subclass(stock, **members(stock, *arguments))


def _layer_list(module: nn.Module) -> nn.ModuleList | tuple:
    layers = getattr(module, "layers", ())
    return layers if isinstance(layers, nn.ModuleList) else ()


def _unknown_architecture(base: PreTrainedModel) -> str:
    return (
        f"Luthier has no description of the architecture {base.config.model_type!r}: the model trains through the stock "
        f"code, correctly but without Luthier's speed. Described: {', '.join(adapters.model_types())}. "
        "To add one, see docs/architectures.md."
    )
