"""Which parts of a model get an adapter: found by their names, and checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier import adapters
from luthier.errors import UnsupportedError, unknown
from luthier.model.experts import expert_stacks

# Names that a dense MLP has, or had in a checkpoint, for what a stack of expert weights holds
STACK_OF = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {"w2": "down_proj"}
LINEAR = (nn.Linear, Conv1D)  # the 4-bit and 8-bit layers are Linears too
OF_AN_ADAPTER = (".lora_", ".modules_to_save.", ".trainable_tokens_", ".token_indices.")
WRAPPINGS = (".base_layer", ".original_module", ".token_adapter")
ROUTERS = ("gate", "router", "shared_expert_gate")
LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Groups:
    """The parts of a model that may be trained, as far as the family's adapter file tells them apart."""

    vision: bool
    language: bool
    attention: bool
    mlp: bool

    def __post_init__(self) -> None:
        if not (self.vision or self.language):
            raise ValueError("finetune_vision_layers and finetune_language_layers are both False: nothing would train.")
        if not (self.attention or self.mlp):
            raise ValueError("finetune_attention_modules and finetune_mlp_modules are both False: nothing would train.")

    def has_vision(self, model: PreTrainedModel) -> bool:
        return getattr(model.config, "vision_config", None) is not None

    def select(self, model: PreTrainedModel, names: Iterable[str]) -> list[str]:
        """The module paths (or parameter paths) of ``names`` that belong to a part to train."""
        names = list(names)
        if self.vision and self.language and self.attention and self.mlp:
            return names
        if not self.language and not self.has_vision(model):
            raise ValueError("finetune_language_layers is False and this model has no vision layers: nothing would train.")
        spec = adapters.find(model.config)
        if spec is None:
            raise UnsupportedError(
                f"{model.config.model_type} has no file in luthier/adapters, so its parts cannot be told apart: name the "
                "modules in target_modules, and leave the finetune_... arguments out."
            )
        vision = spec.vision
        visual = (vision.vision_prefix, *vision.projector_prefixes) if vision is not None else ()

        def wanted(name: str) -> bool:
            in_vision = any(name == prefix or name.startswith(prefix + ".") for prefix in visual)
            attention = vision.attention_targets if in_vision else spec.attention_targets
            in_attention = name.rpartition(".")[2] in attention
            return (self.vision if in_vision else self.language) and (self.attention if in_attention else self.mlp)

        return [name for name in names if wanted(name)]


def chosen_layers(model: PreTrainedModel, chosen: int | Sequence[int] | None, last: int | None) -> list[int] | None:
    count = model.config.get_text_config().num_hidden_layers
    if chosen is not None and last is not None:
        raise ValueError("layers_to_transform and finetune_last_n_layers were both given: choose one.")
    if last is not None:
        if not 1 <= last <= count:
            raise ValueError(f"finetune_last_n_layers is {last}: this model has {count} layers, so give 1 to {count}.")
        return list(range(count - last, count))
    if chosen is None:
        return None
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    wrong = [layer for layer in chosen if layer not in range(count)]
    if wrong or not chosen:
        raise ValueError(f"layers_to_transform is {chosen}: this model has the layers 0 to {count - 1}.")
    return chosen


def chosen_targets(
    model: PreTrainedModel, targets: str | Sequence[str], groups: Groups, layers: list[int] | None
) -> tuple[list[str], list[str]]:
    """The paths of the linear layers and of the expert stacks that get an adapter."""
    linears = [name for name, _ in linear_layers(model)]
    stacks = [plain_name(name) for name in expert_stacks(model)]
    modules = [name for name, module in _base_modules(model) if isinstance(module, (*LINEAR, nn.Embedding))]
    if targets is None or targets == "all-linear":
        chosen, chosen_stacks = linears, stacks
    elif isinstance(targets, str):
        try:
            chosen = [name for name in modules if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"target_modules={targets!r} is no regular expression: {error}. Give a list of names.") from error
        chosen_stacks = []
        if not chosen:
            raise ValueError(
                f"target_modules={targets!r} is taken as a regular expression and matches no module. The linear layers: "
                f"{', '.join(_last_parts(linears))}."
            )
    else:
        chosen, chosen_stacks = set(), set()
        for target in targets:
            found = {name for name in modules if name == target or name.endswith("." + target)}
            stack = STACK_OF.get(target, target)
            found_stacks = {name for name in stacks if name.endswith("." + stack)}
            if not found and not found_stacks:
                raise unknown("target module", target, _last_parts(linears), "Or give target_modules='all-linear'.")
            chosen |= found
            chosen_stacks |= found_stacks
    chosen, chosen_stacks = groups.select(model, sorted(chosen)), groups.select(model, sorted(chosen_stacks))
    if layers is not None:
        chosen, chosen_stacks = ([name for name in names if _in_layers(name, layers)] for names in (chosen, chosen_stacks))
    if not chosen and not chosen_stacks:
        raise ValueError(
            f"target_modules={targets!r} leaves nothing to train in the chosen layers and parts. The model's linear layers: "
            f"{', '.join(_last_parts(linears))}."
        )
    return chosen, chosen_stacks


def require_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Raise ``ValueError`` for targets that the model, which may be one without weights, does not have."""
    chosen_targets(model, targets, Groups(True, True, True, True), None)


def shortest_names(model: PreTrainedModel, chosen: list[str], layers: list[int] | None) -> list[str]:
    """The targets by their last parts where those mean the same modules, else by their whole paths."""
    parts = _last_parts(chosen)
    names = {name for name, _ in _base_modules(model) if name.rpartition(".")[2] in parts}
    meant = {name for name in names if layers is None or _in_layers(name, layers)}
    return parts if meant == set(chosen) else chosen


def check_parameters(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    if isinstance(targets, str):
        raise TypeError(f"target_parameters must be a list of parameter names, not the string {targets!r}.")
    names = [plain_name(name) for name, _ in model.named_parameters() if plain_name(name)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise unknown("target parameter", target, _last_parts(expert_stacks(model)) or _last_parts(names))
    return list(targets)


def check_pattern(field: str, pattern: Mapping, modules: Sequence[str]) -> None:
    """Raise ``ValueError`` for a key that no module with an adapter matches: peft would leave it out."""
    for key in pattern:
        if not any(get_pattern_key([key], name) == key for name in modules):
            raise unknown(f"module in {field}", key, _last_parts(modules))


def saved_modules(model: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """The modules to train whole; with new tokens in the vocabulary, embeddings and head are among them."""
    if isinstance(names, str):
        raise TypeError(f"modules_to_save must be a list of module names, not the string {names!r}.")
    names = list(names or [])
    paths = [path for path, _ in _base_modules(model)]
    for name in names:
        if not any(path == name or path.endswith("." + name) for path in paths):
            raise unknown("module to save", name, {part for part in _last_parts(paths) if not part.isdigit()})
    if getattr(model, "luthier_new_tokens", None):
        names += [path.rpartition(".")[2] for path, module in _base_modules(model) if _is_table(model, module)]
    return sorted(set(names))


def touches_table(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether embeddings or head are among ``names``."""
    return any(
        path.rpartition(".")[2] in names or path in names for path, module in model.named_modules() if _is_table(model, module)
    )


def _is_table(model: PreTrainedModel, module: nn.Module) -> bool:
    return module is model.get_input_embeddings() or module is model.get_output_embeddings()


def plain_name(name: str) -> str | None:
    """The name that a module or parameter has without an adapter; None for one that belongs to the adapter."""
    if any(part in f".{name}." for part in OF_AN_ADAPTER):
        return None
    for wrapping in WRAPPINGS:
        name = name.replace(wrapping, "")
    return name


def linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Every linear layer but the head and the routers of a mixture of experts."""
    modules = _base_modules(model)
    left_out = {name for name, module in modules if module is model.get_output_embeddings()}
    if expert_stacks(model):
        left_out |= {name for name, _ in modules if name.rpartition(".")[2] in ROUTERS}
    return [(name, module) for name, module in modules if isinstance(module, LINEAR) and name not in left_out]


def _base_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The modules of the base model, by their plain names; a wrapped one is there twice, with its wrapper first."""
    return [(plain, module) for name, module in model.named_modules() if (plain := plain_name(name)) is not None]


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _in_layers(name: str, layers: list[int]) -> bool:
    match = LAYER_INDEX.search(name)
    return match is not None and int(match[1]) in layers
