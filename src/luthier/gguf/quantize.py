"""Weights to the bytes of a tensor type and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from luthier.errors import UnsupportedError
from luthier.gguf import blocks
from luthier.gguf.types import PLAIN_DTYPES, TensorType

CHUNK = 1 << 22  # weights that are encoded at once
LARGEST_HALF = 65504.0

# tensor type -> float32 [G, weights of a block] -> uint8 [G, bytes of a block]
QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": blocks.quantize_q4_0,
    "Q4_1": blocks.quantize_q4_1,
    "Q5_0": blocks.quantize_q5_0,
    "Q5_1": blocks.quantize_q5_1,
    "Q8_0": blocks.quantize_q8_0,
}


def require_quantizer(kind: TensorType) -> None:
    """``UnsupportedError`` for a tensor type that cannot be written."""
    if kind.name not in PLAIN_DTYPES and kind.name not in QUANTIZERS:
        raise UnsupportedError(
            f"Luthier cannot write {kind.name} tensors. It can write {', '.join((*PLAIN_DTYPES, *QUANTIZERS))}."
        )


def encode(values: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """float ``[rows, columns]`` -> uint8 ``[rows, bytes of a row]`` on the CPU."""
    rows, columns = values.shape
    if kind.name in PLAIN_DTYPES:
        return values.to(PLAIN_DTYPES[kind.name]).contiguous().view(torch.uint8).view(rows, -1).cpu()
    encoded = QUANTIZERS[kind.name](values.float().reshape(-1, kind.block))
    return encoded.view(rows, kind.row_bytes(columns)).cpu()


def encode_in_chunks(name: str, values: torch.Tensor, kind: TensorType) -> Iterator[tuple[int, torch.Tensor]]:
    """Like `encode`, a few rows at a time: yields (first row, encoded rows). ``ValueError`` for what cannot be stored."""
    step = max(1, CHUNK // values.shape[1])
    for first in range(0, len(values), step):
        chunk = values[first : first + step]
        _check_range(name, chunk, kind)
        yield first, encode(chunk, kind)


def _check_range(name: str, values: torch.Tensor, kind: TensorType) -> None:
    largest = values.abs().amax().item()  # NaN if any is
    if not math.isfinite(largest):
        raise ValueError(f"The tensor {name} holds NaN or infinite values: the checkpoint is damaged or its training diverged.")
    if largest > LARGEST_HALF and kind.name == "F16":
        raise ValueError(f"The tensor {name} holds {largest:g}; float16 ends at 65504. Choose bf16.")
