"""Mixtral 8x7B and 8x22B."""

from luthier.adapters.spec import Spec

SPEC = Spec(
    prefix="Mixtral",
    mlp="experts",
    mlp_targets=(),
    window="config",
)
