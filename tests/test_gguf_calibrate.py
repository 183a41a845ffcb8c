"""Importance matrices computed from a loaded model."""

import pytest
import tiny
import torch
from datasets import Dataset

from luthier.errors import UnsupportedError
from luthier.gguf import GGUFFile, convert_to_gguf
from luthier.gguf.calibrate import calibrate
from luthier.gguf.chat import load_tokenizer
from luthier.gguf.dequantize import load_tensor
from luthier.gguf.imatrix import read_importance
from luthier.gguf.mixed import choose_types
from luthier.gguf.types import TENSOR_TYPES
from luthier.model.accelerate import accelerate
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.proof.export import prove, reference_of

TEXTS = ["A luthier builds lutes.", "One, two, three: 1 2 3", "The end of it all."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_tiny("llama3.1", tmp_path_factory.mktemp("model") / "m")


def test_importance_is_the_mean_of_squared_inputs(directory):
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    found = calibrate(model, tokenizer, TEXTS)
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        inputs = [norm(model.model.embed_tokens(torch.tensor(tokenizer(text)["input_ids"]))) for text in TEXTS]
    expected = torch.cat(inputs).square().mean(0)
    assert torch.allclose(found.importance["blk.0.attn_q.weight"], expected, rtol=1e-5)
    names = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    head = "token_embd.weight"  # is the output head of this model, too
    assert found.importance.keys() == {f"blk.{i}.{name}.weight" for i in range(2) for name in names} | {head}
    with torch.no_grad():
        outputs = [model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0] for text in TEXTS]
    assert torch.allclose(found.importance[head], torch.cat(outputs).square().mean(0), rtol=1e-5)
    assert found.importance["blk.1.ffn_down.weight"].shape == (model.config.intermediate_size,)


def test_adapters_and_fused_layers_are_seen_through(directory):
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    expected = calibrate(model, tokenizer, TEXTS).importance
    fused = accelerate(get_peft_model(model, r=4))  # a new adapter changes nothing
    found = calibrate(fused, tokenizer, TEXTS).importance
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4) for name in found)


def test_every_kind_of_row_and_the_limits(directory):
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    ids = tokenizer(TEXTS[0])["input_ids"]
    plain = calibrate(model, tokenizer, [TEXTS[0]]).importance["blk.0.attn_q.weight"]
    for data in ([{"text": TEXTS[0]}], [{"input_ids": ids}], Dataset.from_list([{"text": TEXTS[0]}])):
        assert torch.equal(calibrate(model, tokenizer, data).importance["blk.0.attn_q.weight"], plain)
    chat = calibrate(model, tokenizer, [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert chat.tokens == len(tokenizer("<|im_start|>user\nHi<|im_end|>\n")["input_ids"])
    assert calibrate(model, tokenizer, TEXTS * 50, length=4, max_tokens=10).tokens == 10
    with pytest.raises(ValueError, match="holds no text"):
        calibrate(model, tokenizer, [{"answer": "x"}])


def test_a_saved_matrix_quantises_like_the_one_in_memory(directory, tmp_path):
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    found = calibrate(model, tokenizer, TEXTS)
    file = found.save(tmp_path / "imatrix.gguf")
    stored = read_importance(file)
    assert all(torch.allclose(stored[name], values) for name, values in found.importance.items())
    first, second = (
        convert_to_gguf(directory, tmp_path / f"{i}.gguf", "q4_0", imatrix=matrix)[0] for i, matrix in enumerate((file, stored))
    )
    plain = convert_to_gguf(directory, tmp_path / "plain.gguf", "q4_0")[0]
    assert first.read_bytes() == second.read_bytes() != plain.read_bytes()
    name = "blk.0.attn_q.weight"
    exact = load_tensor(GGUFFile(convert_to_gguf(directory, tmp_path / "f32.gguf", "f32")[0]), name)
    lost = [((load_tensor(GGUFFile(path), name) - exact).square() * stored[name]).sum() for path in (first, plain)]
    assert lost[0] < lost[1]


def squares_by_expert(directory, model, layer):
    """Importance of a layer's experts token by token, from the weights as they are stored: GGUF name -> [experts, columns]."""
    seen = []
    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([load_tokenizer(directory)(text)["input_ids"]]))
    hook.remove()
    file = GGUFFile(convert_to_gguf(directory, directory.parent / "f32.gguf", "f32")[0])
    parts = {name: load_tensor(file, f"blk.{layer}.ffn_{name}_exps.weight") for name in ("gate", "up", "down")}
    bias = {name: load_tensor(file, f"blk.{layer}.ffn_{name}_exps.bias") if experts.has_bias else torch.zeros(9)
            for name in ("gate", "up")}  # fmt: skip
    sums = {name: torch.zeros(len(part), part.shape[-1]) for name, part in parts.items()}
    counts = torch.zeros(len(parts["up"]), 1)
    for hidden, chosen, *_ in seen:
        for x, ids in zip(hidden.reshape(-1, hidden.shape[-1]), chosen, strict=True):
            for e in ids.tolist():
                gate, up = (parts[name][e] @ x + (bias[name][e] if experts.has_bias else 0) for name in ("gate", "up"))
                if experts.has_bias:  # gpt-oss
                    gate = gate.clamp(max=7.0)
                    inner = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
                else:
                    inner = torch.nn.functional.silu(gate) * up
                counts[e] += 1
                for name, values in (("gate", x), ("up", x), ("down", inner)):
                    sums[name][e] += values.square()
    means = {name: torch.where(counts > 0, values / counts.clamp_min(1), 1.0) for name, values in sums.items()}
    return {f"blk.{layer}.ffn_{name}_exps.weight": values for name, values in means.items()}, counts


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """family -> a directory, made once; eight experts, of which these few tokens do not reach every one."""
    made = {}

    def of(family):
        if family not in made:
            with pytest.MonkeyPatch.context() as patch:
                kind, settings = tiny.FAMILIES[family]
                count = "num_experts" if family == "qwen3_moe" else "num_local_experts"
                patch.setitem(tiny.FAMILIES, family, (kind, {**settings, count: 32, "initializer_range": 0.3}))
                made[family] = tiny.save_tiny(family, tmp_path_factory.mktemp(family) / "m")
        return made[family]

    return of


@pytest.mark.filterwarnings("ignore:.*YaRN")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_every_expert_is_measured_on_its_own_tokens(family, mixtures, tmp_path):
    directory = mixtures(family)
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    found = calibrate(model, tokenizer, TEXTS)
    expected, counts = squares_by_expert(directory, model, 1)
    assert (counts == 0).any() and (counts > 1).any()  # one that was never chosen, too
    for name, values in expected.items():
        assert torch.allclose(found.importance[name], values, rtol=1e-3, atol=1e-6), name
        assert torch.equal(found.counts[name], counts[:, 0])
    assert "output.weight" in found.importance
    stored = read_importance(found.save(tmp_path / "imatrix.gguf"))
    assert all(torch.allclose(stored[name], values) for name, values in found.importance.items())
    plain, weighted = (
        GGUFFile(convert_to_gguf(directory, tmp_path / f"{i}.gguf", "q4_0", imatrix=matrix)[0])
        for i, matrix in enumerate((None, stored))
    )
    assert {name for name in expected if bytes(weighted.data(name)) == bytes(plain.data(name))} == set()


@pytest.mark.filterwarnings("ignore:.*YaRN")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_in_4_bits_are_measured_as_their_adapter_leaves_them(family, mixtures):
    directory = mixtures(family)
    model, tokenizer = load_model(directory, load_in_4bit=True, dtype=torch.float32)
    plain = calibrate(model, tokenizer, TEXTS)
    adapted = calibrate(get_peft_model(model, r=4), tokenizer, TEXTS)  # a new adapter changes nothing
    assert plain.importance.keys() == adapted.importance.keys()
    name = "blk.0.ffn_down_exps.weight"
    assert torch.allclose(plain.sums[name], adapted.sums[name], rtol=1e-3) and (plain.sums[name] > 0).any()


@pytest.mark.filterwarnings("ignore:.*YaRN")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_budget_covers_the_experts(family, mixtures, tmp_path):
    directory = mixtures(family)
    model, tokenizer = load_model(directory, load_in_16bit=True, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    choice = choose_types(
        model, tokenizer, TEXTS[:1], bits=6, imatrix=calibrate(model, tokenizer, TEXTS).importance, max_tokens=6
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    (file,) = convert_to_gguf(directory, tmp_path / "x.gguf", "q8_0", overrides=choice.types)
    tensors = GGUFFile(file).tensors
    matrices = {name for name, info in tensors.items() if len(info.shape) > 1 and name.endswith(".weight")}
    assert choice.types.keys() == {name for name in matrices if "ffn_gate_inp" not in name}
    assert {f"blk.{i}.ffn_{part}_exps.weight" for i in range(2) for part in ("gate", "up", "down")} <= choice.types.keys()
    assert len({choice.types[f"blk.0.ffn_{part}_exps.weight"].name for part in ("gate", "up", "down")} | {"Q4_0"}) > 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose rows are cut into superblocks: hidden size 256."""
    with pytest.MonkeyPatch.context() as patch:
        kind, settings = tiny.FAMILIES["llama3"]
        settings = {**settings, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        patch.setitem(tiny.FAMILIES, "llama3", (kind, settings))
        return tiny.save_tiny("llama3", tmp_path_factory.mktemp("wide") / "m")


def test_bits_go_where_they_save_most(wide, tmp_path, capsys):
    model, tokenizer = load_model(wide, load_in_16bit=True, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    choice = choose_types(model, tokenizer, TEXTS, bits=4.5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert 4.0 < choice.bits <= 4.5 and len({kind.name for kind in choice.types.values()}) > 2
    files = [
        convert_to_gguf(wide, tmp_path / f"{name}.gguf", "q4_k_s", overrides=types)[0]
        for name, types in (("mixed", choice.types), ("plain", {name: TENSOR_TYPES["Q4_K"] for name in choice.types}))
    ]
    assert GGUFFile(files[0]).tensors["output.weight"].type is choice.types["output.weight"]
    assert files[0].stat().st_size <= files[1].stat().st_size
    reference = reference_of(model, tokenizer, TEXTS)
    mixed, plain = (prove(file, reference).divergence for file in files)
    assert mixed < plain and mixed == pytest.approx(choice.divergence, rel=0.5)
    choice.show()
    assert "blk.1.ffn_down.weight" in capsys.readouterr().err


def test_budgets_and_models_that_cannot_be(wide, tmp_path):
    model, tokenizer = load_model(wide, load_in_16bit=True, dtype=torch.float32)
    with pytest.raises(ValueError, match="1.5 bits per weight are too few: the smallest types take 2.6"):
        choose_types(model, tokenizer, TEXTS[:1], bits=1.5, max_tokens=4)
    with pytest.raises(UnsupportedError, match="part of an adapter"):
        choose_types(get_peft_model(model, r=4), tokenizer, TEXTS, bits=4)
    with pytest.raises(ValueError, match="'blk.9.attn_q.weight', which the file does not have"):
        convert_to_gguf(wide, tmp_path / "x.gguf", "q8_0", overrides={"blk.9.attn_q.weight": TENSOR_TYPES["F16"]})
