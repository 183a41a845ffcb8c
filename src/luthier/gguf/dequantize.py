"""The bytes of a tensor type back to float32, for the proof of an export and for files that are read again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from luthier.errors import UnsupportedError
from luthier.gguf.reader import GGUFFile
from luthier.gguf.types import PLAIN_DTYPES, TENSOR_TYPES, TensorType

AT_ONCE = 1 << 24  # weights


def dequantize(encoded: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """uint8 ``[rows, bytes of a row]`` -> float32 ``[rows, columns]``."""
    if kind.name in PLAIN_DTYPES:
        return encoded.contiguous().view(PLAIN_DTYPES[kind.name]).float()
    if kind.name not in DEQUANTIZERS:
        raise UnsupportedError(
            f"Luthier cannot read {kind.name} tensors. It can read {', '.join((*PLAIN_DTYPES, *DEQUANTIZERS))}."
        )
    blocks = encoded.reshape(-1, kind.size)
    return DEQUANTIZERS[kind.name](blocks).reshape(len(encoded), -1)


def load_tensor(file: GGUFFile, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """One tensor of a file, float32 in its own shape, dequantised on ``device``."""
    info, stored = file.tensors[name], file.read(name, device)
    values = torch.empty(info.rows, info.shape[-1], device=device)
    step = max(1, AT_ONCE // info.shape[-1])
    for row in range(0, info.rows, step):  # what is computed on the way takes several times the room of the result
        values[row : row + step] = dequantize(stored[row : row + step], info.type)
    return values.view(info.shape)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte ``start`` of every block: float32 ``[G, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 ``[G, 16]`` -> codes ``[G, 32]``."""
    return torch.cat([data & 15, data >> 4], 1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """uint8 ``[G, 4]`` -> 0 or 16, ``[G, 32]``."""
    bits = (data[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return bits.reshape(len(data), 32) << 4


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _halves(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks, 0) * codes.float() + _halves(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _halves(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _pairs(data: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 64]`` -> codes of 2 bits, ``[B, 8, 32]``."""
    data = data.reshape(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device).view(1, 1, 4, 1)
    return ((data >> shifts) & 3).reshape(-1, 8, 32)


def _bits_of_groups(data: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 32]``, a bit for each of 8 groups -> 0 or 1, ``[B, 8, 32]``."""
    return (data[:, None, :] >> torch.arange(8, dtype=torch.uint8, device=data.device).view(1, 8, 1)) & 1


def _nibbles_of_groups(data: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 128]`` -> codes of 4 bits, ``[B, 8, 32]``."""
    data = data.reshape(-1, 4, 1, 32)
    return torch.cat([data & 15, data >> 4], 2).reshape(-1, 8, 32)


def _six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 ``[B, 12]`` -> two times 8 numbers of 6 bits, float32 ``[B, 8, 1]``."""
    scales, lows, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scale = torch.cat([scales & 63, (rest & 15) | ((scales >> 6) << 4)], 1)
    low = torch.cat([lows & 63, (rest >> 4) | ((lows >> 6) << 4)], 1)
    return scale.float()[:, :, None], low.float()[:, :, None]


def _with_low(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scale, low = _six_bits(blocks[:, 4:16])
    return _halves(blocks, 0)[:, :, None] * scale * codes.float() - _halves(blocks, 2)[:, :, None] * low


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_low(blocks, _nibbles_of_groups(blocks[:, 16:]))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    return _with_low(blocks, _nibbles_of_groups(blocks[:, 48:]) | (_bits_of_groups(blocks[:, 16:48]) << 4))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    both, codes = blocks[:, :16, None], _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    scale, low = (both & 15).float(), (both >> 4).float()
    return _halves(blocks, 80)[:, :, None] * scale * codes.float() - _halves(blocks, 82)[:, :, None] * low


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _pairs(blocks[:, 32:96]).float() - 4 + 4 * _bits_of_groups(blocks[:, :32]).float()
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], 1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scale = (low | (high << 4)).float() - 32
    return _halves(blocks, 108)[:, :, None] * scale[:, :, None] * codes.reshape(-1, 16, 16)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    codes = (low | (high << 4)).float() - 32
    scale = blocks[:, 192:208].view(torch.int8).float()
    return _halves(blocks, 208)[:, :, None] * scale[:, :, None] * codes.reshape(-1, 16, 16)


# tensor type -> uint8 [G, bytes of a block] -> float32 [G, ...], the weights of a block in order
DEQUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
assert DEQUANTIZERS.keys() <= TENSOR_TYPES.keys()
