"""Mistral Small 3.1 and later, Pixtral in its newer form."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_tower",
    projector_prefixes=("model.multi_modal_projector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp_targets=("gate_proj", "up_proj", "down_proj"),
)
