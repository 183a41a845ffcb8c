"""QLoRA fine-tuning on chat rows, from a recipe to what is saved. Read it top to bottom."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from luthier.config import SFTRecipe
from luthier.data.read import read_dataset
from luthier.data.vision import without_images
from luthier.fast import FastLanguageModel
from luthier.training.trainer import Trainer
from luthier.workflows.common import checked, save_outputs, training_arguments
from luthier.workflows.templates import with_template


def run(recipe: SFTRecipe) -> dict[str, Path]:
    """Fine-tune as the recipe says; gives what was written, by kind ("adapter", "merged_16bit", "q8_0" ...)."""
    resume = checked(recipe)

    # 1. Rows: read before the model, so that a mistake in them costs a second and not a download
    rows = without_images(read_dataset(recipe.data, recipe.split), recipe.data)
    held_out = without_images(read_dataset(recipe.eval_data), recipe.eval_data) if recipe.eval_data else None

    # 2. The model, quantised as it is read, and its tokenizer
    model, tokenizer = FastLanguageModel.from_pretrained(recipe.model, **recipe.loading())

    # 3. The chat template: the tokenizer's own unless another is asked for
    tokenizer = with_template(tokenizer, recipe.chat_template, recipe.system_message)

    # 4. The adapter, everything else stays frozen; unless the model came with one that goes on
    if not recipe.full_finetuning and not isinstance(model, PeftModel):
        model = FastLanguageModel.get_peft_model(model, **recipe.adapter())

    # 5. Training: rows become tokens and labels, are counted, and train
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=held_out,
        args=training_arguments(recipe, train_on=recipe.train_on, too_long=recipe.too_long, packing=recipe.packing),
    )
    trainer.train(resume_from_checkpoint=resume)

    # 6. What was trained: the adapter always, merged weights and GGUF as asked
    return save_outputs(model, tokenizer, recipe)
