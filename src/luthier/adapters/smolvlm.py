"""SmolVLM 2: the parts of Idefics 3, under the same names."""

from luthier.adapters.idefics3 import VISION as VISION
