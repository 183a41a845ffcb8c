"""Writing GGUF files: the header is laid out first, then tensors arrive in any order and go to their place.

A file is: magic, version, counts, metadata, tensor descriptions, padding, tensor data. Everything about the data's
place follows from names, shapes and types, so nothing has to be held back until the last tensor is known.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from luthier.gguf.types import TensorType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
READ_BACK = 1 << 24  # bytes at a time
THREADS = min(8, os.cpu_count() or 1)
AHEAD = 16  # runs of bytes that wait to be written

# value type ids of the format
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
# scalar value type -> little-endian struct / numpy code
SCALARS = {
    UINT8: "<u1", INT8: "<i1", UINT16: "<u2", INT16: "<i2", UINT32: "<u4", INT32: "<i4", FLOAT32: "<f4",
    BOOL: "<u1", UINT64: "<u8", INT64: "<i8", FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A metadata value already in the file's bytes (type id and value): copied from another file as it is."""

    data: bytes


Value = bool | int | float | str | Sequence | np.ndarray | Encoded


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. ``shape`` is torch's: the contiguous dimension last. ``offset``: from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.shape[-1])

    @property
    def rows(self) -> int:
        """How many rows of ``shape[-1]`` weights."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    @property
    def size(self) -> int:
        """Bytes of the tensor's data."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """A planned file: its header's bytes and the place of every tensor."""

    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def plan(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> Layout:
    """Lay out a file with this metadata and these tensors, in this order; the offsets given are ignored."""
    placed, offset = {}, 0
    descriptions = bytearray()
    for info in tensors:
        assert info.name not in placed, info.name
        placed[info.name] = TensorInfo(info.name, info.shape, info.type, offset)
        descriptions += _string(info.name) + struct.pack("<I", len(info.shape))
        descriptions += struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape)) + struct.pack("<IQ", info.type.id, offset)
        offset += _aligned(info.size)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + encode_value(key, value)
    header += descriptions
    header += bytes(_aligned(len(header)) - len(header))
    return Layout(bytes(header), placed, len(header) + offset)


@dataclass(frozen=True)
class Written:
    """A run of bytes that is in the file, and its CRC-32."""

    what: str
    offset: int
    size: int
    checksum: int


class GGUFWriter:
    """Write a planned file: ``with GGUFWriter(path, layout) as writer: writer.write(name, rows)``.

    Leaving the block normally checks that every byte of every tensor was written, and reads it back: ``ValueError`` for a
    tensor that did not arrive, ``OSError`` for bytes that the disk does not give back as they were written.
    """

    def __init__(self, path: str | Path, layout: Layout) -> None:
        self.layout = layout
        self._missing = {name: info.size for name, info in layout.tensors.items()}
        self._written: list[Written] = []
        self._pool = ThreadPoolExecutor(THREADS)
        self._waiting: deque[Future] = deque()
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.truncate(self._file, 0)
        os.truncate(self._file, layout.size)
        self._send("the header", 0, memoryview(layout.header))

    def write(self, name: str, data: torch.Tensor, first_row: int = 0) -> None:
        """Write encoded rows, uint8 ``[rows, bytes of a row]``, of the tensor ``name`` from row ``first_row`` on.

        They are on their way when this returns: leave ``data`` as it is.
        """
        info = self.layout.tensors[name]
        rows, width = data.shape
        assert width == info.row_bytes and first_row + rows <= info.rows, (info, data.shape, first_row)
        place = len(self.layout.header) + info.offset + first_row * width
        self._send(name, place, memoryview(data.contiguous().numpy()).cast("B"))
        self._missing[name] -= rows * width

    def _send(self, what: str, offset: int, data: memoryview) -> None:
        if len(self._waiting) == AHEAD:
            self._written.append(self._waiting.popleft().result())
        self._waiting.append(self._pool.submit(self._write, what, offset, data))

    def _write(self, what: str, offset: int, data: memoryview) -> Written:
        written = Written(what, offset, len(data), zlib.crc32(data))
        while data:
            done = os.pwrite(self._file, data[: 1 << 30], offset)
            offset, data = offset + done, data[done:]
        return written

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._written += [future.result() for future in self._waiting]
            if kind is None:
                self._check()
        finally:
            self._pool.shutdown()
            os.close(self._file)

    def _check(self) -> None:
        unfinished = [name for name, size in self._missing.items() if size]
        if unfinished:
            raise ValueError(f"These tensors were announced but did not arrive whole: {', '.join(unfinished[:5])}.")
        for written, found in zip(self._written, self._pool.map(self._read_back, self._written), strict=True):
            if found != written.checksum:
                raise OSError(f"{self._path}: the disk does not give back {written.what} as it was written. Try another disk.")

    def _read_back(self, written: Written) -> int:
        found, end = 0, written.offset + written.size
        for place in range(written.offset, end, READ_BACK):
            found = zlib.crc32(os.pread(self._file, min(READ_BACK, end - place), place), found)
        return found


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf8")
    return struct.pack("<Q", len(data)) + data


def encode_value(key: str, value: Value) -> bytes:
    """A metadata value with its type id: ints become UINT32 (or the next type that holds them), floats FLOAT32."""
    if isinstance(value, Encoded):
        return value.data
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        kind = UINT32 if 0 <= value < 1 << 32 else INT32 if -(1 << 31) <= value < 0 else UINT64 if value > 0 else INT64
        return struct.pack("<I", kind) + np.array(value, SCALARS[kind]).tobytes()
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    return struct.pack("<I", ARRAY) + _array(key, value)


def _array(key: str, values: Sequence | np.ndarray) -> bytes:
    if len(values) and isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    array = np.asarray(values)
    kind = {"b": BOOL, "i": INT32, "u": UINT32, "f": FLOAT32}.get(array.dtype.kind)
    if kind is None or array.ndim != 1:
        raise TypeError(f"{key} cannot be stored in a GGUF file: {type(values).__name__} of {array.dtype}.")
    return struct.pack("<IQ", kind, len(array)) + array.astype(SCALARS[kind]).tobytes()
