"""Whole files against llama.cpp's own quantiser. It is in llama-cpp-python alone, which is compiled: `make test-llama-cpp`."""

import ctypes

import numpy as np
import pytest
import tiny

from luthier.gguf import GGUFFile, convert_to_gguf
from luthier.gguf.types import FILE_TYPES

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llama-cpp")

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
MODELS = {
    "llama3": {},
    "llama3.1": {"num_key_value_heads": 1},  # tied, one head of keys
    "qwen2": {"hidden_size": 288, "head_dim": None, "num_attention_heads": 4},  # rows that superblocks do not fit
    "mixtral": {"num_local_experts": 8},
}
QUANTS = [name for name in FILE_TYPES if name not in ("f32", "q2_k_s")]


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_of_a_file_is_llama_cpps(family, tmp_path, monkeypatch):
    kind, settings = tiny.FAMILIES[family]
    monkeypatch.setitem(tiny.FAMILIES, family, (kind, {**settings, **WIDE, **MODELS[family]}))
    directory = tiny.save_tiny(family, tmp_path / "model")
    (source,) = convert_to_gguf(directory, tmp_path / "f32.gguf", "f32")
    different = []
    for quant, file in zip(QUANTS, convert_to_gguf(directory, tmp_path / "ours", QUANTS), strict=True):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_TYPES[quant].id, 1
        theirs = tmp_path / "theirs.gguf"
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(params)) == 0
        found, wanted = GGUFFile(file), GGUFFile(theirs)
        assert found.tensors.keys() == wanted.tensors.keys()
        for name, info in wanted.tensors.items():
            if found.tensors[name].type is not info.type or not np.array_equal(found.data(name), wanted.data(name)):
                different.append((quant, name, found.tensors[name].type.name, info.type.name))
    assert different == []
