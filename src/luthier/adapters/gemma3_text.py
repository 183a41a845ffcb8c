"""Gemma 3, the text model alone or as a decoder: q and k norms, two rotary bases."""

from luthier.adapters.spec import Head, Spec

SPEC = Spec(
    prefix="Gemma3",
    norm="one_plus_scale",
    qk_norm="head",
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    head=Head(softcap="final_logit_softcapping"),
    window="attention",
)
