"""The names of a model's parameters in its checkpoint, and the tensors they stand for there.

Most are the same. Where they are not (a Mixtral checkpoint holds every expert apart, the model one stack of them),
transformers keeps a list of conversions; here they are run backwards, one group of parameters at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, WeightTransform, rename_source_key


@dataclass(frozen=True)
class Group:
    """Parameters of the model that only together make certain tensors of the checkpoint; nearly always one and one."""

    parameters: tuple[str, ...]
    tensors: dict[str, torch.Size]  # name in the checkpoint -> shape

    @property
    def is_one_to_one(self) -> bool:
        return len(self.parameters) == len(self.tensors) == 1


class Layout:
    """How the parameters of one loaded model are named and cut in its checkpoint."""

    def __init__(self, model: PreTrainedModel, ignored_patterns: tuple[str, ...] = ()) -> None:
        """``ignored_patterns``: source patterns of conversions that a saved model should not go back to."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:  # the model was not loaded from a checkpoint
            conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
        conversions = [c for c in conversions if _is_of_the_model(c) and not set(c.source_patterns) & set(ignored_patterns)]
        backwards = [conversion.reverse_transform() for conversion in reversed(conversions)]
        self._model = model
        self._renamings = [step for step in backwards if isinstance(step, WeightRenaming)]
        self._converters = [step for step in backwards if isinstance(step, WeightConverter)]

    def groups(self, shapes: Mapping[str, torch.Size]) -> list[Group]:
        """Cut the parameters ``{name: shape}`` of the model into groups, in the order given."""
        together: dict[str, list[str]] = {}
        for name in shapes:
            together.setdefault(self._renamed(name)[0], []).append(name)
        groups = []
        for names in together.values():
            tensors = self.to_checkpoint({name: torch.empty(shapes[name], device="meta") for name in names})
            groups.append(Group(tuple(names), {name: tensor.shape for name, tensor in tensors.items()}))
        return groups

    def to_checkpoint(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one whole group, as the checkpoint holds them."""
        mapping: WeightTransform | None = None
        for name, tensor in parameters.items():
            renamed, pattern = self._renamed(name)
            if mapping is None:
                mapping = self._converter(pattern) if pattern else WeightRenaming(name, renamed)
            mapping.add_tensor(renamed, name, pattern or name, tensor)
        converted = mapping.convert(renamed, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters, reverse=True)

    def _converter(self, pattern: str) -> WeightConverter:
        return copy.deepcopy(next(step for step in self._converters if pattern in step.source_patterns))


def _is_of_the_model(conversion: WeightTransform) -> bool:
    """Not a quantiser's, whose packed tensors are not what is written."""
    operations = getattr(conversion, "operations", None) or []
    return all(type(operation).__module__ == core_model_loading.__name__ for operation in operations)
