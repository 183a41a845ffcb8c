"""Adapters: which parts of a model get one, checked by name before anything is changed."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier import adapters
from luthier.errors import UnsupportedError, unknown
from luthier.gguf.lora import BASE_CHANGING_INITS
from luthier.model import checkpoint
from luthier.model.accelerate import base_model
from luthier.model.checkpointing import checkpointing_mode, set_checkpointing
from luthier.model.cpu_4bit import is_misread
from luthier.model.experts import ExpertsLora, Nf4Experts, expert_stacks
from luthier.model.vocab import resize_embeddings

BIASES = ("none", "all", "lora_only")
INITS_OF_EXPERTS = (True, False, "gaussian", "eva")  # of init_lora_weights; the others read a layer's weight
# Names that a dense MLP has, or had in a checkpoint, for what a stack of expert weights holds
STACK_OF = dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj") | {"w2": "down_proj"}
LINEAR = (nn.Linear, Conv1D)  # the 4-bit and 8-bit layers are Linears too
OF_AN_ADAPTER = (".lora_", ".modules_to_save.", ".trainable_tokens_", ".token_indices.")
WRAPPINGS = (".base_layer", ".original_module", ".token_adapter")
ROUTERS = ("gate", "router", "shared_expert_gate")
LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# Fields of a saved adapter's config that say nothing about what the adapter is
INCIDENTAL = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "task_type", "auto_mapping")


def get_peft_model(
    model: PreTrainedModel | PeftModel,
    r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    finetune_last_n_layers: int | None = None,
    use_gradient_checkpointing: bool | str | None = None,
    random_state: int = 3407,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    init_lora_weights: bool | str = True,
    loftq_config: Mapping | None = None,
    target_parameters: Sequence[str] | None = None,
    finetune_vision_layers: bool = True,
    finetune_language_layers: bool = True,
    finetune_attention_modules: bool = True,
    finetune_mlp_modules: bool = True,
    **lora_fields: object,
) -> PeftModel:
    """Attach a trainable LoRA adapter in fp32 to a loaded model, whose own weights are frozen.

    ``target_modules``: names of linear layers (their last parts, or whole paths), a regular expression, or "all-linear":
    all but the head and the routers, with the experts of a mixture. ``finetune_last_n_layers`` is short for
    ``layers_to_transform``. ``lora_fields`` are further fields of peft's LoraConfig. The same ``random_state`` gives the
    same initial weights. A second call with the same arguments changes nothing; with others it is a ``ValueError``.
    """
    if not isinstance(model, PeftModel) and getattr(getattr(model, "luthier", None), "precision", None) == "full":
        warnings.warn("full_finetuning=True trains every weight: no adapter is attached.", UserWarning, stacklevel=2)
        return model
    base = base_model(model)
    _check_values(r, lora_alpha, lora_dropout, bias, lora_fields, use_rslora=use_rslora, use_dora=use_dora)
    checkpointing_mode(use_gradient_checkpointing)
    _check_initialisation(base, init_lora_weights, loftq_config)

    groups = _Groups(finetune_vision_layers, finetune_language_layers, finetune_attention_modules, finetune_mlp_modules)
    layers = _chosen_layers(base, layers_to_transform, finetune_last_n_layers)
    modules, stacks = _chosen_targets(base, target_modules, groups, layers)
    if target_parameters is not None:
        stacks = _check_parameters(base, target_parameters)
    initialised = f"init_lora_weights={init_lora_weights!r}" if init_lora_weights not in INITS_OF_EXPERTS else ""
    if stacks and initialised and target_parameters is not None:
        raise UnsupportedError(f"peft has no {initialised} for target_parameters. Use init_lora_weights=True.")
    if stacks and target_parameters is None and (lora_dropout or use_dora or initialised):
        reason = "lora_dropout" if lora_dropout else "use_dora" if use_dora else initialised
        warnings.warn(f"The experts get no adapter: peft has none with {reason} for them.", UserWarning, stacklevel=2)
        stacks = []
    if use_dora and any(is_misread(module) for _, module in _linear_layers(base)):
        raise UnsupportedError(
            "use_dora=True on a 4-bit model on the CPU needs layer widths that are multiples of 64: bitsandbytes expands "
            "others wrongly there. Use load_in_16bit=True, or use_dora=False."
        )
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(field, lora_fields.get(field) or {}, [*modules, *stacks])
    saved = _modules_to_save(base, modules_to_save)
    narrow = layers is not None and not groups.has_vision(base)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        target_modules=_shortest(base, modules, layers if narrow else None),
        target_parameters=stacks or None,
        layers_to_transform=layers if narrow else None,
        layers_pattern=layers_pattern if narrow else None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=saved or None,
        ensure_weight_tying=bool(saved) and base.config.get_text_config().tie_word_embeddings and _touches_table(base, saved),
        init_lora_weights=init_lora_weights,
        loftq_config=dict(loftq_config or {}),
        **{"task_type": "CAUSAL_LM", **lora_fields},
    )
    if isinstance(model, PeftModel):
        return _same_adapter(model, config)
    register_experts(base, config)
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        model = peft.get_peft_model(base, config)
    return _ready(model, use_gradient_checkpointing)


def attach_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Attach the adapter in ``directory`` to its base model, trainable, in fp32.

    Raises ``ValueError`` if its weights are not those that its config makes on this model: peft would start what is missing
    at zero, and leave out what has no place.
    """
    file = directory / checkpoint.ADAPTER_CONFIG
    method = checkpoint.read_json(file).get("peft_type")
    if method not in peft.PEFT_TYPE_TO_TUNER_MAPPING:
        raise unknown(f"peft_type in {file}:", method, (known.value for known in peft.PEFT_TYPE_TO_TUNER_MAPPING))
    rows = _saved_vocabulary(directory)
    if rows is not None and rows > model.get_input_embeddings().weight.shape[0]:
        resize_embeddings(model, rows)
    config = PeftConfig.from_pretrained(directory)
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        register_experts(model, config)
    try:
        adapted = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config)
        found = adapted.load_adapter(directory, adapted.active_adapter, is_trainable=True)
    except (RuntimeError, ValueError) as error:  # another shape, no such module, a rank of 0
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(_misfit(directory, next((line for line in lines if "size mismatch" in line), lines[0]))) from error
    if found.missing_keys:
        raise ValueError(_misfit(directory, f"it has no {found.missing_keys[0]} ({len(found.missing_keys)} are missing)"))
    if found.unexpected_keys:
        extra = f"{found.unexpected_keys[0]} has no place in the model ({len(found.unexpected_keys)} have none)"
        raise ValueError(_misfit(directory, extra))
    return _ready(adapted, None)


def _misfit(directory: Path, why: str) -> str:
    base = checkpoint.base_of_adapter(directory)
    return (
        f"The adapter {directory} does not fit its base model {base}: {why}. Give the base that it was trained on "
        f"('base_model_name_or_path' in its {checkpoint.ADAPTER_CONFIG}), or save the adapter again."
    )


def _saved_vocabulary(directory: Path) -> int | None:
    """Rows of the embeddings that an adapter brings whole, if it does."""
    header = checkpoint.read_header(directory / checkpoint.ADAPTER_WEIGHTS)
    rows = [entry["shape"][0] for name, entry in header.items() if re.search(r"embed_tokens(\.base_layer)?\.weight$", name)]
    return max(rows, default=None)


def _ready(model: PeftModel, use_gradient_checkpointing: bool | str | None) -> PeftModel:
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    trained = [(parameter, parameter.dtype) for parameter in model.parameters() if parameter.requires_grad]
    model.get_base_model().register_forward_pre_hook(partial(_keep_precision, trained))
    if use_gradient_checkpointing is None:
        info = getattr(model, "luthier", None)
        use_gradient_checkpointing = info.use_gradient_checkpointing if info is not None else "auto"
    return set_checkpointing(model.train(), use_gradient_checkpointing)


def _keep_precision(trained: list[tuple[nn.Parameter, torch.dtype]], model: nn.Module, _: object) -> None:
    """Before a forward in training: undo what every trainer of TRL's does to a quantised model's adapter, a cast to bf16,
    in which the small steps of an optimizer are lost. It has made no step yet."""
    if model.training:
        for parameter, dtype in trained:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def register_experts(model: PreTrainedModel, config: LoraConfig) -> None:
    """Have peft wrap 4-bit experts by our class when it attaches an adapter with this config."""
    if any(isinstance(module, Nf4Experts) for module in model.modules()):
        config._register_custom_module({Nf4Experts: ExpertsLora})


def _same_adapter(model: PeftModel, config: LoraConfig) -> PeftModel:
    """The model as it is if its adapter is the one asked for, else an error that names the differences."""
    old, new = model.peft_config[model.active_adapter].to_dict(), config.to_dict()
    differing = [name for name, value in new.items() if name not in INCIDENTAL and _as_set(value) != _as_set(old.get(name))]
    if differing:
        changes = ", ".join(f"{name}={new[name]!r} (it has {old.get(name)!r})" for name in differing)
        raise ValueError(
            f"The model already has an adapter, and get_peft_model was called again with {changes}. "
            "Load the model again for another adapter, or call it with the same arguments."
        )
    return model


def _as_set(value: object) -> object:
    return frozenset(value) if isinstance(value, list | set | tuple) else value or None


def _check_values(r: int, lora_alpha: float, lora_dropout: float, bias: str, lora_fields: Mapping, **switches: bool) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be a whole number, not {r!r}.")
    for name, value in {"lora_alpha": lora_alpha, "lora_dropout": lora_dropout}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, not {value!r}.")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}.")
    if r <= 0:
        raise ValueError(f"r is {r}: the rank of an adapter must be at least 1 (usual: 8 to 64).")
    if lora_alpha <= 0:
        raise ValueError(f"lora_alpha is {lora_alpha}: it must be above 0 (usual: r or 2 * r).")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}: it must be at least 0 and below 1.")
    if bias not in BIASES:
        raise unknown("bias", bias, BIASES)
    allowed = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for name in lora_fields:
        if name not in allowed:
            raise TypeError(str(unknown("argument", name, allowed)))


def _check_pattern(field: str, pattern: Mapping, modules: Sequence[str]) -> None:
    """Raise ``ValueError`` for a key that no module with an adapter matches: peft would leave it out."""
    for key in pattern:
        if not any(get_pattern_key([key], name) == key for name in modules):
            raise unknown(f"module in {field}", key, _last_parts(modules))


def _check_initialisation(model: PreTrainedModel, init: bool | str, loftq_config: Mapping | None) -> None:
    quantised = any(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules())
    if quantised and (loftq_config or init == "loftq"):
        raise UnsupportedError(
            "LoftQ quantises a 16-bit model itself, and this one is quantised already. Load it with load_in_16bit=True, or "
            "leave loftq_config out."
        )
    if quantised and isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise UnsupportedError(
            f"init_lora_weights={init!r} changes the base weights, which are quantised. Load the model with "
            "load_in_16bit=True, or use init_lora_weights=True."
        )


def _chosen_layers(model: PreTrainedModel, chosen: int | Sequence[int] | None, last: int | None) -> list[int] | None:
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


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The parts of a model that may be trained, as far as the family's adapter file tells them apart."""

    vision: bool
    language: bool
    attention: bool
    mlp: bool

    def has_vision(self, model: PreTrainedModel) -> bool:
        return getattr(model.config, "vision_config", None) is not None

    def __post_init__(self) -> None:
        if not (self.vision or self.language):
            raise ValueError("finetune_vision_layers and finetune_language_layers are both False: nothing would train.")
        if not (self.attention or self.mlp):
            raise ValueError("finetune_attention_modules and finetune_mlp_modules are both False: nothing would train.")

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


def plain_name(name: str) -> str | None:
    """The name that a module or parameter has without an adapter; None for one that belongs to the adapter."""
    if any(part in f".{name}." for part in OF_AN_ADAPTER):
        return None
    for wrapping in WRAPPINGS:
        name = name.replace(wrapping, "")
    return name


def _base_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The modules of the base model, by their plain names; a wrapped one is there twice, with its wrapper first."""
    return [(plain, module) for name, module in model.named_modules() if (plain := plain_name(name)) is not None]


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Every linear layer but the head and the routers of a mixture of experts."""
    modules = _base_modules(model)
    left_out = {name for name, module in modules if module is model.get_output_embeddings()}
    if expert_stacks(model):
        left_out |= {name for name, _ in modules if name.rpartition(".")[2] in ROUTERS}
    return [(name, module) for name, module in modules if isinstance(module, LINEAR) and name not in left_out]


def _chosen_targets(
    model: PreTrainedModel, targets: str | Sequence[str], groups: _Groups, layers: list[int] | None
) -> tuple[list[str], list[str]]:
    """The paths of the linear layers and of the expert stacks that get an adapter."""
    linears = [name for name, _ in _linear_layers(model)]
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
    _chosen_targets(model, targets, _Groups(True, True, True, True), None)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _in_layers(name: str, layers: list[int]) -> bool:
    match = LAYER_INDEX.search(name)
    return match is not None and int(match[1]) in layers


def _shortest(model: PreTrainedModel, chosen: list[str], layers: list[int] | None) -> list[str]:
    """The targets by their last parts where those mean the same modules, else by their whole paths."""
    parts = _last_parts(chosen)
    names = {name for name, _ in _base_modules(model) if name.rpartition(".")[2] in parts}
    meant = {name for name in names if layers is None or _in_layers(name, layers)}
    return parts if meant == set(chosen) else chosen


def _check_parameters(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    if isinstance(targets, str):
        raise TypeError(f"target_parameters must be a list of parameter names, not the string {targets!r}.")
    names = [plain_name(name) for name, _ in model.named_parameters() if plain_name(name)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise unknown("target parameter", target, _last_parts(expert_stacks(model)) or _last_parts(names))
    return list(targets)


def _modules_to_save(model: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """The modules to train whole; with new tokens in the vocabulary, embeddings and head are among them."""
    if isinstance(names, str):
        raise TypeError(f"modules_to_save must be a list of module names, not the string {names!r}.")
    names = list(names or [])
    paths = [path for path, _ in _base_modules(model)]
    for name in names:
        if not any(path == name or path.endswith("." + name) for path in paths):
            raise unknown("module to save", name, {part for part in _last_parts(paths) if not part.isdigit()})
    if getattr(model, "luthier_new_tokens", None):
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        names += [path.rpartition(".")[2] for path, module in _base_modules(model) if any(module is table for table in tables)]
    return sorted(set(names))


def _touches_table(model: PreTrainedModel, names: Sequence[str]) -> bool:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(
        path.rpartition(".")[2] in names or path in names
        for path, module in model.named_modules()
        if any(module is table for table in tables)
    )
