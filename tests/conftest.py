"""What every test needs before it imports transformers."""

from luthier.model.torchvision_repair import repair_torchvision

repair_torchvision()
