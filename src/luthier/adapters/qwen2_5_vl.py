"""Qwen2.5-VL."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.visual",
    projector_prefixes=("model.visual.merger",),
    attention_targets=("qkv", "proj"),
    mlp_targets=("gate_proj", "up_proj", "down_proj"),
)
