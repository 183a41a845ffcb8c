"""What the training workflows share: the trainer's arguments from a recipe, resuming, and what is saved at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from luthier.config import TrainRecipe
from luthier.data.chat import find_template
from luthier.errors import UnsupportedError
from luthier.files import atomic_file, require_writable
from luthier.gguf.convert import output_paths
from luthier.model.compute import require_compute
from luthier.terminal import is_first_process
from luthier.training.arguments import SharedArguments, TrainingArguments
from luthier.training.checkpoints import find_checkpoint


def training_arguments(
    recipe: TrainRecipe, kind: type[SharedArguments] = TrainingArguments, **settings: Any
) -> SharedArguments:
    """The recipe's run as arguments of a trainer; ``settings`` are those of one workflow alone."""
    evaluates = recipe.eval_data is not None
    by_steps = recipe.eval_steps is not None
    checkpoints = recipe.save_steps is not None or recipe.early_stopping_patience is not None
    return kind(
        output_dir=recipe.output,
        learning_rate=recipe.learning_rate,
        embedding_learning_rate=recipe.embedding_learning_rate,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        num_train_epochs=recipe.num_train_epochs,
        max_steps=recipe.max_steps,
        warmup_ratio=recipe.warmup_ratio,
        lr_scheduler_type=recipe.lr_scheduler_type,
        optim=recipe.optim,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.logging_steps,
        eval_strategy=("steps" if by_steps else "epoch") if evaluates else "no",
        eval_steps=recipe.eval_steps,
        save_strategy=("steps" if recipe.save_steps or by_steps else "epoch") if checkpoints else "no",
        save_steps=recipe.save_steps or recipe.eval_steps or 500,
        early_stopping_patience=recipe.early_stopping_patience,
        report_to=recipe.report_to,
        seed=recipe.seed,
        **settings,
    )


def checked(recipe: TrainRecipe) -> str | None:
    """Raise for what can be known to be wrong before rows and model are read -> the checkpoint to resume from, if any."""
    recipe.require("model", "data")
    if any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise UnsupportedError(
            "A recipe trains data parallel, every GPU with the whole model: torchrun --nproc-per-node=N -m luthier sft ... "
            "To shard it with FSDP or DeepSpeed, write a script around luthier.Trainer."
        )
    require_writable(recipe.output)
    require_compute(recipe.compute, recipe.full_finetuning)
    template = getattr(recipe, "chat_template", None)  # a vision model's processor brings its own
    if template is not None:
        find_template(template)
    if recipe.gguf:
        output_paths(recipe.output, "model", recipe.gguf)
    if recipe.resume is None:
        return None
    return str(find_checkpoint(True if recipe.resume == "latest" else recipe.resume, recipe.output))


def save_outputs(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, recipe: TrainRecipe
) -> dict[str, Path]:
    """Save what the recipe asks for below its output directory, in the first process; gives the paths by kind."""
    if torch.distributed.is_initialized():  # nobody waits for the first process, which may write for long
        torch.distributed.destroy_process_group()
    if not is_first_process():
        return {}
    output = Path(recipe.output)
    written: dict[str, Path] = {}
    if isinstance(model, PeftModel):
        written["adapter"] = Path(model.save_pretrained_merged(output / "adapter", tokenizer, save_method="lora"))
    method = recipe.save_method or (None if isinstance(model, PeftModel) else "merged_16bit")
    if method in ("merged_16bit", "merged_4bit"):
        written[method] = Path(model.save_pretrained_merged(output / method, tokenizer, save_method=method, base=recipe.base))
    if recipe.gguf:
        place = output / "gguf" / Path(model.luthier.base_name).name  # the files are named after their directory
        files = model.save_pretrained_gguf(place, tokenizer, quantization_method=recipe.gguf, base=recipe.base)
        written |= {path.stem.rsplit("-", 1)[-1].lower(): path for path in files}
    with atomic_file(output / "written.json") as path:
        path.write_text(json.dumps({kind: str(place) for kind, place in written.items()}, indent=1) + "\n")
    return written
