"""Qwen 3 with experts (30B-A3B, 235B-A22B); some layers may be dense."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="Qwen3Moe",
    mlp="experts",
    qk_norm="head",
    window="attention",
)
