"""OLMo 3: norms after the branches, and over the whole width of q and k."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="Olmo3",
    norm="scale_then_cast",
    qk_norm="width",
    attention_norms=(None, "post_attention_layernorm"),
    mlp_norms=(None, "post_feedforward_layernorm"),
    window="attention",
)
