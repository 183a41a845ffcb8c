"""Loading: every precision, adapters, lengths, and what bad input is told before a weight is read."""

import json
import shutil
import struct
import warnings

import bitsandbytes as bnb
import fake_hub
import pytest
import tiny
import tiny_vision
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2_5_VLConfig

from luthier.errors import UnsupportedError
from luthier.model.experts import expert_stacks
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.precision import choose_dtype, is_bfloat16_supported
from luthier.model.save import save_pretrained_merged
from luthier.ops.nf4 import dequantise, quantised

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function from family to the directory of its tiny checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family="llama3", **options):
        path = root / "-".join([family, *map(str, options.values())])
        return path if path.exists() else tiny.save_tiny(family, path, **options)

    return directory


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of a good checkpoint, to break."""
    return shutil.copytree(checkpoints(), tmp_path / "model")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_16bit_load_is_the_stock_model(checkpoints, family):
    model, tokenizer = load_model(checkpoints(family), load_in_16bit=True)
    ours = family in ("gemma2", "gpt_oss")  # whose soft caps and sinks transformers has in eager alone
    stock = AutoModelForCausalLM.from_pretrained(checkpoints(family), attn_implementation="eager" if ours else None)
    assert model.luthier.precision == "16bit" and model.dtype == torch.float32
    assert model.config._attn_implementation == ("luthier" if ours else stock.config._attn_implementation)
    difference = (model(IDS).logits - stock(IDS).logits).abs().max()
    assert difference == 0 or (ours and difference < 1e-5)
    assert tokenizer("Hello").input_ids == tiny.tiny_tokenizer()("Hello").input_ids


@pytest.mark.parametrize("family", ["llama3", "phi3", "mixtral", "gpt_oss"])
def test_nf4_is_the_default_and_computes_with_the_weights_it_holds(checkpoints, family):
    model, _ = load_model(checkpoints(family))
    assert model.luthier.precision == "nf4" and model.is_loaded_in_4bit
    stock = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    quantised = {name: p for name, p in model.named_parameters() if isinstance(p, bnb.nn.Params4bit)}
    assert {"lm_head.weight", "model.embed_tokens.weight"}.isdisjoint(quantised)
    assert set(expert_stacks(stock)) <= set(quantised)
    with torch.no_grad():
        for name, parameter in quantised.items():
            assert parameter.quant_state.nested and parameter.quant_type == "nf4"
            stock.get_parameter(name).copy_(bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state))
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)


def test_8bit_alone_just_works(checkpoints):
    model, _ = load_model(checkpoints(), load_in_8bit=True)
    assert model.luthier.precision == "int8"
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    assert model(IDS).logits.isfinite().all()


def test_full_finetuning_trains_every_weight(checkpoints):
    model, _ = load_model(checkpoints(), full_finetuning=True, dtype="bfloat16")
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    with pytest.warns(UserWarning, match="no adapter"):
        assert get_peft_model(model) is model


@pytest.mark.parametrize(
    "flags",
    [
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_8bit": True, "load_in_16bit": True},
        {"full_finetuning": True, "load_in_4bit": True},
        {"full_finetuning": True, "load_in_8bit": True},
    ],
)
def test_two_precisions_are_an_error(checkpoints, flags):
    with pytest.raises(ValueError, match="choose one") as error:
        load_model(checkpoints(), **flags)
    assert all(flag in str(error.value) for flag in flags)


def test_the_dtype_follows_the_device(checkpoints, monkeypatch):
    assert choose_dtype(None) == (torch.float32 if not torch.cuda.is_available() else choose_dtype("bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not is_bfloat16_supported() and choose_dtype(None) == torch.float16
    with pytest.warns(UserWarning, match="no bfloat16"):
        assert choose_dtype("bfloat16") == torch.float16
    with pytest.raises(ValueError, match="Did you mean 'bfloat16'"):
        choose_dtype("bflot16")
    with pytest.raises(ValueError, match="int8"):
        choose_dtype(torch.int8)


# Lengths


def test_a_length_within_reach_changes_nothing(checkpoints):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_model(checkpoints(), load_in_16bit=True, max_seq_length=512)
        longer, _ = load_model(checkpoints(), load_in_16bit=True)
    assert model.config.rope_parameters["rope_type"] == longer.config.rope_parameters["rope_type"] == "default"
    assert longer.luthier.max_seq_length == 512, "the default of 2048 never goes beyond the model's own length"


@pytest.mark.parametrize(
    ("family", "kind", "factor"),
    [("llama3", "linear", 4.0), ("llama3.1", "llama3", 16.0), ("gpt_oss", "yarn", 16.0)],
)
def test_a_length_beyond_reach_stretches_the_positions(checkpoints, family, kind, factor):
    with pytest.warns(UserWarning, match=f"native 512.*{kind}"):
        model, _ = load_model(checkpoints(family), load_in_16bit=True, max_seq_length=2048)
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], model.config.max_position_embeddings) == (kind, factor, 2048)
    stock = AutoModelForCausalLM.from_pretrained(checkpoints(family))
    assert not torch.equal(model(IDS).logits, stock(IDS).logits)


def test_only_full_attention_is_stretched_beside_sliding_windows(checkpoints):
    with pytest.warns(UserWarning, match="linear"):
        model, _ = load_model(checkpoints("gemma3"), load_in_16bit=True, max_seq_length=1024)
    assert model.config.rope_parameters["full_attention"]["factor"] == 2.0
    assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_rope_scaling_is_taken_as_given(checkpoints):
    model, _ = load_model(checkpoints(), load_in_16bit=True, rope_scaling={"type": "dynamic", "factor": 3.0})
    assert model.config.rope_parameters["rope_type"] == "dynamic" and model.config.rope_parameters["factor"] == 3.0
    with pytest.raises(TypeError, match="rope_type"):
        load_model(checkpoints(), rope_scaling=2.0)
    for wrong, words in (
        ({"type": "lineal", "factor": 2.0}, "Unknown rope_type 'lineal'. Did you mean 'linear'"),
        ({"type": "linear", "factor": 0.5}, "factor of rope_scaling is 0.5"),
        ({"type": "linear"}, "not whole.*'factor'"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(checkpoints(), rope_scaling=wrong)


# Adapters


@pytest.fixture
def adapter(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints(), load_in_16bit=True)
    model = get_peft_model(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.eval()(IDS).logits.detach()


def test_an_adapter_directory_gives_its_base_with_the_adapter_trainable(adapter):
    directory, logits = adapter
    model, _ = load_model(directory, load_in_16bit=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert torch.equal(model.eval()(IDS).logits, logits)
    assert model.luthier.model_name == str(directory)


def test_an_adapter_whose_base_is_gone_names_both_paths(adapter):
    directory, _ = adapter
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(FileNotFoundError, match="/gone/base") as error:
        load_model(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("family", "changed", "tensors", "words"),
    [
        ("llama3", {"r": 8}, None, "size mismatch.*lora_A"),
        ("llama3", {"r": 0}, None, "positive"),
        ("llama3", {"peft_type": "LORRA"}, None, "Did you mean 'LORA'"),
        ("llama3", {}, lambda tensors: dict([*tensors.items()][:4]), "24 are missing"),
        ("llama3", {}, lambda tensors: tensors | {"base_model.model.model.layers.7.x": torch.ones(1)}, "layers.7.x.*no place"),
        ("phi3", {}, None, "does not fit"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, checkpoints, family, changed, tensors, words):
    directory, _ = adapter
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(checkpoints(family)), **changed}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        weights = directory / "adapter_model.safetensors"
        save_file(tensors(load_file(weights)), weights)
    with pytest.raises(ValueError, match=words):
        load_model(directory, load_in_16bit=True)


def test_of_a_model_and_an_adapter_in_one_directory_the_adapter_wins_only_on_its_own_base(adapter, broken, checkpoints):
    directory, logits = adapter
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(directory / name, broken / name)
    with pytest.raises(ValueError, match="full model and an adapter"):
        load_model(broken, load_in_16bit=True)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(broken)}))
    model, _ = load_model(broken, load_in_16bit=True)
    assert torch.equal(model.eval()(IDS).logits, logits)


# Quantised checkpoints


def test_a_quantised_checkpoint_is_loaded_as_it_is(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints())
    model.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, _ = load_model(tmp_path / "nf4")
    assert again.luthier.precision == "nf4" and torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.warns(UserWarning, match="stored quantised"):
        load_model(tmp_path / "nf4", load_in_16bit=True)
    with pytest.raises(ValueError, match="stored quantised"):
        load_model(tmp_path / "nf4", full_finetuning=True)


def test_mxfp4_experts_are_dequantised_with_a_warning(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints("gpt_oss", dtype=torch.bfloat16), tmp_path / "mxfp4")
    from safetensors.torch import load_file, save_file

    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inner, outer = tensors.pop(name).shape
        blocks = (experts, outer, inner // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, blocks[:3], generator=generator, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.warns(UserWarning, match="MXFP4"):
        model, _ = load_model(directory)
    stack = model.model.layers[0].mlp.experts.down_proj
    assert stack.dtype.is_floating_point and stack.unique().numel() > 8
    assert model(IDS).logits.isfinite().all()


# Bad input


@pytest.mark.parametrize("precision", ["load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"])
def test_what_could_train_without_an_adapter(checkpoints, precision):
    trained = [parameter.requires_grad for parameter in load_model(checkpoints(), **{precision: True})[0].parameters()]
    assert all(trained) if precision in ("load_in_16bit", "full_finetuning") else not any(trained)


def test_an_unknown_argument_is_named_with_its_nearest(checkpoints):
    with pytest.raises(TypeError, match="'load_in_4bits'.*Did you mean 'load_in_4bit'"):
        load_model(checkpoints(), load_in_4bits=True)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "words"),
    [
        ("max_seq_length", 0, ValueError, "at least 1"),
        ("max_seq_length", "2048", TypeError, "'2048'"),
        ("memory_budget", -1, ValueError, "GiB"),
        ("compute", "fp16", ValueError, "bf16"),
        ("load_in_fp8", True, UnsupportedError, "not in this version"),
        ("gpu_memory_utilization", 1.5, ValueError, "at most 1"),
        ("use_gradient_checkpointing", "of", ValueError, "offload"),
        ("use_safetensors", False, ValueError, "pickle"),
        ("resize_model_vocab", 100, ValueError, "never made smaller"),
    ],
)
def test_a_wrong_value_is_named(checkpoints, argument, value, kind, words):
    with pytest.raises(kind, match=words):
        load_model(checkpoints(), **{argument: value})


def test_a_name_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing/here/at/all"):
        load_model("nothing/here/at/all")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_model(tmp_path / "file")


def test_a_directory_without_a_model(tmp_path, broken):
    with pytest.raises(FileNotFoundError, match="neither config.json nor adapter_config.json"):
        load_model(tmp_path)
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model weights"):
        load_model(broken)
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="only as pickle.*safetensors version"):
        load_model(broken)


def test_a_broken_generation_config_is_named(broken):
    (broken / "generation_config.json").write_text('{"eos_token_id": 4')
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(broken, keep):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors.*truncated"):
        load_model(broken)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]  ", b'{"a": {"dtype": "F32", "shape": [1]}}  '])
def test_safetensors_that_are_something_else(broken, header):
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(ValueError, match="model.safetensors.*damaged"):
        load_model(broken)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [("num_hidden_layers", 3, "model.layers.2.*9 tensors are missing"), ("intermediate_size", 256, "another shape")],
)
def test_weights_that_are_not_the_configs_are_refused(broken, setting, value, words):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(ValueError, match=words):
        load_model(broken, load_in_16bit=True)


@pytest.mark.parametrize(("setting", "value"), [("hidden_size", "64"), ("num_attention_heads", 3)])
def test_a_config_that_describes_no_model(broken, setting, value):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(ValueError, match=r"config.json describes no model: .*(hidden_size|attention heads)"):
        load_model(broken)


def test_weights_that_the_model_does_not_read_are_named(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match="9 tensors.*left out.*model.layers.1"):
        load_model(broken, load_in_16bit=True)


def test_a_missing_shard_is_named(tmp_path):
    directory = tiny.save_tiny("llama3", tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(directory)


def test_a_broken_config(broken):
    text = (broken / "config.json").read_text()
    (broken / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="config.json is not valid JSON.*line"):
        load_model(broken)


def test_an_unknown_architecture(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(ValueError, match="unknown architecture, model_type 'lama'"):
        load_model(broken)
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "lama", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(broken)
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(ValueError, match="not a language model"):
        load_model(broken)


def test_a_vision_model_says_which_class_loads_it(broken):
    Qwen2_5_VLConfig().save_pretrained(broken)
    with pytest.raises(ValueError, match="FastVisionModel"):
        load_model(broken)


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3"])
@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_the_language_part_of_a_vision_model_loads_and_merges_alone(tmp_path, family, base):
    directory = tiny_vision.save_tiny_vision(family, tmp_path / "vision")
    whole = AutoModelForImageTextToText.from_pretrained(directory)
    model, tokenizer = load_model(directory, text_only=True, load_in_16bit=True)
    assert torch.equal(model(IDS).logits, whole(input_ids=IDS).logits)
    model, tokenizer = load_model(directory, text_only=True)
    model = get_peft_model(model, r=2)  # which changes nothing yet
    save_pretrained_merged(model, tmp_path / "text", tokenizer, base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    expected = whole.model.language_model.state_dict()
    if base == "nf4":
        weights = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().model.named_parameters()}
        held = {name: dequantise(quantised(p)) for name, p in weights.items() if isinstance(p, bnb.nn.Params4bit)}
        assert held.keys() < expected.keys()
        expected |= held
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in merged.model.state_dict().items())


def test_custom_code_runs_only_if_it_is_trusted_and_is_saved_with_the_model(broken, tmp_path):
    (broken / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "own", "auto_map": names}
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(broken)
    model, tokenizer = load_model(broken, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    save_pretrained_merged(get_peft_model(model, r=2), tmp_path / "out", tokenizer)
    again, _ = load_model(tmp_path / "out", trust_remote_code=True, load_in_16bit=True)
    assert type(again).__name__ == "OwnForCausalLM"


def test_a_directory_without_a_tokenizer(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        load_model(broken)


# The Hub


def test_a_hub_model_is_loaded_and_found_again_offline(checkpoints, tmp_path, monkeypatch):
    with fake_hub.running(monkeypatch) as hub:
        hub.repositories["me/tiny"] = {file.name: file.read_bytes() for file in checkpoints().iterdir()}
        hub.repositories["me/tiny"]["original/other.safetensors"] = b"not needed"
        model, _ = load_model("me/tiny", cache_dir=tmp_path, load_in_16bit=True)
        assert not any("other.safetensors" in request for request in hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again, _ = load_model("me/tiny", cache_dir=tmp_path, load_in_16bit=True)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert again.config._name_or_path == again.luthier.base_name == "me/tiny"
    with pytest.raises(ConnectionError, match="not in the local Hub cache"):
        load_model("me/other", cache_dir=tmp_path)


def test_what_the_hub_refuses_is_explained(checkpoints, tmp_path, monkeypatch):
    with fake_hub.running(monkeypatch) as hub:
        hub.repositories |= {"me/tiny": {}, "me/gated": {}}
        hub.gated.add("me/gated")
        with pytest.raises(FileNotFoundError, match="'me/none'"):
            load_model("me/none", cache_dir=tmp_path)
        with pytest.raises(PermissionError, match="me/gated is gated.*token="):
            load_model("me/gated", cache_dir=tmp_path)
        with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
            load_model("me/tiny", cache_dir=tmp_path, revision="v9")
        hub.repositories["me/tiny"] = {"config.json": (checkpoints() / "config.json").read_bytes()}
        with pytest.raises(FileNotFoundError, match="no model weights"):
            load_model("me/tiny", cache_dir=tmp_path)


def test_a_config_without_its_numbers_is_refused_before_a_model_is_made(tmp_path):
    """Its class's defaults are those of a model of 7 billion parameters, which would not fit here."""
    directory = tiny.save_tiny("llama3", tmp_path / "model")
    (directory / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="hidden_size 4096, but its weights are of 64"):
        load_model(directory)
