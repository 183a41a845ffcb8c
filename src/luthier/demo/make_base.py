"""Pretrain the demo's base model: ``python -m luthier.demo.make_base OUTPUT``.

A Llama of 7 million parameters reads the standard library's source (``corpus.documents``). About two minutes on one
data-centre GPU. The tokenizer, the seed, the recipe and the loss are written beside the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.demo.corpus import documents, identifiers, renamed

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
VOCABULARY = 4096
RECIPE = {
    "steps": 1500,
    "batch": 64,
    "length": 512,
    "learning_rate": 2e-3,
    "warmup": 100,
    "weight_decay": 0.1,
    "renamed_share": 0.75,  # of the documents in each pass, see corpus.renamed
    "seed": 3407,
}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's split pattern, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[PAD, START, END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="right")


def make_model() -> LlamaForCausalLM:
    """A Llama of 7 million parameters with random weights in fp32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """int32[n]: every document between the start and the end token, one behind the other."""
    encoded = tokenizer([START + text + END for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in encoded for token in row], dtype=torch.int32)


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> Iterator[torch.Tensor]:
    """``steps`` batches int64[batch, length]; each pass over the documents renames a share of them anew."""
    generator, names = random.Random(RECIPE["seed"]), identifiers(texts)
    size, left = RECIPE["batch"] * RECIPE["length"], steps
    while left:
        order = generator.sample(texts, len(texts))
        changed = [renamed(text, names, generator) if generator.random() < RECIPE["renamed_share"] else text for text in order]
        stream = token_stream(tokenizer, changed)
        rows = stream[: len(stream) // size * size].view(-1, RECIPE["length"])
        for batch in rows[torch.randperm(len(rows))].split(RECIPE["batch"])[:left]:
            yield batch.long()
            left -= 1


def pretrain(model: LlamaForCausalLM, data: Iterator[torch.Tensor], steps: int, device: str) -> list[tuple[int, float]]:
    """Train in place on ``data``; returns (step, mean loss since the last entry)."""
    recipe = RECIPE
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=recipe["learning_rate"],
        betas=(0.9, 0.95),
    )
    warmup = recipe["warmup"] / max(steps, 2 * recipe["warmup"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe["learning_rate"], total_steps=steps, pct_start=warmup, final_div_factor=1000
    )
    history, losses = [], []
    for step, ids in enumerate(data, start=1):
        ids = ids.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == steps:
            history.append((step, round(torch.stack(losses).mean().item(), 4)))
            losses.clear()
            print(f"step {step}: loss {history[-1][1]}", flush=True)
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=RECIPE["steps"])
    arguments = parser.parse_args()
    torch.manual_seed(RECIPE["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = documents()
    tokenizer = make_tokenizer(texts)
    model = make_model().to(device)
    started = time.monotonic()
    history = pretrain(model, batches(tokenizer, texts, arguments.steps), arguments.steps, device)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    record = {
        "recipe": RECIPE | {"steps": arguments.steps},
        "corpus": {"python": platform.python_version(), "documents": len(texts), "tokens": len(token_stream(tokenizer, texts))},
        "parameters": model.num_parameters(),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "loss": history,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
