"""Device memory that all CUDA graphs of a model share, and the recording of a graph over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

WORKSPACE = 1 << 25  # bytes that cuBLAS takes in every recording, on the largest cards


class Arena:
    """Device memory that graphs are recorded over, one after the other, each as if all of it were free.

    It is one block of ``size`` bytes, so that graphs of many lengths may cut it up in their own ways; a graph that needs
    more than is left of it adds blocks.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device, self.bytes = size, device, 0
        self.pool, self.stream = torch.cuda.graph_pool_handle(), _stream(device)  # memory belongs to a stream
        size += WORKSPACE
        self.holder = self.record(lambda: torch.empty(size, dtype=torch.uint8, device=device)[:1].zero_())

    @staticmethod
    def fits(x: Tensor) -> bool:
        if not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        return torch.cuda.get_allocator_backend() == "native"  # others keep no block for the next recording

    @staticmethod
    def aside(function: Callable[[], None], device: torch.device) -> None:
        """Run ``function`` on the stream of recordings, in memory of its own, before there is an arena or beside it.

        What libraries keep for good must not lie in an arena.
        """
        torch.cuda.empty_cache()  # of an arena that was given up, too
        current, stream = torch.cuda.current_stream(device), _stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                function()
        finally:  # what it launched before it failed writes into the workspace too
            current.wait_stream(stream)

    def record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What ``function`` does on the GPU, recorded without being done, to be done by ``replay``."""
        before, graph = _emptied(self.device), torch.cuda.CUDAGraph()
        alone = {"capture_error_mode": "thread_local"}  # other threads may pin memory meanwhile
        with torch.cuda.stream(torch.cuda.current_stream(self.device)):  # a recording that fails leaves another one behind
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, **alone):
                    function()
            except RuntimeError:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), **alone):  # one that ends well: random numbers work again
                    torch.zeros(1, device=self.device)
                raise
        self.bytes += _emptied(self.device) - before
        return graph

    @staticmethod
    def alias(tensor: Tensor) -> Tensor:
        """The same memory, without a hold on it: when nobody else holds it, the next recording may use it too."""
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        interface = {"shape": (reach * tensor.element_size(),), "typestr": "|u1", "data": (tensor.data_ptr(), False)}
        described = SimpleNamespace(__cuda_array_interface__={**interface, "version": 2})
        flat = torch.as_tensor(described, device=tensor.device).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())


@functools.cache  # one for good: libraries keep memory for every stream that they have seen
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _emptied(device: torch.device) -> int:
    """The bytes that torch holds on the device without its cache, and without cuBLAS' workspaces.

    A recording makes workspaces of its own, in the arena. Those of a stream belong to whoever uses it: a torch.compile with
    graphs frees them all, and so does the end of any graph that was recorded on it, while other graphs still write there.
    """
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
