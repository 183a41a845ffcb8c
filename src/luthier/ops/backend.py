"""Where kernels run: Triton on a GPU; plain torch everywhere else, and where Triton is not installed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references are all there is
    triton = tl = None


def jit(kernel: Callable) -> Callable:
    """``triton.jit`` where there is a Triton; without one the kernel is never launched."""
    return kernel if triton is None else triton.jit(kernel)


def has_kernels(x: Tensor) -> bool:
    """Whether operations on ``x`` run as Triton kernels."""
    return triton is not None and x.is_cuda


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) -> (n, D), a view where a row's elements lie side by side, as kernels want them; of a sum's gradient or
    a transposed x they do not."""
    return side_by_side(x.reshape(-1, x.shape[-1]))


def side_by_side(x: Tensor) -> Tensor:
    """x (n, D), copied if the elements of a row do not lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def warps_for(elements: int) -> int:
    """Warps for a program that holds ``elements`` fp32 values in registers at a time: 16 a thread, 4 to 16 warps."""
    return min(16, max(4, power_of_2(elements) // 512))
