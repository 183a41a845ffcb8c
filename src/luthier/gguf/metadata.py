"""The numbers of a model that its GGUF file carries: sizes, norms, rotary embedding."""

from __future__ import annotations

import math
import warnings

import torch
from transformers import PreTrainedConfig

from luthier.errors import UnsupportedError
from luthier.gguf.architectures import Architecture
from luthier.gguf.writer import Value


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether the embeddings are the output head, too."""
    return bool(getattr(config, "tie_word_embeddings", False))


def rope_parameters(config: PreTrainedConfig, layer_type: str = "full_attention") -> dict:
    """The rotary embedding's parameters of one type of layer; most models have one set for all."""
    parameters = config.rope_parameters
    return parameters.get(layer_type, parameters)


def metadata(architecture: Architecture, config: PreTrainedConfig, name: str) -> dict[str, Value]:
    """Everything but the tokenizer and the file's type, of the language model."""
    outer, config = config, config.get_text_config()
    keys: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": _context_length(architecture, config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        **_rope(architecture, config),
    }
    for key, attribute in architecture.keys.items():
        value = getattr(config, attribute, None)
        if value is not None:
            keys[key] = value
    general: dict[str, Value] = {"general.architecture": architecture.name, "general.type": "model"}
    if name:
        general["general.name"] = name
    vision = getattr(outer, "vision_config", None)
    if getattr(vision, "deepstack_visual_indexes", None):  # layers that a picture enters again
        keys["n_deepstack_layers"] = len(vision.deepstack_visual_indexes)
    return general | {f"{architecture.name}.{key}": value for key, value in keys.items()}


def rope_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors that are computed from the configuration: divisors of the rotary frequencies, float32 ``[head size / 2]``."""
    config = config.get_text_config()
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, head_size(config))}
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"], dtype=torch.float32),
        }
    return {}


def _llama3_divisors(rope: dict, size: int) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between interpolated."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed by the factor, 1: as it was
    return (1 / ((1 - kept) / rope["factor"] + kept)).float()


def _rope(architecture: Architecture, config: PreTrainedConfig) -> dict[str, Value]:
    rope = rope_parameters(config)
    rotated = rope.get("partial_rotary_factor", 1.0) if architecture.partly_rotated else 1.0
    keys: dict[str, Value] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_size(config) * rotated),
    }
    if rope.get("mrope_section"):
        keys["rope.dimension_sections"] = [*rope["mrope_section"], 0]
    local = rope_parameters(config, "sliding_attention")
    if local is not rope:
        if local["rope_type"] != "default":
            raise UnsupportedError(f"GGUF export does not cover rope_type {local['rope_type']!r} in sliding layers.")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if architecture.name == "phi3":  # llama.cpp insists on it
        keys["rope.scaling.original_context_length"] = _original_length(rope, config)
    kind = rope["rope_type"]
    if kind not in architecture.rope_types:
        raise UnsupportedError(
            f"llama.cpp does not have rope_type {kind!r} in {architecture.name}. It has {', '.join(architecture.rope_types)}."
        )
    return keys | _SCALING[kind](rope, config)


def _original_length(rope: dict, config: PreTrainedConfig) -> int:
    length = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return length or config.max_position_embeddings


def _linear(rope: dict, config: PreTrainedConfig) -> dict[str, Value]:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}


def _yarn(rope: dict, config: PreTrainedConfig) -> dict[str, Value]:
    _check_yarn_ramp(rope, config)
    original = _original_length(rope, config)
    factor = rope.get("factor") or config.max_position_embeddings / original
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(factor),
        "rope.scaling.original_context_length": original,
    }
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # llama.cpp multiplies by this itself
    wanted = rope.get("attention_factor")
    if wanted is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        wanted = (0.1 * rope["mscale"] * math.log(factor) + 1) / (0.1 * rope["mscale_all_dim"] * math.log(factor) + 1)
    if wanted is not None and not math.isclose(wanted, default):
        keys["rope.scaling.attn_factor"] = wanted / default
    return keys


def _check_yarn_ramp(rope: dict, config: PreTrainedConfig) -> None:
    """llama.cpp goes over from kept to stretched waves between 32 turns and 1, and rounds to whole dimensions."""
    betas = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if betas != (32, 1):
        raise UnsupportedError(
            f"llama.cpp has YaRN with beta_fast 32 and beta_slow 1 only; this model has {betas[0]} and {betas[1]}. "
            "Its GGUF file would give wrong answers. Save with save_pretrained_merged instead."
        )
    if not rope.get("truncate", True):
        warnings.warn(
            f"{config.model_type}: llama.cpp rounds YaRN's ramp to whole dimensions, this model does not (truncate: false). "
            "Answers differ slightly from transformers' in every GGUF file of it.",
            UserWarning,
            stacklevel=6,
        )


def _longrope(rope: dict, config: PreTrainedConfig) -> dict[str, Value]:
    original = _original_length(rope, config)
    scale = config.max_position_embeddings / original
    attention = rope.get("attention_factor") or (math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
    return {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(attention)}


_SCALING = {
    "default": lambda rope, config: {},
    "llama3": lambda rope, config: {},  # a tensor, see rope_tensors
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


def context_length(architecture: Architecture, config: PreTrainedConfig) -> int:
    """The longest context on which llama.cpp computes what the model was trained to compute."""
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    is_ignored = window and window < longest and "sliding_attention" in layer_types and not architecture.windowed
    return window if is_ignored else longest


def _context_length(architecture: Architecture, config: PreTrainedConfig) -> int:
    length, longest = context_length(architecture, config), config.max_position_embeddings
    if length < longest:
        warnings.warn(
            f"The model attends to the last {length} tokens; llama.cpp's {architecture.name!r} attends to all of them, which "
            f"differs beyond {length}: the file says that the context is {length} tokens long instead of {longest}.",
            UserWarning,
            stacklevel=5,
        )
    return length
