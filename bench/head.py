"""A step as trainers take it, ``model(..., labels, fused_lm_head=True)``: TRL's own answer beside ours.

    python bench/head.py [--shapes llama-8b:2x2048,llama-3.2-1b:8x2048]

First the log-probabilities and the adapters' gradients, which differ by rounding; then tokens per second and peak memory, of
whole rows and of rows of which every second is padded on the right by a third.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from gpu import require_gpu
from models import random_model, with_lora
from step import error
from trl.trainer.utils import add_fused_lm_head

from luthier.model.accelerate import accelerate, base_model
from luthier.training.head import own_head

FIELDS = ("log_probs", "entropy", "is_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-8b:2x2048,llama-3.2-1b:8x2048", help="models of bench/models.py, batches")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    require_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for entry in arguments.shapes.split(","):
        name, _, shape = entry.partition(":")
        batch, tokens = map(int, shape.split("x"))
        model = accelerate(with_lora(random_model(name))).train()
        base, stock = base_model(model), base_model(model).forward
        whole, padded = (rows(model, batch, tokens, cut) for cut in (0, tokens // 3))
        found = {}
        for answer in ("TRL", "ours"):
            base.forward = stock
            add_fused_lm_head(base, outputs=FIELDS)
            if answer == "ours":
                with own_head(model):
                    pass
            scores, gradients = scored(model, whole)
            speeds = [
                f"{label} {timed(model, inputs, arguments.steps)}" for label, inputs in (("whole", whole), ("padded", padded))
            ]
            found[answer] = scores, gradients
            print(f"{name} {shape} {answer:5} " + " | ".join(speeds), flush=True)
        (theirs, wanted), (ours, gradients) = found["TRL"], found["ours"]
        print(f"   log-probabilities differ by {(ours - theirs).abs().max():.1e}, gradients by {error(gradients, wanted):.2%}")
        del model, base, stock, found, theirs, wanted, ours, gradients
        torch.cuda.empty_cache()


def rows(model, batch: int, tokens: int, cut: int) -> dict:
    """Random tokens; of every second row the last ``cut`` are padding."""
    ids = torch.randint(
        model.config.vocab_size, (batch, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    mask = torch.ones_like(ids)
    if cut:
        mask[1::2, -cut:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    scores = model(**inputs, fused_lm_head=True)
    return -scores.log_probs.sum() / scores.label_mask.sum(), scores.log_probs


def scored(model, inputs: dict) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss, log_probs = loss_of(model, inputs)
    loss.backward()
    return log_probs.detach(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def timed(model, inputs: dict, steps: int) -> str:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    seconds = []
    for number in range(steps + 4):
        if number == 4:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss_of(model, inputs)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    speed = inputs["input_ids"].numel() / statistics.median(seconds[4:])
    return f"{speed:.0f} tok/s {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
