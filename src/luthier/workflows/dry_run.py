"""``--dry-run``: everything that can be wrong with a recipe, its rows and its memory, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.config import GRPORecipe, SFTRecipe, TrainRecipe, VisionRecipe
from luthier.data.prepare import prepare_chat
from luthier.data.read import read_dataset
from luthier.data.vision import without_images
from luthier.gguf import architectures
from luthier.model import memory
from luthier.model.load import DEFAULT_LENGTH
from luthier.model.rope import native_length
from luthier.model.source import find_files, is_vision
from luthier.model.vision import require_vision
from luthier.rl.prompts import check_prompts
from luthier.rl.rewards import load_reward, require_columns, reward_name
from luthier.terminal import table
from luthier.workflows import grpo
from luthier.workflows.common import checked, training_arguments
from luthier.workflows.inspect import config_of, tokenizer_of


def dry_run(recipe: TrainRecipe) -> dict[str, Any]:
    """Check the recipe as the run would; shows and gives the ledger of its rows (SFT) and the estimate of its memory."""
    checked(recipe)
    grpo.arguments(recipe) if isinstance(recipe, GRPORecipe) else training_arguments(recipe)
    rows = read_dataset(recipe.data, recipe.split)
    held_out = read_dataset(recipe.eval_data) if recipe.eval_data else None
    result: dict[str, Any] = {"rows": len(rows), "compute": recipe.compute}
    hub = {"revision": recipe.revision} if recipe.revision else {}
    if Path(recipe.model).is_dir():
        find_files(recipe.model)
    config = config_of(recipe.model, recipe.trust_remote_code, **hub)
    if isinstance(recipe, VisionRecipe):
        require_vision(config, recipe.model)
    elif is_vision(config):
        raise ValueError(f"{recipe.model} is a vision model ({config.model_type}): `luthier vision` trains those")
    if recipe.gguf:
        architectures.find(config)
    length = recipe.max_seq_length or min(DEFAULT_LENGTH, native_length(config) or DEFAULT_LENGTH)

    if isinstance(recipe, SFTRecipe):
        without_images(rows, recipe.data)
        if held_out is not None:
            without_images(held_out, recipe.eval_data)
        tokenizer = tokenizer_of(recipe.model, recipe.chat_template, recipe.system_message, **hub)
        _, ledger = prepare_chat(rows, tokenizer, length, recipe.train_on, recipe.too_long)
        ledger.table(f"Data: {recipe.data}")
        result["ledger"] = ledger.to_dict()
    if isinstance(recipe, GRPORecipe):
        recipe.require("rewards")
        check_prompts(rows)
        rewards = [load_reward(reference) for reference in recipe.rewards]
        require_columns(rewards, rows.column_names, recipe.data)
        result["rewards"] = [reward_name(reward) for reward in rewards]

    estimate = memory.estimate(
        config,
        precision=_precision(recipe),
        r=recipe.r,
        target_modules=recipe.target_modules,
        modules_to_save=recipe.modules_to_save,
        batch_tokens=length * recipe.per_device_train_batch_size,
        use_gradient_checkpointing=recipe.checkpointing(),
        memory_budget=recipe.memory_budget,
        optim=recipe.optim,
        compute=recipe.compute,
    )
    table("Memory on the device", ("what", "size"), estimate.rows())
    result["memory"] = estimate.to_dict()
    return result


def _precision(recipe: TrainRecipe) -> str:
    chosen = {"full": recipe.full_finetuning, "16bit": recipe.load_in_16bit, "int8": recipe.load_in_8bit}
    return next((name for name, on in chosen.items() if on), "nf4")
