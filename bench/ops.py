"""Each kernel beside its plain-torch reference and torch.compile of that reference, at Llama 3.1 8B's widths.

    python bench/ops.py [--rows 8192]

The last column is the share of a plain device copy's bandwidth that the kernel reaches, counting what it must move.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from bitsandbytes.nn import Params4bit
from gpu import require_gpu

from luthier.ops.dropout import Dropout, drop
from luthier.ops.expert_gate import Gate
from luthier.ops.expert_gate import gated_backward_ as gated_backward_of_experts_
from luthier.ops.fp8 import E4M3, quantise_rows, quantise_rows_reference, scales_of, weight_bounds, write_weight
from luthier.ops.gated_mlp import gated_activation_reference, gated_backward_, gated_backward_reference, gated_forward
from luthier.ops.grouped import combine, combine_reference, gradient, product, route
from luthier.ops.linear_cross_entropy import loss_and_grad_, loss_and_grad_reference
from luthier.ops.nf4 import dequantise, dequantise_reference, quantised
from luthier.ops.rms_norm import (
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_forward,
    rms_norm_gradients,
    rms_norm_reference,
)
from luthier.ops.rotary import rotary_reference, rotate
from luthier.ops.token_logprobs import scores_and_grad_, token_logprobs_of

WIDTH, MLP, VOCABULARY = 4096, 14336, 128256
EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
LEAD = 4_000_000  # clock ticks, about 2 ms, that Python may be ahead of the GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="tokens")
    rows = parser.parse_args().rows
    require_gpu()
    copied = randn(rows, MLP)
    bandwidth = 2 * copied.numel() * 2 / seconds(copied.clone)
    print(f"{torch.cuda.get_device_name()}, {rows} tokens, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'':22}{'kernel':>10}{'reference':>12}{'compiled':>12}{'of copy':>10}")
    for name, (kernel, reference, moved) in {**cases(rows), **cases_of_experts(rows)}.items():
        ours, plain = seconds(kernel), seconds(reference)
        compiled = seconds(torch.compile(reference, dynamic=False))
        print(f"{name:22}{ours * 1e6:8.0f}us{plain * 1e6:10.0f}us{compiled * 1e6:10.0f}us{moved / ours / bandwidth:10.0%}")


def cases(rows: int) -> dict[str, tuple[Callable, Callable, float]]:
    """name -> (the kernel, its reference, bytes that must be moved)."""
    x, grad, weight, out = randn(rows, WIDTH), randn(rows, WIDTH), randn(WIDTH), randn(rows, WIDTH)
    both, act = randn(rows, 2 * MLP), randn(rows, MLP)
    gate, up = both.chunk(2, dim=1)
    heads = randn(1, rows, 32, 128)
    cos, sin = randn(1, rows, 64), randn(1, rows, 64)
    packed = Params4bit(randn(2 * MLP, WIDTH), requires_grad=False, quant_type="nf4", compress_statistics=True).cuda()
    matrix, written = quantised(packed), randn(2 * MLP, WIDTH)
    scales = [scales_of(bounds) for bounds in weight_bounds(matrix)]
    e4m3 = [torch.empty(shape, device="cuda", dtype=E4M3) for shape in ((2 * MLP, WIDTH), (WIDTH, 2 * MLP))]
    logits, targets = randn(2048, VOCABULARY), torch.randint(VOCABULARY, (2048,), device="cuda")
    scored, is_top1 = torch.empty(2048, device="cuda"), torch.empty(2048, device="cuda", dtype=torch.bool)
    norm = (1e-5, "cast_then_scale")
    return {
        "norm": (lambda: rms_norm_forward(x, weight, *norm, out), lambda: rms_norm_reference(x, weight, *norm), size(x, x)),
        "norm backward": (
            lambda: rms_norm_backward(grad, x, weight, *norm, grad, out),
            lambda: rms_norm_backward_reference(grad, x, weight, *norm, grad)[0],
            size(x, x, x),
        ),
        "norm backward, trained": (
            lambda: rms_norm_gradients(grad, x, weight, *norm, grad, out),
            lambda: rms_norm_backward_reference(grad, x, weight, *norm, grad),
            size(x, x, x),
        ),
        "dropout": (  # beside torch's own, which keeps a mask
            lambda: drop(act, Dropout(0.1, 1 << 40)),
            lambda: torch.nn.functional.dropout(act, 0.1),
            size(act, act),
        ),
        "rotary": (lambda: rotate(heads, cos, sin), lambda: rotary_reference(heads, cos, sin), size(heads, heads)),
        "silu": (
            lambda: gated_forward(gate, up, "silu", act),
            lambda: gated_activation_reference(gate, up, "silu"),
            size(both, act),
        ),
        "silu backward": (
            lambda: gated_backward_(act, gate, up, "silu"),
            lambda: gated_backward_reference(act, gate, up, "silu"),
            size(both, act, both, act),
        ),
        "nf4": (
            lambda: dequantise(matrix, written),
            lambda: dequantise_reference(matrix),
            size(written) + packed.numel() + matrix.absmax.numel(),
        ),
        "rows to e4m3": (lambda: quantise_rows(both), lambda: quantise_rows_reference(both), size(both) * 1.5),
        **{
            f"nf4 to e4m3{', transposed' if transposed else ''}": (
                lambda of=transposed: write_weight(matrix, scales[of], e4m3[of], of),
                lambda of=transposed: quantise_rows_reference(
                    dequantise_reference(matrix).T if of else dequantise_reference(matrix)
                ),
                size(written) / 2 + packed.numel() + matrix.absmax.numel(),
            )
            for transposed in (False, True)
        },
        "cross-entropy": (
            lambda: loss_and_grad_(logits, targets, None, 1.0),
            lambda: loss_and_grad_reference(logits, targets, None, 1.0),
            size(logits, logits, logits),
        ),
        "log-probabilities": (  # of which the cross-entropy is one
            lambda: scores_and_grad_(logits, targets, None, 1.0, scored, is_top1),
            lambda: token_logprobs_of(logits, targets),
            size(logits, logits, logits),
        ),
    }


def cases_of_experts(rows: int) -> dict[str, tuple[Callable, Callable, float]]:
    """The same for a mixture of Qwen3-30B-A3B's widths, beside torch's own grouped product. (The first is bound by FLOPs.)"""
    choices = torch.rand(rows, EXPERTS, device="cuda").topk(TOP_K).indices
    routing = route(choices, EXPERTS)
    token, ends = routing.token.long(), routing.offsets[1:].contiguous()
    x, weight, low = randn(rows, HIDDEN), randn(EXPERTS, 2 * INNER, HIDDEN), randn(rows * TOP_K, 16)
    both, u, y = randn(rows * TOP_K, 2 * INNER), randn(rows * TOP_K, INNER), randn(rows * TOP_K, HIDDEN)
    router, gate = torch.rand(rows, TOP_K, device="cuda").bfloat16(), Gate("silu")
    grouped_mm = torch.nn.functional.grouped_mm
    return {
        "experts' product": (
            lambda: product(x, weight.mT, routing, both, gather=True),
            lambda: grouped_mm(x[token], weight.mT, offs=ends),
            size(x, weight, both),
        ),
        "experts' gradient": (
            lambda: gradient(x, low, routing, gather=True),
            lambda: grouped_mm(x[token].mT, low, offs=ends // 8 * 8).float(),  # torch's wants eights of rows
            size(y, low),
        ),
        "combine": (
            lambda: combine(y, routing, router),
            lambda: combine_reference(y, routing, router),
            size(y, x),
        ),
        "experts' silu backward": (
            lambda: gated_backward_of_experts_(u, both, router, routing, gate),
            lambda: gated_backward_reference(u, *both.chunk(2, dim=1), "silu"),
            size(u, both, u, both),
        ),
    }


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def size(*tensors: torch.Tensor) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def seconds(function: Callable, repeats: int = 20) -> float:
    """Median time of a call, by the GPU's own clock, after warming up; what Python takes to launch it is not counted."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LEAD)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main()
