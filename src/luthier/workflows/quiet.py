"""Libraries that talk over a command's own output, told to be quiet."""

from __future__ import annotations

import logging
import warnings

import datasets
import transformers

from luthier.model.torchvision_repair import repair_torchvision
from luthier.terminal import is_first_process


def quiet_libraries() -> None:
    """Errors only, progress bars of loading and tokenising off, and warnings in a line, without the code that gave them.

    Of several processes the first one warns.
    """
    if not is_first_process():
        warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *place, **line: f"Warning: {message}\n"
    repair_torchvision()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "httpx", "httpx2", "huggingface_hub", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
