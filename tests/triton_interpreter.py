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
        """The one instruction that Luthier's kernels write out: two numbers to e4m3, the first's byte in the lowest bits."""
        assert asm.count("cvt.rn.satfinite.e4m3x2.f32") == 1 and constraints == "=r,f,f" and pack == 1
        first, second = (rounded_to_e4m3(value.data).astype(np.int32) for value in values)
        word = TensorHandle(first | second << 8, tl.int32)
        return SimpleNamespace(get_result=lambda index: word)

    def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    with contextlib.ExitStack() as stack:
        for name in ("cast_impl", *CONVERSIONS):
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, cast))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", dot))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_inline_asm", inline_asm))
        yield
