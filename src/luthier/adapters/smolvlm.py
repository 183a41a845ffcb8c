"""SmolVLM 2."""

from luthier.adapters.spec import Vision

VISION = Vision(
    vision_prefix="model.vision_model",
    projector_prefixes=("model.connector",),
    attention_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    mlp_targets=("fc1", "fc2"),
    language_prefix="model.text_model",
)
