"""What a user holds: FastLanguageModel and the methods of the models it gives."""

import io
import pickle
import re
import warnings

import pytest
import torch
from tiny import save_tiny

from luthier import FastLanguageModel, FastModel, PatchFastRL, SamplingParams, accelerate, restore


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny("llama3", tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapted(directory):
    model, tokenizer = FastLanguageModel.from_pretrained(directory, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.5)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, tokenizer


def test_a_whole_model_is_pickled_once_it_is_restored(adapted):
    model, tokenizer = adapted
    for write in (pickle.dumps, lambda whole: torch.save(whole, io.BytesIO())):
        with pytest.raises(pickle.PicklingError, match=r"luthier\.restore\(model\)"):
            write(model)
    again = pickle.loads(pickle.dumps(restore(model.eval())))
    inputs = tokenizer("The import statement", return_tensors="pt")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    generated = again.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert again.save_pretrained_merged.args[0] is again and again.get_base_model().generate.args[0] is again.get_base_model()


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_without_a_switch_and_padded_on_either_side(adapted, side):
    model, tokenizer = adapted
    texts = ["The try statement", "A much longer prompt than the other one is", "x"]
    model.train()
    alone = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        alone.append(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :])
    tokenizer.padding_side = side
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for one, row in zip(alone, together, strict=True):
        assert one.tolist() == row[: len(one)].tolist()
    assert model.training and all(module.training for module in model.modules())


def test_modes(adapted):
    model, _ = adapted
    assert FastLanguageModel.for_inference(model) is model and not model.training
    assert not model.get_base_model().is_gradient_checkpointing
    assert FastLanguageModel.for_training(model, use_gradient_checkpointing=True) is model and model.training
    assert model.get_base_model().is_gradient_checkpointing


def test_fast_generate_with_a_saved_adapter(adapted, tmp_path):
    model, tokenizer = adapted
    params = SamplingParams(temperature=0, max_tokens=5)
    own = model.fast_generate(["The try statement"], params)[0].outputs[0]
    model.save_lora(tmp_path / "lora")
    again = model.fast_generate(["The try statement"], params, lora_request=model.load_lora(tmp_path / "lora"))[0].outputs[0]
    assert own.token_ids == again.token_ids and len(own.token_ids) == 5


def test_an_adapter_keeps_the_positions_it_was_trained_over(directory, tmp_path):
    with pytest.warns(UserWarning, match="RoPE scaling"):
        model, tokenizer = FastLanguageModel.from_pretrained(directory, max_seq_length=1024)
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, _ = FastModel.from_pretrained(tmp_path / "adapter")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.luthier.max_seq_length == 1024
    ids = tokenizer("The try statement specifies", return_tensors="pt")["input_ids"]
    assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


def test_an_adapter_over_native_positions_writes_nothing_more(adapted, tmp_path):
    adapted[0].save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "rope_scaling.json").exists()


def test_acceleration_is_undone_by_one_call(adapted):
    model, tokenizer = adapted
    ids = tokenizer("The try statement specifies", return_tensors="pt")["input_ids"]
    classes = {type(module) for module in model.modules()}
    before = model.eval()(ids).logits
    restore(model)
    stock = {type(module) for module in model.modules()}
    assert stock != classes
    torch.testing.assert_close(model(ids).logits, before)
    accelerate(model)
    assert {type(module) for module in model.modules()} == classes


def test_patch_fast_rl_says_that_nothing_is_needed(capsys):
    PatchFastRL("GRPO", FastLanguageModel)
    assert "no patch is needed" in capsys.readouterr().err


FIRST_STEP = r"First step [\d.]+ s after loading began: [\d.]+ s loading, [\d.]+ s adapters, [\d.]+ s first step"


def first_steps(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("First step")]


def test_a_loop_of_ones_own_hears_once_how_long_the_first_step_took(adapted, capsys):
    model, _ = adapted
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        model.train()(input_ids=ids)
    for expected in (0, 1, 0):
        model(input_ids=ids, labels=ids).loss.backward()
        said = first_steps(capsys)
        assert len(said) == expected and all(re.match(FIRST_STEP, line) for line in said)


def test_a_trainer_says_it_after_all_batches_of_a_step(adapted, tmp_path, capsys):
    from runs import token_rows, trainer

    run = trainer(adapted[0], tmp_path, token_rows(8), gradient_accumulation_steps=2, max_steps=2)
    run.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("First step", "step "))]
    assert [line.startswith("First step") for line in lines] == [True, False, False]
    run.train()
    assert not first_steps(capsys)
