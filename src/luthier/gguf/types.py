"""The vocabulary of GGUF files: tensor types, and the file types ("quantisations") that users choose between."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from luthier.errors import unknown


@dataclass(frozen=True)
class TensorType:
    """One storage format of a tensor: rows are cut into blocks of ``block`` weights, each stored in ``size`` bytes."""

    name: str
    id: int
    block: int
    size: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights; ``ValueError`` if it cannot be cut into whole blocks."""
        if columns % self.block:
            raise ValueError(f"A row of {columns} weights cannot be stored as {self.name}: its blocks hold {self.block}.")
        return columns // self.block * self.size


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q4_0 = TensorType("Q4_0", 2, 32, 18)
Q4_1 = TensorType("Q4_1", 3, 32, 20)
Q5_0 = TensorType("Q5_0", 6, 32, 22)
Q5_1 = TensorType("Q5_1", 7, 32, 24)
Q8_0 = TensorType("Q8_0", 8, 32, 34)
Q2_K = TensorType("Q2_K", 10, 256, 84)
Q3_K = TensorType("Q3_K", 11, 256, 110)
Q4_K = TensorType("Q4_K", 12, 256, 144)
Q5_K = TensorType("Q5_K", 13, 256, 176)
Q6_K = TensorType("Q6_K", 14, 256, 210)
BF16 = TensorType("BF16", 30, 1, 2)
# read and passed through, never written by a quantiser of ours
I8, I16, I32, I64, F64 = (TensorType(*row) for row in (("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
                                                       ("I64", 27, 1, 8), ("F64", 28, 1, 8)))  # fmt: skip
MXFP4 = TensorType("MXFP4", 39, 32, 17)

TENSOR_TYPES = {t.name: t for t in (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
                                    I8, I16, I32, I64, F64, MXFP4)}  # fmt: skip
TENSOR_TYPES_BY_ID = {t.id: t for t in TENSOR_TYPES.values()}
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileType:
    """What ``quantization_method`` names: a mixture of tensor types around a default one."""

    name: str
    id: int
    default: TensorType
    bits: float  # per weight, of a large model
    description: str

    @property
    def metadata(self) -> dict[str, int]:
        """The entries that say of which type a file is."""
        return {"general.file_type": self.id, "general.quantization_version": 2}


FILE_TYPES = {
    t.name: t
    for t in (
        FileType("f32", 0, F32, 32.0, "Every weight as it is in 32 bits: exact, and four times the size of q8_0."),
        FileType("f16", 1, F16, 16.0, "16-bit floats; weights beyond 65504 are refused."),
        FileType("bf16", 32, BF16, 16.0, "The format that models are trained in: no change for a bf16 checkpoint."),
        FileType("q8_0", 7, Q8_0, 8.5, "8 bits: hardly any loss, quick to write. The default."),
        FileType("q6_k", 18, Q6_K, 6.6, "6 bits: very close to q8_0."),
        FileType("q5_k_m", 17, Q5_K, 5.7, "5 bits, the sensitive tensors in 6. Recommended where q4_k_m is too coarse."),
        FileType("q5_k_s", 16, Q5_K, 5.5, "5 bits throughout."),
        FileType("q4_k_m", 15, Q4_K, 4.9, "4 bits, the sensitive tensors in 6. Recommended."),
        FileType("q4_k_s", 14, Q4_K, 4.6, "4 bits, a few tensors in 5."),
        FileType("q3_k_l", 13, Q3_K, 4.3, "3 bits, the sensitive tensors in 5."),
        FileType("q3_k_m", 12, Q3_K, 3.9, "3 bits, the sensitive tensors in 4 and 5."),
        FileType("q3_k_s", 11, Q3_K, 3.5, "3 bits throughout: noticeable loss."),
        FileType("q2_k", 10, Q2_K, 3.2, "2 bits, the sensitive tensors in 3 and 4: large loss."),
        FileType("q2_k_s", 21, Q2_K, 2.8, "2 bits, needs an importance matrix: the largest loss."),
        FileType("q5_1", 9, Q5_1, 6.0, "The older 5-bit format with an offset; q5_k_m is better."),
        FileType("q5_0", 8, Q5_0, 5.5, "The older 5-bit format; q5_k_m is better."),
        FileType("q4_1", 3, Q4_1, 5.0, "The older 4-bit format with an offset; q4_k_m is better."),
        FileType("q4_0", 2, Q4_0, 4.6, "The older 4-bit format; q4_k_m is better."),
    )
}
ALIASES = {
    "not_quantized": "bf16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}
ALLOWED_QUANTS = {name: t.description for name, t in FILE_TYPES.items()} | {
    alias: f"The same as {name}." for alias, name in ALIASES.items()
}


def file_type(quantization_method: str) -> FileType:
    """The file type that a name of ``ALLOWED_QUANTS`` stands for (any case); ``ValueError`` for another name."""
    if not isinstance(quantization_method, str):
        raise TypeError(f"quantization_method must be a name such as 'q8_0' or a list of names, not {quantization_method!r}.")
    name = quantization_method.lower()
    name = ALIASES.get(name, name)
    if name not in FILE_TYPES:
        raise unknown("quantization_method", quantization_method, ALLOWED_QUANTS)
    return FILE_TYPES[name]


def print_quantization_methods() -> None:
    """Print the names that ``quantization_method`` takes, one a line, with what each is for."""
    for name, description in ALLOWED_QUANTS.items():
        print(f'"{name}"'.ljust(18), description)
