"""The trainer's arithmetic: the same loss and gradients however the rows are put into batches, and as stock TRL's."""

from __future__ import annotations

import io
import logging
import math
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from runs import arguments, losses, nf4_model, token_rows, trainer, with_lora
from tiny import BASE, FAMILIES, VOCAB, save_tiny, tiny_model, tiny_tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from luthier.model.accelerate import accelerate
from luthier.model.cpu_4bit import repair_cpu_4bit
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model as luthier_lora
from luthier.training import progress
from luthier.training.collate import mixes_rows
from luthier.training.optimizer import embedding_parameters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}")


# --- rows in one sequence --------------------------------------------------------------------------------------------


MIXES = {"gpt_oss"}  # in transformers 5.17: its masks are built without position_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padding_free_batch_do_not_see_each_other(family, tmp_path):
    model = tiny_model(family)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = list(token_rows(3, seed=1))
    other_first = [{"input_ids": rows[0]["input_ids"][::-1], "labels": rows[0]["labels"]}, *rows[1:]]
    with torch.no_grad():
        together = model(**collate(rows), use_cache=False).logits[0]
        after_another = model(**collate(other_first), use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows])
    first = len(rows[0]["input_ids"])
    assert not torch.allclose(together[:first], after_another[:first])
    if family in MIXES:
        assert not torch.allclose(together[first:], after_another[first:])
        with pytest.warns(UserWarning, match=f"padded, not padding-free: {family} with .* lets rows of one sequence see"):
            assert not trainer(with_lora(model), tmp_path).padding_free
    else:
        assert mixes_rows(model) is None
        assert_close(together, alone)
        assert_close(together[first:], after_another[first:])


def test_families_without_an_adapter_file_are_tried_too(tmp_path):
    """OPT's masks are built without position_ids, GPT-2's with them."""
    small = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    opt = transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, **small
    )
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, **small)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = list(token_rows(2))
    for config, mixes in ((opt, True), (gpt2, False)):
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            together = model(**collate(rows), use_cache=False).logits[0, len(rows[0]["input_ids"]) :]
            alone = model(torch.tensor([rows[1]["input_ids"]])).logits[0]
        assert torch.allclose(together, alone, atol=1e-5) != mixes
        assert trainer(model, tmp_path).padding_free != mixes


def test_a_recurrent_model_would_mix_rows_and_is_padded(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=64, state_size=8, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config)
    rows = list(token_rows(2))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with torch.no_grad():
        together = model(collate(rows)["input_ids"]).logits[0, len(rows[0]["input_ids"]) :]
        alone = model(torch.tensor([rows[1]["input_ids"]])).logits[0]
    assert not torch.allclose(together, alone)  # the reason for all this
    with pytest.warns(
        UserWarning, match="padded, not padding-free: mamba has layers that do not tell the rows of one sequence apart"
    ):
        run = trainer(model, tmp_path)
    assert not run.padding_free
    run.train()
    for setting in ("packing", "padding_free"):
        with pytest.raises(ValueError, match=f"{setting}=True would train wrong"):
            trainer(model, tmp_path, **{setting: True, "max_length": 64})


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen3_moe"])
def test_one_step_is_the_same_padded_padding_free_and_packed(family, tmp_path):
    """Loss and every weight after a step of plain SGD, hence every gradient."""
    rows = token_rows(4)
    changes = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.0, "router_aux_loss_coef": None}
    results = {}
    for name, how in {
        "padded": {"padding_free": False, "per_device_train_batch_size": 4},
        "padding free": {"per_device_train_batch_size": 4},
        "packed": {"packing": True, "max_length": 512, "per_device_train_batch_size": 1},
    }.items():
        model = with_lora(tiny_model(family))
        model.config.output_router_logits = False
        run = trainer(model, tmp_path, rows, **changes, **how)
        assert run.padding_free == (name != "padded") and len(run.train_dataset) == (1 if name == "packed" else 4)
        run.aux_loss_enabled = False  # a load-balancing loss is a mean over the batch's tokens, padding included
        run.train()
        results[name] = losses(run), weights(run.model)
    for name in ("padding free", "packed"):
        assert_close(torch.tensor(results[name][0]), torch.tensor(results["padded"][0]))  # as fp32, in which they were summed
        assert_same_weights(results[name][1], results["padded"][1])


@pytest.mark.parametrize("padding_free", [True, False])
def test_accumulated_batches_equal_the_big_batch(padding_free, tmp_path):
    """Micro-batches of one row have from 1 to 36 trained tokens: a mean of means would be far off."""
    rows = token_rows(6, seed=3)
    results = []
    for batch, accumulation in ((6, 1), (1, 6), (2, 3)):
        changes = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 2, "padding_free": padding_free}
        changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run = trainer(with_lora(tiny_model("llama3")), tmp_path, rows, **changes)
        run.train()
        results.append((losses(run), weights(run.model)))
    for loss, after in results[1:]:
        assert_close(loss, results[0][0])
        assert_same_weights(after, results[0][1])


def test_a_packed_set_holds_every_token_once(tmp_path):
    rows = token_rows(30)
    run = trainer(with_lora(tiny_model("llama3")), tmp_path, rows, packing=True, max_length=64)
    packed = run.train_dataset
    assert len(packed) < len(rows) / 2 and max(map(len, packed["input_ids"])) <= 64
    assert sum(map(len, packed["input_ids"])) == sum(map(len, rows["input_ids"])) == run.ledger.tokens
    found = []
    for row in packed:
        ends = [sum(row["seq_lengths"][: i + 1]) for i in range(len(row["seq_lengths"]))]
        found += [row["input_ids"][end - length : end] for end, length in zip(ends, row["seq_lengths"], strict=True)]
    assert sorted(found) == sorted(rows["input_ids"])


# --- against stock TRL -----------------------------------------------------------------------------------------------


class FirstWeights(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = weights(model)


def test_loss_curve_is_stock_trls(tmp_path, monkeypatch):
    """NF4 and LoRA, eight steps: our loader, adapter, fast path and padding-free trainer against transformers, peft and TRL.

    To be equal, the two adapters begin with the same numbers, and the stock trainer is told: no autocast (bf16=False,
    use_cpu=True), no recomputation, no cut at 1024 tokens, labels that exist already; its LoRA weights are put back to
    float32, which it casts to bfloat16; and its 4-bit layers get our repair, without which bitsandbytes misreads widths
    like down_proj's 96 on a CPU.
    """
    monkeypatch.setitem(BASE, "intermediate_size", 96)
    base = save_tiny("llama3", tmp_path / "base")
    rows = token_rows(16)
    model = with_lora(nf4_model(base))
    repair_cpu_4bit(model)
    exact = weights(model)

    fast, _ = load_model(str(base), use_gradient_checkpointing=False)
    fast = accelerate(luthier_lora(fast, r=4, lora_alpha=8))
    fast.load_state_dict(exact, strict=False)
    first = FirstWeights()
    ours = trainer(fast, tmp_path / "ours", rows, max_steps=8, callbacks=[first])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*its stock forward")
        ours.train()

    config = SFTConfig(
        output_dir=str(tmp_path / "stock"), learning_rate=1e-2, lr_scheduler_type="constant", max_steps=8, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="no", bf16=False, use_cpu=True, gradient_checkpointing=False,
        max_length=None, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    stock = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())
    for name, parameter in stock.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16  # if TRL stops doing so, trainable_weights_kept can go
            parameter.data = exact[name].clone()
    stock.train()

    assert ours.padding_free and not stock.padding_free
    torch.testing.assert_close(losses(ours), losses(stock), rtol=1e-5, atol=1e-5)
    assert losses(ours)[-1] != losses(ours)[0]
    after = weights(ours.model)
    assert {name for name in after if torch.equal(after[name], first.before[name])} == set()
    assert_same_weights(first.before, exact)  # the adapter began as it was given, not rounded to bfloat16
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


# --- embeddings ------------------------------------------------------------------------------------------------------


def trains_embeddings(how: str):
    model = tiny_model("llama3")
    if how == "full":
        return model
    if how == "modules_to_save":
        return with_lora(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    if how == "lora":
        return with_lora(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    return with_lora(model, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 8, 9, 10, 11]})


@pytest.mark.parametrize("how", ["full", "modules_to_save", "lora", "tokens"])
def test_embedding_learning_rate(how, tmp_path):
    """With everything else at a rate of zero, the embeddings and the head move and nothing else does."""
    first = FirstWeights()
    changes = {"learning_rate": 0.0, "embedding_learning_rate": 1e-2, "weight_decay": 0.0}
    run = trainer(trains_embeddings(how), tmp_path, callbacks=[first], **changes)
    run.train()
    moved = {name for name, tensor in weights(run.model).items() if not torch.equal(tensor, first.before[name])}
    assert moved and all("embed_tokens" in name or "lm_head" in name for name in moved)
    assert len(moved) == len(embedding_parameters(run.model)) == {"full": 2, "modules_to_save": 2, "lora": 4, "tokens": 1}[how]
    assert {group["lr"] for group in run.optimizer.param_groups if group["params"]} == {0.0, 1e-2}
    in_groups = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in run.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "granite"])  # plain, capped and divided logits
def test_a_lora_on_the_head_trains_by_the_models_own_logits(family, tmp_path):
    """One step of plain SGD against the gradients of an ordinary cross-entropy."""
    rows = token_rows(2)
    run = trainer(
        with_lora(tiny_model(family), target_modules=["lm_head", "q_proj"]), tmp_path, rows, optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0, max_steps=1,
    )  # fmt: skip
    reference = with_lora(tiny_model(family), target_modules=["lm_head", "q_proj"])
    total = tokens = 0
    for row in rows:
        logits = reference(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
        tokens += sum(label != -100 for label in row["labels"][1:])
    (total / tokens).backward()
    run.train()
    assert_close(torch.tensor(losses(run)[0]), (total / tokens).detach())
    expected = {name: (p - p.grad).detach() for name, p in reference.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in expected)
    assert_same_weights(weights(run.model), expected)


def test_embedding_learning_rate_follows_the_schedule(tmp_path):
    changes = {"embedding_learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_steps": 4}
    run = trainer(trains_embeddings("full"), tmp_path, **changes)
    run.train()
    rates = sorted({group["lr"] / group["initial_lr"] for group in run.optimizer.param_groups})
    assert rates == [0.0] and {group["initial_lr"] for group in run.optimizer.param_groups} == {1e-2, 1e-3}


def test_embedding_learning_rate_without_embeddings_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="embedding_learning_rate=0.001 applies to nothing"):
        trainer(with_lora(tiny_model("llama3")), tmp_path, embedding_learning_rate=1e-3)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_eval_loss_is_the_mean_over_tokens_whatever_the_batches(tmp_path):
    model, rows = with_lora(tiny_model("llama3")), token_rows(7, seed=5)
    total = tokens = 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").item()
            tokens += sum(label != -100 for label in row["labels"][1:])
    for how in ({"padding_free": False}, {}, {"packing": True, "max_length": 64}):
        for batch in (1, 3, 7):
            run = trainer(model, tmp_path, eval_dataset=rows, per_device_eval_batch_size=batch, **how)
            assert_close(run.evaluate()["eval_loss"], total / tokens, rtol=1.3e-6, atol=1e-5)


def test_compute_metrics_gets_the_logits_row_by_row(tmp_path):
    model, rows, seen = with_lora(tiny_model("llama3")), token_rows(5, seed=6), {}

    def accuracy(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean().item()}

    run = trainer(model, tmp_path, eval_dataset=rows, compute_metrics=accuracy, per_device_eval_batch_size=2)
    metrics = run.evaluate()
    assert run.padding_free and seen["logits"].shape[::2] == (5, VOCAB)
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
        assert_close(torch.tensor(seen["logits"][index, : len(alone)]), alone)
        assert seen["labels"][index, : len(alone)].tolist() == row["labels"]
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_early_stopping_gives_back_the_best_checkpoint(tmp_path):
    """A rate far too high: the first evaluation is the best, and the run ends two evaluations later."""
    model = with_lora(tiny_model("llama3"))
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 30}
    held_out = token_rows(4, seed=9)
    run = trainer(model, tmp_path, eval_dataset=held_out, early_stopping_patience=2, learning_rate=0.5, **changes)
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = evaluations.index(min(evaluations))
    assert len(evaluations) == best + 3 < 30
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best + 1}")
    assert_close(run.evaluate()["eval_loss"], evaluations[best])
    assert all(p.requires_grad for name, p in run.model.named_parameters() if "lora_" in name)  # it can train on


# --- what a person sees ----------------------------------------------------------------------------------------------


def test_progress_is_a_line_per_log_where_there_is_no_terminal(tmp_path, capsys):
    run = trainer(with_lora(tiny_model("llama3")), tmp_path, eval_dataset=token_rows(4), eval_strategy="steps", eval_steps=2)
    run.train()
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "tokens/s" in line]
    assert len(steps) == 4
    for number, line in enumerate(steps, start=1):
        assert line.startswith(f"step {number}/4 · loss {losses(run)[number - 1]:.4f} · ")
        assert line.endswith(" left") and " tokens/s · " in line and " GiB · " in line
    assert sum("eval_loss" in line for line in lines) == 2
    shown = {type(callback) for callback in run.callback_handler.callbacks}
    assert not shown & {transformers.trainer_callback.ProgressCallback, transformers.trainer_callback.PrinterCallback}


def test_progress_is_a_bar_on_a_terminal_and_is_taken_down_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)  # as our command line sets it
    screen = io.StringIO()
    terminal = {"force_terminal": True, "force_interactive": True, "width": 120}
    monkeypatch.setattr(progress, "console", lambda: Console(file=screen, **terminal))
    run = trainer(with_lora(tiny_model("llama3")), tmp_path, eval_dataset=token_rows(4), eval_strategy="steps", eval_steps=2)
    run.train()
    text = screen.getvalue()
    assert "Training" in text and "4/4" in text and "tokens/s" in text and "Evaluating" in text and "eval_loss" in text

    screen.truncate(0)
    trainer(with_lora(tiny_model("llama3")), tmp_path, eval_dataset=token_rows(4)).evaluate()
    assert "Evaluating" in screen.getvalue() and "eval_loss" in screen.getvalue() and "Training" not in screen.getvalue()

    run = trainer(poisoned(with_lora(tiny_model("llama3"))), tmp_path)
    with pytest.raises(FloatingPointError):
        run.train()
    assert run.progress.bar is None


def test_metrics_go_to_what_report_to_names(tmp_path):
    run = trainer(with_lora(tiny_model("llama3")), tmp_path, report_to="tensorboard")
    run.train()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_model_card_names_a_local_base(tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(save_tiny("llama3", tmp_path / "base")))
    run = trainer(model, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    assert f"a fine-tuned version of `{tmp_path / 'base'}`." in (tmp_path / "run" / "README.md").read_text()


# --- numbers that are not finite -------------------------------------------------------------------------------------


def poisoned(model):
    """From now on the model's loss is NaN."""
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(math.nan)
    return model


class PoisonAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.before = weights(poisoned(model))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_changes_weights(tmp_path):
    poison = PoisonAt(3)
    run = trainer(with_lora(tiny_model("llama3")), tmp_path, callbacks=[poison], save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"Step 3: the loss is nan.*Resume from .*checkpoint-2 with a lower"):
        run.train()
    after = weights(run.model)
    assert all(torch.equal(after[name].nan_to_num(), poison.before[name].nan_to_num()) for name in after)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model = with_lora(tiny_model("llama3"))
    next(p for n, p in model.named_parameters() if "lora_A" in n).register_hook(lambda grad: grad * math.inf)
    run = trainer(model, tmp_path)
    before = weights(model)
    with pytest.raises(FloatingPointError, match="Step 1: the norm of the gradients is (nan|inf)"):
        run.train()
    assert_same_weights(weights(run.model), before)


# --- the adapter of a quantised model --------------------------------------------------------------------------------


def test_peft_config_given_to_the_trainer_trains_in_float32_too(tmp_path):
    model = nf4_model(save_tiny("llama3", tmp_path / "base"))
    config = LoraConfig(r=4, target_modules="all-linear")
    run = trainer(model, tmp_path, args=arguments(tmp_path), peft_config=config)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    run.train()


def test_the_models_own_recomputation_plan_stands(tmp_path):
    """None: as the model is. False: none. True: every layer. The loss is the same whichever."""
    results = []
    for loaded in (True, False):
        for asked in (None, True, False):
            model = with_lora(tiny_model("llama3"))
            if loaded:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            run = trainer(model, tmp_path, gradient_checkpointing=asked, max_steps=2)
            run.train()
            assert model.is_gradient_checkpointing == (loaded if asked is None else asked)
            results.append(losses(run))
    assert all(result == results[0] for result in results)


def test_two_models_one_patched_one_not(tmp_path):
    """Our trainer changes nothing that a stock model in the same process would feel."""
    stock = get_peft_model(tiny_model("qwen3"), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.tensor([token_rows(1)[0]["input_ids"]])
    with torch.no_grad():
        before = stock(ids).logits
    trainer(with_lora(tiny_model("qwen3")), tmp_path).train()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, before)
