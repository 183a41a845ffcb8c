"""Loss curves of 8-bit compute on a model that has learnt something, unlike the random ones that bench/step.py times.

    python bench/fp8_curves.py [--pretraining 500] [--steps 300] [--embedded]

A Llama of 27 million parameters reads the standard library's source, is quantised to NF4, and learns the demo's task
through LoRA once for each ``compute``: the same rows in the same order. Beside them stands a bf16 run whose embeddings
are off by one bf16 rounding in every step: curves that differ no more than that one's are the same. ``--embedded`` takes
the demo's base of 7 million parameters instead, and needs no GPU: a CPU emulates 8 bits with the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu import require_gpu
from models import in_nf4, with_lora
from step import nudged_embeddings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.demo import make_base
from luthier.demo.corpus import chat_rows, documents
from luthier.model.accelerate import accelerate
from luthier.model.compute import set_compute

CONFIG = {**make_base.make_model().config.to_dict(), "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
RUNS = {"bf16": "bf16", "one ulp": "bf16", "fp8-backward": "fp8-backward", "fp8": "fp8"}
ROWS, LEARNING_RATE, EVERY = 32, 1e-3, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=500, help="steps on source code, 32,768 tokens each")
    parser.add_argument("--steps", type=int, default=300, help="steps of fine-tuning, 32 rows each")
    parser.add_argument("--embedded", action="store_true", help="the demo's own base")
    parser.add_argument("--out", type=Path, help="JSON file with the curves")
    arguments = parser.parse_args()
    if not arguments.embedded:
        require_gpu()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    directory = Path(make_base.__file__).parent / "base"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    if arguments.embedded:
        model, history = LlamaForCausalLM.from_pretrained(directory).to(device), []
    else:
        started, model = time.perf_counter(), LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device)
        history = make_base.pretrain(model, windows(tokenizer, arguments.pretraining), arguments.pretraining, device)
        print(f"source code {history[-1]}, {time.perf_counter() - started:.0f} s")
    print(f"{model.num_parameters() / 1e6:.0f} M parameters")
    base = in_nf4(model.to(torch.bfloat16))
    rows, held_out = (encoded(tokenizer, chat_rows(held, limit=2000 if not held else 300)) for held in (False, True))
    print(f"loss every {EVERY} steps (their mean)")
    curves = {}
    for name in RUNS:
        curves[name] = tuned(base, name, rows, held_out, arguments.steps, device)
        show(name, curves[name])
    if arguments.out:
        arguments.out.write_text(json.dumps({"pretraining": history, "curves": curves}, indent=1) + "\n")


def windows(tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[torch.Tensor]:
    """Random windows of the corpus, int64[64, 512]."""
    stream = make_base.token_stream(tokenizer, documents())
    length, at = make_base.RECIPE["length"], torch.arange(make_base.RECIPE["length"])
    for _ in range(steps):
        starts = torch.randint(len(stream) - length, (make_base.RECIPE["batch"], 1))
        yield stream[starts + at].long()


def encoded(tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each chat row; the answer trains."""
    result = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        asked = tokenizer(f"{make_base.START}{question}{make_base.END}{make_base.START}").input_ids
        said = tokenizer(f"{answer}{make_base.END}").input_ids
        result.append((asked + said, [-100] * len(asked) + said))
    return result


def tuned(base: torch.nn.Module, name: str, rows: list, held_out: list, steps: int, device: str) -> dict:
    """The training loss every ``EVERY`` steps (mean of those steps) and the held-out loss, which is computed exactly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in 8 bits")
        model = set_compute(accelerate(with_lora(copy.deepcopy(base))), RUNS[name]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    order = torch.randint(len(rows), (steps, ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for chosen in order:
        if name == "one ulp":
            with nudged_embeddings(model):
                loss = model(**padded([rows[index] for index in chosen], device)).loss
        else:
            loss = model(**padded([rows[index] for index in chosen], device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    curve = [round(statistics.mean(losses[start : start + EVERY]), 4) for start in range(0, steps, EVERY)]
    with torch.no_grad():
        model.eval()
        parts = [model(**padded(held_out[start : start + 50], device)).loss.item() for start in range(0, len(held_out), 50)]
    return {"training": curve, "held out": round(statistics.mean(parts), 4)}


def padded(rows: list[tuple[list[int], list[int]]], device: str) -> dict[str, torch.Tensor]:
    """Padded on the right: no real token sees it, so there is no mask."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device)
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows], device=device)
    return {"input_ids": ids, "labels": labels}


def show(name: str, curve: dict) -> None:
    losses = "".join(f"{loss:8.4f}" for loss in curve["training"])
    print(f"{name:13}{losses}   held out {curve['held out']:.4f}", flush=True)


if __name__ == "__main__":
    main()
