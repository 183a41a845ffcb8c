"""Short training runs of tiny models, for the tests of the training layer."""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCAB, tiny_model, tiny_tokenizer
from transformers import BitsAndBytesConfig, PreTrainedModel

from luthier.training.arguments import TrainingArguments
from luthier.training.trainer import Trainer

OWN = ("eval_dataset", "compute_metrics", "callbacks", "optimizers", "peft_config")  # arguments of the trainer itself


def token_rows(count: int, seed: int = 0, longest: int = 40) -> Dataset:
    """Rows of random tokens whose lengths, and shares of trained tokens, differ much."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [chance.randrange(5, 448) for _ in range(chance.randint(4, longest))]
        start = chance.randrange(1, len(ids))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Dataset.from_list(rows)


def with_lora(model: PreTrainedModel, seed: int = 0, **changes) -> PeftModel:
    """A LoRA of rank 4 on every linear layer, with random numbers in B too, so that all of it has a gradient."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        return get_peft_model(model, LoraConfig(**settings | changes))


def nf4_model(directory: Path) -> PreTrainedModel:
    """A tiny saved model, loaded in NF4 with double quantisation by transformers alone."""
    from transformers import AutoModelForCausalLM

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map="cpu")


def arguments(directory: Path, **changes) -> TrainingArguments:
    """Four steps of two rows, a log each step, nothing saved."""
    settings = {
        "output_dir": str(directory),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(**settings | changes)


def trainer(model: PreTrainedModel | PeftModel, directory: Path, rows: Dataset | None = None, **changes) -> Trainer:
    """A trainer over token rows; ``changes`` go to the arguments, or to the trainer if it knows them."""
    own = {name: changes.pop(name) for name in OWN if name in changes}
    args = changes.pop("args", None) or arguments(directory, **changes)
    return Trainer(model=model, args=args, train_dataset=rows or token_rows(16), processing_class=tiny_tokenizer(), **own)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


__all__ = ["VOCAB", "arguments", "losses", "nf4_model", "tiny_model", "token_rows", "trainer", "with_lora"]
