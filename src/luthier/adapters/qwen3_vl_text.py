"""The decoder of Qwen3-VL."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Qwen3VLText", qk_norm="head")
