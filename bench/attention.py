"""Every kernel of attention that can do a case, on this card: what ``FASTEST`` in ops/attention.py is set by.

    python bench/attention.py [--length 8192] [--widths 64 128 256]

Errors come first (relative, against fp64, the worst of output and gradients), then milliseconds forward + backward. A
star marks what the table takes; a line whose star is not the fastest wants a change of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from gpu import require_gpu
from ops import seconds
from torch import Tensor

from luthier.ops import attention
from luthier.ops.attention import attend, attend_backward, kernel_for
from luthier.ops.bands import Padding, Segments

CAUSAL, STRUCTURED = ("cudnn", "flash", "efficient", "tiles"), ("flash, structured", "tiles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 80, 96, 128, 256], help="of a head")
    arguments = parser.parse_args()
    require_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.length} tokens, 32 heads (16 of width 256)")
    for width in arguments.widths:
        for name, (kernels, settings) in cases(arguments.length).items():
            inputs = tensors(arguments.length, width)
            row = [timed(kernel, inputs, settings) for kernel in kernels]
            print(f"{width:4} {name:22}" + "  ".join(row), flush=True)
    print(f"flex, soft cap, width {arguments.widths[-1]}: {flex(tensors(arguments.length, arguments.widths[-1]))}")


def cases(length: int) -> dict[str, tuple[tuple[str, ...], dict]]:
    """name -> (the kernels that know it, what ``attend`` is told)."""
    padding = Padding(*(torch.tensor([value], dtype=torch.int32, device="cuda") for value in (length // 5, length - 1)))
    return {
        "causal": (CAUSAL, {}),
        "packed, 2 sequences": ((*STRUCTURED, "efficient"), {"segments": packed(length, 2)}),
        "packed, 16 sequences": ((*STRUCTURED, "efficient"), {"segments": packed(length, 16)}),
        "window of an eighth": (STRUCTURED, {"window": length // 8}),
        "window of a half": (STRUCTURED, {"window": length // 2}),
        "padded on the left": (("tiles",), {"segments": padding}),
        "soft cap": (("tiles", "reference"), {"softcap": 50.0}),
    }


def packed(length: int, count: int) -> Segments:
    """Sequences of uneven lengths."""
    inner = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    bounds = torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([length])))
    return Segments(bounds.int().cuda(), int(bounds.diff().max()))


def tensors(length: int, width: int) -> list[Tensor]:
    """Query, key, value and the output's gradient, in the layout of a projection's output."""
    heads = (16, 8, 8, 16) if width == 256 else (32, 8, 8, 32)
    return [torch.randn(1, length, n, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads]


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    chosen, attention.kernel_for = attention.kernel_for, lambda *arguments: kernel
    try:
        yield
    finally:
        attention.kernel_for = chosen


def both(kernel: str, inputs: list[Tensor], settings: dict) -> tuple[Tensor, ...]:
    """(the output, the gradients of q, k and v)."""
    *qkv, grad = inputs
    with forced(kernel):
        out, state = attend(*qkv, qkv[0].shape[-1] ** -0.5, **settings)
        return out, *attend_backward(grad, *qkv, out, state, qkv[0].shape[-1] ** -0.5)


def timed(kernel: str, inputs: list[Tensor], settings: dict) -> str:
    *qkv, grad = inputs
    scale = qkv[0].shape[-1] ** -0.5
    with forced(kernel):
        out, state = attend(*qkv, scale, **settings)
        forward = seconds(lambda: attend(*qkv, scale, **settings), 8)
        backward = seconds(lambda: attend_backward(grad, *qkv, out, state, scale), 8)
    star = "*" if kernel == kernel_for(qkv[0], **settings) else ""
    return f"{kernel}{star} {error(kernel, settings, inputs):.1%} {forward * 1e3:.2f}+{backward * 1e3:.2f}"


def error(kernel: str, settings: dict, inputs: list[Tensor]) -> float:
    """On the first heads of the first 512 tokens, where fp64 is quick."""
    small = [t[:, :n, :512] for t, n in zip(inputs, (4, 1, 1, 4), strict=True)]
    settings = {**settings, "segments": packed(512, 3)} if isinstance(settings.get("segments"), Segments) else dict(settings)
    settings |= {"window": 100} if "window" in settings else {}
    if isinstance(settings.get("segments"), Padding):
        settings["segments"] = Padding(*(torch.tensor([value], dtype=torch.int32, device="cuda") for value in (77, 511)))
    truth = both("reference", [t.double() for t in small], settings)
    return max(
        float((ours - exact).norm() / exact.norm()) for ours, exact in zip(both(kernel, small, settings), truth, strict=True)
    )


def flex(inputs: list[Tensor]) -> str:
    """torch's flex_attention, the other way to a soft cap: its first call compiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *qkv, grad = inputs
    length = grad.shape[2]
    qkv = [t.detach().requires_grad_() for t in qkv]
    mask = create_block_mask(lambda batch, head, query, key: query >= key, None, None, length, length)
    compiled: Callable = torch.compile(flex_attention)

    def forward() -> Tensor:
        capped = lambda score, batch, head, query, key: 50.0 * torch.tanh(score / 50.0)  # noqa: E731
        return compiled(*qkv, score_mod=capped, block_mask=mask, enable_gqa=True)

    start = time.perf_counter()
    forward().backward(grad)
    torch.cuda.synchronize()
    compilation = time.perf_counter() - start
    one, two = seconds(forward, 8), seconds(lambda: forward().backward(grad), 8)
    return f"{one * 1e3:.2f}+{(two - one) * 1e3:.2f} ms, first call {compilation:.0f} s"


if __name__ == "__main__":
    main()
