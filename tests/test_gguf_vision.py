"""Vision-language models as two files: the vision part computed by llama.cpp's libmtmd, the text part by llama.cpp."""

import json

import numpy as np
import pytest
import tiny_vision
import torch
from llama_oracle import Llama, encode_picture
from test_gguf_convert import IDS, divergence
from test_gguf_proof import rewrite

from luthier.errors import UnsupportedError
from luthier.gguf import GGUFFile, convert_to_gguf, create_ollama_modelfile
from luthier.gguf.dequantize import load_tensor
from luthier.gguf.mmproj import find_projector, mmproj_path
from luthier.model.lora import get_peft_model
from luthier.model.vision import load_vision_model
from luthier.proof.export import prove, reference_of, save_pretrained_gguf, verify, write_proof
from luthier.proof.gguf_model import GGUFModel

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mistral3")


@pytest.fixture(autouse=True)
def like_published_models(monkeypatch):
    """Windows of 112 pixels, the only size that llama.cpp has, and layers of Pixtral that do more than its 0.02 let them."""
    monkeypatch.setitem(tiny_vision.PIXTRAL_VISION, "initializer_range", 0.1)
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
    assert proof.failures == [] and "a picture's features are off by" in proof.vision and proof.notes == []


def test_what_llama_cpp_does_not_have_is_refused(tmp_path):
    model = tiny_vision.tiny_vision_model("qwen2_5_vl")
    model.config.vision_config.window_size = 56
    model.save_pretrained(tmp_path / "model")
    tiny_vision.tiny_processor("qwen2_5_vl").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="windows of 112 pixels.*windows of 56"):
        convert_to_gguf(tmp_path / "model", tmp_path / "out" / "x.gguf", "f32")
    model.config.vision_config.hidden_act = "gelu"
    with pytest.raises(UnsupportedError, match="its activation must be silu, not gelu"):
        find_projector(model.config)
    pixtral = tiny_vision.tiny_vision_config("llava")
    pixtral.vision_feature_layer = -2
    with pytest.raises(UnsupportedError, match="must use the last vision layer, not -2"):
        find_projector(pixtral)
    tiny_vision.save_tiny_vision("mllama", tmp_path / "mllama")
    with pytest.raises(UnsupportedError, match="MllamaForConditionalGeneration"):
        convert_to_gguf(tmp_path / "mllama", tmp_path / "out" / "x.gguf", "f32")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """family -> a directory and its GGUF files of type q8_0, made once."""
    made = {}

    def of(family):
        if family not in made:
            directory = tiny_vision.save_tiny_vision(family, tmp_path_factory.mktemp(family) / "model")
            made[family] = directory, convert_to_gguf(directory, directory.parent / "x.gguf", "q8_0")[0]
        return made[family]

    return of


def turned(file, name):
    """Rows of a matrix of queries with the halves of every head exchanged for pairs, or pairs for halves."""
    rows = file.data(name)
    return rows.reshape(4, -1, 2, rows.shape[1]).transpose(0, 2, 1, 3).reshape(rows.shape)


QUERIES = {"qwen3_vl": "v.blk.1.attn_qkv.weight"}
FAULTS = {
    "rows of queries in another order": lambda file, q: {"tensors": {q: turned(file, q)}},
    "swapped tensors": lambda file, q: {"tensors": {"v.blk.0.ln1.weight": file.data("v.blk.0.ln2.weight")}},
    "lost key": lambda file, q: {"metadata": {"clip.vision.attention.layer_norm_epsilon": None}},
    "wrong mean": lambda file, q: {"metadata": {"clip.vision.image_mean": [0.0, 0.5, 0.5]}},
    "wrong head count": lambda file, q: {"metadata": {"clip.vision.attention.head_count": 2}},
    "another projector": lambda file, q: {"metadata": {"clip.projector_type": "mlp"}},
}
FAULTS_OF = {
    "qwen2_5_vl": {"other windows": lambda file, q: {"metadata": {"clip.vision.n_wa_pattern": 1}}},
    "qwen3_vl": {"deep features": lambda file, q: {"metadata": {"clip.vision.is_deepstack_layers": [False, True]}}},
    "gemma3": {"norm without its one": lambda file, q: {"tensors": {
        "mm.soft_emb_norm.weight": (file.data("mm.soft_emb_norm.weight").view(np.float32) - 1).view(np.uint8)}}},
    "mistral3": {"wrong break": lambda file, q: {"tensors": {
        "v.token_embd.img_break": np.roll(file.data("v.token_embd.img_break"), 4)}}},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_faults_of_the_vision_part_are_found(family, exported, tmp_path):
    """Without the weights' own comparison: a mistake that the writer's tables make would pass that."""
    directory, file = exported(family)
    reference = reference_of(tiny_vision.tiny_vision_model(family), tiny_vision.tiny_processor(family), ["Hi"])
    good = mmproj_path(file)
    assert prove(file, reference).failures == []
    missed = []
    for number, (fault, plant) in enumerate((FAULTS | FAULTS_OF.get(family, {})).items()):
        text = tmp_path / f"{number}.gguf"
        text.symlink_to(file)
        queries = QUERIES.get(family, "v.blk.1.attn_q.weight")
        rewrite(good, mmproj_path(text), **plant(GGUFFile(good), queries))
        if not any("mmproj" in failure for failure in prove(text, reference).failures):
            missed.append(fault)
    assert missed == []


def test_a_vision_part_is_verified_with_its_text_part(exported):
    directory, file = exported("gemma3")
    with pytest.raises(ValueError, match="mmproj-.* is the vision part of a model: verify the text part"):
        verify(mmproj_path(file), directory)


def test_what_is_lost_or_flipped_in_a_vision_part_is_named(exported, tmp_path):
    directory, file = exported("qwen2_vl")
    text, good = tmp_path / "x.gguf", mmproj_path(file)
    text.symlink_to(file)
    proof = verify(text, directory)
    assert proof.failures == [] and "its vision part mmproj-x.gguf is not beside it: not compared" in proof.notes
    reference = reference_of(tiny_vision.tiny_vision_model("qwen2_vl"), directory, ["Hi"])
    assert "its vision part mmproj-x.gguf is missing" in prove(text, reference).failures
    data = GGUFFile(good).data("v.blk.1.ffn_up.weight").copy()
    data[3, 4] ^= 1
    rewrite(good, mmproj_path(text), tensors={"v.blk.1.ffn_up.weight": data})
    (failure,) = verify(text, directory).failures
    assert "v.blk.1.ffn_up.weight differs from the model's in 1 bytes" in failure
    write_proof(text, prove(text, reference_of(tiny_vision.tiny_vision_model("qwen2_vl"), directory, ["Hi"])))
    rewrite(good, mmproj_path(text))
    assert any("changed since its proof was written: mmproj-x.gguf v.blk.1" in f for f in verify(text, directory).failures)


@pytest.mark.parametrize("base", ["16bit", "nf4"])
def test_an_adapter_on_both_parts_is_exported_with_its_proof(base, tmp_path):
    directory = tiny_vision.save_tiny_vision("gemma3", tmp_path / "base", dtype=torch.bfloat16)
    model, processor = load_vision_model(directory, load_in_4bit=True, dtype=torch.float32)
    model = get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(0)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if "lora_B" in name]
    assert any("vision_tower" in name for name, _ in trained)
    for _, parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    (file,) = save_pretrained_gguf(model, tmp_path / "lute", processor, "f32", base=base)
    proof = json.loads((tmp_path / "lute" / "lute-F32.gguf.proof.json").read_text())
    assert proof["failures"] == [] and "a picture's features are off by" in proof["vision"]
    before, after = (load_tensor(GGUFFile(mmproj_path(path)), "v.blk.0.ffn_up.weight") for path in (
        convert_to_gguf(directory, tmp_path / "x.gguf", "f32")[0], file))  # fmt: skip
    assert not torch.allclose(before, after, atol=1e-3)
