"""Merging an adapter into its base model, one tensor at a time.

Every merged weight is ``W + scale * (B @ A)`` in fp32, rounded once. ``W`` is the original checkpoint's (``base="16bit"``),
or the weight that was trained against, expanded from its 4 or 8 bits (``base="nf4"``). The model itself is not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding as EmbeddingLora
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import UnsupportedError, unknown
from luthier.gguf.lora import BASE_CHANGING_INITS
from luthier.model import checkpoint, experts
from luthier.model.layout import Group, Layout
from luthier.model.targets import LINEAR, plain_name
from luthier.ops.nf4 import dequantise, quantised

Base = Literal["16bit", "nf4"]
BASES = ("16bit", "nf4")
MERGEABLE = ("bitsandbytes", experts.METHOD)
SLICE = 1 << 25  # weights of a product in fp64 at a time
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def merged_tensors(model: nn.Module, base: Base = "16bit", dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Stream the merged model: (name in the checkpoint, tensor on the CPU), never more than a tensor or two at a time.

    ``dtype`` of the floating-point tensors: by default the 16-bit dtype that the model was loaded in or stored in, else
    bfloat16. Raises before the first tensor if something of the adapter cannot be merged, and names it.
    """
    return Merge(model, base, dtype).tensors()


def merged_size(model: nn.Module, base: Base = "16bit", dtype: torch.dtype | None = None) -> int:
    """Bytes that ``merged_tensors`` will yield."""
    return Merge(model, base, dtype).size


@dataclass
class Slot:
    """One parameter of the model, and what the adapter does to it."""

    tensor: Tensor  # as it is in memory: full, 4-bit or 8-bit
    owner: nn.Module
    replacement: Callable[[], Tensor] | None = None
    deltas: list[Callable[[], Tensor]] = field(default_factory=list)  # each gives an fp32 tensor to add
    rewrites: list[Callable[[Tensor], Tensor]] = field(default_factory=list)  # fp32 weight -> fp32 weight

    @property
    def is_quantised(self) -> bool:
        return isinstance(self.tensor, bnb.nn.Params4bit | bnb.nn.Int8Params)

    @property
    def is_changed(self) -> bool:
        return bool(self.replacement or self.deltas or self.rewrites)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter that the architecture defines, quantised or not."""
        if self.replacement is not None:
            return self.replacement().shape
        if isinstance(self.tensor, bnb.nn.Params4bit):
            shape = torch.Size(self.tensor.quant_state.shape)
            return shape[::-1] if self._is_turned else shape
        return self.tensor.shape[::-1] if self.is_quantised and self._is_turned else self.tensor.shape

    @property
    def _is_turned(self) -> bool:
        return getattr(self.owner, "source_cls", None) is Conv1D  # which is quantised as a Linear, transposed

    def expanded(self) -> Tensor:
        """The weight that the forward pass computes with, without the adapter."""
        if isinstance(self.tensor, bnb.nn.Params4bit):
            value = dequantise(quantised(self.tensor))
        elif isinstance(self.tensor, bnb.nn.Int8Params):
            state = self.owner.state
            scales = self.tensor.SCB if state.SCB is None else state.SCB
            value = bnb.functional.int8_vectorwise_dequant(self.tensor.data if state.CB is None else state.CB, scales)
        else:
            return self.tensor.detach()
        return value.T if self._is_turned else value

    def edited(self, value: Tensor) -> Tensor:
        """The adapter's changes applied to the fp32 ``value``, which is on the parameter's device."""
        for rewrite in self.rewrites:
            value = rewrite(value)
        for delta in self.deltas:
            value = delta().add_(value)
        return value


class Merge:
    """The plan of one merge: checked, and ready to stream."""

    def __init__(self, model: nn.Module, base: Base = "16bit", dtype: torch.dtype | None = None) -> None:
        if base not in BASES:
            raise unknown("base", base, BASES)
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.info = getattr(self.model, "luthier", None)
        self.slots = _slots(self.model)
        if isinstance(model, PeftModel):
            _collect_changes(model, self.slots)
        self.source = self._open_source(base, model)
        self.dtype = dtype or self._default_dtype()
        mapping = self.info.key_mapping if self.info is not None else {}
        self.layout = Layout(self.model, tuple(mapping))
        self.tied = self._tied()
        self.groups = self.layout.groups({name: slot.shape for name, slot in self.slots.items() if name not in self.tied})
        self._check_groups()

    # what is merged onto

    def _open_source(self, base: Base, model: nn.Module) -> checkpoint.Checkpoint | None:
        """The original checkpoint where its tensors are to be used; None where those in memory are."""
        settings = getattr(self.model.config, "quantization_config", None)
        if settings is not None and settings.quant_method not in MERGEABLE:
            raise UnsupportedError(
                f"This model is quantised by {settings.quant_method}, which cannot be merged into. Use save_method='lora', or "
                "load the 16-bit checkpoint of the model."
            )
        if base != "16bit" or not any(slot.is_quantised for slot in self.slots.values()):
            return None
        path = self.info.base_path if self.info is not None else Path(self.model.name_or_path)
        if not path.is_dir():
            raise FileNotFoundError(
                f"The base model was loaded from {path}, which is no longer there. Put it back, or merge onto the weights that "
                "were trained against with base='nf4'."
            )
        if checkpoint.read_json(path / "config.json").get("quantization_config"):
            warnings.warn(
                f"{path} holds the base model only quantised: the adapter is merged onto those weights, as with base='nf4'.",
                UserWarning,
                stacklevel=5,
            )
            return None
        inits = [config.init_lora_weights for config in getattr(model, "peft_config", {}).values()]
        changing = [init for init in inits if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)]
        if changing:
            raise UnsupportedError(
                f"init_lora_weights={changing[0]!r} changed the base weights, so the adapter does not fit the original ones. "
                "Use base='nf4'."
            )
        return checkpoint.open_checkpoint(path)

    def _default_dtype(self) -> torch.dtype:
        """16 bits: as asked for at loading, as stored, as loaded; else bfloat16."""
        if self.info is not None and self.info.dtype_given and self.info.dtype in SIXTEEN_BITS:
            return self.info.dtype
        if self.info is not None and self.info.stored_dtype in SIXTEEN_BITS:
            return self.info.stored_dtype
        return self.model.dtype if self.model.dtype in SIXTEEN_BITS else torch.bfloat16

    def _tied(self) -> dict[str, str]:
        """``{parameter: the one it equals}``, of parameters that are one tensor in the architecture and still are."""
        tied = {}
        for name, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if name not in self.slots or source not in self.slots:
                continue
            slot, other = self.slots[name], self.slots[source]
            if slot.tensor is not other.tensor:
                continue
            if not (slot.is_changed or other.is_changed) or torch.equal(self._in_memory(slot), self._in_memory(other)):
                tied[name] = source
        return tied

    @cached_property
    def is_untied(self) -> bool:
        """Whether the adapter made embeddings and head differ that are one tensor in the base model."""
        keys = getattr(self.model, "all_tied_weights_keys", None) or {}
        return any(name in self.slots and name not in self.tied for name in keys)

    def _check_groups(self) -> None:
        """Refuse by name what can only be merged in the model's own layout, where the checkpoint has another."""
        if self.source is None:
            return
        for group in self.groups:
            slots = [self.slots[name] for name in group.parameters]
            if not group.is_one_to_one and any(slot.rewrites for slot in slots):
                raise UnsupportedError(
                    f"DoRA on {group.parameters[0]} cannot be merged onto the 16-bit checkpoint, which holds it in pieces. "
                    "Use base='nf4'."
                )

    # streaming

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """``{name in the checkpoint: dtype}``; what the architecture wants in fp32, and whole numbers, stay so."""
        kept = self.model._get_dtype_plan(self.dtype)  # {part of a name: dtype}
        dtypes = {}
        for group in self.groups:
            slot = self.slots[group.parameters[0]]
            floating = slot.is_quantised or slot.tensor.is_floating_point()
            for name in group.tensors:
                wanted = next((dtype for part, dtype in kept.items() if part in name), self.dtype)
                dtypes[name] = wanted if floating else slot.tensor.dtype
        return dtypes

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(shape.numel() * self.dtypes[name].itemsize for group in self.groups for name, shape in group.tensors.items())

    def tensors(self, rounded: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged checkpoint, on the CPU; ``rounded=False`` leaves merged ones in fp32, where they are."""
        for group in self.groups:
            for name, value in self._group(group).items():
                value = value.to(self.dtypes[name]) if rounded else value
                if value.is_floating_point() and not value.isfinite().all():
                    raise ValueError(
                        f"{name} of the merged model holds NaN or infinite values in {value.dtype}: the base or the adapter is "
                        "damaged, or its training diverged. Save an earlier checkpoint."
                    )
                yield name, (value.cpu() if rounded else value).contiguous()

    def _group(self, group: Group) -> dict[str, Tensor]:
        slots = {name: self.slots[name] for name in group.parameters}
        if not self.reads_checkpoint(group):
            return self.layout.to_checkpoint({name: self._in_memory(slot) for name, slot in slots.items()})
        values = {name: self.read(name, group) for name in group.tensors}
        if not any(slot.is_changed for slot in slots.values()):
            return values
        if group.is_one_to_one:
            (slot,), (name,) = slots.values(), values
            return {name: slot.edited(values[name].float())}
        deltas = {name: slot.edited(torch.zeros(slot.shape, device=slot.tensor.device)) for name, slot in slots.items()}
        return {name: values[name].float() + delta for name, delta in self.layout.to_checkpoint(deltas).items()}

    def reads_checkpoint(self, group: Group) -> bool:
        """Whether a group comes from the checkpoint; not if it is replaced, or has other shapes there (new tokens)."""
        if self.source is None or any(self.slots[name].replacement for name in group.parameters):
            return False
        names = {name: self._stored_name(name, group) for name in group.tensors}
        if None in names.values():
            return False
        return all(tuple(self.source.headers[stored]["shape"]) == group.tensors[name] for name, stored in names.items())

    def _stored_name(self, name: str, group: Group) -> str | None:
        """Where the checkpoint keeps a tensor: checkpoints of a bare model lack the prefix, and a tied head is not stored."""
        prefix = self.model.base_model_prefix + "."
        tied = (getattr(self.model, "all_tied_weights_keys", None) or {}).get(group.parameters[0])
        others = [f"{old.strip('^')}".replace("\\.", ".") for old in (self.info.key_mapping if self.info else {})]
        candidates = [
            name,
            name.removeprefix(prefix),
            prefix + name,
            *(other + name.removeprefix("model.") for other in others),
        ]
        candidates += [other.removesuffix("lm_head.") + name for other in others] + ([tied] if tied else [])
        for candidate in candidates:
            if candidate in self.source.files:
                return candidate
        if any(self.slots[parameter].is_quantised for parameter in group.parameters):
            raise ValueError(f"{self.source.directory} has no tensor {name} to merge onto: use base='nf4'.")
        return None

    def read(self, name: str, group: Group) -> Tensor:
        """A tensor of the original checkpoint, as stored, on the device of the parameter that it becomes."""
        return self.source.read(self._stored_name(name, group), self.slots[group.parameters[0]].tensor.device)

    def _in_memory(self, slot: Slot) -> Tensor:
        value = slot.expanded() if slot.replacement is None else slot.replacement().detach()
        return slot.edited(value.float()) if slot.deltas or slot.rewrites else value


def _slots(model: PreTrainedModel) -> dict[str, Slot]:
    """Every parameter and saved buffer of the architecture, by the name it has without an adapter."""
    slots = {}
    for path, module in model.named_modules():
        buffers = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            full = f"{path}.{name}" if path else name
            plain = plain_name(full)
            if tensor is not None and plain is not None:
                slots[plain] = Slot(tensor, module)
    offloaded = [name for name, slot in slots.items() if slot.tensor.device.type == "meta"]
    if offloaded:
        raise UnsupportedError(
            f"{len(offloaded)} weights, {offloaded[0]} among them, are offloaded. Load the model on one device to merge it."
        )
    return slots


def _collect_changes(model: PeftModel, slots: dict[str, Slot]) -> None:
    """Note in ``slots`` what the active adapters of ``model`` do; refuse by name what cannot be merged."""
    for path, module in model.get_base_model().named_modules():
        name = plain_name(path)
        if name is None:
            continue
        if isinstance(module, ModulesToSaveWrapper):
            _replace_module(name, module, slots)
        elif isinstance(module, TrainableTokensWrapper):
            _replace_rows(name, module, slots)
        elif isinstance(module, LoraLayer):
            _add_lora(name, module, slots)
        elif isinstance(module, BaseTunerLayer) and not path.endswith(".token_adapter"):
            raise UnsupportedError(f"{name} has an adapter of type {type(module).__name__}: only LoRA can be merged.")
    for slot in slots.values():
        if isinstance(slot.tensor, nn.Parameter) and slot.tensor.requires_grad:  # bias="all": trained in place
            slot.replacement = slot.replacement or (lambda tensor=slot.tensor: tensor)


def _replace_module(name: str, wrapper: ModulesToSaveWrapper, slots: dict[str, Slot]) -> None:
    for adapter in wrapper.active_adapters[:1]:
        copy = wrapper.modules_to_save[adapter]
        if any(isinstance(child, LoraLayer) for child in copy.modules()):
            raise UnsupportedError(f"{name} is trained whole and has LoRA layers inside: that cannot be merged.")
        for part, tensor in [*copy.named_parameters(), *copy.named_buffers()]:
            if f"{name}.{part}" in slots:
                slots[f"{name}.{part}"].replacement = lambda tensor=tensor: tensor


def _replace_rows(name: str, wrapper: TrainableTokensWrapper, slots: dict[str, Slot]) -> None:
    layer = wrapper.token_adapter
    for adapter in wrapper.active_adapters:
        if adapter not in layer.token_indices:
            continue
        rows = layer.token_indices[adapter]

        def rewrite(weight: Tensor, rows=rows, adapter=adapter) -> Tensor:
            weight = weight.clone()
            weight[rows] = layer.trainable_tokens_delta[adapter].detach().to(weight)
            return weight

        slots[f"{name}.weight"].rewrites.append(rewrite)


def _add_lora(name: str, layer: LoraLayer, slots: dict[str, Slot]) -> None:
    if layer.merged:
        raise UnsupportedError(f"{name} already has its adapter merged in place: call model.unmerge_adapter() first.")
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    for adapter in adapters:
        variant = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else None
        if variant is not None and not layer.use_dora[adapter]:
            raise UnsupportedError(f"{name} uses the LoRA variant {variant}, which cannot be merged. Use save_method='lora'.")
        if layer.use_dora[adapter] and len(adapters) > 1:
            raise UnsupportedError(f"{name} has DoRA and {len(adapters)} active adapters: activate one of them to merge.")
        if isinstance(layer, ParamWrapper):
            slots[f"{name}.{layer.parameter_name}"].deltas.append(lambda a=adapter: _experts_delta(layer, a))
        elif isinstance(layer, EmbeddingLora):
            _add_embedding(name, layer, adapter, slots)
        elif isinstance(layer.get_base_layer(), LINEAR):
            _add_linear(name, layer, adapter, slots)
        else:
            kind = type(layer.get_base_layer()).__name__
            raise UnsupportedError(f"{name} is a {kind} with LoRA, which cannot be merged. Use save_method='lora'.")


def _add_linear(name: str, layer: LoraLayer, adapter: str, slots: dict[str, Slot]) -> None:
    slot = slots[f"{name}.weight"]
    turned = isinstance(layer.get_base_layer(), Conv1D) or slot._is_turned
    scale = layer.scaling[adapter]

    def delta() -> Tensor:
        change = scale * _product(layer.lora_B[adapter].weight, layer.lora_A[adapter].weight)
        return change.T if turned else change

    def dora(weight: Tensor) -> Tensor:
        weight = weight + delta()
        rows = 0 if turned else 1
        norm = torch.linalg.norm(weight, dim=rows, keepdim=True)
        return _fp32(layer.lora_magnitude_vector[adapter].weight).view_as(norm) / norm * weight

    if layer.use_dora[adapter]:
        slot.rewrites.append(dora)
    else:
        slot.deltas.append(delta)
    if layer.lora_bias[adapter]:
        if f"{name}.bias" not in slots:
            raise UnsupportedError(f"{name} has lora_bias=True but no bias to merge it into. Use save_method='lora'.")
        slots[f"{name}.bias"].deltas.append(lambda: scale * _fp32(layer.lora_B[adapter].bias))


def _add_embedding(name: str, layer: EmbeddingLora, adapter: str, slots: dict[str, Slot]) -> None:
    scale = layer.scaling[adapter]

    def delta() -> Tensor:
        return scale * _product(layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]).T

    def dora(weight: Tensor) -> Tensor:
        weight = weight + delta()
        norm = torch.linalg.norm(weight, dim=0, keepdim=True)
        return _fp32(layer.lora_magnitude_vector[adapter].weight).view_as(norm) / norm * weight

    if layer.use_dora[adapter]:
        slots[f"{name}.weight"].rewrites.append(dora)
    else:
        slots[f"{name}.weight"].deltas.append(delta)


def _experts_delta(layer: ParamWrapper, adapter: str) -> Tensor:
    """(experts, ...) in fp32, in the layout of the stack."""
    a, b = _fp32(layer.lora_A[adapter].weight), _fp32(layer.lora_B[adapter].weight)
    if layer.num_experts == 1:
        return layer.scaling[adapter] * _product(b, a)
    a = a.reshape(layer.num_experts, -1, a.shape[-1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)  # (experts, out, rank)
    change = _product(b, a) if layer._did_swap_in_out_features else _product(a.mT, b.mT)
    return layer.scaling[adapter] * change


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float()


def _product(b: Tensor, a: Tensor) -> Tensor:
    """``b @ a`` in fp32; on a GPU, which may be set to round the factors to TF32 then, a slice at a time in fp64."""
    b, a = _fp32(b), _fp32(a)
    if b.device.type == "cpu":
        return b @ a
    change = torch.empty(*b.shape[:-1], a.shape[-1], device=b.device)
    rows = max(1, SLICE * b.shape[-2] // change.numel())
    for start in range(0, b.shape[-2], rows):
        change[..., start : start + rows, :] = b[..., start : start + rows, :].double() @ a.double()
    return change
