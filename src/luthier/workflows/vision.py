"""Fine-tuning of a vision-language model, from a recipe to what is saved. Read it top to bottom."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from luthier.config import VisionRecipe
from luthier.data.images import image_root
from luthier.data.read import read_dataset
from luthier.data.vision import ROOT_COLUMN, VisionDataCollator
from luthier.fast import FastVisionModel
from luthier.training.trainer import Trainer
from luthier.workflows.common import checked, save_outputs, training_arguments


def run(recipe: VisionRecipe) -> dict[str, Path]:
    """Fine-tune as the recipe says; gives what was written, by kind ("adapter", "merged_16bit" ...)."""
    resume = checked(recipe)

    # 1. Rows: read before the model, so that a mistake in them costs a second and not a download
    rows = read_dataset(recipe.data, recipe.split)
    held_out = None
    if recipe.eval_data:
        held_out, root = read_dataset(recipe.eval_data), image_root(recipe.eval_data) or ""
        held_out = held_out.add_column(ROOT_COLUMN, [str(root)] * len(held_out))  # the collator's is that of the training rows

    # 2. The model, its language part quantised as it is read, and its processor
    model, processor = FastVisionModel.from_pretrained(recipe.model, **recipe.loading())

    # 3. The adapter, in the parts of the model that are to learn, unless the model came with one that goes on
    if not recipe.full_finetuning and not isinstance(model, PeftModel):
        model = FastVisionModel.get_peft_model(
            model,
            **recipe.adapter(),
            finetune_vision_layers=recipe.finetune_vision_layers,
            finetune_language_layers=recipe.finetune_language_layers,
            finetune_attention_modules=recipe.finetune_attention_modules,
            finetune_mlp_modules=recipe.finetune_mlp_modules,
        )

    # 4. Pictures become patches batch by batch; a row whose pictures do not fit is left out beforehand, and counted
    collator = VisionDataCollator(
        model,
        processor,
        resize=recipe.resize,
        train_on_responses_only=recipe.train_on == "responses",
        completion_only_loss=recipe.train_on == "responses",
        too_long=recipe.too_long,
        image_root=image_root(recipe.data),
    )
    rows, ledger = collator.select(rows)
    ledger.table()
    if held_out is not None:
        held_out, ledger = collator.select(held_out)
        ledger.table("Evaluation data")

    # 5. Training
    trainer = Trainer(
        model=model,
        processing_class=processor,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=held_out,
        args=training_arguments(recipe),
    )
    trainer.train(resume_from_checkpoint=resume)

    # 6. What was trained: the adapter always, merged weights as asked
    return save_outputs(model, processor, recipe)
