"""Adapters: attached to a model anew, or from a directory."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from luthier.errors import UnsupportedError, unknown
from luthier.gguf.lora import BASE_CHANGING_INITS
from luthier.gguf.metadata import is_tied
from luthier.model import checkpoint
from luthier.model.accelerate import base_model
from luthier.model.checkpointing import checkpointing_mode, set_checkpointing
from luthier.model.cpu_4bit import is_misread
from luthier.model.experts import ExpertsLora, Nf4Experts
from luthier.model.random_state import seeded
from luthier.model.targets import (
    Groups,
    check_parameters,
    check_pattern,
    chosen_layers,
    chosen_targets,
    linear_layers,
    saved_modules,
    shortest_names,
    touches_table,
)
from luthier.model.vocab import resize_embeddings

BIASES = ("none", "all", "lora_only")
INITS_OF_EXPERTS = (True, False, "gaussian", "eva")  # of init_lora_weights; the others read a layer's weight
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

    groups = Groups(finetune_vision_layers, finetune_language_layers, finetune_attention_modules, finetune_mlp_modules)
    layers = chosen_layers(base, layers_to_transform, finetune_last_n_layers)
    modules, stacks = chosen_targets(base, target_modules, groups, layers)
    if target_parameters is not None:
        stacks = check_parameters(base, target_parameters)
    stacks = _possible_stacks(stacks, target_parameters is not None, lora_dropout, use_dora, init_lora_weights)
    if use_dora and any(is_misread(module) for _, module in linear_layers(base)):
        raise UnsupportedError(
            "use_dora=True on a 4-bit model on the CPU needs layer widths that are multiples of 64: bitsandbytes expands "
            "others wrongly there. Use load_in_16bit=True, or use_dora=False."
        )
    for field in ("rank_pattern", "alpha_pattern"):
        check_pattern(field, lora_fields.get(field) or {}, [*modules, *stacks])
    saved = saved_modules(base, modules_to_save)
    narrow = layers is not None and not groups.has_vision(base)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,
        target_modules=shortest_names(base, modules, layers if narrow else None),
        target_parameters=stacks or None,
        layers_to_transform=layers if narrow else None,
        layers_pattern=layers_pattern if narrow else None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=saved or None,
        ensure_weight_tying=bool(saved) and is_tied(base.config) and touches_table(base, saved),
        init_lora_weights=init_lora_weights,
        loftq_config=dict(loftq_config or {}),
        **{"task_type": "CAUSAL_LM", **lora_fields},
    )
    if isinstance(model, PeftModel):
        return _same_adapter(model, config)
    register_experts(base, config)
    with seeded(base, random_state):
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


def _possible_stacks(stacks: list[str], asked: bool, lora_dropout: float, use_dora: bool, init: bool | str) -> list[str]:
    """Those of ``stacks`` that can have an adapter of this kind: all, or none; an error if they were ``asked`` for."""
    initialised = f"init_lora_weights={init!r}" if init not in INITS_OF_EXPERTS else ""
    if stacks and initialised and asked:
        raise UnsupportedError(f"peft has no {initialised} for target_parameters. Use init_lora_weights=True.")
    if stacks and not asked and (lora_dropout or use_dora or initialised):
        reason = "lora_dropout" if lora_dropout else "use_dora" if use_dora else initialised
        warnings.warn(f"The experts get no adapter: peft has none with {reason} for them.", UserWarning, stacklevel=3)
        return []
    return stacks


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
