"""Command R7B and Command A: parallel blocks, LayerNorm, rotation only in layers with a window."""

from luthier.adapters.spec import Head, Spec

SPEC = Spec(
    prefix="Cohere2",
    norms=("LayerNorm",),
    norm="layer_norm",
    rotary="interleaved_pairs",
    rotary_switch="sliding_window",
    mlp_norms=(None, None),
    parallel=True,
    head=Head(scale="logit_scale"),
    window="attention",
)
