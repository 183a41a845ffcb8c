"""Llama 2, 3, 3.1, 3.2, 3.3 and everything that copies them."""

from luthier.adapters.spec import Spec

SPEC = Spec(prefix="Llama")
