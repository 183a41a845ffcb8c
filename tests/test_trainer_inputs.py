"""What a user may hand the trainer, what becomes of the rows, and what is refused before any work is done."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from runs import arguments, token_rows, trainer, with_lora
from tiny import END, EOS, START, tiny_model, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig

from luthier.errors import UnsupportedError
from luthier.model.load import LoadInfo
from luthier.training.arguments import TrainingArguments
from luthier.training.responses import train_on_responses_only
from luthier.training.trainer import Trainer

QUESTIONS = [("What is two and two?", "It is four."), ("And three more?", "Seven, then."), ("Thanks.", "Not at all!")]
RENDERED = "".join(f"{START}user\n{q}{END}\n{START}assistant\n{a}{END}\n" for q, a in QUESTIONS[:1])

FORMATS = {
    "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QUESTIONS],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in QUESTIONS],
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in QUESTIONS],
    "prompt and completion": [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]} for q, a in QUESTIONS
    ],
}


def loras():
    return with_lora(tiny_model("llama3"))


def build(directory, rows, tokenizer=None, **changes) -> Trainer:
    own = {name: changes.pop(name) for name in ("formatting_func", "eval_dataset", "data_collator") if name in changes}
    return Trainer(loras(), arguments(directory, **changes), train_dataset=rows, tokenizer=tokenizer or tiny_tokenizer(), **own)


def trained_texts(run: Trainer) -> list[str]:
    return [run.processing_class.decode([token for token in row["labels"] if token != -100]) for row in run.train_dataset]


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["dataset", "list", "stream"])
def test_of_chat_data_the_answers_train(name, kind, tmp_path):
    rows = FORMATS[name]
    rows = rows if kind == "list" else Dataset.from_list(rows)
    rows = rows.to_iterable_dataset() if kind == "stream" else rows
    run = build(tmp_path, rows)
    assert trained_texts(run) == [answer + END for _, answer in QUESTIONS]
    first = next(iter(run.train_dataset))
    assert run.processing_class.decode(first["input_ids"]) == RENDERED
    if kind != "stream":
        assert (run.ledger.rows_in, run.ledger.trained) == (3, 3) and 0 < run.ledger.trained_share < 1
    run.train()


def test_all_of_chat_data_trains_if_asked(tmp_path):
    run = build(tmp_path, FORMATS["messages"], train_on="all")
    assert (
        trained_texts(run)[0].startswith(RENDERED[:40]) and run.ledger.trained_tokens == run.ledger.tokens - 3
    )  # the first of a row never does


def test_text_trains_whole_until_narrowed_down(tmp_path):
    texts = [{"text": f"{START}user\n{q}{END}\n{START}assistant\n{a}{END}\n"} for q, a in QUESTIONS]
    for rows, changes in (
        (texts, {}),
        ([{"body": row["text"]} for row in texts], {"dataset_text_field": "body"}),
        (
            [{**row, **chat} for row, chat in zip(texts, FORMATS["sharegpt"], strict=True)],
            {},
        ),  # as scripts of the trade have it
        (FORMATS["alpaca"], {"formatting_func": lambda row: rendered(row["instruction"], row["output"])}),
        (FORMATS["alpaca"], {"formatting_func": lambda rows: [*map(rendered, rows["instruction"], rows["output"])]}),
    ):
        run = build(tmp_path, Dataset.from_list(rows), **changes)
        assert trained_texts(run)[0].startswith(RENDERED[:40])
        train_on_responses_only(run)
        assert trained_texts(run) == [answer + END for _, answer in QUESTIONS]
        assert run.ledger.trained == 3
        run.train()


def rendered(question: str, answer: str) -> str:
    return f"{START}user\n{question}{END}\n{START}assistant\n{answer}{END}\n"


def test_text_has_one_bos_and_one_stop(tmp_path):
    """TRL's preparation doubles both for a text that has them already."""
    tokenizer = tiny_tokenizer(bos=True)
    texts = ["Plain.", "<|bos|>With a BOS.", f"With an EOS.{EOS}"]
    run = build(tmp_path, [{"text": text} for text in texts], tokenizer)
    decoded = [tokenizer.decode(row["input_ids"]) for row in run.train_dataset]
    assert decoded == [f"<|bos|>Plain.{EOS}", f"<|bos|>With a BOS.{EOS}", f"<|bos|>With an EOS.{EOS}"]


def test_token_ids_stay_as_they_are(tmp_path):
    rows = token_rows(5)
    run = build(tmp_path, rows)
    assert [row["labels"] for row in run.train_dataset] == rows["labels"]
    assert [row["labels"] for row in build(tmp_path, rows.remove_columns("labels")).train_dataset] == rows["input_ids"]


def test_evaluation_sets_are_prepared_alike(tmp_path):
    held_out = {"one": FORMATS["sharegpt"][:2], "two": Dataset.from_list(FORMATS["alpaca"])}
    run = build(tmp_path, FORMATS["messages"], eval_dataset=held_out)
    assert {name: len(rows) for name, rows in run.eval_dataset.items()} == {"one": 2, "two": 3}
    assert run.ledger.rows_in == 3
    metrics = run.evaluate()
    assert metrics["eval_one_loss"] > 0 and metrics["eval_two_loss"] > 0
    assert run.evaluate(Dataset.from_list(FORMATS["alpaca"]))["eval_loss"] == pytest.approx(metrics["eval_two_loss"])


def test_a_collator_of_ones_own_gets_prepared_rows(tmp_path):
    tokenizer = tiny_tokenizer()
    run = build(tmp_path, FORMATS["messages"], tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer))
    assert not run.padding_free
    run.train()


# --- rows that are too long ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("too_long", ["drop", "truncate", "raise"])
def test_rows_that_are_too_long(too_long, packing, tmp_path):
    rows = Dataset.from_list([{"input_ids": [7] * n, "labels": [7] * n} for n in (4, 8, 9, 30)])
    changes = {"max_length": 8, "too_long": too_long, "packing": packing}
    if too_long == "raise":
        with pytest.raises(ValueError, match="max_length"):
            build(tmp_path, rows, **changes)
        return
    run = build(tmp_path, rows, **changes)
    lengths = [n for row in run.train_dataset for n in row.get("seq_lengths", [len(row["input_ids"])])]
    assert sorted(lengths) == ([4, 8] if too_long == "drop" else [4, 8, 8, 8])
    assert run.ledger.rows_in == 4 and run.ledger.dropped.total() == (2 if too_long == "drop" else 0)
    assert run.ledger.truncated == (0 if too_long == "drop" else 2)
    assert run.args.max_length == 8


def test_the_models_max_seq_length_is_the_limit(tmp_path):
    model = loras()
    model.get_base_model().luthier = loaded(max_seq_length=8)
    rows = Dataset.from_list([{"input_ids": [7] * n, "labels": [7] * n} for n in (4, 8, 9)])
    run = Trainer(model, arguments(tmp_path), train_dataset=rows, tokenizer=tiny_tokenizer())
    assert (run.max_length, run.ledger.trained) == (8, 2)
    with pytest.raises(ValueError, match="max_length"):
        Trainer(model, arguments(tmp_path, too_long="raise"), train_dataset=rows, tokenizer=tiny_tokenizer())


def test_a_stream_is_measured_as_it_flows(tmp_path):
    rows = [{"input_ids": [7] * n, "labels": [7] * n} for n in (4, 9, 8)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for too_long, lengths in (("drop", [4, 8]), ("truncate", [4, 8, 8])):
        run = build(tmp_path, stream, max_length=8, too_long=too_long)
        assert [len(row["input_ids"]) for row in run.train_dataset] == lengths and run.ledger is None
    run = build(tmp_path, stream, max_length=8, too_long="raise")
    with pytest.raises(ValueError, match="9 tokens, more than max_length=8"):
        list(run.train_dataset)


def loaded(**changes) -> LoadInfo:
    fields = {field.name: None for field in dataclasses.fields(LoadInfo)}
    return LoadInfo(**fields | changes)


# --- TRL's own config ------------------------------------------------------------------------------------------------


def test_a_raw_config_that_contradicts_the_model_warns(tmp_path):
    model = loras()
    model.get_base_model().luthier = loaded(max_seq_length=2048)
    config = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    with pytest.warns(UserWarning) as said:
        run = Trainer(model, config, train_dataset=token_rows(4), tokenizer=tiny_tokenizer())
    text = " ".join(str(warning.message) for warning in said)
    assert "max_length=1024) contradicts the model" in text and "gradient_checkpointing=True) contradicts the model" in text
    assert run.max_length == 1024 and not model.is_gradient_checkpointing
    assert config.gradient_checkpointing is True and config.max_length == 1024  # the user's object is not touched
    run.train()
    assert not model.is_gradient_checkpointing


def test_transformers_own_arguments_will_do(tmp_path):
    """As older scripts give them; their gradient_checkpointing=False is no choice, and leaves the model as it was loaded."""
    model = loras()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().luthier = loaded(max_seq_length=64)
    config = transformers.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    run = Trainer(model, config, train_dataset=token_rows(4), tokenizer=tiny_tokenizer(), too_long="truncate")
    assert (run.max_length, run.args.too_long) == (64, "truncate") and model.is_gradient_checkpointing
    run.train()
    assert model.is_gradient_checkpointing


def test_settings_may_be_given_directly(tmp_path):
    run = Trainer(
        loras(), tokenizer=tiny_tokenizer(), train_dataset=FORMATS["messages"], args=arguments(tmp_path, max_steps=1),
        packing=True, max_seq_length=64, dataset_num_proc=None,
    )  # fmt: skip
    assert run.args.packing and run.max_length == 64


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG_ARGUMENTS = {
    "learning_rate as text": ({"learning_rate": "2e-4"}, TypeError, "learning_rate must be a number .* not '2e-4' of type str"),
    "no steps": ({"max_steps": 0}, ValueError, "max_steps must be at least 1, or -1"),
    "fractional steps": ({"max_steps": 1.5}, TypeError, "max_steps must be a whole number"),
    "no epochs": ({"num_train_epochs": 0}, ValueError, "num_train_epochs must be above zero"),
    "a rate of NaN": ({"learning_rate": float("nan")}, ValueError, "learning_rate must be zero or more"),
    "negative embedding rate": ({"embedding_learning_rate": -1e-5}, ValueError, "embedding_learning_rate must be above zero"),
    "no batch": ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be at least 1"),
    "one token": ({"max_length": 1}, ValueError, "max_length must be at least 2"),
    "a bool": ({"gradient_accumulation_steps": True}, TypeError, "gradient_accumulation_steps must be a whole number"),
    "a switch as text": ({"packing": "false"}, TypeError, "packing must be True or False, not 'false' of type str"),
    "a logger as number": ({"report_to": 5}, TypeError, "report_to must be a name or a list of names, not 5"),
    "unknown policy": ({"too_long": "cut"}, ValueError, "Unknown too_long 'cut'.*drop, raise, truncate"),
    "unknown mask": ({"train_on": "response"}, ValueError, "Unknown train_on 'response'. Did you mean 'responses'"),
    "unknown schedule": (
        {"lr_scheduler_type": "cosin"},
        ValueError,
        "Unknown lr_scheduler_type 'cosin'. Did you mean 'cosine'",
    ),
    "unknown optimizer": ({"optim": "adamw8bit"}, ValueError, "Unknown optim 'adamw8bit'. Did you mean 'adamw_8bit'"),
    "unknown logger": ({"report_to": "wandbb"}, ValueError, "Unknown report_to 'wandbb'. Did you mean 'wandb'"),
    "missing logger": ({"report_to": "wandb"}, ImportError, r'pip install "luthier\[report\]"'),
    "a missing one in a list": ({"report_to": ["tensorboard", "mlflow"]}, ImportError, "pip install mlflow"),
    "misspelt": ({"packng": True}, TypeError, "Unknown argument of TrainingArguments: 'packng'. Did you mean 'packing'"),
    "impatient": ({"early_stopping_patience": 3}, ValueError, "early_stopping_patience=3 needs evaluations"),
    "two warmups": ({"warmup_steps": 5, "warmup_ratio": 0.1}, ValueError, "not both"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments(name, tmp_path):
    changes, kind, message = WRONG_ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        TrainingArguments(str(tmp_path / "out"), **changes)
    assert not (tmp_path / "out").exists()


WRONG_USES = {
    "no dataset": ({"train_dataset": None}, ValueError, "train_dataset is missing"),
    "an empty one": ({"train_dataset": []}, ValueError, "train_dataset has no rows"),
    "an empty table": ({"train_dataset": Dataset.from_dict({"text": []})}, ValueError, "train_dataset has no rows"),
    "a path": ({"train_dataset": "data.jsonl"}, TypeError, "train_dataset must be a datasets.Dataset.*not str"),
    "a list of text": ({"train_dataset": ["one", "two"]}, TypeError, "rows that are dicts of columns, but holds 'one'"),
    "several sets": ({"train_dataset": {"train": [], "test": []}}, TypeError, "not dict .choose one of 'train', 'test'"),
    "an unknown token": (
        {"train_dataset": [{"input_ids": [5, 480], "labels": [5, 480]}]},
        ValueError,
        "token id 480, but the model knows only 480",
    ),
    "an unknown label": (
        {"train_dataset": [{"input_ids": [5, 6], "labels": [5, 480]}]},
        ValueError,
        "token id 480, but the model knows only 480",
    ),
    "images": ({"train_dataset": [{"text": "hello", "images": ["a.png"]}]}, ValueError, "column 'images'.*VisionDataCollator"),
    "no tokenizer": ({"tokenizer": None}, TypeError, "processing_class must be the model's tokenizer or processor, not None"),
    "two tokenizers": ({"processing_class": tiny_tokenizer()}, TypeError, "two names of one argument"),
    "an unknown format": ({"train_dataset": [{"x": 1}]}, ValueError, r"columns are \['x'\]"),
    "all masked": (
        {"train_dataset": [{"input_ids": [5, 6], "labels": [-100, -100]}]},
        ValueError,
        "(?i)no.* trained token|masked",
    ),
    "all too long": ({"max_length": 2}, ValueError, "max_length"),
    "an empty evaluation set": ({"eval_dataset": []}, ValueError, "eval_dataset has no rows"),
    "evaluation without a set": (
        {"eval_strategy": "steps", "eval_steps": 2},
        ValueError,
        "eval_strategy='steps' needs an eval",
    ),
    "packing without a length": ({"packing": True}, ValueError, "packing=True needs a length"),
    "wrapped packing": ({"packing": True, "packing_strategy": "wrapped", "max_length": 64}, UnsupportedError, "cuts rows"),
    "a name": ({"model": "some/model"}, TypeError, "model must be a loaded model"),
    "args of another kind": ({"args": {"max_steps": 3}}, TypeError, "args must be luthier.TrainingArguments"),
    "a misspelt argument": ({"train_datasett": []}, TypeError, "Unknown argument of Trainer: 'train_datasett'"),
    "two optimizers": (
        {"optimizers": (torch.optim.SGD([torch.zeros(1)], 1.0), None), "embedding_learning_rate": 1e-3},
        ValueError,
        "an optimizer of your own, not both",
    ),
}


@pytest.mark.parametrize("name", WRONG_USES)
def test_wrong_uses(name, tmp_path):
    changes, kind, message = WRONG_USES[name]
    settings = {"model": loras(), "train_dataset": token_rows(4, longest=12), "tokenizer": tiny_tokenizer()}
    settings |= {"args": arguments(tmp_path / "out")} | changes
    with pytest.raises(kind, match=message):
        Trainer(**settings)
    assert not (tmp_path / "out").exists() or name == "two optimizers"


def test_output_is_refused_where_nothing_can_be_written_or_the_base_model_lies(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a part of that path is a file"):
        trainer(loras(), tmp_path / "file" / "out")
    model = loras()
    model.get_base_model().luthier = SimpleNamespace(base_path=tmp_path, max_seq_length=512)
    with pytest.raises(ValueError, match="base model's own directory"):
        trainer(model, tmp_path)


def test_gradients_that_are_all_zero_are_said(tmp_path):
    model = loras()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()  # neither factor reaches the other
    with pytest.warns(UserWarning, match="Step 1: every gradient is zero"):
        trainer(model, tmp_path, max_steps=1).train()


def test_a_run_without_a_batch_is_an_error(tmp_path):
    run = trainer(loras(), tmp_path, rows=token_rows(3), per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="Nothing was trained"):
        run.train()
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [5, 6], "labels": [-100, -100]}] * 4))
    with pytest.raises(ValueError, match="Nothing was trained"):
        trainer(loras(), tmp_path, rows=stream).train()


def test_a_model_that_trains_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No parameter of the model trains: call get_peft_model"):
        trainer(tiny_model("llama3").requires_grad_(False), tmp_path)


def test_packing_with_a_collator_is_refused(tmp_path):
    for setting in ("packing", "padding_free"):
        with pytest.raises(UnsupportedError, match=f"{setting}=True builds its own batches"):
            build(tmp_path, token_rows(4), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()), **{setting: True})


def test_no_telemetry_is_sent(tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base

    sent = []
    monkeypatch.setattr(base, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    trainer(loras(), tmp_path)
    assert sent == []
