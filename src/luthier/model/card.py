"""What the memory dial's cost model knows of a card: how fast it multiplies, and how fast its bus is."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

COPIES = 4  # whose time tells the bus's rate
# bf16 (below 8.0: fp16) TFLOP/s of one multiprocessor in a run long enough to meet the card's power limit
PER_MULTIPROCESSOR = {(7, 5): 0.7, (8, 0): 2.0, (8, 6): 0.6, (8, 9): 1.1, (9, 0): 5.0, (10, 0): 10.0, (12, 0): 1.1}


@dataclass(frozen=True)
class Speeds:
    """What the cost model knows of a card: FLOP/s of a large product in a long run, bytes/s of the bus each way."""

    products: float = 650e12
    link: float = 55e9

    ATTENTION = 0.85, 0.75  # of the products' rate, forward and backward
    IN_8_BITS = 1.8  # times the products' rate, with what it takes to round for them
    COPYING = 0.03  # of the time of copies beside the computing that the computing takes longer


@functools.cache
def card_speeds(device: torch.device) -> Speeds:
    """From a table of cards; the bus is measured, once: what it gives depends on the slot."""
    card = torch.cuda.get_device_properties(device)
    known = [capability for capability in PER_MULTIPROCESSOR if capability <= (card.major, card.minor)]
    products = PER_MULTIPROCESSOR[max(known, default=(7, 5))] * 1e12 * card.multi_processor_count
    host = torch.empty(1 << 25, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):  # whose stream does the copies: the clocks run on the one that is current
        target.copy_(host)  # warms up
        start.record()
        for _ in range(COPIES):
            target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
    return Speeds(products, COPIES * host.nbytes / (start.elapsed_time(end) / 1000))
