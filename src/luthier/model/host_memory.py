"""Host memory that a GPU copies to and reads in place: how much is free, and pinning it without making a step wait.

Pinning is slow because the kernel hands out and locks one page after the other. Here pages are asked for as large ones,
written by several threads before they are locked, and all of it goes on in the background while the first forward runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

GROUPS = (  # limit and use of this process' control group, version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
PINNING_THREADS = 4
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def free_host_memory() -> int:
    """Bytes that this process may still take: what the machine has, and no more than its control group allows.

    Processes that a launcher started together, one a device, share it.
    """
    free = psutil.virtual_memory().available
    for limit, used in GROUPS:
        if Path(limit).exists() and (most := Path(limit).read_text().strip()).isdigit():
            free = min(free, max(0, int(most) - int(Path(used).read_text())))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate


def anonymous(size: int) -> Tensor:
    """``size`` bytes (uint8) of page-aligned memory, in large pages where the system has them; not written to yet."""
    if sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # a fork would move the pages that we write to away from where devices see them
    with contextlib.suppress(OSError):  # a kernel may have none
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def pin(memory: Tensor, device: torch.device) -> bool:
    """Lock ``memory`` in place so that ``device`` reaches it; False, with a warning, where the system does not allow it."""
    with torch.cuda.device(device):  # a new thread starts on device 0
        refused = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
    if not refused:
        return True
    warnings.warn(
        f"The system does not let {memory.nbytes / 2**20:.0f} MiB of host memory be pinned (see `ulimit -l`): copies between "
        "the device and host memory will not run beside the computing.",
        UserWarning,
        stacklevel=2,
    )
    return False


def unpin(memory: Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still be under way
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Slab:
    """Pinned memory on loan. ``read``: the event behind which what it held has been copied out; ``waits``: the stream that
    has not waited for that yet; ``views``: by their layout."""

    def __init__(self, capacity: int, device: torch.device, maker: ThreadPoolExecutor | None = None) -> None:
        self.capacity, self.read, self.waits, self.views = capacity, None, None, {}
        self._made: Future[Tensor] = Future()
        maker.submit(self._make, device) if maker else self._make(device)

    @property
    def memory(self) -> Tensor:
        """uint8 (capacity,); waits until it is pinned."""
        return self._made.result()

    def _make(self, device: torch.device) -> None:
        try:
            memory = anonymous(self.capacity).zero_()  # now every page is there
            if device.type == "cuda" and pin(memory, device):
                weakref.finalize(self, unpin, memory).atexit = False
            self._made.set_result(memory)
        except (OSError, RuntimeError, Warning) as error:  # raised where the memory is asked for
            self._made.set_exception(error)


class SlabPool:
    """Slabs that layers borrow in the forward and give back in the backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[Slab] = []
        self.lock = threading.RLock()  # autograd's thread gives back; so may a garbage collection in the middle of ``take``

    @property
    def held(self) -> int:
        """Bytes of the slabs that are free."""
        return sum(slab.capacity for slab in self.free)

    def prepare(self, sizes: list[int], other: SlabPool | None = None) -> None:
        """Have slabs for ``sizes`` bytes, handed out in this order; what is missing comes from ``other``, as far as that has
        some that will do, and is else pinned in the background.

        Free slabs that are too small for anything make room for those that are pinned.
        """
        with self.lock:
            spare, missing = sorted(self.free, key=lambda slab: slab.capacity), []
            kept = []
            for size in sorted(sizes, reverse=True):
                if spare and spare[-1].capacity >= size:
                    kept.append(spare.pop())
                else:
                    missing.append(size)
            for size in [*missing] if other else ():
                if slab := other.take_free(size):
                    kept.append(slab)
                    missing.remove(size)
            self.free = kept if missing else kept + spare
            spare.clear()
            if missing:
                maker = ThreadPoolExecutor(PINNING_THREADS, "luthier-pin")
                self.free += [Slab(size, self.device, maker) for size in sizes if _taken(missing, size)]
                maker.shutdown(wait=False)

    def take(self, size: int) -> Slab:
        """The smallest free slab of at least ``size`` bytes, the oldest of those; a new one if there is none."""
        return self.take_free(size) or Slab(size, self.device)

    def take_free(self, size: int) -> Slab | None:
        with self.lock:
            best = min((slab for slab in self.free if slab.capacity >= size), key=lambda slab: slab.capacity, default=None)
            if best is not None:
                self.free.remove(best)
        return best

    def give(self, slab: Slab) -> None:
        with self.lock:
            self.free.append(slab)


def _taken(sizes: list[int], size: int) -> bool:
    """Take ``size`` out of ``sizes``, if it is in there."""
    if size not in sizes:
        return False
    sizes.remove(size)
    return True


class _InPlace:
    """Tells torch that pinned memory is memory of the device, which it is: one address space holds both."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab  # torch keeps this object as long as the tensor
        self.__cuda_array_interface__ = {
            "shape": (slab.capacity,),
            "typestr": "|u1",
            "data": (slab.memory.data_ptr(), False),
            "version": 3,
        }


def seen_by_device(slab: Slab, device: torch.device) -> Tensor:
    """uint8 (capacity,) on ``device`` whose bytes stay in host memory: every kernel reads them over the bus, in place."""
    return torch.as_tensor(_InPlace(slab), device=device)


class HostEmbedding:
    """A frozen embedding table that waits in pinned host memory. A step reads a few of its rows, the bus is fast enough.

    The parameter stays a tensor of its device with the same values, so whatever reads it (saving, merging, generating) goes
    on as before; only its bytes lie elsewhere. ``bring_back`` undoes it.
    """

    def __init__(self, module: nn.Embedding) -> None:
        weight = module.weight.data
        slab = Slab(weight.nbytes, weight.device)
        self.host = slab.memory.view(weight.dtype).view(weight.shape).copy_(weight)
        view = seen_by_device(slab, weight.device).view(weight.dtype).view(weight.shape)
        self.module, self.device, self.address = module, weight.device, view.data_ptr()
        module.weight.data = view

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model has its table on the device."""

    def bring_back(self) -> None:
        """The table is in the device's memory again, unless somebody has moved it meanwhile."""
        if self.module.weight.data_ptr() == self.address:
            self.module.weight.data = self.host.to(self.device, copy=True)


def movable(embedding: nn.Module | None, tied: bool) -> nn.Embedding | None:
    """``embedding``, if it is a frozen table on a GPU of which nothing but some rows is read."""
    plain = type(embedding) is nn.Embedding and type(embedding.weight) is nn.Parameter
    return embedding if plain and not tied and not embedding.weight.requires_grad and embedding.weight.is_cuda else None
