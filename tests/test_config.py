"""Recipes: what is in them, what is refused, and that those which are shipped are right."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from luthier.config import GRPORecipe, SFTRecipe, VisionRecipe, load_options, load_recipe, make_recipe, schema
from luthier.errors import UnsupportedError
from luthier.model.memory import estimate

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KINDS = {"sft": SFTRecipe, "grpo": GRPORecipe, "vision": VisionRecipe}
SHIPPED = sorted(RECIPES.glob("*.yaml"))
# Sizes of the models that the recipes name, as their configs on the hub say
MODELS = {
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", 128256, 8192, 28672, 80, 64, 8, 128, False),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("head_dim", "tie_word_embeddings")


def kind_of(path):
    return KINDS[path.stem.split("-")[0]]


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(path):
    """It loads, its keys are written as the schema knows them, and it says how it is run."""
    kind = kind_of(path)
    recipe = load_recipe(path, kind)
    assert recipe.model
    text = path.read_text()
    command = path.stem.split("-")[0]
    assert text.startswith(f"# yaml-language-server: $schema=schema/{command}.schema.json\n")
    assert f"luthier {command} recipes/{path.name}" in text
    properties = json.loads(schema(kind))["properties"]
    assert set(yaml.safe_load(text)) <= set(properties)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.startswith("sft-")], ids=lambda path: path.stem)
def test_memory_that_a_recipe_states(path):
    recipe = load_recipe(path, SFTRecipe)
    kind, *sizes = MODELS[recipe.model]
    config = AutoConfig.for_model(kind, **dict(zip(SIZES, sizes, strict=True)))
    settings = {"r": recipe.r, "optim": recipe.optim, "precision": "nf4" if recipe.load_in_4bit else "16bit"}
    found = estimate(config, batch_tokens=recipe.max_seq_length * recipe.per_device_train_batch_size, **settings)
    assert f"{found.total / 2**30:.0f} GiB with every layer recomputed" in path.read_text()
    card = int(re.search(r"(\d+)gb$", path.stem)[1]) * 1e9 / 2**30
    assert found.total / 2**30 < recipe.memory_budget < card


def test_three_sizes_and_two_other_workflows_are_there():
    assert {path.stem for path in SHIPPED} >= {"sft-0.6b-8gb", "sft-8b-24gb", "sft-70b-80gb", "grpo", "vision"}


@pytest.mark.parametrize("name", KINDS)
def test_schemas_are_current(name):
    path = RECIPES / "schema" / f"{name}.schema.json"
    again = f"from luthier import config; print(config.schema(config.{KINDS[name].__name__}), end='')"
    assert path.read_text() == schema(KINDS[name]), f'write it again: python -c "{again}" > recipes/schema/{path.name}'


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_field_is_described(kind):
    properties = json.loads(schema(kind))["properties"]
    assert [entry.name for entry in dataclasses.fields(kind)] == list(properties)
    assert not [name for name, entry in properties.items() if not entry.get("description")]


def test_values_are_read_as_their_types(tmp_path):
    text = "r: 8\nlearning_rate: 1e-4\ngguf: [q8_0]\nuse_gradient_checkpointing: true\nload_in_8bit: yes"
    recipe = load_recipe(write(tmp_path, text), SFTRecipe)
    assert (recipe.r, recipe.learning_rate, recipe.gguf, recipe.load_in_8bit) == (8, 1e-4, ["q8_0"], True)
    assert recipe.checkpointing() is True


def test_names_in_one_text_are_a_list_of_names(tmp_path):
    recipe = load_recipe(write(tmp_path, "gguf: q8_0, q4_k_m\ntarget_modules: q_proj\nreport_to: tensorboard"), SFTRecipe)
    assert (recipe.gguf, recipe.target_modules, recipe.report_to) == (["q8_0", "q4_k_m"], ["q_proj"], ["tensorboard"])
    recipe = load_recipe(write(tmp_path, "target_modules: all-linear\nreport_to: none"), SFTRecipe)
    assert (recipe.target_modules, recipe.report_to) == ("all-linear", "none")

    def export(model: str, quant: list[str] | None = None) -> None: ...

    assert load_options(write(tmp_path, "model: a, b\nquant: q8_0 q6_k"), export) == {
        "model": "a, b",
        "quant": ["q8_0", "q6_k"],
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rat": 1}, "Unknown key in recipe: 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"r": 0}, "r is 0: it must be at least 1"),
        ({"r": "many"}, "r = 'many'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both set"),
        ({"full_finetuning": True, "load_in_4bit": True}, "load_in_4bit and full_finetuning are both set"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"warmup_ratio": 5}, "warmup_ratio is 5"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_data"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type = 'cosin'"),
        ({"save_method": "merged"}, "save_method = 'merged'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(keys, SFTRecipe)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (GRPORecipe, {"num_generations": 1}, "num_generations is 1"),
        (GRPORecipe, {"rewards": ["a.py:f"], "reward_weights": [1, 2]}, "reward_weights has 2 entries for 1 rewards"),
        (GRPORecipe, {"temperature": 0}, "temperature is 0"),
        (GRPORecipe, {"packing": True}, "Unknown key in recipe: 'packing'"),
        (VisionRecipe, {"finetune_vision_layers": False, "finetune_language_layers": False}, "nothing would train"),
        (VisionRecipe, {"finetune_attention_modules": False, "finetune_mlp_modules": False}, "nothing would train"),
    ],
)
def test_wrong_values_of_the_other_workflows(kind, keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(keys, kind)


def test_unsupported_together():
    with pytest.raises(UnsupportedError, match="use_dora"):
        SFTRecipe(full_finetuning=True, use_dora=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and values"),
        ("- a\n- b\n", "must hold keys and values"),
        ("model: [", "is not valid YAML"),
        ("learning_rate: 1e-4\nr: 8\nlearning_rate: 2e-4\n", "the key 'learning_rate' is there twice"),
        ("model: a\nmodle: b\n", "'modle'. Did you mean 'model'?"),
        ("r: 0\n", "r is 0"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as raised:
        load_recipe(path, SFTRecipe)
    assert str(path) in str(raised.value) and message in str(raised.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml", SFTRecipe)


def test_what_a_run_cannot_do_without():
    with pytest.raises(ValueError, match="model, data.*--model, --data"):
        SFTRecipe().require("model", "data")
