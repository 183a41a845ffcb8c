"""Models: loading, adapters, making them fast, merging and saving. Everything here stands on transformers."""

from luthier.model.torchvision_repair import repair_torchvision

repair_torchvision()  # before the modules of this package import transformers, which a broken torchvision would break
