"""GRPO with reward functions, from a recipe to what is saved. Read it top to bottom."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from luthier.config import GRPORecipe
from luthier.data.read import read_dataset
from luthier.fast import FastLanguageModel
from luthier.files import atomic_file
from luthier.rl.prompts import check_prompts
from luthier.rl.rewards import load_reward, require_columns
from luthier.terminal import table
from luthier.training.grpo import GRPOTrainer, reward_change
from luthier.training.grpo_arguments import GRPOConfig
from luthier.workflows.common import checked, save_outputs, training_arguments
from luthier.workflows.templates import with_template

LOG = "trainer_state.json"


def run(recipe: GRPORecipe) -> dict[str, Path]:
    """Train as the recipe says; gives what was written, by kind ("adapter", "merged_16bit", "q8_0" ...)."""
    recipe.require("model", "data", "rewards")
    resume = checked(recipe)

    # 1. Rewards and prompts: read before the model, so that a mistake in them costs a second and not a download
    rewards = [load_reward(reference) for reference in recipe.rewards]
    prompts = read_dataset(recipe.data, recipe.split)
    check_prompts(prompts)
    require_columns(rewards, prompts.column_names, recipe.data)
    held_out = read_dataset(recipe.eval_data) if recipe.eval_data else None
    args = arguments(recipe)

    # 2. The model, quantised as it is read, and its tokenizer
    model, tokenizer = FastLanguageModel.from_pretrained(recipe.model, **recipe.loading())

    # 3. The chat template: the tokenizer's own unless another is asked for
    tokenizer = with_template(tokenizer, recipe.chat_template)

    # 4. The adapter: a new one, unless the model came with one that goes on
    if not recipe.full_finetuning and not isinstance(model, PeftModel):
        model = FastLanguageModel.get_peft_model(model, **recipe.adapter())

    # 5. Training: groups of completions are sampled, rewarded, and compared with each other
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=rewards,
        train_dataset=prompts,
        eval_dataset=held_out,
        args=args,
    )
    trainer.train(resume_from_checkpoint=resume)

    # 6. What became of the rewards, step by step in the log
    with atomic_file(Path(recipe.output) / LOG) as path:
        trainer.state.save_to_json(path)
    changes = reward_change(trainer.state.log_history)
    rows = [(name, f"{first:.3f}", f"{last:.3f}") for name, (first, last) in changes.items()]
    table("Mean rewards", ("", "first fifth of the steps", "last fifth"), rows)

    # 7. What was trained: the adapter always, merged weights and GGUF as asked
    return save_outputs(model, tokenizer, recipe)


def arguments(recipe: GRPORecipe) -> GRPOConfig:
    """The recipe's run as arguments of the trainer."""
    names = (
        "reward_weights", "reward_timeout", "num_generations", "max_prompt_length", "max_completion_length", "temperature",
        "top_p", "top_k", "beta", "loss_type", "epsilon", "epsilon_high", "mask_truncated_completions", "rollout",
    )  # fmt: skip
    settings = {name: getattr(recipe, name) for name in names}
    # An evaluation takes whole groups, too: one group a batch, whatever the batch is.
    return training_arguments(recipe, GRPOConfig, num_generations_eval=recipe.per_device_train_batch_size, **settings)
