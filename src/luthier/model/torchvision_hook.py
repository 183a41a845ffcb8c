"""Lets plain transformers scripts run in an environment whose torchvision does not fit its torch.

``main`` (which run.py calls) looks whether this environment is such a one, and if so adds a start-up line
to it (a .pth file in site-packages): when something is about to import torchvision, ``repair_torchvision`` goes first.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

START_UP_FILE = "luthier_torchvision.pth"


class _RepairFirst:
    """A finder that finds nothing: it only notices that torchvision is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from luthier.model.torchvision_repair import repair_torchvision

            repair_torchvision()


def install() -> None:
    """Watch for the import of torchvision in this process. Python may read a start-up file twice (lib and lib64)."""
    if not any(isinstance(finder, _RepairFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RepairFirst())


def main() -> None:
    from luthier.model.torchvision_repair import repair_torchvision

    if repair_torchvision():
        line = "import luthier.model.torchvision_hook; luthier.model.torchvision_hook.install()\n"
        Path(sysconfig.get_path("purelib"), START_UP_FILE).write_text(line)
