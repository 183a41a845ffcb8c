"""Adapters: what gets one, that it is reproducible and in fp32, and what is refused by name."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from stock_pairs import difference
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from luthier.errors import UnsupportedError
from luthier.model.experts import ExpertsLora, Nf4Experts
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model

IDS = torch.arange(5, 45)[None]
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family="llama3"):
        return root / family if (root / family).exists() else tiny.save_tiny(family, root / family)

    return directory


def adapted(model):
    """The paths of the modules that have an adapter, without the prefix of peft."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    names = {name.removeprefix("base_model.model.").split(".lora_")[0].split(".modules_to_save")[0] for name in names}
    return {name.replace(".base_layer", "") for name in names}


def linear_layers(family, *last):
    last = last or USUAL
    return {f"model.layers.{i}.{'mlp' if n[0] in 'gud' else 'self_attn'}.{n}" for i in range(2) for n in last}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("precision", ["nf4", "16bit"])
def test_every_family_trains_in_fp32_on_every_linear_layer(checkpoints, family, precision):
    model, _ = load_model(checkpoints(family), dtype="bfloat16", load_in_16bit=precision == "16bit")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model = get_peft_model(model, r=4)
    linears = {
        name.replace(".base_layer", "")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and name != "lm_head"
    }
    stacks = {f"model.layers.{i}.mlp.experts" for i in range(2)} if family in MIXTURES else set()
    assert adapted(model) == linears | stacks
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    start = {name: p.clone() for name, p in trainable.items()}
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert not [name for name, p in trainable.items() if torch.equal(p, start[name])]
    frozen = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(frozen[name], parameter) for name, parameter in before.items())


def test_the_first_output_is_the_base_models_and_the_seed_decides_the_rest(checkpoints):
    def weights(seed):
        torch.manual_seed(seed * 100)  # the state outside does not matter, and is not changed
        state = torch.get_rng_state()
        model = get_peft_model(load_model(checkpoints(), load_in_16bit=True)[0], r=4, random_state=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return model, torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    (model, first), (_, again), (_, other) = weights(1), weights(np.int64(1)), weights(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    stock = AutoModelForCausalLM.from_pretrained(checkpoints())
    assert torch.equal(model.eval()(IDS).logits, stock(IDS).logits)


def test_layers_can_be_chosen(checkpoints):
    def chosen(family="llama3", **arguments):
        return adapted(get_peft_model(load_model(checkpoints(family), load_in_16bit=True)[0], r=2, **arguments))

    last = {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")}
    assert chosen(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]) == last
    assert chosen(target_modules=["q_proj", "v_proj"], finetune_last_n_layers=1) == last
    assert chosen(target_modules=r".*\.1\.self_attn\.[qv]_proj") == last
    assert chosen(target_modules=["model.layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]) == last
    assert "model.layers.1.mlp.experts" in (experts := chosen("mixtral", finetune_last_n_layers=1))
    assert not any(".0." in name for name in experts)


def test_parts_can_be_chosen(checkpoints):
    def chosen(**arguments):
        return adapted(get_peft_model(load_model(checkpoints(), load_in_16bit=True)[0], r=2, **arguments))

    attention = linear_layers("llama3", "q_proj", "k_proj", "v_proj", "o_proj")
    assert chosen(finetune_mlp_modules=False) == attention
    assert chosen(finetune_attention_modules=False) == linear_layers("llama3") - attention
    assert chosen(finetune_vision_layers=False) == linear_layers("llama3")
    for arguments in (
        {"finetune_attention_modules": False, "finetune_mlp_modules": False},
        {"finetune_vision_layers": False, "finetune_language_layers": False},
        {"finetune_language_layers": False},
    ):
        with pytest.raises(ValueError, match="nothing would train"):
            chosen(**arguments)


# Mixtures of experts


@pytest.mark.parametrize("family", MIXTURES)
def test_the_usual_list_of_targets_reaches_the_experts(checkpoints, family):
    model = get_peft_model(load_model(checkpoints(family))[0], r=2, target_modules=USUAL)
    experts = model.get_base_model().model.layers[0].mlp.experts
    assert isinstance(experts, ExpertsLora) and isinstance(experts.get_base_layer(), Nf4Experts)
    assert {experts.parameter_name, experts.base_layer.parameter_name} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", MIXTURES)
def test_4bit_experts_with_an_adapter_compute_what_peft_computes_over_the_expanded_weights(checkpoints, family, tmp_path):
    from peft import PeftModel

    from luthier.ops.nf4 import dequantise, quantised

    model, _ = load_model(checkpoints(family))
    model = get_peft_model(model, r=2, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters():
            if hasattr(parameter, "quant_state"):
                plain.get_parameter(name.replace(".base_layer", "")).copy_(dequantise(quantised(parameter)))
    plain = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    gradients = []
    for one in (model, plain):
        loss = one.train()(IDS, labels=IDS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    assert any("experts" in name for name in gradients[0])
    assert difference(*gradients) < 2e-5
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("arguments", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_experts_cannot_have_is_said(checkpoints, arguments):
    model, _ = load_model(checkpoints("mixtral"), load_in_16bit="init_lora_weights" in arguments)
    with pytest.warns(UserWarning, match=f"experts get no adapter.*{next(iter(arguments))}"):
        model = get_peft_model(model, r=2, **arguments)
    assert not any("experts" in name for name in adapted(model))


def test_an_initialisation_that_experts_cannot_have_is_refused_where_they_are_named(checkpoints):
    model, _ = load_model(checkpoints("mixtral"), load_in_16bit=True)
    with pytest.raises(UnsupportedError, match="'pissa' for target_parameters"):
        get_peft_model(model, r=2, init_lora_weights="pissa", target_parameters=["experts.down_proj"])


# Refused


def test_a_second_call_is_the_same_adapter_or_an_error(checkpoints):
    model = get_peft_model(load_model(checkpoints())[0], r=4)
    assert get_peft_model(model, r=4) is model
    with pytest.raises(ValueError, match=r"r=8 \(it has 4\)"):
        get_peft_model(model, r=8)
    with pytest.raises(ValueError, match="target_modules=.*use_rslora=True"):
        get_peft_model(model, r=4, target_modules=["q_proj"], use_rslora=True)


def test_a_loaded_adapter_may_be_asked_for_again(checkpoints, tmp_path):
    get_peft_model(load_model(checkpoints())[0], r=4, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert get_peft_model(model, r=4, modules_to_save=["lm_head"]) is model
    with pytest.raises(ValueError, match="modules_to_save"):
        get_peft_model(model, r=4)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"r": 0}, ValueError, "r is 0.*at least 1"),
        ({"r": -4}, ValueError, "r is -4"),
        ({"r": 2.5}, TypeError, "2.5"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, not '16'"),
        ({"use_dora": "yes"}, TypeError, "use_dora must be True or False, not 'yes'"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"bias": "some"}, ValueError, "'some'.*all, lora_only, none"),
        ({"target_modules": ["q_prj"]}, ValueError, "'q_prj'.*Did you mean 'q_proj'.*down_proj, gate_proj, k_proj"),
        ({"target_modules": "q_proj"}, ValueError, "regular expression.*q_proj"),
        ({"target_modules": "(q_proj"}, ValueError, "'\\(q_proj' is no regular expression"),
        ({"target_modules": []}, ValueError, "nothing to train"),
        ({"rank_pattern": {"q_prj": 4}}, ValueError, "rank_pattern 'q_prj'.*Did you mean 'q_proj'"),
        ({"modules_to_save": ["lm_haed"]}, ValueError, "'lm_haed'.*Did you mean 'lm_head'"),
        ({"modules_to_save": "lm_head"}, TypeError, "list"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ValueError, "target parameter"),
        ({"layers_to_transform": [2]}, ValueError, "layers 0 to 1"),
        ({"finetune_last_n_layers": 3}, ValueError, "has 2 layers"),
        ({"finetune_last_n_layers": 1, "layers_to_transform": [0]}, ValueError, "choose one"),
        ({"lora_alfa": 3}, TypeError, "'lora_alfa'.*Did you mean 'lora_alpha'"),
        ({"loftq_config": {"loftq_bits": 4}}, UnsupportedError, "quantised already"),
        ({"init_lora_weights": "loftq"}, UnsupportedError, "quantised already"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "'pissa' changes the base"),
        ({"use_gradient_checkpointing": "some"}, ValueError, "'some'"),
    ],
)
def test_a_wrong_argument_is_named_before_the_model_changes(checkpoints, arguments, kind, words):
    model, _ = load_model(checkpoints())
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(kind, match=words):
        get_peft_model(model, **arguments)
    assert [name for name, _ in model.named_modules()] == names


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match="got str"):
        get_peft_model("model")


def test_the_adapter_stays_in_fp32_under_trls_own_trainer(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints())
    model = get_peft_model(model, r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    arguments = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    rows = Dataset.from_list([{"text": "How are you?"}] * 2)
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path), **arguments), train_dataset=rows, processing_class=tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}  # TRL's doing
    trainer.train()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    states = [state["exp_avg"] for state in trainer.optimizer.optimizer.state.values()]
    assert len(states) == len(trained) and {state.dtype for state in states} == {torch.float32}


def test_dora_on_a_layer_that_peft_would_read_wrongly_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.BASE, "intermediate_size", 96)
    model, _ = load_model(tiny.save_tiny("llama3", tmp_path))
    with pytest.raises(UnsupportedError, match="multiples of 64"):
        get_peft_model(model, use_dora=True)


# Whole modules


@pytest.mark.parametrize("family", ["llama3", "llama3.1"])
def test_embeddings_and_head_train_whole_and_stay_tied_if_they_were(checkpoints, family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(load_model(checkpoints(family))[0], r=2, modules_to_save=["embed_tokens", "lm_head"])
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings.weight.requires_grad and head.weight.requires_grad
    assert (embeddings.weight is head.weight) == (family == "llama3.1")


def test_every_bias_can_train(checkpoints):
    model = get_peft_model(load_model(checkpoints("qwen2"))[0], r=2, bias="all")
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))
