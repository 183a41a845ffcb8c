"""Qwen 3 (dense): norms over the heads of q and k."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Qwen3", qk_norm="head", window="attention")
