"""Gemma 3 with images (SigLIP tower)."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_tower",
    projector_prefixes=("model.multi_modal_projector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlp_targets=("fc1", "fc2"),
)
