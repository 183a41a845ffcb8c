"""``luthier grpo``: from a recipe to an adapter on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny

from luthier.config import GRPORecipe, make_recipe
from luthier.data.chat import get_chat_template
from luthier.data.read import read_dataset
from luthier.fast import FastLanguageModel
from luthier.rl.sampling import SamplingParams
from luthier.training.grpo import GRPOTrainer
from luthier.training.grpo_arguments import GRPOConfig
from luthier.workflows.dry_run import dry_run
from luthier.workflows.grpo import run as run_grpo

QUESTIONS = ["The statement", "An expression list is", "x", "if the name is bound to an object, then", "class", "return"]


@pytest.fixture()
def recipe(tmp_path) -> dict:
    save_tiny("llama3", tmp_path / "base")
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": text[0]} for text in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = "def brief(completions, answer): return [-float(len(messages[0]['content'])) for messages in completions]"
    (tmp_path / "rewards.py").write_text(source)
    return {
        "model": str(tmp_path / "base"),
        "data": str(tmp_path / "rows.jsonl"),
        "output": str(tmp_path / "out"),
        "rewards": [f"{tmp_path}/rewards.py:brief"],
        "max_seq_length": 256,
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "r": 4,
    }


def test_the_workflow_trains_from_a_recipe_and_goes_on_from_its_adapter(tmp_path, recipe):
    written = run_grpo(make_recipe({**recipe, "eval_data": recipe["data"], "eval_steps": 2}, GRPORecipe))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("reward" in entry for entry in log) == 2 and sum("eval_reward" in entry for entry in log) == 1
    adapter = load_file(written["adapter"] / "adapter_model.safetensors")
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in adapter.items())
    assert all(value.dtype == torch.float32 for value in adapter.values())

    again = run_grpo(make_recipe({**recipe, "model": str(written["adapter"]), "output": str(tmp_path / "again")}, GRPORecipe))
    further = load_file(again["adapter"] / "adapter_model.safetensors")
    assert further.keys() == adapter.keys() and any(not torch.equal(further[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"rewards": []}, ValueError, "rewards"),
        ({"rewards": ["nowhere.py:brief"]}, FileNotFoundError, "nowhere.py"),
        ({"data": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
        ({"loss_type": "gpo"}, ValueError, "loss_type"),
        ({"num_generations": 3}, ValueError, "rollout of 8 completions .* not divisible by num_generations=3"),
        ({"data": "bare.jsonl"}, ValueError, "'brief' needs 'answer', but .*bare.jsonl has only the columns prompt"),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_leaves_nothing_behind(tmp_path, recipe, changes, error, said, monkeypatch):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "x"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FastLanguageModel, "from_pretrained", None)  # found before the model is read
    for attempt in (run_grpo, dry_run):
        with pytest.raises(error, match=said):
            attempt(make_recipe({**recipe, **changes}, GRPORecipe))
    assert not (tmp_path / "out").exists()


def test_the_usual_script(tmp_path, recipe):
    """What scripts of this kind do, from loading to asking the trained adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        recipe["model"], max_seq_length=256, load_in_4bit=True, fast_inference=True, max_lora_rank=8, gpu_memory_utilization=0.6
    )
    tokenizer = get_chat_template(tokenizer, "chatml")
    model = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_alpha=16, use_gradient_checkpointing="unsloth"
    )

    def brevity(prompts, completions, answer, **kwargs) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    params = SamplingParams(
        min_p=0.1, top_p=1.0, top_k=-1, seed=3407, stop=[tokenizer.eos_token], include_stop_str_in_output=True
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[brevity],
        args=GRPOConfig(
            vllm_sampling_params=params,
            temperature=1.0,
            learning_rate=1e-3,
            weight_decay=0.01,
            warmup_ratio=0.1,
            lr_scheduler_type="linear",
            optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            num_generations=4,
            max_prompt_length=120,
            max_completion_length=12,
            max_steps=2,
            save_steps=100,
            report_to="none",
            output_dir=str(tmp_path / "script"),
        ),
        train_dataset=read_dataset(recipe["data"]),
    )
    trainer.train()
    model.save_lora(str(tmp_path / "lora"))

    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    as_trained = model.fast_generate([text], sampling_params=greedy)[0].outputs[0].token_ids
    asked = model.fast_generate(text, sampling_params=greedy, lora_request=model.load_lora(str(tmp_path / "lora")))[0].outputs[
        0
    ]
    assert asked.token_ids == as_trained and isinstance(asked.text, str)


def test_a_dry_run_checks_the_recipes_own_settings(tmp_path):
    """Groups of 4 in a batch of 4, which TRL's default of 8 completions a prompt would refuse."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "one", "answer": "1"}\n' * 4)
    recipe = GRPORecipe(
        model=str(save_tiny("llama3", tmp_path / "model")),
        data=str(data),
        output=str(tmp_path / "out"),
        rewards=["luthier.demo.grpo:right_parts"],
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_seq_length=64,
        max_completion_length=16,
    )
    assert dry_run(recipe)["rows"] == 4
