"""Every tensor of an export against the trained model's own layers: right files pass, one wrong tensor is found in any type."""

import json
import os
import re
import warnings

import numpy as np
import pytest
import tiny
import torch
from llama_oracle import Llama
from test_gguf_convert import MODELS, save
from test_gguf_proof import rewrite, unpermuted
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from luthier.gguf import GGUFFile, convert_to_gguf
from luthier.gguf.dequantize import dequantize
from luthier.gguf.quantize import encode_in_chunks
from luthier.model.gguf_export import write_merged_gguf
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.slots import Slot
from luthier.proof import export
from luthier.proof.export import ExportProofError, prove, reference_of, save_pretrained_gguf, verify
from luthier.proof.reference import TEXTS

QUANTS = ["bf16", "q8_0", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # rows that K-quants fit


def adapted(model, size=0.02, **settings):
    """An adapter of rank 8 that moves what it is on by a few percent at the usual ``size``."""
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(model, **{"r": 8, **settings})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


class Exported:
    """A trained model, what it says, and by type its file and that of its base."""

    def __init__(self, place, family, quants, **settings):
        tiny.save_tiny(family, place / "base", dtype=torch.bfloat16)
        model, tokenizer = load_model(place / "base", load_in_16bit=True, dtype=torch.float32)
        self.model = adapted(model, **settings)
        self.reference = reference_of(self.model, tokenizer)
        self.files = dict(zip(quants, write_merged_gguf(self.model, place / "out", tokenizer, quants), strict=True))
        self.bases = dict(zip(quants, convert_to_gguf(place / "base", place / "plain", quants), strict=True))


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(tiny, "BASE", tiny.BASE | WIDE)


def made_wide(place, family):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "BASE", tiny.BASE | WIDE)
        return Exported(place, family, QUANTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made_wide(tmp_path_factory.mktemp("llama"), "llama3")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return made_wide(tmp_path_factory.mktemp("mixtral"), "mixtral")


def exchanged(rows, one, other):
    rows = rows.copy()
    rows[one], rows[other] = rows[other].copy(), rows[one].copy()
    return rows


def louder(file, name):
    """The rows of a matrix, 1.1 times as large, rounded anew."""
    kind = file.tensors[name].type
    values = 1.1 * dequantize(torch.from_numpy(file.data(name).copy()), kind)
    return torch.cat([data for _, data in encode_in_chunks(name, values, kind)]).numpy()


FAULTS = {  # name -> (what replaces tensors, of the file and of its base's file; what the proof says)
    "queries not reordered": (
        lambda f, b: {"blk.0.attn_q": unpermuted(f, "blk.0.attn_q.weight")}, r"blk\.0\.attn_q\.weight is not the model's"),
    "two heads exchanged": (
        lambda f, b: {"blk.1.attn_q": exchanged(f.data("blk.1.attn_q.weight"), slice(0, 64), slice(64, 128))},
        r"blk\.1\.attn_q\.weight is not the model's"),
    "gate and up exchanged": (
        lambda f, b: {"blk.1.ffn_up": f.data("blk.1.ffn_gate.weight"), "blk.1.ffn_gate": f.data("blk.1.ffn_up.weight")},
        r"blk\.1\.ffn_gate\.weight is not the model's"),
    "another layer's": (
        lambda f, b: {"blk.1.ffn_up": f.data("blk.0.ffn_up.weight")}, r"blk\.1\.ffn_up\.weight is not the model's"),
    "two rows exchanged": (
        lambda f, b: {"blk.0.ffn_gate": exchanged(f.data("blk.0.ffn_gate.weight"), 3, 7)}, r"blk\.0\.ffn_gate\.weight is not"),
    "norms exchanged": (
        lambda f, b: {"blk.0.attn_norm": f.data("blk.0.ffn_norm.weight"), "blk.0.ffn_norm": f.data("blk.0.attn_norm.weight")},
        r"blk\.0\.attn_norm\.weight is not the model's: number 0"),
    "shifted embeddings": (
        lambda f, b: {"token_embd": np.roll(f.data("token_embd.weight"), 1, 0)}, r"token_embd\.weight is not the model's"),
    "two rows of the head": (
        lambda f, b: {"output": exchanged(f.data("output.weight"), 300, 301)}, r"output\.weight is not the model's"),
    "adapter lost in one matrix": (
        lambda f, b: {"blk.0.attn_q": b.data("blk.0.attn_q.weight")},
        r"blk\.0\.attn_q\.weight (has .* of what the adapter|is not)"),
    "adapter lost in some rows": (
        lambda f, b: {"blk.1.ffn_up": np.concatenate(
            [f.data("blk.1.ffn_up.weight")[:384], b.data("blk.1.ffn_up.weight")[384:]])},
        r"blk\.1\.ffn_up\.weight (has .* of what the adapter|is not)"),
    "a tenth too large": (lambda f, b: {"blk.0.ffn_up": louder(f, "blk.0.ffn_up.weight")}, r"blk\.0\.ffn_up\.weight is not"),
}  # fmt: skip
FAULTS_OF_EXPERTS = {
    "two experts exchanged": (
        lambda f, b: {"blk.1.ffn_down_exps": exchanged(f.data("blk.1.ffn_down_exps.weight"), slice(0, 256), slice(256, 512))},
        r"blk\.1\.ffn_down_exps\.weight is not"),
    "one expert's gate and up": (
        lambda f, b: {"blk.0.ffn_gate_exps": np.concatenate(
            [f.data("blk.0.ffn_up_exps.weight")[:512], f.data("blk.0.ffn_gate_exps.weight")[512:]])},
        r"blk\.0\.ffn_gate_exps\.weight is not"),
    "router": (
        lambda f, b: {"blk.0.ffn_gate_inp": exchanged(f.data("blk.0.ffn_gate_inp.weight"), 0, 1)},
        r"blk\.0\.ffn_gate_inp\.weight"),
    "adapter lost in the experts": (
        lambda f, b: {"blk.1.ffn_up_exps": b.data("blk.1.ffn_up_exps.weight")},
        r"blk\.1\.ffn_up_exps\.weight (has .* of what the adapter|is not)"),
    "adapter lost in one expert": (
        lambda f, b: {"blk.1.ffn_up_exps": np.concatenate(
            [f.data("blk.1.ffn_up_exps.weight")[:1536], b.data("blk.1.ffn_up_exps.weight")[1536:]])},
        r"blk\.1\.ffn_up_exps\.weight (has .* of what the adapter|is not)"),
}  # fmt: skip


def planted(exported, quant, fault, target):
    tensors = fault(GGUFFile(exported.files[quant]), GGUFFile(exported.bases[quant]))
    return rewrite(exported.files[quant], target, tensors={f"{name}.weight": rows for name, rows in tensors.items()})


@pytest.mark.parametrize("quant", QUANTS)
def test_one_wrong_tensor_is_found_without_the_checkpoint(quant, llama, tmp_path):
    right = prove(llama.files[quant], llama.reference)
    assert right.failures == [] and right.adapter.endswith("14 matrices") and len(right.errors) == 16
    for name, (fault, message) in FAULTS.items():
        failures = prove(planted(llama, quant, fault, tmp_path / "x.gguf"), llama.reference).failures
        assert any(re.match(message, failure) for failure in failures), (name, failures)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
@pytest.mark.parametrize("size", [0.02, 0.002], ids=["seen", "behind the rounding"])
def test_half_of_an_adapter_is_not_all_of_it(size, quant, tmp_path):
    """Half its scale, half the ranks, or nothing of it, in one matrix that is small enough to be rounded anew."""
    half = Exported(tmp_path, "llama3", [quant], size=size)
    names = [name for name, _ in half.model.named_parameters() if "layers.0.self_attn.k_proj" in name and "lora_B" in name]
    parameter = half.model.get_parameter(names[0])
    whole = parameter.data.clone()
    assert prove(half.files[quant], half.reference).failures == []
    for number, mask in enumerate((torch.full((8,), 0.5), torch.arange(8) < 4, torch.zeros(8))):
        parameter.data = whole * mask
        (file,) = write_merged_gguf(half.model, tmp_path / f"wrong{number}", tiny.tiny_tokenizer(), quant)
        parameter.data = whole
        (failure,) = prove(file, half.reference).failures[:1]
        assert failure.startswith("blk.0.attn_k.weight "), number


@pytest.mark.parametrize("quant", QUANTS)
def test_one_wrong_expert_is_found(quant, mixtral, tmp_path):
    assert prove(mixtral.files[quant], mixtral.reference).failures == []
    for name, (fault, message) in FAULTS_OF_EXPERTS.items():
        failures = prove(planted(mixtral, quant, fault, tmp_path / "x.gguf"), mixtral.reference).failures
        assert any(re.match(message, failure) for failure in failures), (name, failures)


@pytest.mark.parametrize("quant", ["bf16", "q2_k"])
def test_a_wrong_rotation_shows_in_the_attention_of_every_type(quant, llama, tmp_path):
    """Whatever our own table of numbers says: the trained model's queries and keys are rotated as the file says."""
    file = rewrite(llama.files[quant], tmp_path / "x.gguf", metadata={"llama.rope.freq_base": 10000.0})
    failures = prove(file, llama.reference).failures
    assert any(failure.startswith("the attention of layer 0 is off by ") for failure in failures)


def test_a_file_of_other_sizes_is_a_failure_and_no_crash(llama, tmp_path):
    for key in ("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.dimension_count"):
        file = rewrite(llama.files["q4_0"], tmp_path / "x.gguf", metadata={f"llama.{key}": 12})
        assert any(f"llama.{key} is 12 in the file" in failure for failure in prove(file, llama.reference).failures), key
    file = rewrite(llama.files["q4_0"], tmp_path / "x.gguf", metadata={"llama.attention.head_count_kv": None})
    assert any("head_count_kv is 4 in the file" in failure for failure in prove(file, llama.reference).failures)


@pytest.mark.parametrize("name", MODELS)
def test_right_files_of_every_family_pass_and_all_their_tensors_are_seen(name, tmp_path, monkeypatch):
    directory = save(monkeypatch, tmp_path / "model", *MODELS[name])
    with warnings.catch_warnings(action="ignore"):
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
            reference = reference_of(model, directory)
            for file in convert_to_gguf(directory, tmp_path, ["f32", "q8_0", "q2_k"]):
                proof = prove(file, reference)
                assert proof.failures == [] and not any("not asked" in note for note in proof.notes), (dtype, file)
                assert proof.tensors.startswith(
                    f"{sum(not name.startswith('rope_') for name in GGUFFile(file).tensors)} compared"
                )
                assert proof.attention != "not compared"


KINDS = {
    "dora": {"use_dora": True},
    "biases": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "trained whole": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [7, 9, 30]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_found_and_not_refused(kind, wide, tmp_path):
    trained = Exported(tmp_path, "qwen2", ["q8_0", "q4_0", "q2_k"], **KINDS[kind])
    for file in trained.files.values():
        proof = prove(file, trained.reference)
        assert proof.failures == [] and "% of it in " in proof.adapter, file
    for file in trained.bases.values():
        assert prove(file, trained.reference).failures, file


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_in_4_bits_with_an_adapter(family, wide, tmp_path, monkeypatch):
    """Over NF4 weights, of which rounding finds few values: how much of an adapter stays is up to them, and no fault."""
    tiny.save_tiny(family, tmp_path / "base", dtype=torch.bfloat16)
    for size in (0.005, 0.05):
        model, tokenizer = load_model(tmp_path / "base", load_in_4bit=True, dtype=torch.float32)
        model = adapted(model, size)
        with warnings.catch_warnings(action="ignore"):
            for base in ("16bit", "nf4"):
                save_pretrained_gguf(model, tmp_path / "out", tokenizer, ["q8_0", "q4_0", "q2_k"], base=base)


def test_experts_in_4_bits_whose_rows_are_no_whole_blocks(tmp_path):
    """bitsandbytes' CPU kernel expands them wrongly: 0.38 off instead of 0.09."""
    config = tiny.tiny_config("qwen3_moe")
    config.hidden_size = 48
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", load_in_4bit=True, dtype=torch.float32)
    save_pretrained_gguf(adapted(model, 0.05), tmp_path / "out", tokenizer, "q8_0", base="nf4")


def test_a_router_trained_whole(wide, tmp_path):
    trained = Exported(tmp_path, "mixtral", ["q8_0"], target_modules=["q_proj"], modules_to_save=["gate"])
    assert prove(trained.files["q8_0"], trained.reference).failures == []


def test_unusual_weights_and_importances_are_not_refused(wide, tmp_path):
    """Heavy tails round worse than others do: what looks wrong is compared with the same weights rounded anew."""
    model = tiny.tiny_model("llama3")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scales = torch.exp(torch.randn(parameter.shape[-1], generator=generator))
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator) * scales
    model.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    reference = reference_of(model, tmp_path / "model")
    quants = ["q8_0", "q6_k", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
    tensors = GGUFFile(convert_to_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")[0]).tensors
    weighted = {
        name: torch.rand(info.shape[-1], generator=generator) ** 20 + 1e-6
        for name, info in tensors.items()
        if len(info.shape) > 1
    }
    for importance in (None, weighted):
        for file in convert_to_gguf(tmp_path / "model", tmp_path / "out", quants, importance):
            proof = prove(file, export.replace(reference, importance=importance or {}))
            assert proof.failures == [], file


def test_an_export_that_loses_the_adapter_of_one_layer_leaves_nothing(llama, tmp_path, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    edited, calls = Slot.edited, []

    def forgetful(slot, value):
        calls.append(slot)
        return value if len(calls) == 3 else edited(slot, value)

    monkeypatch.setattr(Slot, "edited", forgetful)
    with pytest.raises(ExportProofError, match=r"blk\.0\.attn_v\.weight (has -?\d+% of what the adapter adds|is not)"):
        save_pretrained_gguf(llama.model, tmp_path / "lute", tokenizer, "q4_k_m")
    assert list((tmp_path / "lute").iterdir()) == []


@pytest.mark.parametrize("quant", ["q4_0", "q2_k"])
def test_an_export_that_does_not_reorder_queries_leaves_nothing(quant, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.gguf.plan._rope_order", lambda *args: None)
    with pytest.raises(ExportProofError, match=r"blk\.0\.attn_q\.weight is not the model's"):
        save_pretrained_gguf(llama.model, tmp_path / "lute", tiny.tiny_tokenizer(), quant)
    assert list((tmp_path / "lute").iterdir()) == []


def test_a_disk_that_changes_a_byte_fails_the_export(llama, tmp_path, monkeypatch):
    write, calls = os.pwrite, []

    def pwrite(file, data, offset):
        calls.append(offset)
        return write(file, bytes([data[0] ^ 1]) + bytes(data[1:]) if len(calls) == 9 else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="the disk does not give back"):
        save_pretrained_gguf(llama.model, tmp_path / "lute", tiny.tiny_tokenizer(), "q4_0")
    assert list((tmp_path / "lute").iterdir()) == []


@pytest.mark.parametrize("quant", ["bf16", "q4_0"])
def test_a_flipped_byte_anywhere_is_found_by_verify(quant, tmp_path):
    """In every tensor and every entry of the header, without a proof beside the file; but not in its name, which is free."""
    directory = tiny.save_tiny("llama3.1", tmp_path / "model", dtype=torch.bfloat16)
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", quant)
    read, content = GGUFFile(file), file.read_bytes()
    places = {}
    for key, value in read.encoded.items():
        start = content.index(key.encode())
        places[f"key {key}"], places[key] = start + 2, start + len(key) + len(value.data) - 1
    start = len(content) - sum(part.nbytes for part in list(read.outside())[1:]) - sum(i.size for i in read.tensors.values())
    places |= {name: start + info.offset + info.size // 2 for name, info in read.tensors.items()}
    del places["general.name"]
    missed = []
    for name, place in places.items():
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "y.gguf").write_bytes(damaged)
        try:
            missed += [] if verify(tmp_path / "y.gguf", directory).failures else [name]
        except ValueError:
            continue  # refused as no GGUF file
    assert missed == []


def test_the_tokenizer_is_that_of_tokenizer_json(tmp_path):
    """transformers gives qwen2 its own way to cut text, whatever tokenizer.json says; llama.cpp reads what we write."""
    directory = tiny.save_tiny("qwen2", tmp_path / "model")
    with pytest.warns(UserWarning, match="as a Qwen2Tokenizer and cuts text otherwise"):
        (file,) = export.convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0")
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(file) as read:
        assert [text for text in TEXTS if read.tokenize(text) != stored.encode(text).ids] == []
    assert json.loads((tmp_path / "x.gguf.proof.json").read_text())["texts"] == 7


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss"])
@pytest.mark.parametrize("load", ["load_in_16bit", "load_in_4bit"])
def test_large_biases_leave_matrices_to_be_seen_in_16_bits(family, load, tmp_path):
    """Those of Qwen 2.5's keys are thousands of times its weights: what a layer gives in bfloat16 is then mostly bias."""
    model = tiny.tiny_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.data *= 300
    model.bfloat16().save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model", **{load: True}, dtype=torch.bfloat16)
    model = adapted(model)
    base = "nf4" if load == "load_in_4bit" else "16bit"
    (file,) = write_merged_gguf(model, tmp_path / "out", tokenizer, "q8_0", base=base)
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    proof = prove(file, reference_of(model, tokenizer))
    assert proof.failures == [] and proof.adapter == "100% to 100% of it in 14 matrices"
    assert all(model.get_parameter(name) is bias for name, bias in biases.items())  # the model is as it was


def test_experts_of_a_model_computed_in_16_bits_are_not_held_to_more(tmp_path, monkeypatch):
    """Where a weight and what the adapter adds to it nearly cancel, the sum is off by a step of theirs, not of its own."""
    save(monkeypatch, tmp_path / "base", "mixtral", {"num_local_experts": 8}, dtype=torch.bfloat16)
    model, tokenizer = load_model(tmp_path / "base", load_in_16bit=True, dtype=torch.bfloat16)
    model = adapted(model, 0.1)
    reference = reference_of(model, tokenizer)
    for file in write_merged_gguf(model, tmp_path / "out", tokenizer, ["f16", "q8_0"]):
        assert prove(file, reference).failures == [], file


def test_a_trained_head_that_a_file_lacks_is_found(tmp_path):
    """llama.cpp takes the embeddings for it, which nothing was added to."""
    exported = Exported(tmp_path, "granite", ["q8_0"], modules_to_save=["lm_head"])
    assert prove(exported.files["q8_0"], exported.reference).failures == []
    file = rewrite(exported.files["q8_0"], tmp_path / "x.gguf", without=["output.weight"])
    assert "token_embd.weight is not the model's" in prove(file, exported.reference).failures[0]


def test_scales_that_are_as_good_are_others_in_16_bits(tmp_path, monkeypatch):
    """With an importance matrix a search may end elsewhere for a last bit, and a small tensor is as far off as rounding is."""
    seed = 234303
    monkeypatch.setattr(tiny, "BASE", tiny.BASE | {"initializer_range": 0.05, "vocab_size": 1024})
    model, generator = tiny.tiny_model("llama3.1", seed), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= torch.randn(parameter.shape[:-1], generator=generator).exp()[..., None]
    model.half().save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(seed)
    (plain,) = convert_to_gguf(tmp_path / "base", tmp_path / "plain.gguf", "f32")
    tensors = {name: info for name, info in GGUFFile(plain).tensors.items() if len(info.shape) > 1 and "token" not in name}
    importance = {name: torch.rand(info.shape[-1], generator=generator) ** 4 + 1e-4 for name, info in tensors.items()}
    model, tokenizer = load_model(tmp_path / "base", load_in_4bit=True, dtype=torch.float16)
    model, generator = get_peft_model(model, r=8, random_state=seed), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    (file,) = write_merged_gguf(model, tmp_path / "out", tokenizer, "q4_1", importance, "nf4")
    assert prove(file, reference_of(model, tokenizer, None, importance)).failures == []
