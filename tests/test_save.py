"""Saving: what is written, that it is all or nothing, and the way to a hub and back."""

import errno
import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import fake_hub
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.model.gguf_export import write_merged_gguf
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.merge import Merge
from luthier.model.save import push_to_hub_merged, save_pretrained_merged
from luthier.model.shards import parse_size, room_for, write_shards
from luthier.ops.nf4 import dequantise, quantised

IDS = torch.arange(5, 45)[None]
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% generation %}{{ message['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny("llama3", tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16)


@pytest.fixture
def trained(base):
    model, tokenizer = load_model(base)
    model = get_peft_model(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return model.eval(), tokenizer


def test_the_merged_directory_is_a_whole_model(trained, tmp_path):
    model, tokenizer = trained
    model.config.use_cache = False  # as training leaves it
    tokenizer.chat_template = MARKED
    out = save_pretrained_merged(model, tmp_path / "deep" / "er", tokenizer)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16" and config["use_cache"]
    assert "quantization_config" not in config and config["vocab_size"] == 480
    assert (out / "generation_config.json").exists()
    plain = AutoTokenizer.from_pretrained(out)
    assert plain.chat_template == MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert tokenizer.chat_template == MARKED, "the tokenizer in hand keeps its marks"
    assert plain("Hello").input_ids == tokenizer("Hello").input_ids
    assert {path.name for path in tmp_path.iterdir()} == {"deep"} and {path.name for path in (tmp_path / "deep").iterdir()} == {
        "er"
    }


def test_shards_hold_the_same_and_stay_below_their_size(trained, tmp_path):
    model, tokenizer = trained
    save_pretrained_merged(model, tmp_path / "one", tokenizer)
    save_pretrained_merged(model, tmp_path / "many", tokenizer, max_shard_size="60KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and sorted(set(index["weight_map"].values())) == shards
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "many" / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), whole[name])
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(tmp_path / "many" / shard).values()]
        assert sum(sizes) <= 60_000 or len(sizes) == 1
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert torch.equal(one(IDS).logits, many(IDS).logits)


def test_the_writer_takes_tensors_of_any_size_and_dtype(tmp_path):
    dtypes = [torch.bfloat16, torch.uint8, torch.float32, torch.int64, torch.bool, torch.float16]
    tensors = {f"{number}é": torch.arange(number).to(dtypes[number % len(dtypes)]) for number in range(23)}
    tensors["scalar"], tensors["turned"] = torch.tensor(3.0), torch.arange(6.0).view(2, 3).T
    write_shards(tmp_path, tensors.items(), 100, room_for(tensors))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index[name])[name], tensor)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (7, 7), ("300", 300)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["five", "5 parsecs", "0GB", "", None])
def test_what_is_not_a_size(text, trained, tmp_path):
    with pytest.raises(ValueError, match="size"):
        save_pretrained_merged(trained[0], tmp_path / "out", trained[1], max_shard_size=text)


def test_merged_4bit_is_the_fp32_merge_quantised_once(trained, tmp_path, capsys):
    model, tokenizer = trained
    save_pretrained_merged(model, tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    said = capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    error = norm = 0.0
    for name, weight in Merge(model, dtype=torch.float32).tensors():
        stored = merged.get_parameter(name)
        if not isinstance(stored, bnb.nn.Params4bit):
            assert torch.equal(stored, weight.to(stored.dtype))
            continue
        expected = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
        assert torch.equal(stored.data, expected.data) and torch.equal(stored.quant_state.absmax, expected.quant_state.absmax)
        assert stored.quant_state.dtype == torch.bfloat16
        error += (dequantise(quantised(expected)) - weight).square().sum().item()
        norm += weight.square().sum().item()
    assert error > 0 and f"{(error / norm) ** 0.5:.2%}" in said
    assert not isinstance(merged.lm_head.weight, bnb.nn.Params4bit)
    again, _ = load_model(tmp_path / "nf4")
    assert again.luthier.precision == "nf4" and again.is_loaded_in_4bit


def test_merged_4bit_leaves_experts_in_16_bits_that_plain_transformers_reads(tmp_path):
    model, tokenizer = load_model(tiny.save_tiny("mixtral", tmp_path / "base", dtype=torch.bfloat16))
    save_pretrained_merged(get_peft_model(model, r=2), tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert merged.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert isinstance(merged.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)


def test_lora_saves_the_adapter_with_its_base_and_tokenizer(trained, tmp_path, base, monkeypatch):
    model, tokenizer = trained
    save_pretrained_merged(model, tmp_path / "adapter", tokenizer, save_method="lora")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and Path(config["base_model_name_or_path"]).is_absolute()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    again, _ = load_model("adapter")
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


def test_an_adapter_may_be_saved_beside_its_base(base, tmp_path):
    own = shutil.copytree(base, tmp_path / "own")
    model, tokenizer = load_model(own)
    save_pretrained_merged(get_peft_model(model, r=4), own, tokenizer, save_method="lora")
    again, _ = load_model(own)
    assert again.luthier.base_path == own and "default" in again.peft_config


def test_an_adapter_of_a_grown_vocabulary_comes_back_whole(base, tmp_path):
    model, tokenizer = load_model(base, resize_model_vocab=500, load_in_16bit=True)
    model = get_peft_model(model, r=2)
    model.get_input_embeddings().weight.data[490] = 1.0
    save_pretrained_merged(model, tmp_path / "adapter", tokenizer, save_method="lora")
    again, _ = load_model(tmp_path / "adapter", load_in_16bit=True)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_wrong_arguments_are_named(trained, tmp_path, base):
    model, tokenizer = trained
    with pytest.raises(ValueError, match="'merged_8bit'.*Allowed: lora, merged_16bit, merged_4bit"):
        save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method="merged_8bit")
    with pytest.raises(TypeError, match="'save_metod'.*Did you mean 'save_method'"):
        save_pretrained_merged(model, tmp_path / "out", save_metod="lora")
    with pytest.raises(TypeError, match="tokenizer must be.*'tokenizer'"):
        save_pretrained_merged(model, tmp_path / "out", "tokenizer")
    with pytest.raises(ValueError, match="'16'.*Allowed: 16bit, nf4"):
        save_pretrained_merged(model, tmp_path / "out", tokenizer, base="16")
    with pytest.raises(ValueError, match="is the base model"):
        save_pretrained_merged(model, base, tokenizer)
    save_pretrained_merged(model, tmp_path / "adapter", tokenizer, save_method="lora")
    with pytest.raises(ValueError, match="holds an adapter"):
        save_pretrained_merged(model, tmp_path / "adapter", tokenizer)
    save_pretrained_merged(model, tmp_path / "model", tokenizer)
    with pytest.raises(ValueError, match="holds a whole model"):
        save_pretrained_merged(model, tmp_path / "model", tokenizer, save_method="lora")
    plain, _ = load_model(base, full_finetuning=True)
    with pytest.raises(ValueError, match="has none"):
        save_pretrained_merged(plain, tmp_path / "out", tokenizer, save_method="lora")
    with pytest.raises(TypeError, match="tokenizer is None"):
        write_merged_gguf(model, tmp_path / "out", None)
    with pytest.warns(UserWarning, match="No tokenizer"):
        save_pretrained_merged(model, tmp_path / "bare")
    tokenizer.add_tokens([f"<late{number}>" for number in range(40)])
    with pytest.warns(UserWarning, match="tokenizer has 488 tokens and the model 480 rows"):
        save_pretrained_merged(model, tmp_path / "late", tokenizer)
    assert not (tmp_path / "out").exists()


# All or nothing


def snapshot(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class FullDisk:
    """Stands for a file that takes so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def disk_full_while_writing(monkeypatch):
    opened = Path.open

    def limited(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return FullDisk(file, 50_000) if "w" in mode and path.suffix == ".part" else file

    monkeypatch.setattr(Path, "open", limited)


def disk_full_at_the_end(monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def read_only(monkeypatch):
    def mkdtemp(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)


def too_little_space(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))


@pytest.mark.parametrize("save_method", ["merged_16bit", "merged_4bit", "lora"])
@pytest.mark.parametrize("trouble", [disk_full_while_writing, disk_full_at_the_end, read_only, too_little_space])
def test_a_failed_save_leaves_what_was_there(trained, tmp_path, monkeypatch, save_method, trouble):
    if trouble is disk_full_while_writing and save_method == "lora":
        trouble = disk_full_at_the_end  # peft writes the adapter, through other calls
    model, tokenizer = trained
    out = tmp_path / "out"
    save_pretrained_merged(model, out, tokenizer, save_method=save_method)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="out") as error:
        trouble(patch)
        save_pretrained_merged(model, out, tokenizer, save_method=save_method)
    assert error.value.errno in (errno.ENOSPC, errno.EROFS)
    assert snapshot(tmp_path) == before
    with monkeypatch.context() as patch, pytest.raises(OSError):
        trouble(patch)
        save_pretrained_merged(model, tmp_path / "new", tokenizer, save_method=save_method)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("save_method", ["merged_16bit", "merged_4bit"])
def test_weights_that_are_not_numbers_are_not_saved(trained, tmp_path, save_method):
    model, tokenizer = trained
    model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight").data[3, 2] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight.*NaN"):
        save_pretrained_merged(model, tmp_path / "out", tokenizer, save_method=save_method)
    assert not list(tmp_path.iterdir())


def test_saving_again_leaves_no_stale_shards(trained, tmp_path):
    model, tokenizer = trained
    save_pretrained_merged(model, tmp_path / "out", tokenizer, max_shard_size="60KB")
    (tmp_path / "out" / "README.md").write_text("mine")
    save_pretrained_merged(model, tmp_path / "out", tokenizer)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


# The Hub


def test_a_push_is_the_merged_directory(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    local = save_pretrained_merged(model, tmp_path / "local", tokenizer)
    with fake_hub.running(monkeypatch) as hub:
        address = push_to_hub_merged(model, "me/tuned", tokenizer, token="hf_test")
        assert address == f"{hub.url}/me/tuned/commit/{fake_hub.COMMIT}"
        pushed = hub.repositories["me/tuned"]
        assert {name: data for name, data in pushed.items() if name != ".gitattributes"} == {
            str(name): data for name, data in snapshot(local).items()
        }
        again, _ = load_model("me/tuned", cache_dir=tmp_path / "cache", load_in_16bit=True)
        assert torch.equal(again(IDS).logits, load_model(local, load_in_16bit=True)[0](IDS).logits)
        save_pretrained_merged(model, tmp_path / "tuned-too", tokenizer, save_method="lora", push_to_hub=True, token="hf_test")
        assert "adapter_model.safetensors" in hub.repositories["me/tuned-too"]


def test_a_refused_push_says_why(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    with fake_hub.running(monkeypatch) as hub:
        hub.writable = False
        with pytest.raises(PermissionError, match="me/tuned.*token"):
            push_to_hub_merged(model, "me/tuned", tokenizer, save_method="lora", token="hf_test")
    with pytest.raises(ValueError, match="not a Hub name"):
        push_to_hub_merged(model, "a/b/c", tokenizer, save_method="lora", token="hf_test")
