"""One QLoRA training step beside its peers: correct first, then tokens per second and peak memory.

    python bench/step.py --shapes 2x2048,8x2048,1x8192 --peers hf,liger,luthier

A step is ``model(input_ids, attention_mask, labels).loss.backward(); AdamW(fused).step(); zero_grad()`` on fresh random
tokens, median after warm-up. Every peer runs in a process of its own. Luthier's rows are the settings of its memory dial.
Nothing is timed unless its gradients are as good as stock transformers + peft (at most twice its bf16 error); those of
8-bit compute, as good as stock layers that emulate it (twice their error), and fp8-backward's loss bit for bit bf16's.
Beside them stands what one bf16 rounding of the embeddings does to the gradients of the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from gpu import require_gpu, run_worker

PEER = {"2x2048": 7.0, "8x2048": 10.1, "1x8192": 8.2, "1x32768": 14.3}  # GiB that Unsloth takes
BUDGETS = {  # row -> memory_budget by shape
    "luthier small": defaultdict(lambda: 10, PEER),
    "luthier fp8-backward": defaultdict(lambda: 11, {shape: gib + 1 for shape, gib in PEER.items()}),
}
LUTHIER = {  # row -> arguments of set_checkpointing, of set_compute, and whether short batches run from graphs
    "luthier offload": {"mode": "offload"},
    "luthier small": {"mode": "auto"},
    "luthier recompute": {"mode": True},
    "luthier 40 GiB": {"mode": "auto", "memory_budget": 40},
    "luthier keep": {"mode": False},
    "luthier without graphs": {"mode": False, "graphs": False},  # only on request: the same as "keep" but in short shapes
    "luthier fp8-backward": {"mode": "auto", "compute": "fp8-backward"},
    "luthier fp8": {"mode": False, "compute": "fp8"},
}
CHECKS = {"qwen3-30b-a3b": "check-qwen3-moe", "gpt-oss-20b": "check-gpt-oss"}  # what is checked before the step of a mixture
GROUPS = {  # what a kernel's name holds -> the row of the profile
    "attention": ("flash", "fmha", "cudnn_generated", "sdpa", "attention"),
    "products": ("gemm", "cutlass", "cublas", "nvjet", "xmma", "sm90_", "sm80_", "_product_kernel"),
    "dequantisation": ("nf4", "dequant", "_write_kernel", "_riders_", "_rows_kernel", "_columns_kernel", "_adapter_kernel"),
    "copies": ("memcpy", "copy", "memset", "fill"),
    "element-wise": (
        *("elementwise", "vectorized", "reduce", "softmax"),
        *("_norm_", "_gated_", "_gate_", "_combine_", "_rotary_", "_quantise_", "_ride_", "_cross_entropy_"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="a shape of bench/models.py")
    parser.add_argument("--shapes", default="2x2048,8x2048,1x8192", help="batch x tokens, comma separated")
    parser.add_argument("--peers", default="hf,liger,luthier")
    parser.add_argument("--peer-shapes", help="of the others, where they need not run all")
    rows = ",".join(row for row in LUTHIER if row != "luthier without graphs")
    parser.add_argument("--rows", default=rows, help="which of Luthier's rows to time")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--profile", action="store_true", help="also where the time of one step goes, in the first shape")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/<card>-<date>.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    require_gpu()
    if arguments.worker:
        worker(arguments)
        return
    check = in_a_process(arguments, "check")
    print_check(check)
    if "failed" in check:
        sys.exit(f"The check of the gradients broke off ({check['failed']}, see above): nothing is timed.")
    if not check["passed"]:
        sys.exit("The gradients are wrong: nothing is timed.")
    rows = {}
    peers, ours = arguments.peers.split(","), arguments.rows.split(",")
    for name in [name for peer in peers for name in (ours if peer == "luthier" else [peer])]:
        rows[name] = in_a_process(arguments, name, arguments.shapes if name in LUTHIER else arguments.peer_shapes)
        print_row(name, rows[name])
        path = write(arguments, check, rows)  # after each row: what is measured is kept
    print(f"written to {path}")


def in_a_process(arguments: argparse.Namespace, name: str, shapes: str | None = None) -> dict:
    options = ["--worker", name, "--model", arguments.model, "--shapes", shapes or arguments.shapes]
    options += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    options += ["--layers", str(arguments.layers)] if arguments.layers else []
    options += ["--profile"] if arguments.profile else []
    return run_worker(options)


def worker(arguments: argparse.Namespace) -> None:
    if arguments.worker == "check":
        print(json.dumps(correctness(CHECKS.get(arguments.model, "check"))))
        return
    import torch
    from models import random_model, with_lora

    started = time.perf_counter()
    four_bit_experts = arguments.worker in LUTHIER  # bitsandbytes leaves them in 16 bits
    model = random_model(arguments.model, layers=arguments.layers, four_bit_experts=four_bit_experts)
    model = prepared(arguments.worker, with_lora(model))
    result = {"build_seconds": round(time.perf_counter() - started, 1), "shapes": {}}
    kind = LUTHIER.get(arguments.worker, {}).get("compute")
    if kind:
        result["beside bf16"] = beside_bf16(model, kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    for shape in arguments.shapes.split(","):
        batch, tokens = map(int, shape.split("x"))
        set_memory(arguments.worker, model, shape)
        try:
            result["shapes"][shape] = timed(model, optimizer, batch, tokens, arguments.warmup, arguments.steps)
        except torch.OutOfMemoryError as error:
            result["shapes"][shape] = {"failed": str(error).split(".")[0]}
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    if arguments.profile:
        batch, tokens = map(int, arguments.shapes.split(",")[0].split("x"))
        result["profile"] = profiled(model, optimizer, batch, tokens)
    print(json.dumps(result))


def prepared(name: str, model):
    """The model as a user of that library would train it."""
    model.train()
    if name in LUTHIER:
        from luthier.model.accelerate import accelerate, graphs_of
        from luthier.model.compute import set_compute

        settings = dict(LUTHIER[name])
        set_compute(accelerate(model), settings.pop("compute", "bf16"))
        graphs_of(model).enabled = settings.pop("graphs", True)
        return model
    if name == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model.get_base_model())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def set_memory(name: str, model, shape: str) -> None:
    """Anew for each shape, as in a run of its own: no graphs of other shapes take their part."""
    if name in LUTHIER:
        from luthier.model.checkpointing import set_checkpointing

        budget = BUDGETS[name][shape] if name in BUDGETS else LUTHIER[name].get("memory_budget")
        set_checkpointing(model, LUTHIER[name].get("mode", "auto"), budget)


def timed(model, optimizer, batch: int, tokens: int, warmup: int, steps: int) -> dict:
    """Each shape as if it were the only one. What CUDA graphs hold counts, though the allocator does not call it allocated."""
    import torch

    from luthier.model.accelerate import graphs_of

    graphs = graphs_of(model)
    if graphs is not None:
        graphs.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    warmup = warmup if batch * tokens <= 8192 else min(warmup, 1)  # nothing is recorded of longer ones
    times, losses = [], []
    for index in range(warmup + steps):
        if index == warmup:
            first = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        inputs = random_batch(model, batch, tokens, index)
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step(model, optimizer, inputs))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    seconds, held = statistics.median(times[warmup:]), graphs.dial.graph_bytes if graphs else 0
    return {
        "tokens_per_second": round(batch * tokens / seconds),
        "peak_gib": round(max(first, torch.cuda.max_memory_allocated() + held) / 2**30, 2),
        "spread": round(max(times[warmup:]) / min(times[warmup:]), 3),
        "first_step_seconds": round(times[0], 2),
        "loss": round(float(losses[-1]), 4),
    }


def step(model, optimizer, inputs):
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def random_batch(model, batch: int, tokens: int, seed: int) -> dict:
    import torch

    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def profiled(model, optimizer, batch: int, tokens: int) -> dict:
    """Milliseconds of one step by group of kernels, and the ten longest kernels."""
    import torch

    inputs = random_batch(model, batch, tokens, 99)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step(model, optimizer, inputs)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += 1
            kernels[event.name][1] += event.device_time / 1000
    groups: dict[str, float] = defaultdict(float)
    for name, (_, milliseconds) in kernels.items():
        groups[group_of(name)] += milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
    return {
        "groups": {name: round(value, 1) for name, value in sorted(groups.items(), key=lambda item: -item[1])},
        "kernels": [[name[:90], count, round(milliseconds, 2)] for name, (count, milliseconds) in longest],
    }


def group_of(kernel: str) -> str:
    lowered = kernel.lower()
    return next((group for group, words in GROUPS.items() if any(word.lower() in lowered for word in words)), "other")


def correctness(shape: str) -> dict:
    """Loss and adapter gradients of two layers of real kernels' widths: each setting's error beside stock bf16's own.

    Stock experts are in 16 bits, written out from the 4 that ours are in. 8 bits leave experts alone: not checked there.
    """
    import torch
    from models import dequantised, emulating_8_bits, random_model, with_lora

    from luthier.model.accelerate import accelerate, dial_of, graphs_of
    from luthier.model.blocks import Mode
    from luthier.model.compute import set_compute
    from luthier.model.cost import LayerPlan
    from luthier.model.graphs import REPEATS
    from luthier.model.offload import Host

    torch.backends.cuda.matmul.allow_tf32 = False
    exact_model = with_lora(dequantised(random_model(shape)))
    inputs = random_batch(exact_model, 2, 1024, 0)
    exact_loss, exact = gradients(exact_model, inputs)
    in_8_bits = {}
    mixture = shape != "check"
    for kind in () if mixture else ("fp8-backward", "fp8"):
        with emulating_8_bits(exact_model, everywhere=kind == "fp8"):
            in_8_bits[kind] = 2 * error(gradients(exact_model, inputs)[1], exact)
    del exact_model
    model = with_lora(dequantised(random_model(shape), torch.bfloat16) if mixture else random_model(shape))
    stock_loss, stock = gradients(model, inputs)
    allowed = 2 * error(stock, exact)
    model = with_lora(random_model(shape)) if mixture else model
    rows = {"stock": {"loss": stock_loss, "gradient_error": allowed / 2}}
    dial, graphs = dial_of(accelerate(model)), graphs_of(model)
    graphs.enabled = False

    def row(layer: LayerPlan, allowed: float, loss_allowed: float = 0.01) -> dict:
        dial.set_plan([layer] * dial.layers, embedding_in_host_memory=layer.host == Host.EVERYTHING)
        loss, ours = gradients(model, inputs)
        found = error(ours, exact)
        passed = found <= allowed and abs(loss - exact_loss) < loss_allowed
        return {"loss": loss, "gradient_error": found, "allowed": allowed, "passed": passed}

    kinds = [LayerPlan(mode, host) for mode in Mode for host in (Host.NOTHING, Host.NARROW)]
    for layer in [*kinds, LayerPlan(Mode.KEEP, Host.INPUT), LayerPlan(Mode.KEEP, Host.EVERYTHING)]:
        place = f", {layer.host.name.lower()} in host memory" if layer.host else ""
        rows[f"luthier {layer.mode.name.lower()}{place}"] = row(layer, allowed)
    if not mixture:
        graphs.enabled = True
        last = [row(LayerPlan(Mode.KEEP), allowed) for _ in range(REPEATS + 1)][-1]
        if graphs.recordings:
            rows["luthier keep, from graphs"] = last
        graphs.enabled = False
    for kind, loss_allowed in () if mixture else (("fp8-backward", 0.01), ("fp8", 0.05)):
        set_compute(model, kind)
        for mode in (Mode.ALL_BUT_GATE_UP, Mode.KEEP):
            rows[f"luthier {kind} {mode.name.lower()}"] = row(LayerPlan(mode), in_8_bits[kind], loss_allowed)
    passed = all(row.get("passed", True) for row in rows.values())
    passed &= mixture or rows["luthier fp8-backward keep"]["loss"] == rows["luthier keep"]["loss"]
    return {"exact_loss": exact_loss, "allowed": allowed, "rows": rows, "passed": passed}


def beside_bf16(model, kind: str) -> dict:
    """Relative error and cosine of all adapters' gradients against the same model's in bf16; and what one ulp does.

    With gate and up computed again, as most layers do in the memory that fp8-backward has in its row.
    """
    from luthier.model.accelerate import state_of
    from luthier.model.blocks import Mode
    from luthier.model.compute import set_compute
    from luthier.model.cost import LayerPlan

    state = state_of(model)
    dial = state.dial
    dial.set_plan([LayerPlan(Mode.ALL_BUT_GATE_UP)] * dial.layers)
    inputs = random_batch(model, 1, 2048, 0)
    truth = gradients(set_compute(model, "bf16"), inputs)[1]
    with nudged_embeddings(model):
        ulp = gradients(model, inputs)[1]
    ours = gradients(set_compute(model, kind), inputs)[1]
    model.zero_grad(set_to_none=True)
    dial.follow_flag()
    dial.has_run = False  # plans leave room for the moments and buffers, which the first step will make
    state.workspace.buffers.clear()
    return {
        name: {"gradient_error": error(value, truth), "cosine": cosine(value, truth)}
        for name, value in ((kind, ours), ("one ulp", ulp))
    }


@contextlib.contextmanager
def nudged_embeddings(model):
    """While open, the embeddings are off by what rounding to bf16 may cost: times 1 + 2^-9 noise."""
    import torch

    def nudge(module, arguments, output):
        return output * (1 + 2**-9 * torch.randn_like(output))

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    yield
    handle.remove()


def gradients(model, inputs: dict) -> tuple[float, dict]:
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error(ours: dict, truth: dict) -> float:
    squares = sum((ours[name] - truth[name]).square().sum() for name in truth)
    return float((squares / sum(value.square().sum() for value in truth.values())).sqrt())


def cosine(ours: dict, truth: dict) -> float:
    lengths = [sum(value.square().sum() for value in gradients.values()).sqrt() for gradients in (ours, truth)]
    return float(sum((ours[name] * truth[name]).sum() for name in truth) / (lengths[0] * lengths[1]))


def print_check(check: dict) -> None:
    for name, row in check.get("rows", {}).items():
        print(f"{name:48} loss {row['loss']:.5f}   relative error of the adapters' gradients {row['gradient_error']:.4%}")
    verdict = "passed" if check.get("passed") else "FAILED"
    print(f"exact loss {check.get('exact_loss')}, allowed error {check.get('allowed')}: {verdict}", flush=True)


def print_row(name: str, row: dict) -> None:
    cells = []
    for shape, cell in row.get("shapes", {"": row}).items():
        if "failed" in cell:
            cells.append(f"{shape}: {cell['failed']}")
        else:
            cells.append(f"{shape}: {cell['tokens_per_second']} tok/s {cell['peak_gib']} GiB")
    print(f"{name:18} " + " | ".join(cells), flush=True)
    for other, found in row.get("beside bf16", {}).items():
        print(f"{'':18} {other}: gradients off by {found['gradient_error']:.1%}, cosine {found['cosine']:.4f}")
    if "profile" in row:
        print(f"{'':18} " + ", ".join(f"{group} {ms} ms" for group, ms in row["profile"]["groups"].items()))


def write(arguments: argparse.Namespace, check: dict, rows: dict) -> Path:
    import importlib.metadata

    import torch

    card = torch.cuda.get_device_name()
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    result = {
        "card": card,
        "driver": torch.cuda.driver_version() if hasattr(torch.cuda, "driver_version") else None,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "model": arguments.model,
        "check": check,
        "rows": rows,
    }
    path = arguments.out or Path(__file__).parent / "results" / f"{card.replace(' ', '-')}-{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
