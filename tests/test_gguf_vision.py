"""Vision-language models as two files: the vision part computed by llama.cpp's libmtmd, the text part by llama.cpp."""

import numpy as np
import pytest
import tiny_vision
import torch
from llama_oracle import Llama, encode_picture
from test_gguf_convert import IDS, divergence

from luthier.errors import UnsupportedError
from luthier.gguf import GGUFFile, convert_to_gguf, create_ollama_modelfile
from luthier.gguf.mmproj import mmproj_path
from luthier.proof.export import verify
from luthier.proof.gguf_model import GGUFModel

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mistral3")


@pytest.fixture(autouse=True)
def windows_of_112_pixels(monkeypatch):
    """The only size that llama.cpp has, and that published models have."""
    original = tiny_vision.tiny_vision_config

    def config(family):
        result = original(family)
        if family == "qwen2_5_vl":
            result.vision_config.window_size = 112
        return result

    monkeypatch.setattr(tiny_vision, "tiny_vision_config", config)


def features(family, picture):
    """What transformers' vision part makes of a picture: float32 ``[tokens, width]``, deep features behind each other."""
    model, processor = tiny_vision.tiny_vision_model(family), tiny_vision.tiny_processor(family)
    inputs = processor.image_processor(images=[picture], return_tensors="pt")
    sizes = {key: inputs[key] for key in ("image_grid_thw", "image_sizes") if key in inputs}
    if family == "gemma3":
        sizes = {}
    with torch.no_grad():
        found = model.get_image_features(pixel_values=inputs["pixel_values"], **sizes)
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
    parts = [torch.cat(list(part)) if isinstance(part, list | tuple) else part for part in parts]
    width = model.config.get_text_config().hidden_size
    return torch.cat([part.reshape(-1, width) for part in parts], -1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_text_are_what_transformers_computes(family, tmp_path):
    directory = tiny_vision.save_tiny_vision(family, tmp_path / "model")
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "f32")
    picture = tiny_vision.picture(0, (32, 32) if family == "gemma3" else (64, 64))
    expected = features(family, picture)
    with Llama(file) as llama:
        found = encode_picture(llama, mmproj_path(file), np.asarray(picture), expected.shape[1])
        logits = llama.logits(IDS)
    if family in ("llava", "mistral3"):  # a token stands behind each row but the last
        side = int(len(expected) ** 0.5)
        found = found[[i for i in range(len(found)) if (i + 1) % (side + 1)]]
    assert np.abs(found - expected).max() < 1e-2 * expected.std()
    with torch.no_grad():
        wanted = tiny_vision.tiny_vision_model(family)(input_ids=torch.tensor([IDS])).logits[0].numpy()
    own = GGUFModel(GGUFFile(file)).logits([IDS])[0].numpy()
    assert np.abs(own - wanted).max() < 1e-4
    assert verify(file, directory).failures == []
    assert divergence(wanted, logits) < 1e-3  # llama.cpp rotates in three axes, with less precision


def test_one_vision_part_for_all_quantisations(tmp_path):
    directory = tiny_vision.save_tiny_vision("gemma3", tmp_path / "lute")
    files = convert_to_gguf(directory, tmp_path / "out", ["f16", "q8_0"])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"lute-F16.gguf", "lute-Q8_0.gguf", "mmproj-lute.gguf"}
    assert {mmproj_path(file).name for file in files} == {"mmproj-lute.gguf"}
    vision = GGUFFile(tmp_path / "out" / "mmproj-lute.gguf")
    assert vision.tensors["v.blk.0.ffn_up.weight"].type.name == "F16"
    assert vision.tensors["v.patch_embd.weight"].type.name == "F32"
    with Llama(files[1]) as llama:
        picture = np.asarray(tiny_vision.picture(0, (32, 32)))
        found = encode_picture(llama, mmproj_path(files[1]), picture, 64)
    expected = features("gemma3", tiny_vision.picture(0, (32, 32)))
    assert np.abs(found - expected).max() < 3e-2 * expected.std()
    text = create_ollama_modelfile(directory, files[1])
    assert text.startswith("FROM ./lute-Q8_0.gguf\nFROM ./mmproj-lute.gguf\n")
    proof = verify(files[1], directory)
    assert proof.failures == [] and "the vision part was read back, not computed" in proof.notes


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    model = tiny_vision.tiny_vision_model("qwen2_5_vl")
    model.config.vision_config.window_size = 56
    model.save_pretrained(tmp_path / "model")
    tiny_vision.tiny_processor("qwen2_5_vl").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="windows of 112 pixels.*windows of 56"):
        convert_to_gguf(tmp_path / "model", tmp_path / "out" / "x.gguf", "f32")
    tiny_vision.save_tiny_vision("mllama", tmp_path / "mllama")
    with pytest.raises(UnsupportedError, match="MllamaForConditionalGeneration"):
        convert_to_gguf(tmp_path / "mllama", tmp_path / "out" / "x.gguf", "f32")
    assert not (tmp_path / "out").exists()
