"""Adapters as GGUF files: loaded in llama.cpp over their base, against peft."""

import numpy as np
import pytest
import tiny
import torch
from llama_oracle import Llama
from peft import LoraConfig, get_peft_model
from test_gguf_convert import IDS

from luthier.errors import UnsupportedError
from luthier.gguf import convert_to_gguf
from luthier.gguf.lora import convert_lora_to_gguf

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(family, directory, **settings):
    """A random adapter over a tiny model of ``family``; saved, with its base -> (peft model, base's directory)."""
    base = tiny.save_tiny(family, directory / "base")
    model = get_peft_model(tiny.tiny_model(family), LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL, **settings}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(directory / "adapter")
    return model.eval(), base


SETTINGS = {
    "plain": ("llama3", {}),
    "rsLoRA": ("qwen3", {"use_rslora": True}),
    "patterns": ("llama3", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 16}, "alpha_pattern": {"k_proj": 64}}),
    "patterns, rsLoRA": ("llama3", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}),
    "head and embeddings": ("llama3", {"target_modules": [*ALL, "lm_head", "embed_tokens"]}),
    "embeddings of rank 1": ("llama3", {"target_modules": ["embed_tokens"], "r": 1, "lora_alpha": 64}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "gemma": ("gemma3", {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_adapter_acts_in_llama_cpp_as_in_peft(name, tmp_path):
    family, settings = SETTINGS[name]
    model, base = adapter(family, tmp_path, **settings)
    (file,) = convert_to_gguf(base, tmp_path / "base.gguf", "f32")
    lora = convert_lora_to_gguf(tmp_path / "adapter", model.config, tmp_path / "lora.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    with Llama(file) as plain, Llama(file, lora=lora) as adapted:
        assert np.abs(plain.logits(IDS) - expected).max() > 0.1
        assert np.abs(adapted.logits(IDS) - expected).max() < (1e-2 if family == "gemma3" else 1e-4)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("llama3", {"use_dora": True}, "DoRA"),
        ("llama3", {"alora_invocation_tokens": [7, 8]}, "invocation tokens"),
        ("llama3", {"layer_replication": [[0, 2], [1, 2]]}, "layers that the base has once"),
        ("llama3", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changed the base"),
        ("llama3", {"modules_to_save": ["lm_head"]}, "modules saved whole"),
        ("llama3", {"trainable_token_indices": [1, 2]}, "new or retrained tokens"),
        ("qwen2", {"bias": "lora_only"}, "trained biases"),
        ("llama3.1", {"target_modules": ["q_proj", "embed_tokens"]}, "tied embeddings"),
    ],
)
def test_what_cannot_be_an_adapter_there_is_refused(family, settings, message, tmp_path):
    model, _ = adapter(family, tmp_path, **settings)
    with pytest.raises(UnsupportedError, match=f"{message}.*Merge it instead"):
        convert_lora_to_gguf(tmp_path / "adapter", model.config, tmp_path / "out" / "lora.gguf")
    assert not (tmp_path / "out").exists()
