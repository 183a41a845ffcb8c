"""Gemma 1."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Gemma", norm="one_plus_scale")
