"""How much of a device's memory a step of one model may still take."""

from __future__ import annotations

import weakref

import torch

GIB = 1 << 30
RESERVE = 0.06  # of the card, for fragmentation and for what other libraries allocate

_held: weakref.WeakKeyDictionary[object, tuple[torch.device, int]] = weakref.WeakKeyDictionary()


def available_memory(device: torch.device, budget: float | None) -> float:
    """Bytes that a step may still allocate: what the device has free less a reserve, or what the budget leaves.

    What CUDA graphs hold counts as free, as the allocator counts it: see ``held_by_others``.
    """
    if device.type != "cuda":
        return float("inf")  # main memory is plenty
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    available = free + reserved - allocated - RESERVE * total
    return available if budget is None else min(available, budget * GIB - allocated)


def hold(owner: object, device: torch.device, size: int) -> None:
    """CUDA graphs of ``owner`` hold so many bytes now, which the allocator has reserved but does not count as allocated."""
    _held[owner] = device, size


def release(owner: object) -> None:
    _held.pop(owner, None)


def held_by(owner: object) -> int:
    return _held[owner][1] if owner in _held else 0


def held_by_others(owner: object, device: torch.device) -> int:
    """Bytes that the CUDA graphs of other models hold on the device: they give way to their own model only."""
    return sum(size for other, (where, size) in _held.items() if other is not owner and where == device)
