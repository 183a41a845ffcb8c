"""Mistral 7B, Nemo, Small; the decoder of Pixtral and Mistral 3."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Mistral", window="config")
