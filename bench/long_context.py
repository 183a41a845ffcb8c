"""How long a row trains on one card: the Llama-3.1-8B shape, NF4, LoRA on all linears, one row, within a cap of memory.

    python bench/long_context.py --caps 24,48,80,139 --full 24x98304

For each cap the longest row is found from the dial's own cost model and then run, with torch held to the cap. A whole step
of such a row takes minutes, nearly all of it attention, so only ``--layers`` layers run: the others' weights, adapters,
moments and inputs are there as ballast, so that the peak is the whole model's, and the step's time is projected from the
layers'. ``--full`` steps run all 32 layers and are measured. The CUDA context is not torch's: it is taken off the cap.
"""

from __future__ import annotations

import argparse
import json
import time

from gpu import require_gpu, run_worker

GIB = 1 << 30
CONTEXT = 0.6  # GiB that CUDA takes beside torch's allocator
LAYERS = 32
MARGIN = 0.98  # of what the cost model says fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", default="24,48,80,139", help="GiB, comma separated")
    parser.add_argument("--full", default="24x98304", help="cap x tokens of whole steps, comma separated; empty for none")
    parser.add_argument("--layers", type=int, default=1, help="layers that run where the step is projected")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--host", type=float, default=0.5, help="share of the free host memory that may be pinned")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    require_gpu()
    if arguments.worker:
        cap, tokens = arguments.worker.split("x")
        print(json.dumps(worker(arguments, float(cap), int(tokens) or None)))
        return
    jobs = [job for job in arguments.full.split(",") if job] + [f"{cap}x0" for cap in arguments.caps.split(",") if cap]
    for job in jobs:
        options = ["--worker", job, *(f"--{name}={getattr(arguments, name)}" for name in ("layers", "r", "host"))]
        print_row(job, run_worker(options, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"))


def print_row(job: str, row: dict) -> None:
    if "failed" in row:
        print(f"{job:12} {row['failed']}", flush=True)
        return
    print(
        f"{row['cap']:g} GiB: {row['tokens']} tokens, {row['tokens_per_second']:.0f} tok/s {row['kind']}, peak "
        f"{row['peak_gib']:.2f} GiB measured ({row['expected_gib']:.2f} by the cost model), {row['host_gib']:.1f} GiB of host "
        f"memory; step {row['step_seconds']:.1f} s, a layer {row['layer_seconds']:.2f} s, head {row['head_seconds']:.2f} s",
        flush=True,
    )


def worker(arguments: argparse.Namespace, cap: float, tokens: int | None) -> dict:
    import torch
    from models import random_model, with_lora

    from luthier.model.accelerate import accelerate, dial_of
    from luthier.model.card import card_speeds
    from luthier.model.cost import Cost, Shape
    from luthier.model.host_memory import free_host_memory

    device, is_full = torch.device("cuda", 0), tokens is not None
    torch.cuda.set_per_process_memory_fraction((cap - CONTEXT) * GIB / torch.cuda.get_device_properties(device).total_memory)
    layers = LAYERS if is_full else arguments.layers
    model = accelerate(with_lora(random_model("llama-8b", layers=layers), r=arguments.r).train())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    train_step(model, optimizer, 4096)  # compiles, and makes gradients and moments
    config, dial = model.config, dial_of(model)
    shape = Shape(config.hidden_size, 6144, 4096, config.intermediate_size, 7 * arguments.r, 2)
    table = model.get_base_model().get_input_embeddings().weight.nbytes
    per_layer = layer_bytes(model)
    ballast = [torch.empty(int((LAYERS - layers) * per_layer), dtype=torch.uint8, device=device)]
    gradients = 4 * sum(parameter.numel() for parameter in trained)  # given back by the optimizer's zero_grad
    fixed = torch.cuda.memory_allocated() - table + gradients
    room = (cap - CONTEXT) * GIB - fixed
    host, speeds = arguments.host * free_host_memory() - table, card_speeds(device)
    tokens = tokens or longest(shape, MARGIN * room, host, speeds)
    plan = fastest(shape, tokens, room, host, speeds)
    cost = Cost(shape, tokens, tokens, speeds)
    if not is_full:
        few = plan[-layers:]
        ballast.append(torch.empty(cost.device(plan) - cost.device(few), dtype=torch.uint8, device=device))
    else:
        few = plan
    dial.set_plan(few, embedding_in_host_memory=True)
    head = head_seconds(model, min(tokens, 65536)) * tokens / min(tokens, 65536)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = train_step(model, optimizer, tokens)
    layer = (seconds - head) / layers
    step = seconds if is_full else head + LAYERS * layer
    return {
        "cap": cap,
        "tokens": tokens,
        "kind": "measured" if is_full else f"projected from {layers} of {LAYERS} layers",
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        "layer_seconds": layer,
        "head_seconds": head,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "expected_gib": (fixed + cost.device(plan)) / GIB,
        "host_gib": (cost.host(plan) + table) / GIB,
    }


def train_step(model, optimizer, tokens: int) -> float:
    """Seconds of forward, backward and AdamW on one row of random tokens."""
    import torch

    ids = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def head_seconds(model, tokens: int) -> float:
    """Of the head's loss and gradient."""
    import torch

    from luthier.model.head import causal_loss

    base = model.get_base_model()
    hidden = torch.randn(1, tokens, model.config.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(model.config.vocab_size, (1, tokens), device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    causal_loss(hidden, base.get_output_embeddings(), {}, labels).backward()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def layer_bytes(model) -> float:
    """What one layer holds: 4-bit weights with their scales, and adapters with gradients and moments in fp32."""
    layer = model.get_base_model().model.layers[0]
    total = 0
    for parameter in layer.parameters():
        total += 16 * parameter.numel() if parameter.requires_grad else parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.state2 else 0)
    return total


def fastest(shape, tokens: int, room: float, host: float, speeds):
    from luthier.model.cost import Cost, plan_for

    return plan_for(Cost(shape, tokens, tokens, speeds), LAYERS, room, host)


def longest(shape, room: float, host: float, speeds) -> int:
    """The most tokens, in thousands, for which a plan fits."""
    from luthier.model.cost import Cost

    low, high = 1, 4096
    while high - low > 1:
        middle = (low + high) // 2
        plan, cost = fastest(shape, 1024 * middle, room, host, speeds), Cost(shape, 1024 * middle)
        low, high = (middle, high) if cost.device(plan) <= room else (low, middle)
    return 1024 * low


if __name__ == "__main__":
    main()
