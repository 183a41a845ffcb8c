"""Exported files against transformers, with llama.cpp as the judge."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_oracle import Llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from luthier.errors import UnsupportedError
from luthier.gguf import ALLOWED_QUANTS, GGUFFile, convert_to_gguf, print_quantization_methods
from luthier.gguf.convert import read_config, write_gguf
from luthier.gguf.source import CheckpointSource

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,  # llama.cpp rounds a context up to 256, and chooses the factors by it
}
HALF = {"partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# name -> (family of tests/tiny.py, what is changed); the names of families stand for themselves
MODELS = {
    **{name: (name, {}) for name in ("llama2", "llama3", "llama3.1", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")},
    **{name: (name, {}) for name in ("granite", "olmo2", "mixtral", "qwen3_moe")},
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}),
    "granite llama3": ("granite", {"rope_parameters": tiny.LLAMA3_ROPE, "embedding_multiplier": 12.0}),
    "gemma2, capped": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5}),
    "llama, large heads": ("llama3", {"head_dim": 32, "num_key_value_heads": 1}),
    "mixtral yarn, 8 experts": ("mixtral", {"num_local_experts": 8, "rope_parameters": YARN}),
    "llama with biases": ("llama3", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama3", {"rope_parameters": LINEAR}),
    "llama, a share that it ignores": ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **HALF}}),
    "llama yarn": ("llama3", {"rope_parameters": YARN}),
    "qwen2 yarn, own attention factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
    "phi3 partly rotated": ("phi3", {"rope_parameters": {**LINEAR, "rope_type": "default", "partial_rotary_factor": 0.75}}),
    "gemma3, global and local": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt_oss": ("gpt_oss", {"rope_parameters": {**tiny.YARN_ROPE, "truncate": True}}),
}
IDS = torch.randint(5, 440, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def save(monkeypatch, directory, family, changes=None, **options):
    """A tiny model of ``family`` with ``changes`` in its configuration, in ``directory``."""
    kind, settings = tiny.FAMILIES[family]
    monkeypatch.setitem(tiny.FAMILIES, family, (kind, {**settings, **(changes or {})}))
    return tiny.save_tiny(family, directory, **options)


def reference(directory, ids=IDS, weights=None):
    """Logits of transformers, float32 ``[len(ids), vocab]``; ``weights`` maps every matrix first."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        if weights is not None:
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "norm" not in name:
                    parameter.copy_(weights(parameter))
        return model(torch.tensor([ids])).logits[0].numpy()


def divergence(reference, other):
    """Mean KL divergence over positions."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path, monkeypatch):
    directory = save(monkeypatch, tmp_path / "model", *MODELS[name])
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "f32")
    expected = reference(directory)
    with Llama(file, context=128) as llama:
        found = llama.logits(IDS)
        tokens = llama.greedy(IDS[:8], 12)
    # llama.cpp takes GELU from a table of half precision
    assert np.abs(found - expected).max() < (1e-2 if name.startswith("gemma") else 1e-4)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.tensor([IDS[:8]])
    wanted = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert tokens == wanted[0].tolist()


def test_a_head_of_its_own_is_kept_where_the_config_says_tied(tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (tied,) = convert_to_gguf(directory, tmp_path / "tied.gguf", "f32")
    assert "output.weight" not in GGUFFile(tied).tensors
    weights["lm_head.weight"] *= torch.linspace(0.5, 2, tiny.VOCAB)[:, None]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (apart,) = convert_to_gguf(directory, tmp_path / "apart.gguf", "f32")
    with Llama(apart) as llama:
        assert np.abs(llama.logits(IDS) - reference(directory)).max() < 1e-4


@pytest.mark.parametrize("quant, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_files_equal_weights_rounded_the_same_way(quant, dtype, tmp_path):
    directory = tiny.save_tiny("llama3.1", tmp_path / "model")
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", quant)
    stored = load_file(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].to(dtype)
    assert bytes(GGUFFile(file).data("blk.0.ffn_up.weight")) == bytes(stored.view(torch.uint8).numpy())
    with Llama(file) as llama:  # llama.cpp rounds activations to the type of the weights, so this is a distance, not equality
        assert divergence(reference(directory, weights=lambda w: w.to(dtype).float()), llama.logits(IDS)) < 1e-4


def test_q8_0_is_close(tmp_path):
    directory = tiny.save_tiny("llama3.1", tmp_path / "model")
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0")
    with Llama(file) as llama:
        assert divergence(reference(directory), llama.logits(IDS)) < 1e-3


@pytest.mark.parametrize("name", ["x.bin", "x.GGUF", "x.safetensors"])
def test_a_file_of_another_ending_is_no_directory(name, tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    with pytest.raises(ValueError, match=f"{name} looks like a file: a GGUF file ends in .gguf"):
        convert_to_gguf(directory, tmp_path / "y" / name, "q8_0")
    assert not (tmp_path / "y").exists()


def test_several_quantisations_come_from_one_pass(tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model", max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    files = convert_to_gguf(directory, tmp_path / "out", ["f16", "q8_0", "fast_quantized"])
    assert [file.name for file in files] == ["model-F16.gguf", "model-Q8_0.gguf"]
    (alone,) = convert_to_gguf(directory, tmp_path / "alone.gguf", "q8_0")
    assert files[1].read_bytes() == alone.read_bytes()


def test_a_stream_of_tensors_is_enough(tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    (wanted,) = convert_to_gguf(directory, tmp_path / "a.gguf", "q8_0")
    weights = load_file(directory / "model.safetensors")

    class Merged:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

        def __iter__(self):
            return iter(sorted(weights.items(), reverse=True))

    (streamed,) = write_gguf(read_config(directory), directory, Merged(), {tmp_path / "b.gguf": "q8_0"}, name="model")
    first, second = GGUFFile(wanted), GGUFFile(streamed)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(np.array_equal(first.data(name), second.data(name)) for name in first.tensors)


def test_a_sliding_window_that_llama_cpp_ignores_limits_the_context(tmp_path):
    directory = tiny.save_tiny("mistral", tmp_path / "model")
    with pytest.warns(UserWarning, match="attends to the last 16 tokens"):
        (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "f32")
    assert GGUFFile(file).metadata["llama.context_length"] == 16
    with Llama(file) as llama:
        assert np.abs(llama.logits(IDS[:16]) - reference(directory, IDS[:16])).max() < 1e-4


def test_a_ramp_that_llama_cpp_rounds_is_said(tmp_path):
    """gpt-oss as it is published: close, not equal."""
    directory = tiny.save_tiny("gpt_oss", tmp_path / "model")
    with pytest.warns(UserWarning, match="rounds YaRN's ramp"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "f32")


@pytest.mark.filterwarnings("ignore:.*YaRN")
def test_experts_stored_in_mxfp4_are_expanded(tmp_path, monkeypatch):
    """As gpt-oss is published, and as transformers reads it."""
    directory = save(monkeypatch, tmp_path / "model", "gpt_oss", {"intermediate_size": 96})
    weights, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    expanded = {}
    for name in [name for name in weights if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expanded[name] = convert_moe_packed_tensors(blocks, scales)
    (tmp_path / "stored").mkdir()
    for file in directory.iterdir():
        shutil.copy(file, tmp_path / "stored")
    save_file(weights, tmp_path / "stored" / "model.safetensors", {"format": "pt"})
    others = {name: weight for name, weight in weights.items() if not name.endswith(("_blocks", "_scales"))}
    save_file({**others, **{n: w.contiguous() for n, w in expanded.items()}}, directory / "model.safetensors", {"format": "pt"})
    source = CheckpointSource(tmp_path / "stored")
    found = dict(source)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == source.shapes and expanded
    assert all(torch.equal(found[name], weight) and found[name].dtype == weight.dtype for name, weight in expanded.items())
    files = [convert_to_gguf(place, tmp_path / f"{place.name}.gguf", "q8_0")[0] for place in (tmp_path / "stored", directory)]
    first, second = map(GGUFFile, files)
    assert all(np.array_equal(first.data(name), second.data(name)) for name in first.tensors)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gemma3", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar must be the head's size"),
        ("smollm3", {}, "every fourth layer"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "must alternate"),
        ("llama3", {"hidden_act": "relu"}, "hidden_act must be silu"),
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ("llama3", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast 32 and beta_slow 1 only; this model has 16.0"),
        ("qwen3", {"rope_parameters": tiny.LLAMA3_ROPE}, "does not have rope_type 'llama3' in qwen3"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be false"),
        ("qwen2", {"head_dim": 32}, "head_dim must be hidden_size"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "both soft caps must be set"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob must be true"),
        ("gemma", {"tie_word_embeddings": False}, "the head must be the embeddings"),
        ("gemma2", {"tie_word_embeddings": False}, "the head must be the embeddings"),
        ("olmo2", {"tie_word_embeddings": True}, "the head must not be the embeddings"),
        ("gpt_oss", {"tie_word_embeddings": True}, "the head must not be the embeddings"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention must look back only"),
        ("smollm3", {"no_rope_layer_interval": 4, "mlp_bias": True}, "mlp_bias must be false"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(family, changes, message, tmp_path, monkeypatch):
    directory = save(monkeypatch, tmp_path / "model", family, changes)
    with pytest.raises(UnsupportedError, match=message):
        convert_to_gguf(directory, tmp_path / "out" / "x.gguf", "f32")
    assert not (tmp_path / "out").exists()


def damaged(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), ValueError, "it lacks blk.1.ffn_up.weight"),
        (lambda w: w.pop("lm_head.weight"), ValueError, "it lacks output.weight"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}), ValueError, "too many"),
        (lambda w: w.update({"model.surprise.weight": torch.ones(2, 2)}), UnsupportedError, "model.surprise.weight"),
        (lambda w: w["lm_head.weight"].fill_(math.nan), ValueError, "output.weight holds NaN"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_leaves_nothing(change, error, message, tmp_path):
    directory = damaged(tiny.save_tiny("llama3", tmp_path / "model"), change)
    with pytest.raises(error, match=message):
        convert_to_gguf(directory, tmp_path / "out" / "x.gguf", "f16")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "[1]", "config.json is damaged"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", {"hidden_size": "abc"}, "config.json is damaged.*hidden_size"),
        ("config.json", {"num_key_value_heads": 4}, r"attn_k.weight \(32, 64\) instead of \(64, 64\)"),
        ("config.json", {"vocab_size": 100}, r"token_embd.weight \(480, 64\) instead of \(100, 64\)"),
        ("config.json", {"intermediate_size": 64}, r"ffn_down.weight \(64, 128\) instead of \(64, 64\)"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer.json", {"model": {"vocab": {"a": 0}, "merges": ["b c"]}}, "tokenizer.json is damaged|no token for"),
        ("tokenizer.json", {"post_processor": {"type": "Nothing"}}, "tokenizer.json is damaged"),
        ("tokenizer_config.json", '["a"]', "tokenizer_config.json is damaged"),
    ],
)
def test_damaged_json_is_named(file, content, message, tmp_path):
    directory = tiny.save_tiny("qwen3", tmp_path / "model")
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / file).read_text()) | content)
    (directory / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_to_gguf(directory, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_half_precision_are_refused_for_f16(tmp_path):
    directory = damaged(tiny.save_tiny("llama3", tmp_path / "model"), lambda w: w["lm_head.weight"].mul_(1e7))
    with pytest.raises(ValueError, match="output.weight.*65504.*bf16"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "f16")
    assert convert_to_gguf(directory, tmp_path / "x.gguf", "bf16")


def test_other_bad_input(tmp_path):
    directory = tiny.save_tiny("qwen2", tmp_path / "model")
    with pytest.raises(ValueError, match="Did you mean 'q8_0'"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "q8")
    with pytest.raises(TypeError, match="quantization_method"):
        convert_to_gguf(directory, tmp_path / "x.gguf", [8])
    with pytest.raises(ValueError, match="give a directory"):
        convert_to_gguf(directory, tmp_path / "x.gguf", ["f16", "f32"])
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        convert_to_gguf(tmp_path, tmp_path / "x.gguf", "f16")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "f16")
    weights.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickles"):
        convert_to_gguf(directory, tmp_path / "x.gguf", "f16")
    config = json.loads((directory / "config.json").read_text())
    for change, message in (
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        ({"architectures": ["OPTForCausalLM"]}, "OPT"),
    ):
        (directory / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedError, match=message):
            convert_to_gguf(directory, tmp_path / "x.gguf", "f16")


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "damaged or not an index"),
        ("[]", "damaged or not an index"),
        ('{"weight_map": {"a": 3}}', "damaged or not an index"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "not files of its own directory"),
    ],
)
def test_a_hostile_index_is_refused(index, message, tmp_path):
    directory = tiny.save_tiny("qwen2", tmp_path / "model")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        convert_to_gguf(directory, tmp_path / "x.gguf", "f16")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_of_a_checkpoint_breaks_the_reader(data, tmp_path):
    """Any bytes of a safetensors file changed or cut: it reads, or is refused with a ValueError; nothing else."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=12))
    path.write_bytes(content)
    try:
        source = CheckpointSource(tmp_path)
        assert all(tuple(tensor.shape) == source.shapes[name] for name, tensor in source)
    except ValueError:
        pass


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    directory = tiny.save_tiny("qwen2", tmp_path / "model")
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="only 0.00 GB are free"):
        convert_to_gguf(directory, tmp_path / "out" / "x.gguf", "f16")
    assert not (tmp_path / "out").exists()


def test_the_list_of_quantisations_can_be_printed(capsys):
    print_quantization_methods()
    printed = capsys.readouterr().out
    assert all(f'"{name}"' in printed for name in ALLOWED_QUANTS)
    assert {"not_quantized", "fast_quantized", "quantized", "q4_k", "q5_k", "q2_k_s"} <= ALLOWED_QUANTS.keys()
