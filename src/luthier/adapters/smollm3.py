"""SmolLM 3: some layers do not rotate."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="SmolLM3", rotary_switch="use_rope", window="attention")
