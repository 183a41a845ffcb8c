"""GLM 4 (0414): interleaved rotation of half a head, norms on both sides of a branch."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="Glm4",
    rotary="interleaved",
    mlp="fused",
    attention_norms=("input_layernorm", "post_self_attn_layernorm"),
    mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
    mlp_targets=("gate_up_proj", "down_proj"),
)
