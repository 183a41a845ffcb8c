"""The decoder of Qwen2.5-VL."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Qwen2_5_VL", window="attention")
