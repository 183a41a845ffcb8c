"""Gemma 2: norms on both sides of a branch, soft caps, every second layer with a window."""

from luthier.adapters.spec import Head, Spec

SPEC = Spec(
    prefix="Gemma2",
    norm="one_plus_scale",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    head=Head(softcap="final_logit_softcapping"),
    window="attention",
    softcap="attn_logit_softcapping",
)
