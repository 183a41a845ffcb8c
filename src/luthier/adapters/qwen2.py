"""Qwen 1.5, 2, 2.5: biases on q, k and v."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Qwen2", window="attention")
