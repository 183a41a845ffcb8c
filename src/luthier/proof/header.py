"""Damage in the header of a GGUF file: what differs in a few bytes from what an export of the same directory writes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luthier.gguf import convert
from luthier.gguf.dequantize import load_tensor
from luthier.gguf.metadata import rope_tensors
from luthier.gguf.plan import Plan
from luthier.gguf.reader import GGUFFile
from luthier.gguf.types import FILE_TYPES
from luthier.gguf.writer import encode_value

DAMAGE = 8  # bytes of a list or text: if no more than these differ, it is damaged, not another
UNKNOWABLE = ("general.name", "general.file_type")  # in every file, with a value that the directory does not say


def damaged_header(file: GGUFFile, config: Any, against: str | Path, planned: Plan) -> list[str]:
    """Entries of the file's metadata that differ in a few bytes from what an export of the directory would write."""
    with warnings.catch_warnings(action="ignore"):
        wanted = convert.header(config, against, planned.shapes["token_embd.weight"][0])
        rope = rope_tensors(config)
    wanted |= {"general.quantization_version": 2, **dict.fromkeys(UNKNOWABLE)}
    wrong = []
    for key, value in wanted.items():
        if key not in file.encoded:
            alike = [name for name in file.encoded if name not in wanted and _bytes_unlike(name.encode(), key.encode()) == 1]
            wrong += [f"it has {name!r} for {key!r}: it is damaged" for name in alike]
        elif value is not None:
            wrong += _damaged_entry(file, config, key, value)
    for name, tensor in rope.items():
        stored = load_tensor(file, name) if name in file.tensors else tensor
        if stored.shape == tensor.shape and (stored != tensor).sum() == 1:
            wrong.append(f"{name} differs from the model's in one number: it is damaged")
    claimed, others = file.metadata.get("general.file_type"), convert.file_types(config, planned, file)
    if others and claimed not in {FILE_TYPES[name].id for name in others}:
        wrong.append(f"general.file_type is {claimed}, but its tensors are those of {' or '.join(others)}")
    return wrong


def _damaged_entry(file: GGUFFile, config: Any, key: str, value: Any) -> Iterator[str]:
    found, stored, encoded = file.metadata[key], file.encoded[key].data, encode_value(key, value)
    if not isinstance(value, bool | int | float):
        if 0 < (count := _bytes_unlike(stored, encoded)) <= DAMAGE:
            yield f"{key} differs from the model's in {count} bytes: it is damaged"
        return
    full = getattr(config.get_text_config(), "max_position_embeddings", None)
    found = found.tolist() if isinstance(found, np.ndarray) else found
    if found != value and not close(found, value) and not (key.endswith(".context_length") and found == full):
        yield f"{key} is {found} in the file and {value} in the model"
    elif stored[:4] != encoded[:4]:
        yield f"{key} is stored as another kind of number than llama.cpp reads"


def _bytes_unlike(one: bytes, other: bytes) -> int:
    """How many bytes of two strings of one length differ; -1 where lengths do."""
    if len(one) != len(other):
        return -1
    return int((np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)).sum())


def close(found: Any, wanted: Any) -> bool:
    """Whether both are numbers, and the same to six digits."""
    return isinstance(found, int | float) and isinstance(wanted, int | float) and math.isclose(found, wanted, rel_tol=1e-6)
