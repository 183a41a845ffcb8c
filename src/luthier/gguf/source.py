"""Where the weights of an export come from: names and shapes at once, tensors one by one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open


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
    """The safetensors of a directory, read one tensor at a time.

    Raises ``FileNotFoundError`` where weights or a shard are missing, ``ValueError`` for a file that is damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self._files = _weight_files(Path(directory))
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files:
            with _opened(file) as weights:
                self.shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with _opened(file) as weights:
                for name in weights.keys():
                    yield name, weights.get_tensor(name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error}). Download or save it again.") from error


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
