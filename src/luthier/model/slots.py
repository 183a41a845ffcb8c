"""What an adapter does to each parameter of a model, as something to apply to that parameter alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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

from luthier.errors import UnsupportedError
from luthier.model.targets import LINEAR, plain_name
from luthier.ops.nf4 import dequantise, quantised

SLICE = 1 << 25  # weights of a product in fp64 at a time


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


def slots_of(model: PreTrainedModel | PeftModel) -> dict[str, Slot]:
    """Every parameter and saved buffer of the architecture, by the name it has without an adapter.

    Refuses by name what cannot be merged.
    """
    if not isinstance(model, PeftModel):
        return _slots(model)
    slots = _slots(model.get_base_model())
    _collect_changes(model, slots)
    return slots


def _slots(model: PreTrainedModel) -> dict[str, Slot]:
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
    """Note in ``slots`` what the active adapters of ``model`` do."""
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

    _add_change(slot, layer, adapter, delta, dim=0 if turned else 1)
    if layer.lora_bias[adapter]:
        if f"{name}.bias" not in slots:
            raise UnsupportedError(f"{name} has lora_bias=True but no bias to merge it into. Use save_method='lora'.")
        slots[f"{name}.bias"].deltas.append(lambda: scale * _fp32(layer.lora_B[adapter].bias))


def _add_embedding(name: str, layer: EmbeddingLora, adapter: str, slots: dict[str, Slot]) -> None:
    scale = layer.scaling[adapter]

    def delta() -> Tensor:
        return scale * _product(layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]).T

    _add_change(slots[f"{name}.weight"], layer, adapter, delta, dim=0)


def _add_change(slot: Slot, layer: LoraLayer, adapter: str, delta: Callable[[], Tensor], dim: int) -> None:
    """``dim``: along which DoRA's norms are taken, if it is one."""

    def dora(weight: Tensor) -> Tensor:
        weight = weight + delta()
        norm = torch.linalg.norm(weight, dim=dim, keepdim=True)
        return _fp32(layer.lora_magnitude_vector[adapter].weight).view_as(norm) / norm * weight

    if layer.use_dora[adapter]:
        slot.rewrites.append(dora)
    else:
        slot.deltas.append(delta)


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
