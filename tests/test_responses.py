"""train_on_responses_only on TRL's trainer and ours: what trains, packed or not, and what happens where nothing does."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import BOS, END, START, tiny_model, tiny_tokenizer
from tiny_vision import picture_row, tiny_processor, tiny_vision_model
from trl import SFTConfig, SFTTrainer

from luthier.data.vision import VisionDataCollator
from luthier.training.arguments import TrainingArguments
from luthier.training.responses import train_on_responses_only
from luthier.training.trainer import Trainer

PARTS = (f"{START}user\n", f"{START}assistant\n")
ROWS = [("hi", "hello"), ("2+2?", "4"), ("who?", "me, the one and only"), ("why?", "so")]


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"{START}user\n{q}{END}\n{START}assistant\n{a}{END}\n" for q, a in turns)


def texts(*more: str) -> Dataset:
    return Dataset.from_dict({"text": [chat(turn) for turn in ROWS] + list(more)})


def options(tmp_path, **settings) -> dict:
    return {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, **settings}


def raw_trainer(tmp_path, dataset, tokenizer=None, eval_dataset=None, **settings) -> SFTTrainer:
    args = SFTConfig(**{"max_length": 128, **options(tmp_path, **settings)})
    tokenizer = tokenizer or tiny_tokenizer()
    return SFTTrainer(tiny_model("llama3"), args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=tokenizer)


def our_trainer(tmp_path, dataset, tokenizer=None, eval_dataset=None, **settings) -> Trainer:
    args = TrainingArguments(**{"max_length": 128, **options(tmp_path, **settings)})
    tokenizer = tokenizer or tiny_tokenizer()
    return Trainer(tiny_model("llama3"), args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=tokenizer)


def trained(labels) -> str:
    return tiny_tokenizer().decode([label for label in labels if label != -100])


def answers(dataset) -> list[str]:
    return sorted(trained(labels) for labels in dataset["labels"])


EXPECTED = sorted(f"{answer}{END}" for _, answer in ROWS)


@pytest.mark.parametrize("make", [raw_trainer, our_trainer])
@pytest.mark.parametrize("parts", [(), PARTS])
def test_only_answers_train_and_the_trainer_runs(tmp_path, make, parts):
    trainer = train_on_responses_only(make(tmp_path, texts(), eval_dataset=texts()), *parts)
    assert answers(trainer.train_dataset) == answers(trainer.eval_dataset) == EXPECTED
    assert trainer.ledger.to_dict() | {"rows_in": 4, "trained": 4, "dropped": {}} == trainer.ledger.to_dict()
    batches = list(trainer.get_train_dataloader())
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == trainer.ledger.trained_tokens
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_a_second_call_changes_nothing_or_narrows(tmp_path):
    both = Dataset.from_dict({"text": [chat(*ROWS[:2])]})
    trainer = train_on_responses_only(raw_trainer(tmp_path, both))
    assert answers(trainer.train_dataset) == [f"hello{END}4{END}"]
    assert answers(train_on_responses_only(trainer).train_dataset) == [f"hello{END}4{END}"]
    assert answers(train_on_responses_only(trainer, last_response_only=True).train_dataset) == [f"4{END}"]
    assert answers(train_on_responses_only(trainer).train_dataset) == [f"4{END}"]


def test_masks_that_are_there_already_stay(tmp_path):
    """TRL trains on the completion only: the answer in the prompt does not train afterwards either."""
    rows = {"prompt": [chat(ROWS[0]) + f"{START}user\n2+2?{END}\n{START}assistant\n"], "completion": [f"4{END}\n"]}
    trainer = train_on_responses_only(raw_trainer(tmp_path, Dataset.from_dict(rows)))
    assert answers(trainer.train_dataset) == [f"4{END}"]


@pytest.mark.parametrize("make", [raw_trainer, our_trainer])
def test_packed_rows_are_masked_conversation_by_conversation(tmp_path, make):
    """And conversations without an answer leave the packed row, boundaries and all."""
    silent = f"{START}user\nnobody answers{END}\n"
    trainer = make(tmp_path, texts(silent, silent), packing=True)
    assert len(trainer.train_dataset) < len(ROWS)
    train_on_responses_only(trainer)
    found = []
    for row in trainer.train_dataset:
        starts = [0, *torch.tensor(row["seq_lengths"]).cumsum(0).tolist()]
        assert starts[-1] == len(row["input_ids"]) == len(row["labels"])
        found += [trained(row["labels"][start:end]) for start, end in pairwise(starts)]
    assert sorted(found) == EXPECTED
    assert (trainer.ledger.rows_in, trainer.ledger.trained, trainer.ledger.dropped) == (6, 4, {"no trained token": 2})
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_a_packing_that_cuts_answers_warns(tmp_path):
    trainer = raw_trainer(tmp_path, texts(), packing=True, packing_strategy="wrapped", max_length=40)
    with pytest.warns(UserWarning, match="'wrapped' cuts conversations"):
        train_on_responses_only(trainer)


def test_rows_that_trl_cut_shorter_than_the_model_takes_warn(tmp_path):
    trainer = raw_trainer(tmp_path, texts(), max_length=16)
    trainer.model.luthier = SimpleNamespace(max_seq_length=128)
    with pytest.warns(UserWarning, match="max_length=16.*max_seq_length=128"):
        train_on_responses_only(trainer)


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path):
    trainer = raw_trainer(tmp_path, texts("no chat at all"), eval_dataset={"a": texts(), "b": texts("none")})
    train_on_responses_only(trainer)
    assert (trainer.ledger.rows_in, trainer.ledger.dropped) == (5, {"no trained token": 1})
    assert answers(trainer.train_dataset) == EXPECTED
    assert {name: answers(rows) for name, rows in trainer.eval_dataset.items()} == {"a": EXPECTED, "b": EXPECTED}


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset 'b'"])
def test_nothing_to_train_on_is_an_error_that_leaves_the_trainer_alone(tmp_path, where):
    wrong = Dataset.from_dict({"text": ["Q: 2+2? A: 4"]})
    train, other = (wrong, texts()) if where == "train_dataset" else (texts(), wrong)
    trainer = raw_trainer(tmp_path, train, eval_dataset={"a": texts(), "b": other})
    before = trainer.train_dataset
    with pytest.raises(ValueError) as raised:
        train_on_responses_only(trainer, *PARTS)
    for part in (f"No token of {where} would train", "Q: 2+2? A: 4", *map(repr, PARTS)):
        assert part in str(raised.value)
    assert trainer.train_dataset is before


def test_streams_are_masked_as_they_flow(tmp_path):
    stream = texts("no chat").to_iterable_dataset()
    trainer = train_on_responses_only(raw_trainer(tmp_path, stream))
    rows = list(trainer.train_dataset)
    assert sorted(trained(row["labels"]) for row in rows) == EXPECTED and "trained" not in rows[0]
    trainer.train()
    with pytest.raises(ValueError, match="the first 1 rows of train_dataset"):
        train_on_responses_only(raw_trainer(tmp_path, Dataset.from_dict({"text": ["hi"]}).to_iterable_dataset()))


def test_a_tokenizer_that_adds_bos(tmp_path):
    trainer = raw_trainer(tmp_path, texts(), tokenizer=tiny_tokenizer(bos=True))
    assert tiny_tokenizer().decode(trainer.train_dataset["input_ids"][0]).startswith(BOS)
    assert answers(train_on_responses_only(trainer).train_dataset) == EXPECTED


def test_the_masking_function_by_itself(tmp_path):
    trainer = raw_trainer(tmp_path, texts())
    before = trainer.train_dataset
    mask = train_on_responses_only(trainer, return_function=True)
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts()["text"]]
    labels = mask({"input_ids": ids})["labels"]
    assert sorted(map(trained, labels)) == EXPECTED and trainer.train_dataset is before
    assert mask({"input_ids": ids[0]})["labels"] == labels[0]
    assert mask({"input_ids": torch.tensor(ids[:1])})["labels"].tolist() == labels[:1]
    assert Dataset.from_dict({"input_ids": ids}).map(mask, batched=True)["labels"][:] == labels


def test_pictures_are_masked_in_the_collator(tmp_path):
    processor, model = tiny_processor("qwen2_5_vl"), tiny_vision_model("qwen2_5_vl")
    rows = [picture_row(seed, answer) for seed, answer in enumerate(["a cat", "a dog"])]
    args = SFTConfig(**options(tmp_path, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}))
    messages = [row["messages"] for row in rows]
    dataset = Dataset.from_dict({"row": [0, 1]}).with_transform(lambda batch: {"messages": [messages[i] for i in batch["row"]]})
    trainer = SFTTrainer(
        model, args, train_dataset=dataset, processing_class=processor, data_collator=VisionDataCollator(model, processor)
    )
    batch = train_on_responses_only(trainer).data_collator(rows)
    assert [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]] == [f"a cat{END}", f"a dog{END}"]
    with pytest.raises(ValueError, match="the first 2 rows of train_dataset"):
        train_on_responses_only(trainer, "Question:", "Answer:")


def test_what_is_no_trainer_is_refused():
    with pytest.raises(TypeError, match="needs a trainer with a processing_class"):
        train_on_responses_only(texts())
