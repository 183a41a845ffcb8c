"""Phi 3, 3.5 and 4 (text): fused projections, part of each head rotates."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="Phi3",
    mlp="fused",
    qkv="fused",
    attention_targets=("qkv_proj", "o_proj"),
    mlp_targets=("gate_up_proj", "down_proj"),
    window="config",
)
