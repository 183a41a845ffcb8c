"""GRPOTrainer: TRL's numbers, our checks, and rollouts that sample what they say."""

from __future__ import annotations

import asyncio
import copy
import math
from unittest import mock

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from luthier.errors import UnsupportedError
from luthier.fast import FastLanguageModel
from luthier.model.accelerate import accelerate
from luthier.ops import token_logprobs as op
from luthier.rl.rewards import RewardError, RewardTimeout
from luthier.rl.sampling import SamplingParams
from luthier.training.grpo import GRPOTrainer, reward_change
from luthier.training.grpo_arguments import GRPOConfig

PROMPTS = ["The statement", "An expression list is", "x", "if the name is bound to an object, then", "class", "return"]


def adapted(model, **config):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **config))


def settings(tmp_path, **changes) -> dict:
    usual = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 11,
    }
    return {**usual, **changes}


def text_rows(**columns) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def shorter(completions, **columns):
    return [-float(len(text)) for text in completions]


def trainer(tmp_path, rewards=shorter, model=None, rows=None, tokenizer=None, **changes) -> GRPOTrainer:
    return GRPOTrainer(
        model=model if model is not None else adapted(tiny_model("qwen2")),
        tokenizer=tokenizer or tiny_tokenizer(chat=False),
        reward_funcs=rewards,
        args=GRPOConfig(**settings(tmp_path, **changes)),
        train_dataset=rows if rows is not None else text_rows(),
    )


def logged(run, *names) -> list[dict]:
    return [{name: entry[name] for name in names if name in entry} for entry in run.state.log_history if "loss" in entry]


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "epsilon_high": 0.3},
        {"loss_type": "gspo", "steps_per_generation": 3, "gradient_accumulation_steps": 2},
        {"loss_type": "sapo", "mask_truncated_completions": True},
    ],
    ids=lambda changes: changes["loss_type"],
)
def test_the_run_is_trls_run_number_for_number(tmp_path, changes):
    runs = []
    for kind in (trl, None):
        model = adapted(tiny_model("qwen2"))
        arguments = settings(tmp_path, **changes)
        if kind is trl:
            name = arguments["loss_type"]
            level = {"loss_type": "grpo", "importance_sampling_level": "sequence"} if name == "gspo" else {}
            args = trl.GRPOConfig(
                **{**arguments, **level}, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False
            )
            run = trl.GRPOTrainer(model, shorter, args, text_rows(), processing_class=tiny_tokenizer(chat=False))
        else:
            run = trainer(tmp_path, model=model, **changes)
        run.train()
        weights = {name: value for name, value in model.named_parameters() if ".default." in name}
        runs.append(
            (logged(run, "loss", "reward", "reward_std", "kl", "entropy", "grad_norm"), weights, run._logs["advantages"])
        )
    (ours, our_weights, our_advantages), (theirs, their_weights, their_advantages) = runs[1], runs[0]
    assert len(ours) == 3 and any(entry["grad_norm"] > 0 for entry in ours)
    assert ours == theirs
    assert our_advantages == their_advantages
    assert all(torch.equal(our_weights[name], their_weights[name]) for name in their_weights)


@pytest.mark.parametrize(
    ("changes", "ours"), [({}, True), ({"entropy_coef": 0.1}, False), ({"cast_lm_head_to_fp32": True}, False)], ids=str
)
def test_tokens_are_scored_by_our_op_unless_their_entropy_trains(tmp_path, changes, ours):
    with mock.patch.object(op._TokenLogprobs, "apply", side_effect=op._TokenLogprobs.apply) as called:
        trainer(tmp_path, model=accelerate(adapted(tiny_model("qwen2"))), max_steps=1, **changes).train()
    assert called.called == ours


def test_an_accelerated_model_gives_the_stock_models_numbers(tmp_path):
    runs = []
    for prepare in (accelerate, lambda model: model):
        run = trainer(tmp_path, model=prepare(adapted(tiny_model("llama3"))), beta=0.1)
        run.train()
        names = ("loss", "reward", "reward_std", "kl", "entropy", "grad_norm")
        runs.append([torch.tensor([entry[name] for name in names]) for entry in logged(run, *names)])
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo"])
def test_every_loss_trains(tmp_path, loss_type):
    model = adapted(tiny_model("llama3"))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    run = trainer(tmp_path, model=model, loss_type=loss_type, max_steps=2)
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in logged(run, "loss"))
    moved = [name for name, value in model.named_parameters() if name in before and not torch.equal(value, before[name])]
    assert len(moved) == len(before)


def test_dr_grpo_does_not_divide_advantages(tmp_path):
    scored = trainer(
        tmp_path, lambda completions: [float(row % 4) for row in range(len(completions))], loss_type="dr_grpo", max_steps=1
    )
    scored.train()
    assert sorted(set(scored._logs["advantages"])) == [-1.5, -0.5, 0.5, 1.5]


def test_the_reward_rises(tmp_path):
    """The share of tokens from the lower half of the vocabulary: about a half by chance, soon nearly all."""

    def low(completion_ids, **columns):
        return [sum(token < 224 for token in ids) / len(ids) for ids in completion_ids]

    model = tiny_model("qwen2").requires_grad_(True)
    run = trainer(tmp_path, low, model=model, max_steps=60, learning_rate=3e-3, lr_scheduler_type="constant")
    run.train()
    for first, last in reward_change(run.state.log_history).values():
        assert last > first + 0.15


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_sync_and_async_with_weights_columns_and_none(tmp_path):
    seen = []

    def right(completions, answer):
        seen.append(answer)
        return [1.0 if wanted == "A" else None for wanted in answer]

    async def judged(prompts, completions, completion_ids, **columns):
        await asyncio.sleep(0.01)
        assert {"answer", "trainer_state"} <= columns.keys()
        return [0.25] * len(prompts)

    run = trainer(tmp_path, [right, judged], rows=text_rows(answer=list("AABBAB")), reward_weights=[2.0, 4.0], max_steps=3)
    run.train()
    assert all(len(answers) == 8 for answers in seen)
    for entry, answers in zip(logged(run, "reward", "rewards/right/mean", "rewards/judged/mean"), seen, strict=True):
        share = answers.count("A") / 8
        assert entry["reward"] == pytest.approx(2.0 * share + 4.0 * 0.25)
        assert entry["rewards/judged/mean"] == 0.25
        assert entry["rewards/right/mean"] == (1.0 if share else None)


def test_a_step_to_which_no_reward_applies_learns_nothing(tmp_path, capsys):
    model = adapted(tiny_model("qwen2"))
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, lambda completions: [None] * len(completions), model=model, max_steps=1)
    run.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "step 1/1 · loss 0.0000 · " in capsys.readouterr().err


@pytest.mark.parametrize("masked", [True, False])
def test_a_run_whose_completions_are_all_cut_and_masked_says_so(tmp_path, recwarn, masked):
    trainer(tmp_path, mask_truncated_completions=masked, max_completion_length=1, max_steps=2).train()
    said = [str(warning.message) for warning in recwarn]
    assert sum("every completion was cut at max_completion_length=1," in text for text in said) == masked


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_bad_reward_stops_the_run_by_name_before_anything_is_learned(tmp_path, kind):
    def wrong(completions, **columns):
        return [0.0] * (len(completions) - 1) + [float("nan")]

    async def wrong_async(completions, **columns):
        return wrong(completions)

    model = adapted(tiny_model("qwen2"))
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, [shorter, wrong if kind == "sync" else wrong_async], model=model)
    with pytest.raises(RewardError, match="'wrong.*nan at row 7 of 8.*prompt.*completion"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_timeout_of_the_arguments_reaches_the_reward(tmp_path, kind):
    import time

    def slow(completions):
        time.sleep(20)

    async def slow_async(completions):
        await asyncio.sleep(20)

    run = trainer(tmp_path, slow if kind == "sync" else slow_async, reward_timeout=0.2)
    with pytest.raises(RewardTimeout, match="slow"):
        run.train()


def test_a_column_that_a_reward_needs_is_missed_before_work(tmp_path):
    def right(completions, answer): ...

    with pytest.raises(ValueError, match="'right' needs 'answer'.*columns prompt, question"):
        trainer(tmp_path, right, rows=text_rows(question=PROMPTS))


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"question": ["a"]}, "no column 'prompt', only question"),
        ({"prompt": []}, "no rows"),
        ({"prompt": ["a", ""]}, "Row 1 has the prompt ''"),
        (
            {"prompt": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]},
            "Row 0.*ends with the assistant",
        ),
        ({"prompt": [[]]}, "Row 0 has the prompt"),
        ({"prompt": [3]}, "Row 0 has the prompt 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dataset_that_cannot_be_used(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, rows=Dataset.from_dict(rows), tokenizer=tiny_tokenizer(chat=True))


def test_long_prompts_are_dropped_and_counted(tmp_path):
    rows = Dataset.from_dict({"prompt": [*PROMPTS, "word " * 200]})
    run = trainer(tmp_path, rows=rows, max_prompt_length=40)
    assert (run.ledger.rows_in, run.ledger.kept, run.ledger.dropped) == (7, 6, 1)
    assert run.ledger.longest > 200 and len(run.train_dataset) == 6
    with pytest.raises(ValueError, match="1 of 7 prompts are longer than 40.*row 6"):
        trainer(tmp_path, rows=rows, max_prompt_length=40, too_long="raise")
    with pytest.raises(ValueError, match="none is left"):
        trainer(tmp_path, rows=rows.select([3, 6]), max_prompt_length=1)
    with pytest.raises(ValueError, match="takes 4 prompts.*only 3"):
        trainer(tmp_path, rows=text_rows().select(range(3)), gradient_accumulation_steps=2)


def test_long_prompts_are_cut_only_when_asked(tmp_path):
    run = trainer(
        tmp_path, rows=Dataset.from_dict({"prompt": ["word " * 200 + "end"] * 8}), max_prompt_length=20, too_long="truncate"
    )
    ids, _, _ = run._tokenize_prompts(run.train_dataset["prompt"][:1])
    assert len(ids[0]) == 20 and run.processing_class.decode(ids[0]).endswith("end")
    assert run.ledger.truncated == run.ledger.kept == 8


def test_prompt_and_completion_must_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length=500 and max_completion_length=100 exceed the model's 512"):
        trainer(tmp_path, max_prompt_length=500, max_completion_length=100)
    with pytest.raises(ValueError, match="max_completion_length=512 leaves no room"):
        trainer(tmp_path, max_completion_length=512)


def test_a_rendered_prompt_gets_no_second_bos(tmp_path):
    tokenizer = tiny_tokenizer(chat=True, bos=True)
    run = trainer(tmp_path, tokenizer=tokenizer, rows=Dataset.from_dict({"prompt": [tokenizer.bos_token + "hello"] * 8}))
    assert run._tokenize_prompts([tokenizer.bos_token + "hello"])[0][0].count(tokenizer.bos_token_id) == 1


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_conversations_end_at_the_templates_stop_token(tmp_path):
    model = tiny_model("qwen2")
    tokenizer = tiny_tokenizer(chat=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.lm_head.weight[stop] += (
            0.6 * model.lm_head.weight.std() * torch.randn(64, generator=torch.Generator().manual_seed(1)).sign()
        )
    seen = []

    def watch(completion_ids, completions, **columns):
        seen.extend(completion_ids)
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [0.0] * len(completion_ids)

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    run = trainer(tmp_path, watch, model=adapted(model), tokenizer=tokenizer, rows=rows, max_completion_length=120, max_steps=2)
    assert {stop, tokenizer.eos_token_id} <= set(run.eos_token_ids)
    run.train()
    assert any(ids[-1] == stop for ids in seen)
    assert all(stop not in ids[:-1] for ids in seen)


def test_rollouts_ignore_the_checkpoints_sampling_and_the_adapters_dropout(tmp_path):
    def sampled(dropout: float, **leaking):
        model = tiny_model("qwen2")
        for name, value in leaking.items():
            setattr(model.generation_config, name, value)
        run = trainer(tmp_path, model=adapted(model, lora_dropout=dropout, init_lora_weights=False))
        run.model.train()
        torch.manual_seed(0)
        ids, _ = run._generate_single_turn([[5, 6, 7], [8]] * 4, None, {}, 4)
        assert run.model.training and all(getattr(model.generation_config, name) == value for name, value in leaking.items())
        return ids

    assert sampled(0.0) == sampled(0.9) == sampled(0.0, min_p=1.0, no_repeat_ngram_size=1, typical_p=0.1)


def test_the_sampling_of_the_arguments_is_honoured(tmp_path):
    run = trainer(tmp_path, top_k=1, temperature=3.0)
    ids, _ = run._generate_single_turn([[5, 6, 7]] * 4, None, {}, 4)
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_vllms_sampling_parameters_are_taken_over(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    params = SamplingParams(min_p=0.1, top_k=-1, top_p=0.9, seed=3, stop=[tokenizer.eos_token], include_stop_str_in_output=True)
    run = trainer(tmp_path, vllm_sampling_params=params, tokenizer=tokenizer, seed=3)
    assert (run.args.min_p, run.args.top_p, run.args.top_k, run.args.seed) == (0.1, 0.9, 0, 3)
    with pytest.raises(ValueError, match="top_p=0.5 contradicts vllm_sampling_params"):
        GRPOConfig(**settings(tmp_path, vllm_sampling_params=params, seed=3, top_p=0.5))
    with pytest.raises(UnsupportedError, match="presence_penalty=1.0"):
        GRPOConfig(**settings(tmp_path, vllm_sampling_params=SamplingParams(presence_penalty=1.0)))
    with pytest.raises(UnsupportedError, match="'###'"):
        trainer(tmp_path, vllm_sampling_params=SamplingParams(stop="###"))


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_plan_for_recomputation_survives_rollouts(tmp_path):
    model = adapted(tiny_model("qwen2"))
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    before = [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in base.model.layers]
    assert [is_on for is_on, _ in before] == [True, False]
    trainer(tmp_path, model=model, beta=0.1).train()
    assert [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in base.model.layers] == before


def nf4(tmp_path):
    save_tiny("qwen2", tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)


def test_nf4_gradients_are_right_after_rollouts(tmp_path):
    """bitsandbytes repacks a 4-bit weight in its first eval forward on some CPUs, and then gradients are wrong."""

    def gradients(model):
        model.train()
        model.zero_grad()
        ids = torch.arange(40).reshape(2, 20)
        model(input_ids=ids, labels=ids).loss.backward()
        return {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None and "default" in name
        }

    fresh = gradients(adapted(nf4(tmp_path), init_lora_weights=False))
    model = adapted(nf4(tmp_path), init_lora_weights=False)
    run = trainer(tmp_path, model=model, learning_rate=0.0)
    run.train()
    after = gradients(model)
    assert fresh.keys() == after.keys() and len(fresh) > 0
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)


def test_adapters_of_a_quantised_model_stay_in_fp32_the_reference_included(tmp_path):
    model = adapted(nf4(tmp_path), init_lora_weights=False)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    run = trainer(tmp_path, model=model, beta=0.1, max_steps=2)
    parameters = dict(model.named_parameters())
    assert all(parameters[name].dtype == torch.float32 and torch.equal(parameters[name], before[name]) for name in before)
    run.train()
    parameters = dict(model.named_parameters())
    references = {name: name.replace(".default.", ".ref.") for name in before}
    assert all(torch.equal(parameters[reference], before[name]) for name, reference in references.items())
    assert not any(parameters[reference].requires_grad for reference in references.values())
    assert all(entry["kl"] >= 0 for entry in logged(run, "kl"))


@pytest.mark.parametrize(
    "step, changes",
    [
        (2, {}),
        (2, {"beta": 0.1}),
        (3, {}),  # the end of an epoch
        (4, {}),
        (3, {"num_iterations": 2}),  # the completions of step 3 train once more
        (1, {"steps_per_generation": 2, "gradient_accumulation_steps": 1}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, step, changes):
    def run(name, resume=None):
        model = adapted(tiny_model("qwen2"))
        saving = {"save_strategy": "steps", "save_steps": step, "max_steps": step + 2, "lr_scheduler_type": "constant"}
        trainer(tmp_path / name, model=model, **saving, **changes).train(resume_from_checkpoint=resume)
        return {name: value for name, value in model.named_parameters() if "lora" in name}

    whole, resumed = run("whole"), run("resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_reference_of_a_whole_model_has_its_scaled_positions(tmp_path):
    """TRL reads it anew from the checkpoint, whose 512 tokens of context were stretched to 1024 for this run."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        save_tiny("llama3", tmp_path / "base"), max_seq_length=1024, full_finetuning=True
    )
    saving = {"save_strategy": "steps", "save_steps": 1}  # writes the arguments
    run = trainer(tmp_path, model=model, tokenizer=tokenizer, beta=0.1, max_steps=1, **saving)
    run.train()
    assert run.ref_model is not None and logged(run, "kl") == [{"kl": 0}]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"loss_type": "dr-grpo"}, ValueError, "Did you mean 'dr_grpo'"),
        ({"loss_type": "gspo", "importance_sampling_level": "token"}, ValueError, "gspo"),
        ({"importance_sampling_level": "tokens"}, ValueError, "Did you mean 'token'"),
        ({"scale_rewards": "groups"}, ValueError, "Did you mean 'group'"),
        ({"rollout": "embedded"}, UnsupportedError, "rollout='transformers'"),
        ({"rollout": "transformer"}, ValueError, "Did you mean 'transformers'"),
        ({"rollout": "vllm"}, ImportError, r"luthier\[vllm\]"),
        ({"too_long": "cut"}, ValueError, "drop, raise, truncate"),
        ({"num_generations": 1}, ValueError, "num_generations"),
        ({"num_generations": 3}, ValueError, "divisible"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"beta": -1, "epsilon": -0.1}, ValueError, "beta.*epsilon"),
        ({"reward_timeout": 0}, ValueError, "reward_timeout"),
        ({"max_completion_length": 0}, ValueError, "max_completion_length"),
        ({"num_generations": "8"}, TypeError, "num_generations must be a number.*'8' of type str"),
        ({"num_generation": 8}, TypeError, "Did you mean 'num_generations'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        GRPOConfig(**settings(tmp_path, **changes))


def test_wrong_arguments_of_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="'some/model'"):
        GRPOTrainer("some/model", tiny_tokenizer(), shorter)
    with pytest.raises(TypeError, match="Did you mean 'callbacks'"):
        GRPOTrainer(tiny_model("qwen2"), tiny_tokenizer(), shorter, callback=[])
    with pytest.raises(TypeError, match="one argument"):
        GRPOTrainer(tiny_model("qwen2"), tiny_tokenizer(), shorter, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="get_peft_model"):
        trainer(tmp_path, model=tiny_model("qwen2").requires_grad_(False))
    with pytest.raises(ValueError, match="reward"):
        trainer(tmp_path, rewards=[])
    with pytest.raises(ValueError, match="weights"):
        trainer(tmp_path, reward_weights=[1.0, 2.0])


def test_a_raw_trl_config_works_and_stays_as_it_is(tmp_path):
    raw = trl.GRPOConfig(**settings(tmp_path, max_steps=1), bf16=False, use_cpu=True, report_to="none")
    before = raw.to_dict()
    run = GRPOTrainer(adapted(tiny_model("qwen2")), tiny_tokenizer(chat=False), shorter, raw, text_rows())
    run.train()
    assert run.state.global_step == 1 and raw.to_dict() == before


def test_evaluation_during_training(tmp_path):
    run = GRPOTrainer(
        adapted(tiny_model("qwen2")),
        tiny_tokenizer(chat=False),
        shorter,
        GRPOConfig(**settings(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=4)),
        text_rows(),
        {"first": text_rows().select(range(2)), "second": [{"prompt": "x"}, {"prompt": "y"}]},
    )
    run.train()
    losses = [name for entry in run.state.log_history for name in entry if name.endswith("_loss")]
    assert {"eval_first_loss", "eval_second_loss"} <= set(losses)


def test_early_stopping_goes_by_the_reward(tmp_path):
    calls = []

    def falling(completions, **columns):
        calls.append(len(completions))
        return [-float(len(calls))] * len(completions)

    run = GRPOTrainer(
        adapted(tiny_model("qwen2")),
        tiny_tokenizer(chat=False),
        falling,
        GRPOConfig(
            **settings(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=9)
            | {"early_stopping_patience": 2, "per_device_eval_batch_size": 4}
        ),
        text_rows(),
        text_rows().select(range(1)),
    )
    run.train()
    assert run.state.global_step == 3  # the first evaluation stays the best, and two more were allowed
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
