"""Writing safetensors one tensor at a time, so that a model of any size needs the memory of its largest tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from luthier.errors import unknown
from luthier.model.checkpoint import INDEX, SINGLE

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ENTRY_BYTES = 200  # more than any header entry takes beside its name


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"``, ``"500MiB"`` or a number."""
    if isinstance(size, int) and not isinstance(size, bool):
        number, unit = float(size), "B"
    else:
        text = str(size).strip()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(digits) :].strip().upper() or "B"
        try:
            number = float(digits)
        except ValueError:
            raise ValueError(f"{size!r} is not a size. Give a number of bytes or one such as '5GB'.") from None
    if unit not in UNITS:
        raise unknown(f"unit of the size {size!r}:", unit, UNITS)
    if number * UNITS[unit] < 1:
        raise ValueError(f"{size!r} is not a size above 0. Give one such as '5GB'.")
    return int(number * UNITS[unit])


class _Shard:
    """One file, whose header is written into a gap left for it once everything else is there."""

    def __init__(self, path: Path, header_room: int) -> None:
        self.path, self.header_room = path, header_room
        self.entries: dict[str, dict] = {}
        self.later: list[tuple[str, Tensor]] = []
        self.size = 0
        self.file: BinaryIO = path.open("wb")
        self.file.seek(8 + header_room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Tensors whose bytes are no multiple of 8 wait for the end, where they put no other tensor out of step."""
        if tensor.nbytes % 8:
            self.later.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        self.file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        self.entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }
        self.size += tensor.nbytes

    def close(self) -> None:
        for name, tensor in sorted(self.later, key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        assert len(header) <= self.header_room
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.header_room) + header.ljust(self.header_room))
        self.file.close()


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int, header_room: int) -> int:
    """Write a stream of CPU tensors to ``directory`` as safetensors, with an index if one file does not hold them -> bytes.

    ``header_room``: bytes that the names and shapes of one file can take at most (``room_for``).
    """
    shards = [_Shard(directory / "model-1.part", header_room)]
    where: dict[str, int] = {}
    try:
        for name, tensor in tensors:
            full = shards[-1].size + sum(item.nbytes for _, item in shards[-1].later)
            if full and full + tensor.nbytes > max_shard_size:
                shards[-1].close()
                shards.append(_Shard(directory / f"model-{len(shards) + 1}.part", header_room))
            shards[-1].add(name, tensor)
            where[name] = len(shards)
        shards[-1].close()
    finally:
        for shard in shards:
            shard.file.close()
    total = sum(shard.size for shard in shards)
    if len(shards) == 1:
        shards[0].path.rename(directory / SINGLE)
        return total
    names = {number: f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)}
    for number, shard in enumerate(shards, start=1):
        shard.path.rename(directory / names[number])
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in sorted(where.items())}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def room_for(names: Iterable[str]) -> int:
    """Bytes that the header of a file with these tensors can take at most, a multiple of 8."""
    return sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) // 8 * 8 + 64
