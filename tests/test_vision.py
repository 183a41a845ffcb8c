"""Vision-language models: loaded, adapted, trained, merged and read back, in nine families."""

from __future__ import annotations

import json
import shutil
import warnings
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset, Features, Image, Json, List
from peft import PeftModel
from tiny import save_tiny
from tiny_vision import FAMILIES, picture, picture_row, save_tiny_vision, tiny_vision_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from luthier import FastLanguageModel, FastModel, FastVisionModel, Trainer, TrainingArguments, VisionDataCollator, cli
from luthier.config import VisionRecipe
from luthier.errors import UnsupportedError
from luthier.evaluation.ocr import ocr
from luthier.model.accelerate import base_model
from luthier.model.vision import quantisation_of_language
from luthier.workflows import vision

TRAINED = ("qwen2_5_vl", "gemma3")  # the two that must; the others go through the same code with cheaper tests


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_tiny_vision(family, root / family) for family in FAMILIES}


def load(directory, **arguments):
    return FastVisionModel.from_pretrained(directory, max_seq_length=256, **arguments)


def language_part(family: str) -> str:
    return "model.text_model" if family == "smolvlm" else "model.language_model"


def rows(count: int = 4) -> list[dict]:
    return [picture_row(seed, answer) for seed, answer in zip(range(count), ["cat", "dog", "fox", "owl"] * count, strict=False)]


def greedy(model, batch: dict, count: int = 8) -> list[list[int]]:
    """Greedy tokens behind the prompts of ``batch``."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def question_batch(processor, seeds=(0, 1)) -> dict:
    messages = [picture_row(seed)["messages"] for seed in seeds]
    texts = [processor.apply_chat_template(m[:1], tokenize=False, add_generation_prompt=True) for m in messages]
    images = [[m[0]["content"][0]["image"]] for m in messages]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    settings["add_special_tokens"] = not texts[0].startswith(processor.tokenizer.bos_token)
    return dict(processor(text=texts, images=images, **settings))


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_the_stock_model(family, checkpoints):
    model, processor = load(checkpoints[family], load_in_16bit=True)
    batch = VisionDataCollator(model, processor)(rows(2))
    stock = tiny_vision_model(family)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, stock(**batch).logits)
    inputs = question_batch(processor)
    assert greedy(model, inputs) == greedy(stock, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_4_bits_the_language_part_is_quantised_and_the_tower_is_not(family, checkpoints):
    model, _ = load(checkpoints[family])
    assert model.luthier.precision == "nf4"
    quantised = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    decoder = {name for name in linear if name.startswith(f"{language_part(family)}.layers.")}
    assert decoder and quantised == decoder
    eight, _ = load(checkpoints[family], load_in_8bit=True)
    assert eight.luthier.precision == "int8"
    assert decoder == {name for name, module in eight.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}


def test_a_family_without_a_file_says_that_its_vision_part_is_quantised_too():
    config = AutoConfig.for_model("llava_next")
    with pytest.warns(UserWarning, match="llava_next has no file.*quantised too"):
        assert quantisation_of_language(SimpleNamespace(precision="nf4", dtype=torch.float32), config).load_in_4bit
    with warnings.catch_warnings(action="error"):
        assert quantisation_of_language(SimpleNamespace(precision="16bit", dtype=torch.float32), config) is None


def test_the_class_for_the_model(checkpoints, tmp_path):
    text = save_tiny("llama3", tmp_path / "llama")
    with pytest.raises(ValueError, match="text model .llama.: load it with FastLanguageModel"):
        load(text)
    with pytest.raises(ValueError, match="FastVisionModel"):
        FastLanguageModel.from_pretrained(checkpoints["gemma3"])
    with pytest.raises(ValueError, match="text_only=True .*FastLanguageModel"):
        load(checkpoints["gemma3"], text_only=True)
    assert hasattr(FastModel.from_pretrained(checkpoints["gemma3"])[1], "image_processor")
    assert not hasattr(FastModel.from_pretrained(text)[1], "image_processor")


def test_a_checkpoint_without_its_processor_says_what_is_missing(checkpoints, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(checkpoints["qwen2_5_vl"], directory)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (directory / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        load(directory)


def test_wrong_arguments_are_errors_before_a_weight_is_read(checkpoints):
    with pytest.raises(ValueError, match="load_in_4bit=True and load_in_8bit=True|choose one"):
        load(checkpoints["gemma3"], load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(TypeError, match="max_sequence_length.*max_seq_length"):
        FastVisionModel.from_pretrained(checkpoints["gemma3"], max_sequence_length=12)
    with pytest.raises(FileNotFoundError):
        load("no/such/./directory")


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_groups_choose_what_trains(family, checkpoints):
    def adapted(**groups) -> set[str]:
        model = FastVisionModel.get_peft_model(load(checkpoints[family], load_in_16bit=True)[0], r=2, **groups)
        names = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name.removeprefix("base_model.model.") for name in names}

    everything = adapted()
    language = adapted(finetune_vision_layers=False)
    seeing = adapted(finetune_language_layers=False)
    attention = adapted(finetune_mlp_modules=False)
    mlp = adapted(finetune_attention_modules=False)
    assert language and seeing and attention and mlp
    assert language | seeing == everything and not language & seeing
    assert attention | mlp == everything and not attention & mlp
    assert all(name.startswith(f"{language_part(family)}.") for name in language)
    assert not any(name.startswith(f"{language_part(family)}.") for name in seeing)
    assert all("attn" in name or "attention" in name for name in attention)
    assert not any("self_attn" in name or "cross_attn" in name for name in mlp)
    with pytest.raises(ValueError, match="nothing would train"):
        adapted(finetune_vision_layers=False, finetune_language_layers=False)


@pytest.mark.parametrize("family", ["qwen2_vl", "mistral3"])
def test_a_head_that_trains_whole_stays_tied_if_it_was(family, checkpoints):
    """As the model's own config says: that of its language part may not know, or say otherwise."""
    model = FastVisionModel.get_peft_model(load(checkpoints[family])[0], r=2, modules_to_save=["lm_head"])
    head = model.get_output_embeddings().weight
    assert head.requires_grad and (head is model.get_input_embeddings().weight) == (family == "mistral3")


# Training


def train(model, processor, data, kind=Trainer, steps: int = 8, **arguments):
    collator = VisionDataCollator(model, processor, train_on_responses_only=True)
    common = {"max_steps": steps, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    if kind is Trainer:
        args = TrainingArguments(**common, **arguments)
    else:  # as the usual notebooks write it
        args = SFTConfig(
            **common,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            **arguments,
        )
    trainer = kind(model=model, processing_class=processor, data_collator=collator, train_dataset=data, args=args)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def as_table(data: list[dict]) -> Dataset:
    """The same rows with the pictures in a column, which is what TRL's own trainer takes."""
    table = []
    for row in data:
        question, answer = row["messages"]
        places = [{"type": "image"}, question["content"][1]]
        table.append({"images": [question["content"][0]["image"]], "messages": [{**question, "content": places}, answer]})
    return Dataset.from_list(table, features=Features({"images": List(Image()), "messages": Json()}))


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("family", TRAINED)
def test_training_lowers_the_loss_and_moves_every_adapter(family, kind, checkpoints, tmp_path):
    model, processor = load(checkpoints[family])
    model = FastVisionModel.get_peft_model(model, r=4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    data = rows() if kind is Trainer else as_table(rows())
    losses = train(model, processor, data, kind, output_dir=str(tmp_path))
    assert losses[-1] < losses[0] / 2
    still = [name for name, parameter in model.named_parameters() if name in before and torch.equal(parameter, before[name])]
    assert not still
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {
        torch.float32
    } or kind is SFTTrainer


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*TRAINED}))
def test_the_other_families_train_too(family, checkpoints, tmp_path):
    model, processor = load(checkpoints[family])
    model = FastVisionModel.get_peft_model(model, r=4)
    losses = train(model, processor, rows(), output_dir=str(tmp_path), steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", TRAINED)
def test_the_loss_is_the_stock_loss_under_accumulation(family, checkpoints, tmp_path):
    """One step over batches of 1 and 3 trained tokens has the loss and the gradient of the batch of 4."""
    data = [picture_row(0, "a"), picture_row(1, "one two three four five six"), picture_row(2, "b"), picture_row(3, "c d e")]
    results = []
    for size in (1, 4):
        model, processor = load(checkpoints[family], load_in_16bit=True)
        model = FastVisionModel.get_peft_model(model, r=4)
        arguments = {
            "gradient_accumulation_steps": 4 // size,
            "output_dir": str(tmp_path),
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        collator = VisionDataCollator(model, processor, train_on_responses_only=True)
        args = TrainingArguments(
            per_device_train_batch_size=size, max_steps=1, logging_steps=1, save_strategy="no", **arguments
        )
        trainer = Trainer(model=model, processing_class=processor, data_collator=collator, train_dataset=data, args=args)
        trainer.train()
        weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        results.append((trainer.state.log_history[0]["loss"], weights))
        batch = collator(data)
    stock = tiny_vision_model(family)
    assert results[0][0] == pytest.approx(stock(**batch).loss.item(), rel=1e-4)
    assert results[1][0] == pytest.approx(stock(**batch).loss.item(), rel=1e-4)
    for one, four in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, four)


# Merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_the_merged_directory_answers_as_the_adapter_over_its_base(family, base, checkpoints, tmp_path):
    model, processor = load(checkpoints[family])
    model = FastVisionModel.get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained_merged(tmp_path / "merged", processor, base=base)
    model.save_pretrained_merged(tmp_path / "adapter", processor, save_method="lora")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if base == "16bit":
        over = AutoModelForImageTextToText.from_pretrained(checkpoints[family], dtype=torch.float32)
    else:
        over = base_model(load(checkpoints[family])[0]).dequantize()
    reference = PeftModel.from_pretrained(over, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        for parameter in reference.parameters():  # rounded the same way
            parameter.copy_(parameter.to(merged_dtype(tmp_path / "merged")))
    inputs = question_batch(AutoProcessor.from_pretrained(tmp_path / "merged"))
    assert greedy(merged, inputs) == greedy(reference, inputs)
    original = AutoModelForImageTextToText.from_pretrained(checkpoints[family], dtype=torch.float32)
    assert greedy(merged, inputs) != greedy(original, inputs)


def merged_dtype(directory) -> torch.dtype:
    return getattr(torch, json.loads((directory / "config.json").read_text())["dtype"])


@pytest.mark.parametrize("family", TRAINED)
def test_an_adapter_directory_continues_where_it_was(family, checkpoints, tmp_path):
    model, processor = load(checkpoints[family])
    model = FastVisionModel.get_peft_model(model, r=4)
    train(model, processor, rows(), output_dir=str(tmp_path / "run"), steps=4)
    model.save_pretrained_merged(tmp_path / "adapter", processor, save_method="lora")
    again, processor = load(tmp_path / "adapter")
    inputs = question_batch(processor)
    assert greedy(again, inputs) == greedy(model, inputs)
    assert any(parameter.requires_grad for parameter in again.parameters())


# The workflow


def recipe_for(checkpoint, directory, **fields) -> VisionRecipe:
    for seed in range(4):
        picture(seed).save(directory / f"{seed}.png")
    data = directory / "rows.jsonl"
    with data.open("w") as file:
        for seed, answer in enumerate(["cat", "dog", "fox", "owl"]):
            question = [{"type": "image", "image": f"{seed}.png"}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    settings = {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    settings |= {"model": str(checkpoint), "data": str(data), "output": str(directory / "out"), "max_seq_length": 256, "r": 8}
    return VisionRecipe(**{**settings, **fields})


def test_the_workflow_teaches_a_model_to_read(checkpoints, tmp_path):
    written = vision.run(recipe_for(checkpoints["qwen2_5_vl"], tmp_path, save_method="merged_16bit", base="nf4"))
    assert set(written) == {"adapter", "merged_16bit"}
    data = [picture_row(seed, answer) for seed, answer in enumerate(["cat", "dog", "fox", "owl"])]
    plain, processor = tiny_vision_model("qwen2_5_vl"), AutoProcessor.from_pretrained(written["merged_16bit"])
    before = ocr(plain, processor, data, max_new_tokens=8).wer
    merged = AutoModelForImageTextToText.from_pretrained(written["merged_16bit"], dtype=torch.float32)
    after = ocr(merged, processor, data, max_new_tokens=8).wer
    assert (before >= 1, after) == (True, 0)


@pytest.mark.parametrize("given, resize", [([], "min"), (["--resize", "16"], 16), (["--resize", "max"], "max")])
def test_eval_shows_pictures_at_the_size_of_the_training(given, resize, checkpoints, tmp_path, monkeypatch):
    recipe, seen = recipe_for(checkpoints["gemma3"], tmp_path), []
    monkeypatch.setattr("luthier.evaluation.ocr.resize_image", lambda image, size, side: seen.append(size) or image)
    command = ["eval", str(checkpoints["gemma3"]), "--task", "ocr", "--data", recipe.data, "--max-new-tokens", "1", *given]
    assert cli.main(command) == 0 and seen == [resize] * 4


def test_pictures_of_held_out_rows_lie_beside_their_own_file(checkpoints, tmp_path):
    place = tmp_path / "held out"
    place.mkdir()
    picture(7).save(place / "there.png")
    row = {"prompt": "What is it?", "completion": "cat", "image": "there.png", "image_root": "a column of the user's own"}
    (place / "rows.jsonl").write_text(json.dumps(row))
    fields = {"max_steps": 1, "eval_data": str(place / "rows.jsonl"), "eval_steps": 1, "save_steps": 1}
    recipe = recipe_for(checkpoints["qwen2_5_vl"], tmp_path, **fields)
    assert set(vision.run(recipe)) == {"adapter"}
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])


def test_the_workflow_refuses_what_cannot_train_before_it_writes(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="None of the 4 rows can train"):
        vision.run(recipe_for(checkpoints["gemma3"], tmp_path, max_seq_length=8))
    recipe = recipe_for(checkpoints["gemma3"], tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="row 3: There is no image .*2.png"):
        vision.run(recipe)
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_a_table_trains_as_it_is(checkpoints, tmp_path):
    model, processor = load(checkpoints["qwen2_5_vl"])
    model = FastVisionModel.get_peft_model(model, r=4)
    for seed in range(4):
        picture(seed).save(tmp_path / f"{seed}.png")
    messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "cat"}]
    table = [{"image": str(tmp_path / f"{seed}.png"), "messages": messages} for seed in range(4)]
    data = Dataset.from_list(table)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Rows are left out")
        losses = train(model, processor, data, output_dir=str(tmp_path / "run"), steps=4)
    assert losses[-1] < losses[0]


def test_mllama_refuses_a_mixed_batch(checkpoints):
    model, processor = load(checkpoints["mllama"])
    text = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(UnsupportedError, match="cannot mix"):
        VisionDataCollator(model, processor)([picture_row(0), text])
