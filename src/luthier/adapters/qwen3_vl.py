"""Qwen3-VL; features of three depths of the tower are merged into the first decoder layers."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.visual",
    projector_prefixes=("model.visual.merger", "model.visual.deepstack_merger_list"),
    attention_targets=("qkv", "proj"),
    mlp_targets=("linear_fc1", "linear_fc2"),
)
