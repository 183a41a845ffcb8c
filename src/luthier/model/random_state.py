"""Random numbers that depend on a seed alone and leave those of the caller alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """While open, random numbers on the CPU and on the model's own GPUs come from ``seed``. Other GPUs are not woken up."""
    seed = int(seed)  # numpy's integers too
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.random.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
