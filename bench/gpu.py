"""What most benches need."""

from __future__ import annotations

import sys


def require_gpu() -> None:
    """Stop with a sentence where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("This bench needs an NVIDIA GPU, and torch sees none: `luthier doctor` says what is missing.")
