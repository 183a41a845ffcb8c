"""Memory that the layers of a model share, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Buffers for written-out weights, one for each shape, reused by every layer of a model in turn.

    All use is on one stream at a time, so the next layer's write waits for this layer's product by itself; ``follow`` sees
    to it where that stream changes.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None  # of whoever used them last

    def follow(self, device: torch.device) -> None:
        """Called before their next use: on another stream than the last one, it comes behind that one."""
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        if self.stream not in (None, current) and not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self.stream)
        self.stream = current

    def buffer(self, role: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Uninitialised memory of ``shape`` in the dtype and on the device of ``like``, the same on every call."""
        key = role, shape, like.dtype, like.device
        if key not in self.buffers:
            with torch.inference_mode(False):  # which this call may be in, and later ones not
                self.buffers[key] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.buffers[key]

    def inside(self, role: str, shape: tuple[int, int], like: Tensor, start: int, size: int) -> Tensor:
        """The same from byte ``start`` of memory of ``size`` bytes, in which other buffers of that role lie as well."""
        key = role, shape, like.dtype, like.device, start, size
        if key not in self.buffers:
            memory = self.buffer(role, (1, size), like.new_empty(0, dtype=torch.uint8)).view(-1)
            end = start + shape[0] * shape[1] * like.element_size()
            self.buffers[key] = memory[start:end].view(like.dtype).view(shape)
        return self.buffers[key]

    def __deepcopy__(self, memo: dict) -> Workspace:
        return Workspace()  # a copied model gets buffers of its own when it first needs them
