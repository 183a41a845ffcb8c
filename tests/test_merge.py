"""Merging: tensor by tensor against ``W + scale * B @ A`` in fp32 rounded once, and against peft over a plain base."""

import json
import warnings

import bitsandbytes as bnb
import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from luthier.errors import UnsupportedError
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.merge import Merge
from luthier.model.original import computing_with, original_weights
from luthier.model.save import save_pretrained_merged
from luthier.model.vocab import add_new_tokens
from luthier.ops.nf4 import dequantise, quantised

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function from family to the directory of its tiny bf16 checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(family="llama3"):
        return root / family if (root / family).exists() else tiny.save_tiny(family, root / family, dtype=torch.bfloat16)

    return directory


def trained(model, seed=0):
    """Every trainable parameter moved, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def plain_base(directory, model=None):
    """The base in plain transformers, fp32; with the 4-bit weights of ``model`` if it is given."""
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters() if model is not None else ():
            if isinstance(parameter, bnb.nn.Params4bit):
                plain.get_parameter(name.replace(".base_layer", "")).copy_(dequantise(quantised(parameter)))
    return plain


def merged_by_peft(plain, model, directory):
    model.save_pretrained(directory)
    return PeftModel.from_pretrained(plain, directory).merge_and_unload()


def assert_same_weights(model, reference):
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    differing = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name].to(tensor.dtype))
    ]
    assert not differing


def greedy(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("base", ["16bit", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_merges_to_what_peft_merges_over_the_same_base(checkpoints, tmp_path, family, base):
    model, tokenizer = load_model(checkpoints(family))
    model = trained(get_peft_model(model, r=4, use_rslora=True))
    save_pretrained_merged(model, tmp_path / "merged", tokenizer, base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    plain = plain_base(checkpoints(family), model if base == "nf4" else None)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints(family))  # .to(bfloat16) would round its RoPE tables too
    reference.load_state_dict(merged_by_peft(plain, model, tmp_path / "adapter").state_dict())
    assert_same_weights(merged, reference)
    assert greedy(merged) == greedy(reference)


def test_a_merged_weight_is_the_formula_rounded_once(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints("llama3"))
    model = trained(get_peft_model(model, r=4, lora_alpha=6))
    save_pretrained_merged(model, tmp_path, tokenizer)
    merged, original = load_file(tmp_path / "model.safetensors"), load_file(checkpoints("llama3") / "model.safetensors")
    assert merged.keys() == original.keys()
    layers = dict(model.get_base_model().named_modules())
    for name, weight in original.items():
        layer = layers[name.removesuffix(".weight")]
        expected = weight
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            expected = (weight.float() + 6 / 4 * (b @ a)).to(torch.bfloat16)
            assert not torch.equal(expected, weight)
        assert torch.equal(merged[name], expected), name


LINEAR = ["q_proj", "v_proj", "down_proj"]
VARIANTS = {
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 64}},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embeddings": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embeddings, dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": [*LINEAR, "lm_head"]},
    "tokens": {"trainable_token_indices": [7, 9, 30]},
    "some layers": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize(
    ("variant", "family"),
    [
        (variant, family)
        for variant in VARIANTS
        for family in ("qwen2", "llama3.1")
        if (variant, family) != ("lora_bias", "llama3.1")
    ],
)
def test_every_kind_of_adapter_computes_the_same_merged(checkpoints, tmp_path, variant, family):
    """In fp32, where the only difference left is the order of sums; qwen2 has biases, llama3.1 tied embeddings."""
    model, _ = load_model(checkpoints(family), load_in_16bit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(get_peft_model(model, **{"r": 4, "target_modules": LINEAR, **VARIANTS[variant]}))
    merged = written_in_fp32(Merge(model, dtype=torch.float32), tmp_path)
    expected = model(IDS).logits
    assert not torch.allclose(expected, plain_base(checkpoints(family))(IDS).logits)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def written_in_fp32(merge, directory):
    from luthier.model.save import merged_config

    merged_config(merge).save_pretrained(directory)
    save_file(dict(merge.tensors()), directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory)


def test_tied_embeddings_stay_tied_where_they_are_trained_as_one(checkpoints, tmp_path):
    model, _ = load_model(checkpoints("llama3.1"), load_in_16bit=True)
    model = trained(get_peft_model(model, r=4, modules_to_save=["embed_tokens"]))
    merge = Merge(model)
    assert not merge.is_untied and "lm_head.weight" not in dict(merge.tensors())
    model, _ = load_model(checkpoints("llama3.1"), load_in_16bit=True)
    merge = Merge(trained(get_peft_model(model, r=4, target_modules=["embed_tokens"])))
    assert merge.is_untied and "lm_head.weight" in dict(merge.tensors())


def test_two_active_adapters_add_up(checkpoints, tmp_path):
    model, _ = load_model(checkpoints(), load_in_16bit=True)
    model = get_peft_model(model, r=4, target_modules=LINEAR)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model = trained(model)
    merged = written_in_fp32(Merge(model, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama3", "llama3.1", "gemma3"])
@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_added_tokens_are_merged(checkpoints, tmp_path, family, base):
    model, tokenizer = load_model(checkpoints(family))
    ids = add_new_tokens(model, tokenizer, [f"<tool_{i}>" for i in range(40)])
    model = trained(get_peft_model(model, r=4))
    save_pretrained_merged(model, tmp_path, tokenizer, base=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.config.vocab_size == max(ids) + 1 == merged.get_input_embeddings().weight.shape[0]
    trained_rows = model.get_input_embeddings().weight.detach().to(torch.bfloat16)
    assert torch.equal(merged.get_input_embeddings().weight, trained_rows)
    assert torch.equal(merged.lm_head.weight, model.get_output_embeddings().weight.detach().to(torch.bfloat16))


def test_a_resized_vocabulary_without_training_is_saved(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints(), resize_model_vocab=512)
    save_pretrained_merged(trained(get_peft_model(model, r=4)), tmp_path, tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    original = plain_base(checkpoints()).to(torch.bfloat16)
    assert torch.equal(merged.lm_head.weight[:480], original.lm_head.weight)
    assert torch.equal(merged.lm_head.weight[511], original.lm_head.weight.float().mean(0).to(torch.bfloat16))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_experts_are_written_under_the_names_of_their_checkpoint(checkpoints, family, base):
    model, _ = load_model(checkpoints(family))
    model = trained(get_peft_model(model, r=2))
    original = load_file(checkpoints(family) / "model.safetensors")
    merged = dict(Merge(model, base).tensors())
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: tensor.shape for name, tensor in original.items()}
    experts = [name for name in original if "experts" in name and "bias" not in name]
    assert experts and not any(torch.equal(merged[name], original[name]) for name in experts)


def test_full_finetuning_saves_the_weights_in_memory(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints(), full_finetuning=True)
    save_pretrained_merged(trained(model), tmp_path, tokenizer)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_8bit_merges_onto_either_base(checkpoints, tmp_path):
    model, _ = load_model(checkpoints(), load_in_8bit=True)
    model = trained(get_peft_model(model, r=4))
    original = dict(Merge(model, "16bit").tensors())
    reference = merged_by_peft(plain_base(checkpoints()), model, tmp_path).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in original.items())
    for name, tensor in Merge(model, "nf4", torch.float32).tensors():
        steps = original[name].float().abs().amax() / 127 if tensor.ndim == 2 else 0
        assert (tensor - original[name].float()).abs().max() <= steps + original[name].abs().max() * 2**-8


def test_a_model_and_adapter_of_plain_transformers_and_peft_merge_too(checkpoints, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(checkpoints())
    model = trained(peft_get_peft_model(plain, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")))
    reference = merged_by_peft(plain_base(checkpoints()), model, tmp_path).to(torch.bfloat16)
    for name, tensor in Merge(model).tensors():
        assert torch.equal(tensor, reference.get_parameter(name))


@pytest.mark.parametrize(("precision", "use_dora"), [("load_in_4bit", False), ("load_in_4bit", True), ("load_in_8bit", False)])
def test_a_quantised_model_computes_with_its_original_weights(checkpoints, tmp_path, precision, use_dora):
    model, _ = load_model(checkpoints(), dtype=torch.float32, **{precision: True})
    model = trained(get_peft_model(model, r=4, lora_alpha=8, use_dora=use_dora))
    model.save_pretrained(tmp_path)
    exact = PeftModel.from_pretrained(plain_base(checkpoints()), tmp_path)
    before = model(IDS).logits
    weights = original_weights(Merge(model))
    assert len(weights) == 7 * model.config.num_hidden_layers
    with torch.no_grad(), computing_with(model, weights):
        torch.testing.assert_close(model(IDS).logits, exact(IDS).logits)
    assert not any({"forward", "get_weight_norm"} & vars(layer).keys() for layer in model.modules())
    assert torch.equal(model(IDS).logits, before) and not torch.allclose(before, exact(IDS).logits, atol=1e-3)


def test_experts_have_no_original_weights_one_by_one(checkpoints):
    model, _ = load_model(checkpoints("qwen3_moe"), load_in_4bit=True)
    assert original_weights(Merge(model)) is None


def test_merging_leaves_the_model_alone(checkpoints):
    model, _ = load_model(checkpoints())
    model = trained(get_peft_model(model, r=4))
    before = model(IDS).logits
    first, second = dict(Merge(model).tensors()), dict(Merge(model).tensors())
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Peak(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once."""

    def __init__(self, model):
        super().__init__()
        states = [parameter.quant_state for parameter in model.parameters() if isinstance(parameter, bnb.nn.Params4bit)]
        stored = [*(state.state2 for state in states), *states]
        scales = [tensor for state in stored for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)]
        self.old = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *scales]}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.old:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_the_stream_needs_the_same_memory_for_a_deeper_model(tmp_path, monkeypatch, family, base):
    peaks, sizes = [], []
    for depth in (2, 8):
        monkeypatch.setitem(tiny.BASE, "num_hidden_layers", depth)
        model, _ = load_model(tiny.save_tiny(family, tmp_path / str(depth)))
        model = trained(get_peft_model(model, r=2))
        with Peak(model) as memory:
            sizes.append(sum(tensor.nbytes for _, tensor in Merge(model, base, torch.float32).tensors()))
        peaks.append(memory.peak)
    assert 2 * sizes[0] < sizes[1] == Merge(model, base, torch.float32).size
    assert 480 * 64 * 4 <= peaks[1] <= peaks[0] < sizes[1] / 2, "the largest tensor at least, and no more for more layers"


# What cannot be merged


def test_what_cannot_be_merged_is_refused_by_name(checkpoints):
    model, _ = load_model(checkpoints(), load_in_16bit=True)
    ia3 = peft_get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="layers.0.self_attn.k_proj.*only LoRA"):
        Merge(ia3)
    model, _ = load_model(checkpoints(), load_in_16bit=True)
    model = get_peft_model(model, r=4, target_modules=["k_proj"])
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="k_proj already has its adapter merged"):
        Merge(model)
    with pytest.raises(ValueError, match="'16bits'.*Did you mean '16bit'"):
        Merge(model, "16bits")


def test_an_adapter_whose_base_was_changed_does_not_go_onto_the_original(checkpoints):
    model, _ = load_model(checkpoints())
    model = get_peft_model(model, r=4)
    model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(UnsupportedError, match="pissa.*base='nf4'"):
        Merge(model)
    assert Merge(model, "nf4").size > 0


def test_a_base_that_is_gone_is_named(checkpoints, tmp_path):
    directory = tiny.save_tiny("llama3", tmp_path / "base")
    model, _ = load_model(directory)
    directory.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base.*base='nf4'"):
        Merge(model)
    assert Merge(model, "nf4").size > 0


def test_a_checkpoint_that_exists_in_4_bits_only_takes_nf4_with_a_warning(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints())
    model.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    model, _ = load_model(tmp_path / "nf4")
    model = trained(get_peft_model(model, r=4))
    with pytest.warns(UserWarning, match="only quantised"):
        original = dict(Merge(model, "16bit").tensors())
    assert all(torch.equal(tensor, original[name]) for name, tensor in Merge(model, "nf4").tensors())
    assert json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
