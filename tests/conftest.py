"""What every test needs before it imports transformers: see luthier/model/torchvision_repair.py."""

import luthier.model  # noqa: F401
