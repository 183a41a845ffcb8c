"""Llama 3.2 Vision."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_model",
    projector_prefixes=("model.multi_modal_projector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp_targets=("fc1", "fc2"),
)
