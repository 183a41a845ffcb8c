"""One small data file per architecture: the file system is the registry.

``find(config)`` gives the description of a model, or None for an architecture that has no file yet (it trains through
the stock code). To add an architecture, add a file named after its ``model_type`` and a line in docs/architectures.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from luthier.adapters.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def find(config: PreTrainedConfig) -> Spec | None:
    """The Spec of a model with this config; for a vision-language model that of its decoder, with ``vision`` filled in."""
    module = _module(config.model_type)
    if module is None:
        return None
    vision = getattr(module, "VISION", None)
    if vision is None:
        return module.SPEC
    text = find(config.get_text_config())
    return text and dataclasses.replace(text, vision=vision, head=vision.head)


def model_types() -> list[str]:
    """Every architecture that has a file, sorted."""
    return sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if name != "spec")


@functools.cache
def _module(model_type: str) -> ModuleType | None:
    if model_type not in model_types():
        return None
    return importlib.import_module(f"{__name__}.{model_type}")
