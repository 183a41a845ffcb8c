"""Triton's CPU interpreter, repaired: as shipped it does arithmetic on the bits of bf16 and truncates when it stores it.

Luthier's kernels load bf16, convert to fp32, compute, and convert back, so the conversions are what must be right (and
dot, whose operands stay bf16); so is the one to e4m3, which nothing reads back. test_ops.py tests the repair itself.
TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

CONVERSIONS = ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc")
CONVERSIONS += ("create_fp_to_fp",)


def interprets() -> bool:
    """Whether Luthier's kernels were decorated for the interpreter: the variable was set when they were imported."""
    from luthier.ops import rms_norm

    return not isinstance(rms_norm._norm_forward, triton.runtime.JITFunction)


def widened(handle: TensorHandle) -> np.ndarray:
    """The values of a handle; those of bf16, which is stored as the upper half of an fp32's bits, as fp32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def rounded_to_e4m3(values: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of the nearest e4m3, ties to even, the largest one for what is beyond it, as the card converts."""
    return torch.from_numpy(values).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def run_ptx(asm: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What a few instructions of PTX make of ``inputs``, which are $outputs, $outputs + 1, and so on: 32 bits as uint32."""
    registers = {f"${outputs + index}": values for index, values in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        return registers[name].view(np.uint32) if name in registers else np.uint32(int(name, 0))

    for line in asm.strip("{ }").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *names = (name.strip() for name in operands.split(","))
        if operation == "cvt.rn.satfinite.e4m3x2.f32":  # the first operand to the upper half
            upper, lower = (rounded_to_e4m3(registers[name]).astype(np.uint32) for name in names)
            registers[target] = upper << 8 | lower
        elif operation in PAIRS:
            upper, lower = (PAIRS[operation](registers[name]).astype(np.uint32) for name in names)
            registers[target] = upper << 16 | lower
        else:
            registers[target] = PTX[operation](*map(read, names))
    return [np.ascontiguousarray(registers[f"${index}"]) for index in range(outputs)]


def picked_bytes(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """PTX's prmt, whose selectors are three bits here: the fourth would ask for a sign."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for index in range(4):
        selector = selectors >> np.uint32(4 * index) & np.uint32(15)
        assert (selector < 8).all()
        picked = both >> (8 * selector.astype(np.uint64)) & np.uint64(255)
        result = result | picked.astype(np.uint32) << np.uint32(8 * index)
    return result


PAIRS = {
    "cvt.rn.bf16x2.f32": rounded_to_bf16,
    "cvt.rn.f16x2.f32": lambda values: values.astype(np.float16).view(np.uint16),
}
PTX = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "mov.b32": np.copy,
    "cvt.u32.u16": np.copy,
    "prmt.b32": picked_bytes,
}


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """While open, the interpreter converts and multiplies bf16 as a GPU does, and converts to e4m3."""
    shipped = InterpreterBuilder.cast_impl

    def cast(self, source, target_type, rounding_mode=None):
        target = target_type.scalar
        if target == tl.float8e4nv:
            return TensorHandle(rounded_to_e4m3(widened(source).astype(np.float32)), target)
        if target == tl.bfloat16:
            return TensorHandle(rounded_to_bf16(widened(source).astype(np.float32)), target)
        if source.dtype.scalar == tl.bfloat16:
            return TensorHandle(widened(source).astype(interpreter._get_np_dtype(target)), target)
        return shipped(self, source, target_type)

    def inline_asm(self, asm, constraints, values, types, is_pure, pack):
        assert pack == 1
        results = run_ptx(asm, constraints.count("="), [value.data for value in values])
        handles = [TensorHandle(result.view(np.int32), tl.int32) for result in results]
        return SimpleNamespace(get_result=lambda index: handles[index])

    def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    with contextlib.ExitStack() as stack:
        for name in ("cast_impl", *CONVERSIONS):
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, cast))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_inline_asm", inline_asm))
        yield
