"""Idefics 3, and SmolVLM, which is published as one."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_model",
    projector_prefixes=("model.connector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlp_targets=("fc1", "fc2"),
)
