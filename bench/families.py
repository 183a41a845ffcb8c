"""Families of models through the public path, as a user's own script trains them: correct first, then speed and memory.

    python bench/families.py --families llama-3.1-8b,qwen3-8b,gemma3-4b

A random checkpoint of a few layers at real widths is written to disk, loaded with FastLanguageModel.from_pretrained in
NF4 and given adapters with get_peft_model; a step is ``model(input_ids, attention_mask, labels).loss.backward()`` and
AdamW. Beside it stock transformers + peft on the same checkpoint and adapters, with gradient checkpointing. The error of
the gradients is against the same weights in fp32, and may be twice stock's own. ``--kind`` trains something else.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

LAYERS = {"gemma3-4b": 6, "gemma3-12b": 6}  # every sixth layer sees the whole row
WIDE = {"vocab_size": 32768, "pad_token_id": 0}  # the head would outweigh so few layers
FAMILIES = (
    "llama-3.1-8b,qwen3-8b,gemma3-4b,mistral-7b,qwen2.5-7b,phi-4,gemma3-12b,granite-8b,phi-3-mini,"
    "gemma2-9b,qwen3-4b,llama-3.2-1b,smollm3-3b,olmo2-7b"
)
KINDS = {  # what trains -> arguments of FastLanguageModel.from_pretrained
    "qlora": {"load_in_4bit": True},
    "lora": {"load_in_16bit": True},
    "full": {"full_finetuning": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=FAMILIES, help="shapes of bench/models.py, comma separated")
    parser.add_argument("--kind", default="qlora", choices=KINDS, help="adapters on 4 bits, on 16 bits, or every weight")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", default="2x2048", help="batch x tokens that are timed")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny widths and no timing: try the script where there is no GPU")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        for family in arguments.families.split(","):
            print(json.dumps({"family": family, **measured(family, arguments)}), flush=True)
        return
    print(f"{'family':14}{'gradient error':>16}{'stock':>9}{'tok/s':>9}{'GiB':>7}{'HF':>9}{'GiB':>7}  {'loading':16}layers")
    rows = collected(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    if any("failed" in row or not row["passed"] for row in rows):
        sys.exit("Not every family passed.")


def collected(arguments: argparse.Namespace) -> list[dict]:
    """The rows of all families, from one process as long as it lives: a fault of the GPU ends it, and the next one goes on."""
    rows, left = [], arguments.families.split(",")
    options = [option for option in sys.argv[1:] if option != "--worker"]
    while left:
        command = [sys.executable, __file__, *options, "--worker", "--families", ",".join(left)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    left.remove(rows[-1]["family"])
                    print_row(rows[-1])
        if process.returncode and left:
            rows.append({"family": left.pop(0), "failed": f"exit code {process.returncode}"})
            print_row(rows[-1])
    return rows


def print_row(row: dict) -> None:
    if "failed" in row:
        print(f"{row['family']:14} {row['failed']}", flush=True)
        return
    ours, hf = row["luthier"], row["hf"]
    cells = f"{row['error']:.3%}{'' if row['passed'] else ' WRONG':6}"
    speed = "".join(f"{row['tokens_per_second']:9}{row['peak_gib']:7}" for row in (ours, hf)) if ours else 32 * " "
    loading = f"{row['seconds']:.1f} s, HF {row['hf_seconds']:.1f}"
    print(f"{row['family']:14}{cells:>16}{row['stock_error']:9.3%}{speed}  {loading:16}{row['layers']}", flush=True)


def measured(family: str, arguments: argparse.Namespace) -> dict:
    """Gradients and speed of one family, stock and ours."""
    import torch
    from models import TINY, dequantised, load_stock, with_lora, write_checkpoint
    from step import error as relative_error
    from step import random_batch, timed

    import luthier.fast  # noqa: F401  not counted as loading

    gc.collect()  # the family before
    layers = LAYERS.get(family, arguments.layers)
    batch, tokens = map(int, arguments.shape.split("x"))

    def speed(model: torch.nn.Module) -> dict | None:
        if arguments.tiny:
            return None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        return timed(model, optimizer, batch, tokens, arguments.warmup, arguments.steps)

    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, family, layers, **(TINY if arguments.tiny else WIDE))
        started = time.perf_counter()
        stock = load_stock(directory, four_bit=arguments.kind == "qlora").train()
        stock = stock if arguments.kind == "full" else with_lora(stock)
        hf_seconds = time.perf_counter() - started
        trained = {name: p.detach().clone() for name, p in stock.named_parameters() if p.requires_grad}
        inputs = random_batch(stock, 2, 24 if arguments.tiny else 512, seed=0)
        stock_loss, stock_gradients = gradients(stock, inputs)
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        hf = speed(stock)
        stock.gradient_checkpointing_disable()
        stock.load_state_dict(trained, strict=False)
        exact_loss, exact = gradients(dequantised(stock), inputs)
        del stock
        gc.collect()

        started = time.perf_counter()
        model = our_model(directory, arguments.kind)
        seconds = time.perf_counter() - started
    model.load_state_dict(trained, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, ours = gradients(model, inputs)
    said = {str(warning.message) for warning in caught if "stock forward" in str(warning.message)}
    error, stock_error = relative_error(ours, exact), relative_error(stock_gradients, exact)
    return {
        "error": error,
        "stock_error": stock_error,
        "losses": {"exact": exact_loss, "stock": stock_loss, "luthier": loss},
        "passed": error <= 2 * stock_error and abs(loss - exact_loss) <= 2 * max(abs(stock_loss - exact_loss), 1e-3),
        "layers": f"stock: {'; '.join(said)}" if said else "fused",
        "luthier": speed(model),
        "hf": hf,
        "seconds": seconds,
        "hf_seconds": hf_seconds,
    }


def our_model(directory: str, kind: str):
    import torch

    from luthier import FastLanguageModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tokenizer of four words is repaired
        model, _ = FastLanguageModel.from_pretrained(directory, dtype=torch.bfloat16, **KINDS[kind])
    return model if kind == "full" else FastLanguageModel.get_peft_model(model, r=16)


def gradients(model, inputs: dict) -> tuple[float, dict]:
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


if __name__ == "__main__":
    main()
