"""Stacks of experts in MXFP4, as gpt-oss is published: 4-bit floats in blocks of 32 with a power of two for each block."""

from __future__ import annotations

from collections.abc import Mapping

import torch

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors that a stack is stored in
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are their negatives
BIAS = 127  # of the exponents
BLOCK = 32


def stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
    """Name of a stack -> names of its codes ``[experts, rows, blocks, 16]`` and exponents ``[experts, rows, blocks]``."""
    names = [name.removesuffix(BLOCKS) for name in shapes if name.endswith(BLOCKS)]
    pairs = {name: (f"{name}{BLOCKS}", f"{name}{SCALES}") for name in names}
    return {name: (codes, scales) for name, (codes, scales) in pairs.items() if shapes[codes] == (*shapes.get(scales, ()), 16)}


def shape_of(codes: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of an expanded stack."""
    experts, rows, blocks, _ = codes
    return experts, blocks * BLOCK, rows


def expand(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """uint8 codes, two to a byte, and their exponents -> bfloat16 ``[experts, columns, rows]``, the way round that
    transformers keeps these weights. Nothing is rounded.
    """
    experts, rows, blocks, _ = codes.shape
    values = torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)
    result = torch.empty(experts, rows, blocks * BLOCK, dtype=torch.bfloat16, device=codes.device)
    for expert in range(experts):  # one after the other: what is in between takes ten times the memory
        pairs = torch.stack([codes[expert] & 15, codes[expert] >> 4], -1).reshape(rows, blocks, BLOCK)
        powers = exponents[expert].to(torch.int32)[..., None] - BIAS
        result[expert] = torch.ldexp(values[pairs.int()], powers).reshape(rows, -1).bfloat16()
    return result.transpose(1, 2)
