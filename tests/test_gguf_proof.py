"""The proof of export: its own two readers against llama.cpp, and planted faults, each of which it must find."""

import json
import re
from types import SimpleNamespace

import fake_hub
import numpy as np
import pytest
import tiny
import torch
from gguf_tokenizers import CUTS, byte_level, difficult_lines, sentencepiece
from llama_oracle import Llama
from safetensors.torch import load_file, save_file
from test_gguf_convert import IDS, MODELS, save
from test_gguf_tokenizer import export as export  # noqa: PLC0414  (a fixture)
from transformers import AutoModelForCausalLM

from luthier.errors import UnsupportedError
from luthier.fast import FastLanguageModel
from luthier.gguf import GGUFFile, convert_to_gguf
from luthier.gguf.architectures import find
from luthier.gguf.chat import load_tokenizer
from luthier.gguf.convert import read_config
from luthier.gguf.imatrix import made_with_importance
from luthier.gguf.plan import Piece, plan_tensors, same
from luthier.gguf.quantize import encode_in_chunks, quantize_gguf
from luthier.gguf.source import CheckpointSource
from luthier.gguf.types import TENSOR_TYPES
from luthier.gguf.writer import GGUFWriter, TensorInfo, plan
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.proof import export as export_module
from luthier.proof.export import (
    ExportProofError,
    prove,
    push_to_hub_gguf,
    reference_of,
    require,
    save_pretrained_gguf,
    verify,
    write_proof,
)
from luthier.proof.export import convert_to_gguf as proved_conversion
from luthier.proof.gguf_model import GGUFModel
from luthier.proof.gguf_tokenizer import GGUFTokenizer
from luthier.proof.logits import THRESHOLDS
from luthier.proof.tokens import compare_tokens
from luthier.proof.weights import compare_weights


@pytest.mark.parametrize("name", MODELS)
def test_our_reading_of_a_file_is_that_of_llama_cpp(name, tmp_path, monkeypatch):
    directory = save(monkeypatch, tmp_path / "model", *MODELS[name])
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "f32")
    first, second = GGUFModel(GGUFFile(file)).logits([IDS, IDS[:5]])
    with Llama(file, context=128) as llama:
        assert np.abs(first.numpy() - llama.logits(IDS)).max() < (1e-2 if name.startswith("gemma") else 1e-4)
    assert torch.allclose(first[:5], second, atol=1e-5)


TOKENIZERS = {
    **{pre: lambda pre=pre: byte_level(pre) for pre in CUTS},
    "whole words": lambda: byte_level("llama-bpe", ignore_merges=True, bos=True),
    **{style: lambda style=style: sentencepiece(style) for style in ("llama", "phi-3", "mistral", "gemma")},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_our_reading_of_a_tokenizer_is_that_of_llama_cpp(name, export):
    file = export(TOKENIZERS[name]())
    rebuilt = GGUFTokenizer(GGUFFile(file))
    with Llama(file) as llama:
        assert [line for line in difficult_lines() if rebuilt.encode(line) != llama.tokenize(line)] == []


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model directory, and its GGUF files f32, bf16 and q4_0 by name."""
    place = tmp_path_factory.mktemp("proof")
    directory = tiny.save_tiny("llama3.1", place / "model", dtype=torch.bfloat16)
    files = convert_to_gguf(directory, place / "files", ["f32", "bf16", "q4_0"])
    return directory, dict(zip(("f32", "bf16", "q4_0"), files, strict=True))


@pytest.mark.parametrize("quant", ["f32", "bf16", "q4_0"])
def test_a_good_file_is_proved(quant, models, tmp_path):
    directory, files = models
    proof = verify(files[quant], directory)
    assert proof.failures == [] and proof.divergence < proof.allowed_divergence and proof.texts == 7
    assert proof.weights == "20 of 20 tensors are identical" and proof.stop_tokens == ["<|im_end|>", "<|endoftext|>"]
    require(proof)
    stored = json.loads(write_proof(tmp_path / "x.gguf", proof).read_text())
    assert stored["file_type"] == quant and stored["failures"] == [] and len(stored["checksums"]) == 1 + 21


def rewrite(source, target, metadata=None, tensors=None, without=()):
    """A copy of a GGUF file with some metadata and tensors (uint8 rows) replaced; None drops a key, ``without`` tensors."""
    file = GGUFFile(source)
    entries = {key: value for key, value in {**file.encoded, **(metadata or {})}.items() if value is not None}
    infos = [TensorInfo(name, info.shape, info.type) for name, info in file.tensors.items() if name not in without]
    layout = plan(entries, infos)
    with GGUFWriter(target, layout) as writer:
        for name in layout.tensors:
            writer.write(name, torch.from_numpy((tensors or {}).get(name, file.data(name)).copy()))
    return target


def unpermuted(file, name):
    """Rows of a query matrix as transformers has them."""
    rows = file.data(name)
    return rows.reshape(4, -1, 2, rows.shape[1]).transpose(0, 2, 1, 3).reshape(rows.shape)


def shifted(file):
    tokens = file.metadata["tokenizer.ggml.tokens"]
    return [*tokens[:300], tokens[301], tokens[300], *tokens[302:]]


FAULTS = {
    "queries not reordered": (
        lambda file: {"tensors": {"blk.0.attn_q.weight": unpermuted(file, "blk.0.attn_q.weight")}},
        "blk.0.attn_q.weight is not the model's",
    ),
    "swapped tensors": (
        lambda file: {"tensors": {"blk.1.ffn_up.weight": file.data("blk.1.ffn_gate.weight")}},
        "blk.1.ffn_up.weight is not the model's",
    ),
    "wrong rotary base": (
        lambda file: {"metadata": {"llama.rope.freq_base": 10000.0}},
        "llama.rope.freq_base is 10000.0 in the file",
    ),
    "wrong rotary scaling": (
        lambda file: {"tensors": {"rope_freqs.weight": np.ones(8, np.float32).view(np.uint8)[None]}},
        "rope_freqs.weight is not the model's",
    ),
    "no rotary base": (
        lambda file: {"metadata": {"llama.rope.freq_base": None}},
        "llama.rope.freq_base is 10000.0 in the file",
    ),
    "rotary scaling that is not the model's": (
        lambda file: {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}},
        "llama.rope.scaling.factor is 2.0 in the file and 1.0 in the model",
    ),
    "lost stop token": (lambda file: {"metadata": {"tokenizer.ggml.eot_token_id": None}}, "does not stop at <|im_end|>"),
    "shifted vocabulary": (lambda file: {"metadata": {"tokenizer.ggml.tokens": shifted(file)}}, "token 300 is"),
    "other pre-tokenizer": (lambda file: {"metadata": {"tokenizer.ggml.pre": "llama-bpe"}}, "token .* of .* is .* instead of"),
    "doubled BOS": (lambda file: {"metadata": {"tokenizer.ggml.add_bos_token": True}}, "token 0 of"),
    "changed template": (lambda file: {"metadata": {"tokenizer.chat_template": "{{ messages }}"}}, "chat template is not"),
    "lost template": (lambda file: {"metadata": {"tokenizer.chat_template": None}}, "no chat template"),
}


@pytest.mark.parametrize(("family", "dtype"), [("llama3", torch.bfloat16), ("olmo2", torch.float32), ("qwen3", torch.float32)])
def test_an_f32_file_of_an_adapter_is_that_of_its_merged_directory(family, dtype, tmp_path):
    """Which holds in 16 bits what the file holds in 32: no logit is equal to four digits, and no norm of queries."""
    base = tiny.save_tiny(family, tmp_path / "base", dtype=dtype)
    model, tokenizer = FastLanguageModel.from_pretrained(base, load_in_16bit=True, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02
    (file,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert verify(file, tmp_path / "merged").failures == []
    assert verify(file, base).failures != []


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_a_merge_that_was_rounded_to_fp16_is_no_damage(quant, tmp_path):
    """Few codes change with a weight's last bits, but in every tensor that the adapter moves."""
    base = tiny.save_tiny("llama3", tmp_path / "base", dtype=torch.float16)
    model, tokenizer = FastLanguageModel.from_pretrained(base, load_in_16bit=True, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    (file,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=quant)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    proof = verify(file, tmp_path / "merged")
    identical, of = map(int, proof.weights.split()[:3:2])
    assert proof.failures == [] and identical < of


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("quant", ["f32", "q4_0"])
def test_planted_faults_are_found(quant, fault, models, tmp_path):
    directory, files = models
    plant, message = FAULTS[fault]
    file = rewrite(files[quant], tmp_path / "x.gguf", **plant(GGUFFile(files[quant])))
    proof = verify(file, directory)
    with pytest.raises(ExportProofError, match=message):
        require(proof)


def changed(file, key, place, value):
    entries = file.metadata[key].copy()
    entries[place] = value
    return {key: entries}


def without_merge(file, *places):
    merges = list(file.metadata["tokenizer.ggml.merges"])
    return {"tokenizer.ggml.merges": [*merges[: places[0]], *merges[places[0] + 1 :]]} if len(places) == 1 else {
        "tokenizer.ggml.merges": [*merges[: places[0]], merges[places[1]], merges[places[0]], *merges[places[1] + 1 :]]
    }  # fmt: skip


FAULTS_OF_TOKENS = {  # what no sample text has to show
    "a control token as text": (lambda f: changed(f, "tokenizer.ggml.token_type", 1, 1), r"token 1, .* is of the type text"),
    "text as a control token": (lambda f: changed(f, "tokenizer.ggml.token_type", 440, 3), "token 440, .* of the type control"),
    "padding as text": (lambda f: changed(f, "tokenizer.ggml.token_type", 470, 1), "token 470, .* of the type text instead of"),
    "lost merge": (lambda f: without_merge(f, 150), "merge 150 is|it has .* merges"),
    "lost last merge": (lambda f: without_merge(f, len(f.metadata["tokenizer.ggml.merges"]) - 1), "it has .* merges, the tok"),
    "two merges exchanged": (lambda f: without_merge(f, 150, 151), "merge 150 is"),
    "other BOS": (lambda f: {"tokenizer.ggml.bos_token_id": 4}, "its BOS is token 4, the tokenizer's 1"),
    "BOS without a token": (
        lambda f: {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "it adds BOS to a text and has"
    ),
    "a shorter vocabulary": (
        lambda f: {f"tokenizer.ggml.{name}": f.metadata[f"tokenizer.ggml.{name}"][:400] for name in ("tokens", "token_type")},
        "its merge .* is of tokens that it does not have",
    ),
    "another cut": (lambda f: {"tokenizer.ggml.pre": "smollm"}, "it cuts text otherwise than the tokenizer: 'Ġ'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS_OF_TOKENS)
def test_every_entry_of_the_vocabulary_is_compared(fault, models, tmp_path):
    change, message = FAULTS_OF_TOKENS[fault]
    file = rewrite(models[1]["f32"], tmp_path / "x.gguf", change(GGUFFile(models[1]["f32"])))
    failures = compare_tokens(GGUFFile(file), tiny.tiny_tokenizer()).failures
    assert any(re.search(message, failure) for failure in failures), failures


@pytest.mark.parametrize("style", ["llama", "mistral", "gemma"])
def test_scores_and_spaces_of_sentencepiece_are_compared(style, export, tmp_path):
    """A space more than the tokenizer puts is excused where llama.cpp always puts one; tokens cut otherwise are not."""
    file = export(sentencepiece(style))
    tokenizer = load_tokenizer(file.parent)
    assert compare_tokens(GGUFFile(file), tokenizer).failures == []
    read = GGUFFile(file)
    scores, prefix = read.metadata["tokenizer.ggml.scores"], read.metadata["tokenizer.ggml.add_space_prefix"]
    # not the first of the bytes of a character
    lost = ["<0xbf>" if token == "<0xBF>" else token for token in read.metadata["tokenizer.ggml.tokens"]]
    for wrong in (
        {"scores": 0 * scores},
        {"scores": -scores},
        {"scores": scores[::-1].copy()},
        {"add_space_prefix": not prefix},
        {"tokens": lost},
    ):
        changes = {f"tokenizer.ggml.{key}": value for key, value in wrong.items()}
        assert compare_tokens(GGUFFile(rewrite(file, tmp_path / "x.gguf", changes)), tokenizer).failures != [], wrong


def test_what_a_file_lacks_is_named(models, tmp_path, monkeypatch):
    directory, files = models
    reference = reference_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), directory)
    for name in ("output_norm.weight", "blk.1.attn_q.weight"):
        file = rewrite(files["q4_0"], tmp_path / "x.gguf", without=[name])
        assert f"it lacks {name}" in prove(file, reference).failures
    directory = save(monkeypatch, tmp_path / "phi3", *MODELS["phi3 longrope"])
    reference = reference_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), directory)
    (file,) = convert_to_gguf(directory, tmp_path / "phi3.gguf", "f32")
    key = "phi3.rope.scaling.original_context_length"  # where the factors change: beyond every prompt
    for value, said in ((384, "384"), (None, "missing")):
        failures = prove(rewrite(file, tmp_path / "y.gguf", {key: value}), reference).failures
        assert f"{key} is {said} in the file and 256 in the model" in failures


@pytest.mark.parametrize("fault", ["wrong rotary base", "wrong rotary scaling", "queries not reordered", "swapped tensors"])
def test_what_is_wrong_shows_in_the_logits_too(fault, models, tmp_path):
    """Nothing but the computed file and the model: what holds for a mistake that our own tables make, too."""
    directory, files = models
    file = rewrite(files["f32"], tmp_path / "x.gguf", **FAULTS[fault][0](GGUFFile(files["f32"])))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert any("its logits diverge" in failure for failure in prove(file, reference_of(model, directory)).failures)


@pytest.mark.parametrize("quant", ["f32", "bf16", "q4_0"])
def test_one_flipped_bit_is_found(quant, models, tmp_path):
    directory, files = models
    data = GGUFFile(files[quant]).data("blk.1.ffn_down.weight").copy()
    data[7, 21] ^= 1
    file = rewrite(files[quant], tmp_path / "x.gguf", tensors={"blk.1.ffn_down.weight": data})
    assert any(
        "blk.1.ffn_down.weight differs from the model's in 1 bytes" in failure for failure in verify(file, directory).failures
    )


def test_a_code_that_a_merge_could_have_moved_is_found_alone(tmp_path):
    """A weight may lie as near to one code of q8_0 as to the next within bfloat16; but a merge does not move one code."""
    directory = tiny.save_tiny("llama3", tmp_path / "model", dtype=torch.bfloat16)
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0")
    name, missed = "blk.1.ffn_down.weight", 0
    planned = plan_tensors(find(read_config(directory)), read_config(directory), (source := CheckpointSource(directory)).shapes)
    for place in range(2, 34):
        data = GGUFFile(file).data(name).copy()
        data[3, place] ^= 1
        wrong = rewrite(file, tmp_path / "y.gguf", tensors={name: data})
        missed += not compare_weights([(GGUFFile(wrong), planned)], source)[1]
    assert missed == 0


def test_damage_after_the_proof_is_found_without_the_weights(models, tmp_path):
    """Where the model was rounded on the way, bytes cannot be compared; the checksums of the proof can."""
    directory, files = models
    file = rewrite(files["q4_0"], tmp_path / "x.gguf")
    write_proof(file, prove(file, reference_of(tiny.tiny_model("llama3.1"), directory)))
    content = bytearray(file.read_bytes())
    content[-40] ^= 16
    file.write_bytes(content)
    assert any("changed since its proof was written: " in failure for failure in verify(file, directory).failures)


def test_a_truncated_file_is_refused(models, tmp_path):
    directory, files = models
    (tmp_path / "x.gguf").write_bytes(files["bf16"].read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        verify(tmp_path / "x.gguf", directory)


def test_a_file_made_from_unrounded_weights_is_no_failure(models, tmp_path):
    """A merge is exported in 32 bits and saved in 16: the two files differ in their last bits only."""
    directory, _ = models
    exact = tmp_path / "exact"
    tiny.save_tiny("llama3.1", exact, dtype=torch.float32)
    for quant in ("q8_0", "q4_0", "bf16"):
        (file,) = convert_to_gguf(exact, tmp_path / f"{quant}.gguf", quant)
        assert verify(file, directory).failures == []


@pytest.mark.parametrize("quant, size", [("q2_k", 2e-3), ("q4_k_m", 2e-3), ("q8_0", 3e-4), ("q4_0", 2e-3)])
def test_a_lost_adapter_is_found(quant, size, tmp_path, monkeypatch):
    """It moves weights by less than rounding does; but not every weight lies nearest to its code then. With any scales."""
    monkeypatch.setitem(tiny.FAMILIES, "llama3.1", ("llama", {**tiny.FAMILIES["llama3.1"][1], "hidden_size": 256}))
    base = tiny.save_tiny("llama3.1", tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    weighted = {f"blk.0.ffn_{name}.weight": torch.rand(256, generator=generator) ** 4 + 1e-4 for name in ("gate", "up")}
    files = [convert_to_gguf(base, tmp_path / f"{i}.gguf", quant, weights)[0] for i, weights in enumerate((None, weighted))]
    assert [verify(file, base).failures for file in files] == [[], []]
    tensors = load_file(base / "model.safetensors")
    b, a = torch.randn(128, 1, generator=generator), torch.randn(1, 256, generator=generator)
    tensors["model.layers.0.mlp.up_proj.weight"] += size * b @ a
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for file in files:
        (failure,) = verify(file, base).failures
        assert failure.startswith("blk.0.ffn_up.weight was rounded from other weights")


ROUNDED_LATE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_lost_adapter_is_found_against_a_merged_directory(dtype, tmp_path):
    """The merge moves weights by half a percent of their size; the directory holds it in 16 bits, the file is made from 32."""
    base = tiny.save_tiny("llama3", tmp_path / "base")
    right = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    lost = {
        **right,
        name: right[name] + 5e-4 * torch.randn(128, 2, generator=generator) @ torch.randn(2, 64, generator=generator),
    }
    files = convert_to_gguf(base, tmp_path / "out", ROUNDED_LATE)
    if dtype is torch.bfloat16:
        (half,) = convert_to_gguf(base, tmp_path / "half.gguf", "f16")
        files += [quantize_gguf(half, tmp_path / f"by-way-of-f16-{kind}.gguf", kind) for kind in ("q4_0", "q8_0")]
    for tensors, fails in ((right, False), (lost, True)):
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
        planned = plan_tensors(find(read_config(base)), read_config(base), (source := CheckpointSource(base)).shapes)
        for file in files:
            wrong = compare_weights([(GGUFFile(file), planned)], source)[1]
            assert [failure.split(" ")[0] for failure in wrong] == fails * ["blk.0.ffn_up.weight"], wrong


def test_norms_that_gemma_stores_with_one_added_are_as_exact_as_its_directory(tmp_path):
    exact = tiny.save_tiny("gemma", tmp_path / "exact")
    directory = tiny.save_tiny("gemma", tmp_path / "model", dtype=torch.bfloat16)
    (file,) = convert_to_gguf(exact, tmp_path / "x.gguf", "q8_0")
    assert verify(file, directory).failures == []


def test_a_byte_that_no_rounding_gives_is_found_among_many_that_differ(tmp_path):
    exact = tiny.save_tiny("llama3", tmp_path / "exact")
    directory = tiny.save_tiny("llama3", tmp_path / "model", dtype=torch.bfloat16)
    planned = plan_tensors(find(read_config(directory)), read_config(directory), (source := CheckpointSource(directory)).shapes)
    for file in convert_to_gguf(exact, tmp_path / "out", ["q8_0", "q4_0", "q4_1"]):
        data = GGUFFile(file).data("blk.1.ffn_down.weight").copy()
        data[3, 7] ^= 4  # a code, by four steps
        wrong = rewrite(file, tmp_path / "y.gguf", tensors={"blk.1.ffn_down.weight": data})
        assert compare_weights([(GGUFFile(file), planned)], source)[1] == []
        assert "it is damaged" in compare_weights([(GGUFFile(wrong), planned)], source)[1][0]


def test_one_code_that_a_merge_moved_is_no_damage(tmp_path):
    """Of a small tensor that a float16 directory holds, it may be the only one; whether it may be takes many draws to see."""
    generator, seen = torch.Generator().manual_seed(0), 0
    kind, info = TENSOR_TYPES["Q5_0"], TensorInfo("x.weight", (16, 64), TENSOR_TYPES["Q5_0"])
    planned = SimpleNamespace(shapes={"x.weight": (16, 64)}, pieces={"x": [Piece("x.weight", None, same)]})
    for _ in range(150):
        values = torch.randn(16, 64, generator=generator)
        (encoded,) = (data for _, data in encode_in_chunks("x", values, kind))
        (plain,) = (data for _, data in encode_in_chunks("x", values.half().float(), kind))
        if 0 < (encoded != plain).sum() < 3:
            file = SimpleNamespace(tensors={"x.weight": info}, metadata={}, data=lambda name, data=encoded: data.numpy())
            seen += 1
            assert compare_weights([(file, planned)], [("x", values.half())])[1] == []
    assert seen > 20


def test_a_file_made_with_an_importance_matrix_that_is_not_given_is_no_failure(tmp_path):
    """Heavy tails: what hardly counts is off by several times the usual. What is not the model's is still found."""
    directory = tiny.save_tiny("llama3", tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and "layers" in name:
            tensor /= torch.randn(tensor.shape, generator=generator).abs().clamp_min(0.02)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    importance = {
        f"blk.{i}.ffn_{name}.weight": torch.rand(64, generator=generator) ** 8 + 1e-5 for i in (0, 1) for name in ("gate", "up")
    }
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "q4_0", importance)
    assert verify(file, directory, imatrix=importance).weights == "21 of 21 tensors are identical"
    proof = verify(file, directory)
    assert proof.failures == [] and any("importance matrix" in note for note in proof.notes)
    data = GGUFFile(file).data("blk.1.ffn_up.weight").copy()
    data[[3, 4]] = data[[4, 3]]
    wrong = rewrite(file, tmp_path / "y.gguf", tensors={"blk.1.ffn_up.weight": data})
    assert any("blk.1.ffn_up.weight" in failure for failure in verify(wrong, directory).failures)


def test_what_no_file_can_say_is_named_and_measured(tmp_path):
    """gpt-oss as it is published: llama.cpp rounds the ramp of its rotary embedding, whatever the file says."""
    directory = tiny.save_tiny("gpt_oss", tmp_path / "model")
    with pytest.warns(UserWarning, match="rounds YaRN's ramp"):
        (file,) = proved_conversion(directory, tmp_path / "x.gguf", "f32")
    proof = json.loads((tmp_path / "x.gguf.proof.json").read_text())
    assert "truncate: false" in proof["deviation"] and proof["failures"] == [] and proof["divergence"] < 1e-8
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = model(torch.tensor([IDS])).logits[0].detach()
    reference = reference_of(model, directory, ["A luthier builds lutes."])
    assert torch.equal(before, model(torch.tensor([IDS])).logits[0])  # the model is as it was
    with Llama(file) as llama:
        found = torch.from_numpy(llama.logits(reference.sequences[0]))
    trained = model(torch.tensor(reference.sequences)).logits[0].detach()
    assert (found - reference.logits[0]).abs().max() < 1e-4 < 10 * (found - trained).abs().max()
    wrong = rewrite(file, tmp_path / "y.gguf", metadata={"gpt-oss.rope.scaling.original_context_length": 64})
    assert any("its logits diverge" in failure for failure in prove(wrong, reference).failures)


def test_a_model_that_rounding_disturbs_more_than_others_is_allowed_it(tmp_path, monkeypatch):
    """Random weights in many layers: every layer doubles the error. What is wrong is still found."""
    changes = {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.08}
    directory = save(monkeypatch, tmp_path / "model", "llama3", changes)
    reference = reference_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), directory)
    for quant, file in zip(("q8_0", "q4_k_m"), convert_to_gguf(directory, tmp_path, ["q8_0", "q4_k_m"]), strict=True):
        proof = prove(file, reference)
        assert proof.failures == [] and proof.divergence > THRESHOLDS[quant], quant
        assert any("this model is sensitive" in note for note in proof.notes)
    (file,) = convert_to_gguf(directory, tmp_path / "y.gguf", "q8_0")
    wrong = rewrite(
        file, tmp_path / "z.gguf", tensors={"blk.3.attn_q.weight": unpermuted(GGUFFile(file), "blk.3.attn_q.weight")}
    )
    assert any("its logits diverge" in failure for failure in prove(wrong, reference).failures)
    loud = (GGUFFile(file).data("output_norm.weight").view(np.float32) * 10).view(np.uint8)  # noise costs such a file more
    wrong = rewrite(file, tmp_path / "z.gguf", {"general.file_type": 9999}, {"output_norm.weight": loud})
    assert any("its logits diverge" in failure for failure in prove(wrong, reference).failures)


@pytest.mark.parametrize("dtype, quant", [(torch.bfloat16, "f16"), (torch.float32, "q8_0"), (torch.float32, "f32")])
def test_a_very_sensitive_model_is_judged_by_its_tensors_and_its_header(dtype, quant, tmp_path, monkeypatch):
    """16 bits cost this one 0.08 nats; its own weights, computed as the header says, still give its logits."""
    directory = save(monkeypatch, tmp_path / "model", "gemma", {"initializer_range": 0.5}, dtype=torch.bfloat16)
    reference = reference_of(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), directory)
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", quant)
    assert prove(file, reference).failures == []
    monkeypatch.setattr(export_module, "_compare_sizes", lambda *args: True)  # what our own table would say
    wrong = rewrite(file, tmp_path / "y.gguf", metadata={"gemma.attention.layer_norm_rms_epsilon": 10.0})
    failures = prove(wrong, reference).failures
    assert failures[0].startswith("the model's own weights, computed as its header says, give logits that diverge by ")


def test_an_adapter_that_an_f32_file_lacks_is_found(tmp_path):
    """It moves weights by a thousandth, less than 16 bits round the large ones by; but not those near zero."""
    base = tiny.save_tiny("llama3", tmp_path / "base", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(base / "model.safetensors")
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    exact["model.layers.0.mlp.up_proj.weight"] += 1e-4 * torch.randn(128, 64, generator=generator)
    save_file(exact, base / "model.safetensors", metadata={"format": "pt"})
    files = convert_to_gguf(base, tmp_path / "out", ["f32", "f16"])
    for changes, fails in (
        ({}, False),
        ({"model.layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"]}, True),
    ):
        save_file({**{n: t.bfloat16() for n, t in exact.items()}, **changes}, base / "model.safetensors", {"format": "pt"})
        for file in files:
            failures = verify(file, base).failures
            assert any("16 bits put them" in failure for failure in failures) if fails else failures == [], failures


def test_a_mixture_without_a_name_is_measured(models, tmp_path):
    directory, files = models
    reference = reference_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), directory)
    for quant, fault, fails in (("q4_0", {}, False), ("bf16", {}, False), ("q4_0", FAULTS["swapped tensors"][0], True)):
        changes = fault(GGUFFile(files[quant])) if fault else {}
        file = rewrite(files[quant], tmp_path / "x.gguf", metadata={"general.file_type": 9999}, **changes)
        assert bool(prove(file, reference).failures) == fails, quant


def test_another_model_is_no_match(models, tmp_path):
    directory, _ = models
    (file,) = convert_to_gguf(tiny.save_tiny("llama3.1", tmp_path / "other", seed=5), tmp_path / "x.gguf", "bf16")
    failures = verify(file, directory).failures
    assert any("its logits diverge" in failure for failure in failures)


@pytest.fixture
def trained(tmp_path):
    """A model loaded in 4 bits with an adapter that changes it, and its tokenizer."""
    directory = tiny.save_tiny("llama3.1", tmp_path / "base", dtype=torch.bfloat16)
    model, tokenizer = load_model(directory, load_in_4bit=True, dtype=torch.float32)
    model = get_peft_model(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, tokenizer


@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_an_adapter_is_exported_with_its_proof(base, trained, tmp_path):
    model, tokenizer = trained
    files = save_pretrained_gguf(model, tmp_path / "lute", tokenizer, ["f32", "q8_0"], base=base)
    assert [file.name for file in files] == ["lute-F32.gguf", "lute-Q8_0.gguf"]
    names = {file.name for file in (tmp_path / "lute").iterdir()}
    assert names == {name + end for name in ("lute-F32.gguf", "lute-Q8_0.gguf") for end in ("", ".proof.json")} | {
        "Modelfile-lute-F32",
        "Modelfile-lute-Q8_0",
    }
    proof = json.loads((tmp_path / "lute" / "lute-F32.gguf.proof.json").read_text())
    assert proof["divergence"] < 1e-8 and proof["failures"] == []


def test_the_adapter_alone(trained, tmp_path):
    model, tokenizer = trained
    (file,) = save_pretrained_gguf(model, tmp_path / "lute", tokenizer, save_method="lora")
    assert file == tmp_path / "lute" / "lute-LORA.gguf" and GGUFFile(file).metadata["general.type"] == "adapter"
    with pytest.raises(ValueError, match="Unknown save_method 'merged'.*Allowed: lora"):
        save_pretrained_gguf(model, tmp_path / "lute", tokenizer, save_method="merged")


def test_an_importance_matrix_from_data(trained, tmp_path):
    model, tokenizer = trained
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "A luthier builds lutes."}\n{"text": "One, two, three."}\n')
    for number, data in enumerate((None, rows, ["A luthier builds lutes.", "One, two, three."])):
        save_pretrained_gguf(model, tmp_path / f"{number}", tokenizer, "q4_0", imatrix=data, base="nf4")
    plain, *weighted = (GGUFFile(tmp_path / f"{number}" / f"{number}-Q4_0.gguf") for number in range(3))
    assert [made_with_importance(file) for file in (plain, *weighted)] == [False, True, True]
    rows = [file.data("blk.0.attn_q.weight").tobytes() for file in (plain, *weighted)]
    assert rows[0] != rows[1] == rows[2]


@pytest.mark.parametrize(
    "content, error", [(None, FileNotFoundError), (b"GGUF" + b"\xff" * 60, ValueError)], ids=["missing", "damaged"]
)
def test_an_importance_matrix_that_cannot_be_read_leaves_nothing(trained, tmp_path, content, error):
    model, tokenizer = trained
    file = tmp_path / "imatrix.gguf"
    if content:
        file.write_bytes(content)
    with pytest.raises(error, match="imatrix.gguf"):
        save_pretrained_gguf(model, tmp_path / "lute", tokenizer, "q4_0", imatrix=file)
    assert not (tmp_path / "lute").exists()


def test_a_failed_proof_leaves_nothing(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr("luthier.gguf.plan._rope_order", lambda *args: None)  # queries are written as they are
    with pytest.raises(ExportProofError, match="its logits diverge"):
        save_pretrained_gguf(model, tmp_path / "lute", tokenizer, "q8_0", base="nf4")
    assert list((tmp_path / "lute").iterdir()) == []


def test_a_directory_is_converted_with_its_proof(models, tmp_path):
    directory, _ = models
    assert proved_conversion(directory, tmp_path / "x.gguf", "q8_0") == [tmp_path / "x.gguf"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Modelfile-x", "x.gguf", "x.gguf.proof.json"]
    files = proved_conversion(directory, tmp_path / "out", ["bf16", "q8_0"], prompts=["A prompt of my own."])
    assert [file.name for file in files] == ["model-BF16.gguf", "model-Q8_0.gguf"]


@pytest.mark.filterwarnings("ignore:The model attends to the last 16 tokens")
def test_nothing_is_compared_beyond_the_context_that_a_file_announces(tmp_path):
    directory = tiny.save_tiny("mistral", tmp_path / "model", dtype=torch.bfloat16)
    (file,) = proved_conversion(directory, tmp_path / "x.gguf", "q8_0", prompts=["A prompt of more tokens than sixteen. " * 4])
    assert GGUFFile(file).metadata["llama.context_length"] == 16


def test_only_proved_files_are_uploaded(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    with fake_hub.running(monkeypatch) as hub:
        push_to_hub_gguf(model, "me/lute", tokenizer, "q8_0", base="nf4", token="hf_x")
        assert {"lute-Q8_0.gguf", "lute-Q8_0.gguf.proof.json", "Modelfile-lute-Q8_0"} <= hub.repositories["me/lute"].keys()
        monkeypatch.setattr("luthier.gguf.plan._rope_order", lambda *args: None)
        with pytest.raises(ExportProofError):
            push_to_hub_gguf(model, "me/wrong", tokenizer, "q8_0", base="nf4", token="hf_x")
        assert "me/wrong" not in hub.repositories


def test_what_is_not_covered_leaves_no_directory(tmp_path):
    model = tiny.tiny_model("glm4")
    with pytest.raises(UnsupportedError, match="Glm4ForCausalLM"):
        save_pretrained_gguf(model, tmp_path / "lute", tiny.tiny_tokenizer())
    assert not (tmp_path / "lute").exists()
