"""From an empty process to the second training step of an 8B model: ours beside transformers + peft.

    python bench/cold_start.py --stored bf16,nf4 --peers hf,luthier

A random checkpoint is written to disk in 16 bits, and quantised by bitsandbytes. Each peer reads each of them in a process
of its own: importing, loading in NF4, attaching adapters, the first step with what it compiles, the second. ``--cold``
drops the files from the system's cache before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from gpu import run_worker

STAGES = ("imports", "loading", "adapters", "first step", "second step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape of bench/models.py")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--stored", default="bf16,nf4", help="how the checkpoints are stored, comma separated")
    parser.add_argument("--peers", default="hf,luthier")
    parser.add_argument("--shape", default="2x2048", help="batch x tokens of a step")
    parser.add_argument("--cold", action="store_true", help="read from the disk instead of from the system's cache")
    parser.add_argument("--tiny", action="store_true", help="tiny widths: try the script where there is no GPU")
    parser.add_argument("--directory", type=Path, help="where to put the checkpoints (default: the system's temporary folder)")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "CHECKPOINT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(staged(*arguments.worker, arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        started = time.perf_counter()
        run_worker([*sys.argv[1:], "--worker", "write", directory])
        print(f"checkpoints written in {time.perf_counter() - started:.1f} s")
        print(f"{'':16}" + "".join(f"{stage:>13}" for stage in STAGES) + f"{'load to step':>14}")
        for stored in arguments.stored.split(","):
            for peer in arguments.peers.split(","):
                if arguments.cold:
                    forget(Path(directory, stored))
                row = run_worker([*sys.argv[1:], "--worker", peer, str(Path(directory, stored))])
                print_row(f"{peer}, {stored}", row)


def print_row(name: str, row: dict) -> None:
    if "failed" in row:
        print(f"{name:16} {row['failed']}", flush=True)
        return
    total = sum(row[stage] for stage in ("loading", "adapters", "first step"))
    print(f"{name:16}" + "".join(f"{row[stage]:11.2f} s" for stage in STAGES) + f"{total:12.2f} s", flush=True)


def forget(directory: Path) -> None:
    """Have the system's cache drop the files of a checkpoint."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def staged(peer: str, checkpoint: str, arguments: argparse.Namespace) -> dict:
    """Seconds of each stage of one peer on one checkpoint."""
    if peer == "write":
        return write(Path(checkpoint), arguments)
    marks = [time.perf_counter()]
    import torch

    def mark() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    load, adapt = PEERS[peer]()
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")  # the GPU's context counts with the imports
    mark()
    model = load(checkpoint)
    mark()
    model = adapt(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    mark()
    from step import random_batch, step

    batch, tokens = (1, 16) if arguments.tiny else map(int, arguments.shape.split("x"))
    for index in range(2):
        step(model, optimizer, random_batch(model, batch, tokens, index))
        mark()
    return dict(zip(STAGES, (end - start for start, end in zip(marks, marks[1:], strict=False)), strict=True))


def write(directory: Path, arguments: argparse.Namespace) -> dict:
    from models import TINY, load_stock, write_checkpoint
    from transformers import AutoTokenizer

    sixteen_bits, four_bits = directory / "bf16", directory / "nf4"
    write_checkpoint(str(sixteen_bits), arguments.model, arguments.layers, **(TINY if arguments.tiny else {}))
    if "nf4" in arguments.stored.split(","):
        load_stock(str(sixteen_bits)).save_pretrained(four_bits)
        AutoTokenizer.from_pretrained(sixteen_bits).save_pretrained(four_bits)
    return {}


def transformers_and_peft() -> tuple:
    from models import load_stock
    from peft import LoraConfig, get_peft_model

    def adapt(model):
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return load_stock, adapt


def luthier() -> tuple:
    import torch

    from luthier import FastLanguageModel

    def load(checkpoint: str):
        return FastLanguageModel.from_pretrained(checkpoint, dtype=torch.bfloat16)[0]

    return load, lambda model: FastLanguageModel.get_peft_model(model, r=16)


PEERS = {"hf": transformers_and_peft, "luthier": luthier}


if __name__ == "__main__":
    main()
