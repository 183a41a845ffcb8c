"""The vision part of a model as a GGUF file of its own ("mmproj"): one row a family, as in ``architectures.py``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from luthier.errors import UnsupportedError
from luthier.gguf.plan import VISION, Piece, Plan, same
from luthier.gguf.types import F32, FILE_TYPES, FileType, TensorType
from luthier.gguf.writer import Value

KEPT = ("norm", "ln", "position_embd", "patch_embd", "img_break")  # parts of names that stay in 32 bits


SIGLIP_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    **{f"self_attn.{hf}_proj": f"attn_{name}" for hf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))},
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
QWEN_LAYER = {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn_qkv", "attn.proj": "attn_out"}
QWEN_OUTSIDE = {"visual.merger.ln_q": "v.post_ln", "visual.merger.mlp.0": "mm.0", "visual.merger.mlp.2": "mm.2"}
PIXTRAL_LAYER = {
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
    **{f"attention.{hf}_proj": f"attn_{name}" for hf, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))},
    **{f"feed_forward.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
PIXTRAL_OUTSIDE = {
    "vision_tower.patch_conv": "v.patch_embd",
    "vision_tower.ln_pre": "v.pre_ln",
    "multi_modal_projector.linear_1": "mm.1",
    "multi_modal_projector.linear_2": "mm.2",
    "multi_modal_projector.norm": "mm.input_norm",
    "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
}


@dataclass(frozen=True)
class Projector:
    """One family. ``layers``: the path of the layers; ``layer``, ``outside``: modules and their GGUF tensors; ``split_qkv``:
    llama.cpp wants q, k and v apart; ``keys``: numbers that only this family has.
    """

    type: str
    layers: str
    layer: Mapping[str, str]
    outside: Mapping[str, str]
    keys: Callable[[PreTrainedConfig], dict[str, Value]]
    split_qkv: bool = False
    interleaved_rope: bool = False


def _qwen2_vl(config: PreTrainedConfig) -> dict[str, Value]:
    vision = config.vision_config
    return {
        "clip.vision.embedding_length": vision.embed_dim,
        "clip.vision.feed_forward_length": int(vision.embed_dim * vision.mlp_ratio),
        "clip.vision.image_size": 560,
        "clip.vision.spatial_merge_size": vision.spatial_merge_size,
    }


def _qwen2_5_vl(config: PreTrainedConfig) -> dict[str, Value]:
    vision, full = config.vision_config, list(config.vision_config.fullatt_block_indexes)
    every = full[0] + 1
    if full != list(range(every - 1, vision.depth, every)) or vision.window_size != 112:
        raise UnsupportedError(
            "llama.cpp has windows of 112 pixels and full attention in every n-th vision layer; this model has windows of "
            f"{vision.window_size} and full attention in the layers {full}. Save with save_pretrained_merged instead."
        )
    return {
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": every,
        "clip.vision.image_size": 560,
        "clip.vision.spatial_merge_size": vision.spatial_merge_size,
    }


def _qwen3_vl(config: PreTrainedConfig) -> dict[str, Value]:
    vision = config.vision_config
    return {
        "clip.use_gelu": True,
        "clip.vision.image_size": math.isqrt(vision.num_position_embeddings) * vision.patch_size,
        "clip.vision.spatial_merge_size": vision.spatial_merge_size,
        "clip.vision.is_deepstack_layers": [i in vision.deepstack_visual_indexes for i in range(vision.depth)],
    }


def _gemma3(config: PreTrainedConfig) -> dict[str, Value]:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return {
        "clip.use_gelu": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.projector.scale_factor": side // math.isqrt(config.mm_tokens_per_image),
    }


def _pixtral(config: PreTrainedConfig) -> dict[str, Value]:
    vision = config.vision_config
    return {
        "clip.use_silu" if vision.hidden_act == "silu" else "clip.use_gelu": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.spatial_merge_size": getattr(config, "spatial_merge_size", 1),
        "clip.rope.freq_base": float(vision.rope_parameters["rope_theta"]),
    }


# model_type of the whole model -> row
PROJECTORS = {
    "qwen2_vl": Projector(
        "qwen2vl_merger",
        "visual.blocks",
        QWEN_LAYER | {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
        QWEN_OUTSIDE,
        _qwen2_vl,
        split_qkv=True,
    ),
    "qwen2_5_vl": Projector(
        "qwen2.5vl_merger",
        "visual.blocks",
        QWEN_LAYER | {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
        QWEN_OUTSIDE,
        _qwen2_5_vl,
        split_qkv=True,
    ),
    "qwen3_vl": Projector(
        "qwen3vl_merger",
        "visual.blocks",
        QWEN_LAYER | {"mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"},
        {
            "visual.pos_embed": "v.position_embd",
            "visual.merger.norm": "v.post_ln",
            "visual.merger.linear_fc1": "mm.0",
            "visual.merger.linear_fc2": "mm.2",
        },
        _qwen3_vl,
    ),
    "gemma3": Projector(
        "gemma3",
        "vision_tower.encoder.layers",
        SIGLIP_LAYER,
        {
            "vision_tower.embeddings.patch_embedding": "v.patch_embd",
            "vision_tower.embeddings.position_embedding": "v.position_embd",
            "vision_tower.post_layernorm": "v.post_ln",
            "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
        },
        _gemma3,
    ),
    "llava": Projector(
        "pixtral", "vision_tower.transformer.layers", PIXTRAL_LAYER, PIXTRAL_OUTSIDE, _pixtral, interleaved_rope=True
    ),
    "mistral3": Projector(
        "pixtral", "vision_tower.transformer.layers", PIXTRAL_LAYER, PIXTRAL_OUTSIDE, _pixtral, interleaved_rope=True
    ),
}


# what llama.cpp takes for granted
ACTIVATIONS = {
    "qwen2_vl": ("quick_gelu",),
    "qwen2_5_vl": ("silu",),
    "qwen3_vl": ("gelu_pytorch_tanh",),
    "gemma3": ("gelu_pytorch_tanh",),
    "llava": ("silu", "gelu"),
    "mistral3": ("silu", "gelu"),
}


def is_vision(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to the vision part."""
    return VISION.match(name) is not None


def mmproj_path(gguf_path: Path) -> Path:
    """Where the vision part of the model in this GGUF file lies: the same for all of its quantisations."""
    stem, _, quant = gguf_path.stem.rpartition("-")
    return gguf_path.with_name(f"mmproj-{stem if quant.lower() in FILE_TYPES else gguf_path.stem}.gguf")


def find_projector(config: PreTrainedConfig) -> Projector | None:
    """The row of a configuration; None for a model of text alone, ``UnsupportedError`` for one that is not covered."""
    if getattr(config, "vision_config", None) is None:
        return None
    row = PROJECTORS.get(config.model_type)
    vision = getattr(config.vision_config, "model_type", "")
    if row is None or (row.type == "pixtral" and vision != "pixtral"):
        raise UnsupportedError(
            f"GGUF export does not cover the vision part of {config.model_type} ({vision}). Covered: "
            f"{', '.join(PROJECTORS)} (llava and mistral3 with Pixtral). Save with save_pretrained_merged instead."
        )
    _check_fixed(config)
    return row


def _check_fixed(config: PreTrainedConfig) -> None:
    """``UnsupportedError`` for a vision part that would load and see wrongly."""
    allowed, found = ACTIVATIONS[config.model_type], config.vision_config.hidden_act
    layers = getattr(config.vision_config, "num_hidden_layers", 0)
    last = getattr(config, "vision_feature_layer", -1)
    wrong = []
    if found not in allowed:
        wrong.append(f"its activation must be {' or '.join(allowed)}, not {found}")
    if last not in (-1, layers, [-1], [layers]):
        wrong.append(f"it must use the last vision layer, not {last}")
    if wrong:
        raise UnsupportedError(
            f"llama.cpp computes the vision part of {config.model_type} in one way only: {'; '.join(wrong)}. "
            "Save with save_pretrained_merged instead."
        )


def plan_vision(
    row: Projector, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], break_token: int | None
) -> Plan:
    """What becomes of every tensor of the vision part; ``UnsupportedError`` for one that is not known.

    ``break_token``: the token that stands between the rows of a picture, whose embedding Pixtral takes into the file.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name in shapes:
        match = VISION.match(name)
        found = () if match is None else _route(row, config, match["name"].replace("vision_model.", ""))
        if found is None:
            raise UnsupportedError(f"GGUF export does not know the tensor {name} of the checkpoint's vision part.")
        if row.type == "pixtral" and break_token is not None and name.endswith("embed_tokens.weight"):
            found = (Piece("v.token_embd.img_break", None, lambda weight: weight[break_token]),)
        if found:
            pieces[name] = found
    result = {
        piece.name: tuple(piece.transform(torch.empty(shapes[name], device="meta")).shape)
        for name, found in pieces.items()
        for piece in found
    }
    return Plan(pieces, result)


def _route(row: Projector, config: PreTrainedConfig, name: str) -> tuple[Piece, ...] | None:
    if name == "multi_modal_projector.mm_input_projection_weight":
        return (Piece("mm.input_projection.weight", None, same),)
    if name == "visual.patch_embed.proj.weight":  # two pictures of a film: llama.cpp adds the two convolutions
        return tuple(Piece(f"v.patch_embd.weight{end}", None, lambda w, i=i: w[:, :, i]) for i, end in ((0, ""), (1, ".1")))
    if name == "visual.patch_embed.proj.bias":
        return (Piece("v.patch_embd.bias", None, same),)
    module, _, leaf = name.rpartition(".")
    if module in row.outside:
        offset = module.endswith("mm_soft_emb_norm")
        return (Piece(f"{row.outside[module]}.{leaf}", None, (lambda w: w.float() + 1) if offset else same),)
    deep = re.fullmatch(r"visual\.deepstack_merger_list\.(\d+)\.(norm|linear_fc1|linear_fc2)", module)
    if deep:
        layer = config.vision_config.deepstack_visual_indexes[int(deep[1])]
        return (Piece(f"v.deepstack.{layer}.{deep[2].removeprefix('linear_')}.{leaf}", None, same),)
    found = re.fullmatch(rf"{re.escape(row.layers)}\.(\d+)\.(.+)", module)
    if found is None or found[2] not in row.layer:
        return None
    target = f"v.blk.{found[1]}.{row.layer[found[2]]}.{leaf}"
    if row.split_qkv and found[2] == "attn.qkv":
        return tuple(
            Piece(target.replace("attn_qkv", f"attn_{part}"), None, lambda w, i=i: w.chunk(3)[i])
            for i, part in enumerate("qkv")
        )
    if row.interleaved_rope and found[2] in ("attention.q_proj", "attention.k_proj"):
        heads = config.vision_config.num_attention_heads
        return (Piece(target, None, lambda w: w.reshape(heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)),)
    return (Piece(target, None, same),)


def vision_metadata(row: Projector, config: PreTrainedConfig, colours: tuple[list[float], list[float]]) -> dict[str, Value]:
    """Everything but the file's type. ``colours``: their mean and standard deviation, see `normalisation`."""
    vision = config.vision_config
    mean, std = colours
    keys: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": row.type,
        "clip.vision.projection_dim": config.get_text_config().hidden_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": getattr(vision, "intermediate_size", 0) or 0,
        "clip.vision.block_count": getattr(vision, "num_hidden_layers", None) or vision.depth,
        "clip.vision.attention.head_count": getattr(vision, "num_attention_heads", None) or vision.num_heads,
        "clip.vision.attention.layer_norm_epsilon": float(_epsilon(vision)),
        "clip.vision.image_mean": mean,
        "clip.vision.image_std": std,
    }
    return keys | row.keys(config)


def _epsilon(vision: PreTrainedConfig) -> float:
    """Pixtral's and Qwen's vision towers have theirs in their code."""
    return getattr(vision, "layer_norm_eps", None) or (1e-5 if vision.model_type == "pixtral" else 1e-6)


def normalisation(directory: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the colours, from the image processor's configuration."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = directory / file
        if path.is_file():
            settings: dict[str, Any] = json.loads(path.read_text("utf8"))
            settings = settings.get("image_processor") or settings
            if "image_mean" in settings:
                return [float(x) for x in settings["image_mean"]], [float(x) for x in settings["image_std"]]
    raise FileNotFoundError(f"{directory} has no processor_config.json that says image_mean: save the processor there.")


def vision_type(name: str, shape: tuple[int, ...], target: FileType) -> TensorType:
    """The default of the file's type for matrices; F32 for what is small or decisive."""
    return F32 if len(shape) < 2 or any(kept in name for kept in KEPT) else target.default
