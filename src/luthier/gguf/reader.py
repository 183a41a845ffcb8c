"""Reading GGUF files that nobody vouches for: every count and size is checked against the file before it is believed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from luthier.gguf.source import read_bytes
from luthier.gguf.types import TENSOR_TYPES_BY_ID
from luthier.gguf.writer import ALIGNMENT, ARRAY, BOOL, MAGIC, SCALARS, STRING, Encoded, TensorInfo

MAX_DIMENSIONS = 4
MAX_NAME = 1 << 16  # bytes of a key or of a tensor's name
MAX_NESTING = 4  # arrays in arrays
# far beyond any model's header (a few hundred entries, a thousand tensors, a million strings, 30 MB): Python's objects are up
# to thirty times as large as what they are read from, and a file with holes is large for nothing
MAX_HEADER, MAX_ENTRIES, MAX_TENSORS, MAX_ITEMS = 1 << 28, 1 << 14, 1 << 18, 1 << 23
SMALLEST_ENTRY = 8 + 4 + 1  # bytes of the shortest possible metadata entry; a tensor's description is longer


class GGUFFile:
    """A GGUF file, mapped read-only.

    ``metadata``: key -> bool, int, float, str, list of str (or of lists), numpy array of numbers.
    ``encoded``: key -> the same value in the file's own bytes, for copying.
    ``tensors``: name -> `TensorInfo`.

    Raises ``FileNotFoundError``, or ``ValueError`` that names the file and what is wrong with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is not a file.")
        if self.path.stat().st_size < 24:
            raise self._error("it is too short to have a header")
        self._data = np.memmap(self.path, np.uint8, mode="r")
        self._view = memoryview(self._data)  # a slice of it costs a tenth of an array's: headers have 300,000 strings
        self._position, self._items = 0, 0
        self._read_header()

    def data(self, name: str) -> np.ndarray:
        """The stored bytes of one tensor, uint8 ``[rows, bytes of a row]``: a view into the file."""
        info = self.tensors[name]
        start = self._data_start + info.offset
        return self._data[start : start + info.size].reshape(info.rows, info.row_bytes)

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Like `data`, but read into memory of its own."""
        info = self.tensors[name]
        return read_bytes(self.path, self._data_start + info.offset, info.size, device).view(info.rows, info.row_bytes)

    def outside(self) -> Iterator[np.ndarray]:
        """All bytes that are no tensor's, in order: the header, and what fills up between tensors and behind them."""
        place = 0
        for info in sorted(self.tensors.values(), key=lambda info: info.offset):
            start = self._data_start + info.offset
            yield self._data[place:start]
            place = start + info.size
        yield self._data[place:]

    def _read_header(self) -> None:
        if self._take(4) != MAGIC:
            raise self._error("it does not begin with 'GGUF'")
        self.version, tensor_count, entry_count = struct.unpack("<IQQ", self._take(20))
        if self.version not in (2, 3):
            raise self._error(f"its version is {self.version}; versions 2 and 3, little-endian, can be read")
        self._expect_items(tensor_count, SMALLEST_ENTRY, "tensors", MAX_TENSORS)
        self._expect_items(entry_count, SMALLEST_ENTRY, "metadata entries", MAX_ENTRIES)
        self.metadata, self.encoded = {}, {}
        for _ in range(entry_count):
            key = self._string("a metadata key", MAX_NAME)
            if key in self.metadata:
                raise self._error(f"the metadata key {key!r} comes twice")
            start = self._position
            self.metadata[key] = self._value(key, *self._unpack("<I"))
            self.encoded[key] = Encoded(bytes(self._data[start : self._position]))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._error(f"general.alignment is {alignment!r}, not a power of two from 8 on")
        self.tensors = {}
        for _ in range(tensor_count):
            info = self._tensor_info(alignment)
            if info.name in self.tensors:
                raise self._error(f"the tensor {info.name!r} comes twice")
            self.tensors[info.name] = info
        self._data_start = (self._position + alignment - 1) // alignment * alignment
        self._check_places()

    def _tensor_info(self, alignment: int) -> TensorInfo:
        name = self._string("a tensor's name", MAX_NAME)
        (dimensions,) = self._unpack("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"the tensor {name!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(reversed(self._unpack(f"<{dimensions}Q")))
        type_id, offset = self._unpack("<IQ")
        if type_id not in TENSOR_TYPES_BY_ID:
            raise self._error(f"the tensor {name!r} has the type {type_id}, which Luthier does not know")
        info = TensorInfo(name, shape, TENSOR_TYPES_BY_ID[type_id], offset)
        if not all(shape):
            raise self._error(f"the tensor {name!r} is empty: {shape}")
        if shape[-1] % info.type.block:
            raise self._error(f"the tensor {name!r} of type {info.type.name} has rows of {shape[-1]} weights")
        if offset % alignment:
            raise self._error(f"the tensor {name!r} begins at {offset}, which is not a multiple of {alignment}")
        return info

    def _check_places(self) -> None:
        end = 0
        for info in sorted(self.tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self._error(f"the tensor {info.name!r} overlaps the one before it")
            end = info.offset + info.size
            if self._data_start + end > len(self._data):
                raise self._error(f"it ends before the tensor {info.name!r} does: it is truncated")

    def _value(self, key: str, kind: int, depth: int = 0) -> object:
        if kind == STRING:
            return self._string(f"the value of {key!r}", len(self._data))
        if kind == BOOL:
            return bool(self._numbers(key, kind, 1)[0])
        if kind in SCALARS:
            return self._numbers(key, kind, 1)[0].item()
        if kind != ARRAY:
            raise self._error(f"the metadata {key!r} has the unknown type {kind}")
        item_kind, count = self._unpack("<IQ")
        if item_kind in SCALARS:
            return self._numbers(key, item_kind, count)
        if depth >= MAX_NESTING:
            raise self._error(f"the metadata {key!r} is nested more than {MAX_NESTING} arrays deep")
        size, weight = (8, 1) if item_kind == STRING else (12, 64)  # nobody has arrays of arrays
        self._expect_items(count, size, f"items of {key!r}", (MAX_ITEMS - self._items) // weight)
        self._items += count * weight
        return [self._value(key, item_kind, depth + 1) for _ in range(count)]

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind])
        self._expect_items(count, dtype.itemsize, f"items of {key!r}")
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if kind != BOOL:
            return values
        if count and values.max() > 1:
            raise self._error(f"the metadata {key!r} is a truth value other than 0 and 1")
        return values.astype(bool)

    def _string(self, what: str, longest: int) -> str:
        (length,) = self._unpack("<Q")
        if length > longest:
            raise self._error(f"{what} would be {length} bytes long")
        try:
            return self._take(length).decode("utf8")
        except UnicodeDecodeError as error:
            raise self._error(f"{what} is not UTF-8") from error

    def _unpack(self, layout: str) -> tuple:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _take(self, size: int) -> bytes:
        if size > len(self._view) - self._position:
            raise self._error(f"it ends inside its header, at byte {len(self._view)}: it is truncated")
        if self._position + size > MAX_HEADER:
            raise self._error(f"its header is longer than {MAX_HEADER} bytes")
        start, self._position = self._position, self._position + size
        return self._view[start : self._position].tobytes()

    def _expect_items(self, count: int, size: int, what: str, most: int = MAX_HEADER) -> None:
        if count * size > len(self._data) - self._position:
            raise self._error(f"it claims {count} {what}, more than it has room for")
        if count > most:
            raise self._error(f"it claims {count} {what}, more than any model has")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a GGUF file that can be read: {what}.")
