"""Where the weights of an export come from: names and shapes at once, tensors one by one."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from luthier.gguf import mxfp4

PIECE = 1 << 25  # bytes that a thread reads at a time for a GPU
THREADS = min(8, os.cpu_count() or 1)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_bytes(path: str | Path, start: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``size`` bytes of a file, uint8 on ``device``: to a GPU by several threads, through pinned memory.

    ``ValueError`` where the file ends before.
    """
    data = torch.empty(size, dtype=torch.uint8, device=device)

    def read(first: int, place: torch.Tensor) -> None:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start + first)
            view = memoryview(place.numpy())
            while view:
                count = stream.readinto(view)
                if not count:
                    raise ValueError(f"{path} ends before the data that it announces: it became shorter while it was read.")
                view = view[count:]

    def through_pinned(first: int) -> None:
        part = data[first : first + PIECE]
        pinned = torch.empty(part.shape, dtype=torch.uint8, pin_memory=True)
        read(first, pinned)
        part.copy_(pinned, non_blocking=True)

    if not data.is_cuda:
        read(0, data)
    else:
        list(_readers().map(through_pinned, range(0, size, PIECE)))
    return data


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


class TensorSource(Protocol):
    """Tensors under the names of a Hugging Face checkpoint. ``shapes`` is known before any tensor is made."""

    shapes: Mapping[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class MemorySource:
    """Tensors that are in memory, such as a model's ``state_dict()``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors.items())


class CheckpointSource:
    """The safetensors of a directory, read one tensor at a time and not through a memory map, so that no more than that
    tensor is in memory; to the GPU where there is one. Experts that are stored in MXFP4 come as what they stand for.

    Raises ``FileNotFoundError`` where weights or a shard are missing, ``ValueError`` for a file that is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        files = {file: _read_header(file) for file in _weight_files(Path(directory))}
        self._stored = {name: (file, entry) for file, entries in files.items() for name, entry in entries.items()}
        shapes = {name: entry.shape for name, (_, entry) in self._stored.items()}
        self._stacks = mxfp4.stacks(shapes)
        for name, (blocks, scales) in self._stacks.items():
            shapes[name] = mxfp4.shape_of(shapes.pop(blocks))
            del shapes[scales]
        self.shapes = shapes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.shapes:
            if name in self._stacks:
                data = mxfp4.expand(*map(self.read, self._stacks[name]))
            else:
                data = self.read(name)
            yield name, data
            del data  # before there is the next one

    def read(self, name: str) -> torch.Tensor:
        """One stored tensor."""
        file, entry = self._stored[name]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return read_bytes(file, entry.start, entry.size, device).view(entry.dtype).view(entry.shape)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file in the order of their data; the library has checked every size before."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error}). Download or save it again.") from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    strange = [name for name, entry in header.items() if entry["dtype"] not in DTYPES]
    if strange:
        raise ValueError(f"{file}: {strange[0]} is of the type {header[strange[0]]['dtype']}, which Luthier does not read.")
    entries = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        entries[name] = Entry(tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + begin, end - begin)
    return entries


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory.")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if (directory / "adapter_model.safetensors").is_file():
        raise ValueError(f"{directory} holds an adapter only. Merge it first: save_pretrained_merged, or `luthier merge`.")
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)]
    if pickles:
        raise ValueError(f"{directory} has its weights as pickles ({pickles[0]}), which are never read. Use safetensors.")
    raise FileNotFoundError(f"{directory} has no model.safetensors.")


def _indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, all of them in its own directory."""
    try:
        names = sorted(set(json.loads(index.read_text("utf8"))["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged or not an index of safetensors ({error!r}).") from error
    if strange or not names:
        raise ValueError(f"{index} names {strange[0] if strange else 'no file'}, not files of its own directory.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, which its index names.")
    return [index.parent / name for name in names]
