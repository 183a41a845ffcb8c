"""Keeping a torchvision that does not fit the installed torch from breaking every transformers model.

The torchvision wheels of PyPI are built for CUDA. Beside a torch without CUDA their C++ library cannot load, so the
operators that ``import torchvision`` describes do not exist, and the import fails: with it that of every transformers
model, text models too, because transformers imports torchvision wherever it finds it. Its image transforms are plain
torch and need none of those operators; declaring the two names is enough for the import to succeed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

PLACEHOLDERS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[torch.library.Library] = []  # a Library's operators live as long as the object


def repair_torchvision() -> bool:
    """Declare torchvision's missing operators if its own library cannot load; True if they had to be declared.

    Does nothing where torchvision is not installed, is already imported, or fits the installed torch. Call it before
    anything imports torchvision. An import that already failed is undone, so that the next one starts afresh.
    """
    spec = importlib.util.find_spec("torchvision")  # asks torchvision_hook too, which calls this function
    if _declared:
        return True
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    if spec is None or spec.origin is None or _library_loads(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in PLACEHOLDERS:
        library.define(name + SIGNATURE)
    _declared.append(library)
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    return True


def _library_loads(package: Path) -> bool:
    """Load torchvision's C++ library as torchvision itself would; a second load by torchvision is then free."""
    for library in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True
