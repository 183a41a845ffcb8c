"""The decoder of Qwen2-VL; its rotary embedding mixes the three axes before the layers see it."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Qwen2VL", window="attention")
