"""Importance matrices: for every weight matrix, how strongly each of its input columns is used.

The importance of a column is the mean of its squared activations over some text. It is computed here by hooks on the
loaded model, from the user's own data, and read and written in llama.cpp's file format (a GGUF file with the sums of
squares and the number of tokens of each tensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.gguf.reader import GGUFFile
from luthier.gguf.types import F32, FileType
from luthier.gguf.writer import GGUFWriter, TensorInfo, plan

# GGUF tensor name -> float32 [columns], or [experts, columns]
Importance = Mapping[str, torch.Tensor]

SAYS_SO = "quantize.imatrix."  # how the keys begin by which a file says that it was rounded with an importance matrix
NEEDS_IMPORTANCE = ("q2_k_s",)


def require_importance(target: FileType, importance: Importance) -> None:
    """``ValueError`` where a file type cannot do without an importance matrix."""
    if target.name in NEEDS_IMPORTANCE and not importance:
        raise ValueError(f"{target.name} needs an importance matrix: pass imatrix=, a file or a dataset, or choose q2_k.")


def check_importance(importance: Importance, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """``ValueError`` for an importance matrix of another model than that whose tensors have these shapes, or a broken one."""
    for name, values in importance.items():
        shape = shapes.get(name)
        if shape is None or values.shape[-1] != shape[-1] or (values.ndim > 1 and len(values) != shape[0]):
            raise ValueError(
                f"The importance matrix is not of this model: {name} is {tuple(values.shape)}, in the model {shape}."
            )
        if not (values.isfinite() & (values >= 0)).all():
            raise ValueError(
                f"The importance of {name} holds NaN, infinity or a number below 0, and is a mean of squares: compute it anew."
            )


def importance_metadata(importance: Importance) -> dict[str, int]:
    """What a file says of the importance matrix that it was rounded with, as llama.cpp's own do; nothing without one."""
    return {f"{SAYS_SO}entries_count": len(importance)} if importance else {}


def made_with_importance(file: GGUFFile) -> bool:
    return any(key.startswith(SAYS_SO) for key in file.metadata)


def read_importance(imatrix: str | Path | Importance | None) -> Importance:
    """The importance by tensor name, from a file or as it is; empty for None."""
    if imatrix is None:
        return {}
    if isinstance(imatrix, Mapping):
        return imatrix
    file = GGUFFile(imatrix)
    if file.metadata.get("general.type") != "imatrix":
        raise ValueError(f"{imatrix} is a GGUF file but not an importance matrix: its general.type is not 'imatrix'.")
    result = {}
    for name in file.tensors:
        if not name.endswith(".in_sum2"):
            continue
        stem = name.removesuffix(".in_sum2")
        sums = _tensor(file, name)
        if f"{stem}.counts" not in file.tensors:
            raise ValueError(f"{imatrix} has {name} but not {stem}.counts.")
        counts = _tensor(file, f"{stem}.counts").reshape(-1, 1)
        if len(counts) not in (1, sums.reshape(-1, sums.shape[-1]).shape[0]):
            raise ValueError(f"{imatrix} has {len(counts)} counts for {name} of shape {tuple(sums.shape)}.")
        result[stem] = mean_squares(sums, counts).squeeze(0)
    if not result:
        raise ValueError(f"{imatrix} holds no importance: no tensor in it ends in .in_sum2.")
    return result


def mean_squares(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``[columns]`` or ``[experts, columns]`` over as many counts. An expert that was never chosen says nothing: all of its
    columns count the same.
    """
    counts = counts.reshape(-1, 1) if sums.ndim > 1 else counts
    return torch.where(counts > 0, sums / counts.clamp_min(1), torch.ones_like(sums))


def write_importance(
    path: str | Path, sums: Importance, counts: Mapping[str, torch.Tensor], tokens: int, chunk: int = 512
) -> Path:
    """Write sums of squares (float32 ``[columns]`` or ``[experts, columns]``) and token counts in llama.cpp's format."""
    tensors = {}
    for name, values in sums.items():
        tensors[f"{name}.in_sum2"] = values.float().reshape(-1, values.shape[-1])
        tensors[f"{name}.counts"] = counts[name].float().reshape(-1, 1)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": ["luthier"],
        "imatrix.chunk_count": max(1, tokens // chunk),
        "imatrix.chunk_size": chunk,
    }
    layout = plan(metadata, [TensorInfo(name, tuple(tensor.shape), F32) for name, tensor in tensors.items()])
    with GGUFWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.cpu().contiguous().view(torch.uint8))
    return Path(path)


def _tensor(file: GGUFFile, name: str) -> torch.Tensor:
    info = file.tensors[name]
    if info.type is not F32:
        raise ValueError(f"{file.path}: {name} is {info.type.name}, not F32.")
    return file.read(name).view(torch.float32).reshape(info.shape)
