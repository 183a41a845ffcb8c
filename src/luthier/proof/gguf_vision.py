"""The vision part in a GGUF file of its own ("mmproj"), read back and computed, for the proof of an export.

Names, order of rows and numbers are read from the file alone and put into transformers' vision tower; the tables here say
what llama.cpp takes the tensors for and share nothing with the code that writes them.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedConfig
from transformers.initialization import no_init_weights

from luthier.gguf.dequantize import load_tensor
from luthier.gguf.reader import GGUFFile

LARGEST_GRID = (6, 10)  # tokens of the picture, down and across: more than one window of Qwen 2.5

# module of the tower, {} for the number of a layer -> tensor of the file
QWEN_2 = {
    "visual.blocks.{}.norm1": "v.blk.{}.ln1",
    "visual.blocks.{}.norm2": "v.blk.{}.ln2",
    "visual.blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "visual.blocks.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.fc2": "v.blk.{}.ffn_down",
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
}
QWEN_2_5 = QWEN_2 | {f"visual.blocks.{{}}.mlp.{name}_proj": f"v.blk.{{}}.ffn_{name}" for name in ("gate", "up", "down")}
QWEN_3 = QWEN_2 | {
    "visual.patch_embed.proj": "v.patch_embd",
    "visual.pos_embed": "v.position_embd",
    "visual.blocks.{}.attn.qkv": "v.blk.{}.attn_qkv",
    "visual.blocks.{}.mlp.linear_fc1": "v.blk.{}.ffn_up",
    "visual.blocks.{}.mlp.linear_fc2": "v.blk.{}.ffn_down",
    "visual.merger.norm": "v.post_ln",
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
    "visual.deepstack_merger_list.{}.norm": "v.deepstack.{}.norm",
    "visual.deepstack_merger_list.{}.linear_fc1": "v.deepstack.{}.fc1",
    "visual.deepstack_merger_list.{}.linear_fc2": "v.deepstack.{}.fc2",
}
SIGLIP = {
    "vision_tower.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.embeddings.position_embedding": "v.position_embd",
    "vision_tower.encoder.layers.{}.layer_norm1": "v.blk.{}.ln1",
    "vision_tower.encoder.layers.{}.layer_norm2": "v.blk.{}.ln2",
    "vision_tower.encoder.layers.{}.self_attn.q_proj": "v.blk.{}.attn_q",
    "vision_tower.encoder.layers.{}.self_attn.k_proj": "v.blk.{}.attn_k",
    "vision_tower.encoder.layers.{}.self_attn.v_proj": "v.blk.{}.attn_v",
    "vision_tower.encoder.layers.{}.self_attn.out_proj": "v.blk.{}.attn_out",
    "vision_tower.encoder.layers.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "vision_tower.encoder.layers.{}.mlp.fc2": "v.blk.{}.ffn_down",
    "vision_tower.post_layernorm": "v.post_ln",
    "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
    "multi_modal_projector.mm_input_projection_weight": "mm.input_projection.weight",
}
PIXTRAL = {
    "vision_tower.patch_conv": "v.patch_embd",
    "vision_tower.ln_pre": "v.pre_ln",
    "vision_tower.transformer.layers.{}.attention_norm": "v.blk.{}.ln1",
    "vision_tower.transformer.layers.{}.ffn_norm": "v.blk.{}.ln2",
    "vision_tower.transformer.layers.{}.attention.q_proj": "v.blk.{}.attn_q",
    "vision_tower.transformer.layers.{}.attention.k_proj": "v.blk.{}.attn_k",
    "vision_tower.transformer.layers.{}.attention.v_proj": "v.blk.{}.attn_v",
    "vision_tower.transformer.layers.{}.attention.o_proj": "v.blk.{}.attn_out",
    "vision_tower.transformer.layers.{}.feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    "vision_tower.transformer.layers.{}.feed_forward.up_proj": "v.blk.{}.ffn_up",
    "vision_tower.transformer.layers.{}.feed_forward.down_proj": "v.blk.{}.ffn_down",
    "multi_modal_projector.norm": "mm.input_norm",
    "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
    "multi_modal_projector.linear_1": "mm.1",
    "multi_modal_projector.linear_2": "mm.2",
}
TOWERS = {
    "qwen2vl_merger": QWEN_2,
    "qwen2.5vl_merger": QWEN_2_5,
    "qwen3vl_merger": QWEN_3,
    "gemma3": SIGLIP,
    "pixtral": PIXTRAL,
}
BREAK = "v.token_embd.img_break"  # belongs to the text part's embeddings
LAYER = re.compile(r"(?<=blocks\.)\d+|(?<=layers\.)\d+|(?<=merger_list\.)\d+")


def read_vision(file: GGUFFile, config: PreTrainedConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The model of ``config`` with the vision part of ``file`` in 32 bits; its language model holds no weights.

    ``ValueError`` for a file that lacks a tensor, has one of another shape, or one that the model does not know.
    """
    model = _empty_model(config, device)
    taken: set[str] = set()
    tower = TOWERS[file.metadata["clip.projector_type"]]
    for name, parameter in model.model.named_parameters():
        if parameter.is_meta:
            continue
        found = _read(file, tower, name.replace("vision_model.", ""), device, taken)
        if found.shape != parameter.shape:
            raise ValueError(f"{name} has the shape {tuple(found.shape)} there and {tuple(parameter.shape)} in the model")
        parameter.data = found
    strange = [name for name in file.tensors if name not in taken and name != BREAK]
    if strange:
        raise ValueError(f"the model has no place for {', '.join(strange[:5])}")
    return model.eval()


def _empty_model(config: PreTrainedConfig, device: torch.device | str) -> nn.Module:
    """A model whose vision part is made, though not filled, and whose language model is not."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with no_init_weights(), torch.device(device):
        if hasattr(model.model, "visual"):
            model.model.visual = type(model.model.visual)(config.vision_config)
        else:
            model.model.vision_tower = AutoModel.from_config(config.vision_config)
            model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    return model


def _read(file: GGUFFile, tower: dict[str, str], name: str, device: torch.device | str, taken: set[str]) -> torch.Tensor:
    """The tensor of the file, or what is made of several, that is the parameter ``name`` of the model."""

    def tensor(stored: str) -> torch.Tensor:
        if stored not in file.tensors:
            raise ValueError(f"it lacks {stored}")
        taken.add(stored)
        return load_tensor(file, stored, device)

    if name == "visual.patch_embed.proj.weight":  # two pictures of a film, each with a convolution of its own
        return torch.stack([tensor("v.patch_embd.weight"), tensor("v.patch_embd.weight.1")], 2)
    module, _, leaf = name.rpartition(".")
    if name in tower:  # a matrix that is no module
        return tensor(tower[name])
    layer = LAYER.search(module)
    number = int(layer[0]) if layer else 0
    general = LAYER.sub("{}", module)
    if general == "visual.blocks.{}.attn.qkv" and general not in tower:
        return torch.cat([tensor(f"v.blk.{number}.attn_{part}.{leaf}") for part in "qkv"])
    if general not in tower:
        raise ValueError(f"the proof does not know the model's {name}")
    if "merger_list" in general:  # named by the layer that they stand behind
        number = [i for i, deep in enumerate(file.metadata["clip.vision.is_deepstack_layers"]) if deep][number]
    found = tensor(f"{tower[general].format(number)}.{leaf}")
    if general.endswith("mm_soft_emb_norm"):  # the file has 1 + weight
        return found - 1
    if general.endswith((".attention.q_proj", ".attention.k_proj")):  # the file has the pairs that turn together side by side
        rows = torch.arange(len(found), device=device).view(file.metadata["clip.vision.attention.head_count"], -1)
        return found[torch.cat([rows[:, 0::2], rows[:, 1::2]], 1).flatten()]
    return found


def picture_for(config: PreTrainedConfig) -> torch.Tensor:
    """A made picture, uint8 ``[3, height, width]``, that the vision part takes as it is; no square where it may be none."""
    vision = config.vision_config
    cell = vision.patch_size * _merged(config)  # pixels of a token
    if config.model_type == "gemma3":
        height = width = vision.image_size
    elif config.model_type.startswith("qwen"):
        height, width = (size * cell for size in LARGEST_GRID)
    else:  # positions are numbered within the largest picture
        side = vision.image_size // cell
        height, width = (min(size, side - less) * cell for size, less in zip(LARGEST_GRID, (1, 0), strict=True))
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    grain = torch.rand(3, height, width, generator=generator)
    return ((0.7 * smooth + 0.3 * grain) * 255).to(torch.uint8)


@torch.no_grad()
def features(model: nn.Module, picture: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """What the vision part makes of ``picture``: float32 ``[tokens, width]``, on the CPU; deep features behind each other."""
    config = model.config
    parameter = next(p for name, p in model.named_parameters() if re.search(r"visual\.|vision_tower\.", name))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    pixels = ((picture / 255 - mean) / std).to(parameter.device)
    pixels = pixels if not parameter.is_floating_point() else pixels.to(parameter.dtype)
    inputs = {"pixel_values": pixels[None]}
    if config.model_type.startswith("qwen"):
        inputs["pixel_values"], inputs["image_grid_thw"] = _patches(pixels, config.vision_config.patch_size, _merged(config))
    elif config.model_type != "gemma3":
        inputs["image_sizes"] = torch.tensor([picture.shape[1:]], device=pixels.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions in 32 bits are in 19 otherwise
        found = model.get_image_features(**inputs)
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    parts = [torch.cat(list(part)) if isinstance(part, list | tuple) else part for part in parts]
    width = config.get_text_config().hidden_size
    return torch.cat([part.reshape(-1, width) for part in parts], -1).float().cpu()


def _merged(config: PreTrainedConfig) -> int:
    """Patches along a side of what becomes one token."""
    return getattr(config.vision_config, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1


def _patches(pixels: torch.Tensor, patch: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[3, height, width]`` as Qwen's towers take it: patches that become one token behind each other, each twice in time."""
    _, height, width = pixels.shape
    down, across = height // patch // merge, width // patch // merge
    cut = pixels.view(3, down, merge, patch, across, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    twice = cut[..., None, :, :].expand(*cut.shape[:5], 2, patch, patch)
    grid = torch.tensor([[1, height // patch, width // patch]], device=pixels.device)
    return twice.reshape(down * across * merge * merge, -1), grid
