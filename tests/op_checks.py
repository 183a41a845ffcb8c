"""What tests of ops share: both ways through an op, and errors that are held against torch's own.

On a GPU the kernels run compiled; elsewhere in Triton's interpreter, repaired (tests/triton_interpreter.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available()
if HAS_TRITON and not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
if HAS_TRITON:
    from triton_interpreter import interprets, repaired

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
KERNELS_RUN = GPU or (HAS_TRITON and interprets())
RUNS_KERNELS = pytest.param(
    True, id="kernel", marks=pytest.mark.skipif(not KERNELS_RUN, reason="no Triton, or TRITON_INTERPRET=1 was not set")
)
BOTH_WAYS = [pytest.param(False, id="reference"), RUNS_KERNELS]


@contextlib.contextmanager
def running_kernels(wanted: bool, monkeypatch: pytest.MonkeyPatch, *ops: ModuleType) -> Iterator[None]:
    """While open, ``ops`` go through their kernels, or through their plain-torch references."""
    for op in ops:
        monkeypatch.setattr(op, "has_kernels", lambda x: wanted)
    with repaired() if wanted and not GPU else contextlib.nullcontext():
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that shows when a kernel leaves it as it was."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def error(value: Tensor, truth: Tensor) -> float:
    """The relative error in the Euclidean norm; NaN counts as infinite."""
    difference = (value.double() - truth).norm() / truth.norm()
    return float("inf") if difference.isnan() else float(difference)


def in_a_row(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, each sum one term after the other in float32, as a kernel's exact products go; cuBLAS adds up many parts."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float32)
    for index in range(a.shape[-1]):
        total = torch.addcmul(total, a[..., index, None].float(), b[..., index, None, :].float())
    return total.to(a.dtype)


def worst(truth: dict[str, Tensor], *results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the same in several words of torch's, what is furthest off."""
    return {name: max((result[name] for result in results), key=lambda x: error(x, exact)) for name, exact in truth.items()}  # noqa: B023


def also_in_a_row(truth: dict[str, Tensor], function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``function`` gives with torch's own products, or on a GPU with sums in a row where those are further off."""
    if not GPU:
        return function()
    with mock.patch.object(Tensor, "__matmul__", in_a_row):
        summed = function()
    return worst(truth, function(), summed)


def assert_as_good(ours: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Each of our results may be off by twice what torch's own is in the same dtype, or by a last bit where that is exact.

    A single number may be off by a whole last bit; that all of many are is no rounding any more.
    """
    assert ours.keys() == torchs.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == torchs[name].dtype and value.shape == torchs[name].shape, name
        last_bit = torch.finfo(value.dtype).eps / (4 if value.numel() > 1 else 2)
        allowed = 2 * max(error(torchs[name], truth[name]), last_bit)
        assert error(value, truth[name]) <= allowed, f"{name}: {error(value, truth[name]):.2e} > {allowed:.2e}"


def with_gradients(function, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The outputs of ``function`` and the gradients of its inputs, under fixed output gradients."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [randn(*out.shape, seed=99 + n).to(out.dtype) for n, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    results = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def check(op, reference, inputs: dict[str, Tensor], *others) -> None:
    """``others`` say the same as ``reference`` in other words of torch's; of their errors the largest counts."""
    truth = with_gradients(reference, inputs, torch.float64)
    torchs = [with_gradients(said, inputs) for said in (reference, *others)]
    assert_as_good(with_gradients(op, inputs), worst(truth, *torchs), truth)


def differentiable(forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """An op whose forward (inputs -> output) and backward (gradient, inputs -> theirs) are called apart in training."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors)

    return Op.apply
