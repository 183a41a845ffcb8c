"""Models: loading, adapters, making them fast, merging and saving. Everything here stands on transformers."""

from luthier.model.torchvision_hook import install

install()  # the modules of this package import transformers, which a torchvision that does not fit would break
