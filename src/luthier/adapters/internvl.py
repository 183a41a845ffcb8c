"""InternVL 2.5, 3 and 3.5, in the form of transformers (-hf)."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_tower",
    projector_prefixes=("model.multi_modal_projector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "projection_layer"),
    mlp_targets=("fc1", "fc2"),
)
