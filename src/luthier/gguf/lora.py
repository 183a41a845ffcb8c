"""An adapter as a GGUF file of its own, for ``llama-cli --lora`` beside the GGUF file of its base model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from luthier.errors import UnsupportedError
from luthier.files import atomic_file, require_space
from luthier.gguf import architectures
from luthier.gguf.metadata import is_tied
from luthier.gguf.plan import route
from luthier.gguf.types import F32
from luthier.gguf.writer import GGUFWriter, TensorInfo, Value, plan

KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(?:\.weight)?$")
MERGE = "Merge it instead: leave save_method out."
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these put a part of the base into the adapter


def convert_lora_to_gguf(adapter_dir: str | Path, config: PreTrainedConfig, out: str | Path) -> Path:
    """Write the adapter in ``adapter_dir`` (peft's files), of a model with ``config``, as a GGUF file of type "adapter".

    llama.cpp scales every pair by one alpha over the pair's rank. rsLoRA and patterns of ranks and alphas are right here:
    what one alpha cannot say is multiplied into the B matrices. Raises ``UnsupportedError`` for what cannot be an adapter
    there: DoRA, modules saved whole, new tokens, adapters of biases, experts or tied embeddings, or over a changed base.
    """
    adapter_dir = Path(adapter_dir)
    settings = json.loads((adapter_dir / "adapter_config.json").read_text("utf8"))
    weights = load_file(adapter_dir / "adapter_model.safetensors")
    weights = {key: weight for key, weight in weights.items() if ".base_layer." not in key}  # peft's copies of the base's
    _refuse_others(settings, weights, config)
    architecture = architectures.find(config)
    alpha = _scale(settings, "", settings["r"]) * settings["r"]
    tensors: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        match = KEY.match(key)
        assert match is not None, key  # _refuse_others has seen all of them
        (piece,) = route(architecture, config, f"{match['module']}.weight") or (None,)
        if piece is None or piece.expert is not None:
            raise UnsupportedError(f"llama.cpp has no adapter for {match['module']}. {MERGE}")
        weight = weight.float()
        if match["side"].endswith("B"):
            wanted = _scale(settings, match["module"], weight.shape[1])
            weight = piece.transform(weight) * (wanted * weight.shape[1] / alpha)
        elif match["side"] == "embedding_A":
            weight = weight.t()
        # `contiguous` would leave a matrix of one column its strides
        tensors[f"{piece.name}.lora_{match['side'][-1].lower()}"] = weight.clone(memory_format=torch.contiguous_format)
    return _write(tensors, architecture.name, alpha, Path(out))


def _write(tensors: Mapping[str, torch.Tensor], architecture: str, alpha: float, out: Path) -> Path:
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        **{"general.file_type": 0, "general.quantization_version": 2},
    }
    layout = plan(metadata, [TensorInfo(name, tuple(tensor.shape), F32) for name, tensor in tensors.items()])
    require_space(out, layout.size)
    with atomic_file(out) as place, GGUFWriter(place, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.view(torch.uint8))
    return out


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies B·A by in this module."""
    alpha = _of_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """peft's rule: a key of the pattern names the end of a module's path, as a regular expression."""
    key = next((key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", module)), None)
    return default if key is None else pattern[key]


def _refuse_others(settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor], config: PreTrainedConfig) -> None:
    if settings.get("peft_type") != "LORA":
        raise UnsupportedError(f"llama.cpp knows LoRA adapters, not {settings.get('peft_type')}. {MERGE}")
    init = settings.get("init_lora_weights")
    reasons = {
        "DoRA": settings.get("use_dora"),
        "invocation tokens (aLoRA)": settings.get("alora_invocation_tokens"),
        "layers that the base has once (layer_replication)": settings.get("layer_replication"),
        f"init_lora_weights={init!r}, which changed the base": str(init).lower().startswith(BASE_CHANGING_INITS),
        "modules saved whole (modules_to_save)": settings.get("modules_to_save"),
        "new or retrained tokens": settings.get("trainable_token_indices"),
        "trained biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "parameters of experts": settings.get("target_parameters"),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    strange = [key for key in weights if not KEY.match(key)]
    if strange and not found:
        found = [f"the tensor {strange[0]}"]
    if is_tied(config) and any(re.search(r"\b(lm_head|embed_tokens)\.", key) for key in weights):
        found.append("tied embeddings")
    if found:
        raise UnsupportedError(f"An adapter with {', '.join(found)} cannot be a GGUF adapter. {MERGE}")
