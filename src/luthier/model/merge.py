"""Merging an adapter into its base model, one tensor at a time.

Every merged weight is ``W + scale * (B @ A)`` in fp32, rounded once. ``W`` is the original checkpoint's (``base="16bit"``),
or the weight that was trained against, expanded from its 4 or 8 bits (``base="nf4"``). The model itself is not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import UnsupportedError, unknown
from luthier.gguf.lora import BASE_CHANGING_INITS
from luthier.model import checkpoint, experts
from luthier.model.layout import Group, Layout
from luthier.model.slots import Slot, slots_of

Base = Literal["16bit", "nf4"]
BASES = ("16bit", "nf4")
MERGEABLE = ("bitsandbytes", experts.METHOD)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Merge:
    """The plan of one merge: checked, and ready to stream.

    ``dtype`` of the floating-point tensors: by default the 16-bit dtype that the model was loaded in or stored in, else
    bfloat16. Raises if something of the adapter cannot be merged, and names it.
    """

    def __init__(self, model: nn.Module, base: Base = "16bit", dtype: torch.dtype | None = None) -> None:
        if base not in BASES:
            raise unknown("base", base, BASES)
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.info = getattr(self.model, "luthier", None)
        self.slots = slots_of(model)
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
        """Every tensor of the merged checkpoint by its name, on the CPU, never more than one or two at a time.

        ``rounded=False`` leaves merged ones in fp32, where they are.
        """
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
