"""Compile every kernel ahead of time for GPU architectures, without a GPU: ``python compile_kernels.py 80 90``.

A process of its own, because Triton decides at import whether it interprets or compiles. Each kernel is built for the
shapes of a real model; its shared memory is printed so that the test can hold it against what the card has.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from luthier.gguf import kernels as quantisers
from luthier.ops import (
    dropout,
    expert_gate,
    flash_attention,
    fp8,
    gated_mlp,
    grouped,
    linear_cross_entropy,
    lora_kernels,
    nf4,
    nf4_e4m3,
    rms_norm,
    rotary,
)

DIVISIBLE = [["tt.divisibility", 16]]  # what Triton finds of pointers and strides (i64 here) at a launch: copies can be wide


def kernels(dtype: str) -> dict[str, tuple]:
    """name -> (kernel, types of its leading arguments, its constants, warps), activations in ``dtype``."""
    x = f"*{dtype}"
    norm = {"D": 4096, "BLOCK": 4096, "TILE": 1, "FLAVOUR": 0}
    head_norm = {"D": 128, "BLOCK": 128, "TILE": 32, "FLAVOUR": 2}
    table = {"HEADS": 32, "HEAD_BLOCK": 32, "HALF": 64, "HALF_BLOCK": 64, "REST": 0, "REST_BLOCK": 1, "INTERLEAVED": False}
    partial = {**table, "HALF": 48, "REST": 32, "REST_BLOCK": 32, "INTERLEAVED": True}
    forward = [x, x, x, "i32", "i64", "i64", "fp32"]
    backward = [x, x, x, x, x, "*fp32", "i32", "i64", "i64", "i64", "i64", "fp32"]
    rotation = [x, x, x, x, "i32", *["i64"] * 12]
    weights = ["*fp32", "*fp32", "*fp32", "*fp32", x, "i32", "i32", "i64"]
    words = ["*fp32", "*fp32", "*fp32", "*fp32", x, "i32", "i64"]
    in_words = {"SIZE": 64, "NESTED": 256, "STEPS": 7, "WORDS": nf4.WORDS, "PAIRED": nf4.PAIRED[torch.bfloat16]}
    whole = {"SIZE": 64, "BLOCKS": 64, "WHOLE": True, "PAIRS": True}
    broken = {**whole, "WHOLE": False, "PAIRS": False}
    x32, adapter = "*fp32", {"RANK": 16, "EXTENSION": 48, "BLOCK": 64, "HAS_BIAS": True, "ROWS": 64, "COLUMNS": 1024}
    gated = ["i64", "i32", *["i64"] * 3]
    gradient = [x, x, x, x, "i32", "i32", *["i64"] * 3, "fp32", "fp32"]
    extension = {"COPIES": True, "RANK": 16, "EXTENSION": 16, "RANK_BLOCK": 16, "ROWS": lora_kernels.GRADIENT_ROWS[1]}
    of_128 = {"RANK": 128, "EXTENSION": 128, "RANK_BLOCK": 128, "COLUMNS": 32}
    total, (rows, columns) = [x, x, x, x, "i32", "i32", *["i64"] * 3, "fp32"], lora_kernels.SUM_TILE
    of_sum = {"RANK": 128, "RANK_BLOCK": 128, "ROWS": rows, "COLUMNS": columns}
    mask = {"ADDS": True, "ROUNDS": 7, "SHIFT": 8, "ROWS": 8, "TILE": 256}
    head, logits = [x, "*i64", *["*fp32"] * 3, "i64", "fp32", "fp32"], {"V": 128256, "BLOCK": 8192, "CAPPED": True}
    logits |= {"GRAD": True, "SCORES": False}
    scored = [x, "*i64", "*fp32", "*fp32", "*i1", "i64", "fp32", "fp32"]
    return {
        "norm": (rms_norm._norm_forward, forward, norm, 16),
        "norm of heads": (rms_norm._norm_forward, forward, head_norm, 16),
        "norm backward": (rms_norm._norm_backward, backward, {**norm, "RESIDUAL": True, "WEIGHT": False}, 16),
        "norm of heads backward": (rms_norm._norm_backward, backward, {**head_norm, "RESIDUAL": False, "WEIGHT": True}, 16),
        "rotary": (rotary._rotary_kernel, rotation, {**table, "INVERSE": False}, 8),
        "rotary, part of a head": (rotary._rotary_kernel, rotation, {**partial, "INVERSE": True}, 8),
        **{
            f"{kind} {name}": (kernel, types, {"KIND": number, "BLOCK": 1024, **more}, 4)
            for number, kind in enumerate(gated_mlp.KINDS)
            for name, kernel, types, more in (
                ("forward", gated_mlp._gated_forward, [x] * 5 + gated, {"ROUNDS": False}),
                ("backward", gated_mlp._gated_backward, [x] * 3 + gated[1:], {}),
            )
        },
        "nf4": (nf4._nf4_kernel, ["*u8", "*u8", *weights], {"NESTED": 256, **whole}, 4),
        **({} if dtype == "fp16" else {"nf4, words": (nf4._nf4_words_kernel, ["*u8", "*u8", *words], in_words, 4)}),
        "nf4, plain scales": (nf4._nf4_kernel, ["*u8", "*fp32", *weights], {"NESTED": 0, **broken}, 4),
        "adapter": (lora_kernels._adapter_kernel, [x32, x32, x, x, x, *["i32"] * 5, *["i64"] * 4], adapter, 4),
        "gradient of an adapter": (lora_kernels._gradient_kernel, gradient, {**extension, "COLUMNS": 256}, 4),
        "gradient of a wide adapter": (lora_kernels._gradient_kernel, gradient, {**extension, **of_128}, 4),
        "sum with an adapter": (lora_kernels._sum_kernel, total, of_sum, 4),
        "dropout": (dropout._dropout_kernel, [x, x, x, "i64", *["i32"] * 5, *["i64"] * 3], mask, 4),
        **quantising_kernels(),
        "cross-entropy": (linear_cross_entropy._cross_entropy_kernel, head, logits, 16),
        "cross-entropy, no gradient": (linear_cross_entropy._cross_entropy_kernel, head, {**logits, "GRAD": False}, 16),
        "log-probabilities": (linear_cross_entropy._cross_entropy_kernel, scored, {**logits, "SCORES": True}, 16),
    }


def kernels_in_8_bits(dtype: str) -> dict[str, tuple]:
    """The same for what only cards from Ada on have."""
    x, e4m3 = f"*{dtype}", "*fp8e4nv"
    rider = {"RANK": 48, "WIDTH": 192, "RIDERS": 256}
    rows, riders = [x, x, e4m3, "*fp32", "i32", "i64", "i64"], ["*fp32", x, "*fp32", e4m3, "i32", "i64", "i64", "i64"]
    nf4_weight, blocks = ["*u8", "*u8", *["*fp32"] * 5, e4m3], {"SIZE": 64, "NESTED": 256}
    tile = {"ROWS": nf4_e4m3.QUADS, "BLOCKS": nf4_e4m3.BLOCKS}
    dense = [x, "*fp32", e4m3, "i32", "i32", "i64", "i64"]
    gated = [x, x, x, e4m3, "*fp32", "i64", "i32", *["i64"] * 3]
    return {
        "rounded activation": (gated_mlp._gated_forward, gated, {"KIND": 0, "ROUNDS": True, "BLOCK": fp8.ROW_BLOCK}, 16),
        "riders of rows": (fp8._ride_kernel, rows, {**rider, "BLOCK": fp8.RIDE_BLOCK}, 1),
        "e4m3 rows": (fp8._quantise_kernel, rows, {**rider, "STEPS": 2, "BLOCK": fp8.ROW_BLOCK}, 16),
        "e4m3 riders": (fp8._riders_kernel, riders, {**rider, "ROWS": 64, "GROUP": 64}, 8),
        "weight to e4m3": (fp8._write_kernel, dense, {"TRANSPOSED": False, "TILE": fp8.TILE}, 8),
        "weight to e4m3, transposed": (fp8._write_kernel, dense, {"TRANSPOSED": True, "TILE": fp8.TILE}, 8),
        "nf4 to e4m3": (nf4_e4m3._rows_kernel, [*nf4_weight, "i32", "i64"], {**blocks, "BLOCKS": 64}, 2),
        "nf4 to e4m3, transposed": (
            nf4_e4m3._columns_kernel,
            [*nf4_weight, "i32", "i32", "i64"],
            {**blocks, **tile},
            nf4_e4m3.WARPS,
        ),
    }


def quantising_kernels() -> dict[str, tuple]:
    """For groups that follow each other in memory, as they do on a GPU; an argument's name says its type."""
    rows = {
        "ordered_sum": {},
        "largest_of": {},
        "fit_with_offset": {"ABSOLUTE": False},
        "fit_symmetric": {},
        "fit_by_exchange": {"N": 16},
        "exchange": {"NEED_REST": True, "N": 16},
        "search_scales": {"N": 8},
        "round": {"HAS_OFFSET": True},
    }
    floats, built = ("levels", "smallest", "lowest", "highest"), {}
    for name, own in rows.items():
        kernel = getattr(quantisers, f"_{name}")
        constants = {"apart": 1, "x_apart": 1, "w_apart": 1, "N": 32, "LANES": quantisers.LANES, **own}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        types = ["*fp32" if key.isupper() else "fp32" if key in floats else "i32" for key in kernel.arg_names]
        built[f"quantising: {name}"] = (kernel, types, constants, 4)
    return built


def kernels_of_experts(dtype: str, capability: int) -> dict[str, tuple]:
    """The same for mixtures of experts; what is copied while it computes has a number of stages, too."""
    x = f"*{dtype}"
    routed = [x, x, x, x, x, x, *["*i32"] * 4, "i32", "i32", *["i64"] * 8]
    tile = {"K": 2048, "N": 1536, "TOP_K": 8, "RANK": 16, "HAS_BIAS": True, "ROWS": grouped.ROWS}
    columns, step, *how = grouped.tile_shape((capability // 10, capability % 10), 2, 1536)
    wide = {**tile, "COLUMNS": columns, "STEP": step, "stride_k": 1, "stride_other_n": 1}
    thin = {**tile, "N": 16, "COLUMNS": 16, "STEP": 64, "RANK": 0, "HAS_BIAS": False, "stride_k": 1}
    sums = {"N": 2048, "TOP_K": 8, "RANK": 16, "ROWS": 64, "COLUMNS": 128}
    clamped = {"KIND": expert_gate.CLAMPED, "ALTERNATES": True, "BLOCK": expert_gate.BLOCK}
    combine = {"E": 128, "TOP_K": 8, "WEIGHTED": True, "BLOCK": grouped.BLOCK}
    backward = [x, x, x, "*fp32", "*i32", "*i32", "i32", "fp32", "fp32"]
    route = {"E": 128, "LANES": 256, "STEPS": 17, "ROWS": 128, "BLOCK": grouped.ROUTE_BLOCK, "TILES_BLOCK": 16}
    return {
        "route": (grouped._route_kernel, ["*i16", "*i64", *["*i32"] * 5, "i32", "i32"], route, 4),
        "grouped product": (grouped._product_kernel, routed, wide, *how),
        "grouped product, thin": (grouped._product_kernel, routed, thin, 4, 3),
        "grouped gradient": (grouped._gradient_kernel, [x, x, "*fp32", "*i32", "*i32", "i64", "fp32"], sums, 4, 3),
        "combine": (grouped._combine_kernel, [x, "*i32", x, x, "*i32", "i32", "i64"], combine, 4),
        "clamped gate": (expert_gate._gate_forward, [x, x, "i32", "fp32", "fp32"], clamped, 4),
        "clamped gate backward": (expert_gate._gate_backward, backward, {**clamped, "E": 32, "EDGE": True}, 4),
    }


def kernels_of_attention(capability: int) -> dict[str, tuple]:
    """The widest heads, which take the most memory, in the tiles that the card would get."""
    x, heads, tail = "*bf16", {"D": 256, "WIDTH": 256, "CAPPED": True}, [*["i32"] * 4, *["fp32"] * 3]
    halves = {"OF_K": True, "OF_V": False}
    built = {
        "forward": (flash_attention._forward, [*[x] * 4, "*fp32", *["*i32"] * 2, *["i64"] * 12, *tail], {}),
        "dq": (flash_attention._backward_q, [*[x] * 6, *["*fp32"] * 2, *["*i32"] * 2, *["i64"] * 18, *tail], {}),
        "dkdv": (flash_attention._backward_kv, [*[x] * 6, *["*fp32"] * 2, *["*i32"] * 2, *["i64"] * 18, *tail], halves),
    }
    result = {}
    for name, (kernel, types, more) in built.items():
        cut = flash_attention.tiles(name, 256, divmod(capability, 10))
        constants = {"OWN": cut.own, "WALKED": cut.walked, **heads, **more}
        result[f"attention {name}"] = kernel, types, constants, cut.warps, cut.stages
    return result


def build(target: GPUTarget, kernel, types: list[str], constants: dict, warps: int, stages: int = 3) -> int:
    """Bytes of shared memory that the compiled kernel uses."""
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | {name: "constexpr" for name in constants}
    assert set(signature) == set(names), f"{sorted(set(names) ^ set(signature))} of {names}"
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): DIVISIBLE for name, kind in signature.items() if kind[0] == "*" or kind == "i64"}
    source = ASTSource(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}).metadata.shared


def main(capabilities: list[int]) -> None:
    """Print {capability: {kernel: bytes of shared memory}}; bf16 where the card has it."""
    result = {}
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        dtype = "fp16" if capability < 80 else "bf16"
        built = kernels(dtype) | kernels_of_experts(dtype, capability)
        built |= kernels_in_8_bits("bf16") if capability >= 89 else {}
        if capability >= 80 and capability != 89:  # which takes the tiles of 86
            built |= kernels_of_attention(capability)
        result[capability] = {name: build(target, *arguments) for name, arguments in built.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
