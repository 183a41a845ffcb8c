"""Where the weights of an export come from: names and shapes at once, tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

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
    tensor is in memory.

    Raises ``FileNotFoundError`` where weights or a shard are missing, ``ValueError`` for a file that is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self._files = {file: _read_header(file) for file in _weight_files(Path(directory))}
        self.shapes = {name: entry.shape for entries in self._files.values() for name, entry in entries.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, entries in self._files.items():
            with open(file, "rb") as stream:
                for name, entry in entries.items():
                    stream.seek(entry.start)
                    data = torch.empty(entry.size, dtype=torch.uint8)
                    if stream.readinto(data.numpy()) != entry.size:
                        raise ValueError(f"{file} became shorter while it was read.")
                    yield name, data.view(entry.dtype).view(entry.shape)
                    del data  # before there is the next one


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
