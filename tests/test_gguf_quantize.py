"""Our quantisers against llama.cpp's own, byte for byte; mixtures, files and importance matrices."""

import gguf
import numpy as np
import pytest
import tiny
import torch
from llama_oracle import Llama, quantize_chunk
from quantiser_inputs import column_importance, inputs
from test_gguf_convert import IDS, divergence, reference

from luthier.errors import UnsupportedError
from luthier.gguf import GGUFFile, blocks, convert_to_gguf, quantize_gguf
from luthier.gguf.dequantize import dequantize, load_tensor
from luthier.gguf.imatrix import read_importance, write_importance
from luthier.gguf.mixtures import ModelShape, tensor_type
from luthier.gguf.quantize import CHUNK, QUANTIZERS, WEIGHTED_QUANTIZERS, encode, encode_in_chunks
from luthier.gguf.types import FILE_TYPES, TENSOR_TYPES

INPUTS = inputs()


def differing_rows(kind, values, importance=None):
    expected = quantize_chunk(kind.id, values, importance)
    weights = None if importance is None else torch.from_numpy(importance).expand(values.shape)
    found = encode(torch.from_numpy(values), kind, weights).numpy()
    return np.unique(np.nonzero(found != expected)[0]).tolist()


@pytest.fixture(params=["torch", "compiled"])
def path(request, monkeypatch):
    """Both ways to compute on a CPU; the compiled one where numba is installed."""
    if request.param == "torch":
        monkeypatch.setattr(blocks, "compiled", None)
    elif blocks.compiled is None:
        pytest.skip("numba is not installed (extra gguf)")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bytes_equal_those_of_llama_cpp(name, path):
    kind = TENSOR_TYPES[name]
    assert {what: rows for what, values in INPUTS.items() if (rows := differing_rows(kind, values))} == {}


@pytest.mark.parametrize("name", WEIGHTED_QUANTIZERS)
def test_bytes_with_an_importance_matrix_equal_those_of_llama_cpp(name, path):
    kind, weights = TENSOR_TYPES[name], column_importance()
    assert {what: rows for what, values in INPUTS.items() if (rows := differing_rows(kind, values, weights))} == {}


@pytest.mark.parametrize("name", WEIGHTED_QUANTIZERS)
def test_bytes_where_one_column_alone_counts(name, path):
    """The fits of such groups have no solution, or one of negative scale, which spoils other groups' scales in Q4_K."""
    weights = np.zeros(256, np.float32)
    weights[77] = 1
    values = np.random.default_rng(5).standard_normal((1500, 256)).astype(np.float32)
    assert differing_rows(TENSOR_TYPES[name], values, weights) == []


@pytest.mark.skipif(blocks.compiled is None, reason="numba is not installed (extra gguf)")
def test_compiled_loops_need_no_directory_to_be_kept_in(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return original(**options)

    original = blocks.compiled.numba.njit
    monkeypatch.setattr(blocks.compiled.numba, "njit", njit)
    assert blocks.compiled._compiled(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("name", QUANTIZERS)
def test_dequantised_weights_equal_those_of_another_reader(name):
    kind = TENSOR_TYPES[name]
    values = np.concatenate([INPUTS[what] for what in ("normal", "heavy tails", "sparse", "positive")])
    encoded = encode(torch.from_numpy(values), kind)
    theirs = gguf.quants.dequantize(encoded.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(dequantize(encoded, kind).numpy(), theirs)


def test_a_tensor_in_chunks_equals_the_whole():
    values = torch.randn(CHUNK * 3 // 256 + 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    importance = torch.rand(256)
    for kind, weights in ((TENSOR_TYPES["Q8_0"], None), (TENSOR_TYPES["Q4_0"], importance)):
        threads = torch.get_num_threads()
        chunks = list(encode_in_chunks("t", values, kind, weights))
        assert len(chunks) > 2 and threads == torch.get_num_threads()
        expected = encode(values, kind, None if weights is None else weights.expand(values.shape))
        assert torch.equal(torch.cat([encoded for _, encoded in chunks]), expected)
        assert [first for first, _ in chunks] == np.cumsum([0] + [len(encoded) for _, encoded in chunks[:-1]]).tolist()


def test_weights_whose_errors_overflow_are_refused_with_an_importance_matrix():
    values = torch.full((2, 256), 1e18)
    with pytest.raises(ValueError, match="tensor t holds 1e.18; with an importance matrix, .* overflow in Q4_K. Choose bf16"):
        list(encode_in_chunks("t", values, TENSOR_TYPES["Q4_K"], torch.rand(256)))
    assert len(list(encode_in_chunks("t", values, TENSOR_TYPES["BF16"], torch.rand(256)))) == 1
    assert len(list(encode_in_chunks("t", values, TENSOR_TYPES["Q4_K"]))) == 1  # as llama.cpp does it


def test_experts_have_their_own_importance():
    values, importance = torch.randn(6, 256), torch.rand(3, 256)
    kind = TENSOR_TYPES["Q4_0"]
    ((_, found),) = encode_in_chunks("t", values, kind, importance)
    assert torch.equal(found, encode(values, kind, importance.repeat_interleave(2, 0)))


# the choices of llama.cpp for a model of 32 layers with grouped heads, a few that a wrong rule would miss
MIXTURE_CASES = [
    ("q4_k_m", "blk.0.attn_v.weight", "Q6_K"),
    ("q4_k_m", "blk.4.attn_v.weight", "Q4_K"),
    ("q4_k_m", "blk.6.ffn_down.weight", "Q6_K"),
    ("q4_k_m", "blk.28.attn_v.weight", "Q6_K"),
    ("q4_k_m", "blk.0.attn_q.weight", "Q4_K"),
    ("q4_k_m", "output.weight", "Q6_K"),
    ("q4_k_m", "token_embd.weight", "Q4_K"),
    ("q4_k_m", "blk.0.attn_norm.weight", "F32"),
    ("q4_k_m", "blk.0.ffn_gate_inp.weight", "F32"),
    ("q4_k_s", "blk.3.attn_v.weight", "Q5_K"),
    ("q4_k_s", "blk.4.attn_v.weight", "Q4_K"),
    ("q2_k", "blk.5.attn_v.weight", "Q4_K"),
    ("q2_k", "blk.5.attn_output.weight", "Q3_K"),
    ("q3_k_m", "blk.1.attn_v.weight", "Q5_K"),
    ("q3_k_m", "blk.2.ffn_down.weight", "Q4_K"),
    ("q3_k_l", "blk.9.attn_qkv.weight", "Q5_K"),
    ("q5_k_m", "blk.31.ffn_down.weight", "Q6_K"),
    ("q8_0", "output.weight", "Q8_0"),
    ("bf16", "blk.0.attn_q.weight", "BF16"),
]


@pytest.mark.parametrize("quant, name, expected", MIXTURE_CASES)
def test_mixtures(quant, name, expected):
    assert tensor_type(name, (4096, 4096), FILE_TYPES[quant], ModelShape(32, 32, 8)).name == expected


def test_mixtures_of_odd_models():
    q4 = FILE_TYPES["q4_k_m"]
    assert tensor_type("token_embd.weight", (512, 4096), q4, ModelShape(32, 32, 8, tied=True)).name == "Q6_K"
    assert tensor_type("blk.0.attn_k.weight", (512, 4096), q4, ModelShape(32, 32, 8, experts=8)).name == "Q8_0"
    assert tensor_type("blk.9.attn_v.weight", (512, 8192), q4, ModelShape(80, 64, 8)).name == "Q6_K"
    assert tensor_type("blk.10.attn_v.weight", (512, 8192), q4, ModelShape(80, 64, 8)).name == "Q5_K"
    for columns, expected in ((288, "Q5_0"), (100, "F16")):
        assert tensor_type("blk.4.attn_v.weight", (64, columns), q4, ModelShape(32, 32, 8)).name == expected
    assert tensor_type("output.weight", (64, 288), q4, ModelShape(32, 32, 8)).name == "Q8_0"
    early = ModelShape(32, 32, 8, imatrix=True)
    assert tensor_type("blk.0.ffn_down.weight", (64, 256), FILE_TYPES["q4_0"], early).name == "Q4_1"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model whose rows are cut into superblocks: hidden size 256, four layers."""
    changes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    with pytest.MonkeyPatch.context() as patch:
        kind, settings = tiny.FAMILIES["llama3"]
        patch.setitem(tiny.FAMILIES, "llama3", (kind, {**settings, **changes, "initializer_range": 0.05}))
        return tiny.save_tiny("llama3", tmp_path_factory.mktemp("wide"), dtype=torch.bfloat16)


# limits: twice what llama.cpp's own quantiser loses on a random model of this size
LIMITS = {"q6_k": 0.006, "q5_k_m": 0.02, "q4_k_m": 0.07, "q3_k_m": 0.25, "q2_k": 0.8, "q5_1": 0.02, "q4_0": 0.1}


def test_every_quantisation_loads_and_is_as_close_as_its_bits_allow(wide_model, tmp_path):
    names = [name for name in FILE_TYPES if name != "q2_k_s"]
    files = dict(zip(names, convert_to_gguf(wide_model, tmp_path, names), strict=True))
    expected = reference(wide_model)
    gaps = {}
    for name, file in files.items():
        with Llama(file) as llama:
            gaps[name] = divergence(expected, llama.logits(IDS))
    assert {name: gap for name, gap in gaps.items() if gap > LIMITS.get(name, 1)} == {}
    assert gaps["bf16"] < gaps["q8_0"] < gaps["q6_k"] < gaps["q5_k_m"] < gaps["q4_k_m"] < gaps["q3_k_m"] < gaps["q2_k"]


def test_quantising_a_file_equals_converting_the_model(wide_model, tmp_path):
    direct, plain = convert_to_gguf(wide_model, tmp_path, ["q4_k_m", "bf16"])
    again = quantize_gguf(plain, tmp_path / "again.gguf", "quantized")
    first, second = GGUFFile(direct), GGUFFile(again)
    assert first.encoded.keys() == second.encoded.keys()
    assert {key for key in first.encoded if first.encoded[key] != second.encoded[key]} == set()
    assert {name: info.type for name, info in first.tensors.items()} == {n: i.type for n, i in second.tensors.items()}
    assert all(np.array_equal(first.data(name), second.data(name)) for name in first.tensors)
    with pytest.raises(UnsupportedError, match="already quantised"):
        quantize_gguf(again, tmp_path / "twice.gguf", "q2_k")
    assert not (tmp_path / "twice.gguf").exists()


def test_importance_files(tmp_path):
    sums = {"blk.0.ffn_up.weight": torch.rand(64), "blk.0.ffn_up_exps.weight": torch.rand(3, 64)}
    counts = {"blk.0.ffn_up.weight": torch.tensor([8.0]), "blk.0.ffn_up_exps.weight": torch.tensor([4.0, 0.0, 2.0])}
    file = write_importance(tmp_path / "x.gguf", sums, counts, tokens=2048)
    importance = read_importance(file)
    assert torch.equal(importance["blk.0.ffn_up.weight"], sums["blk.0.ffn_up.weight"] / 8)
    experts = importance["blk.0.ffn_up_exps.weight"]
    assert torch.equal(experts[0], sums["blk.0.ffn_up_exps.weight"][0] / 4) and (experts[1] == 1).all()
    assert GGUFFile(file).metadata["imatrix.chunk_count"] == 4


def test_an_importance_matrix_changes_what_is_written(wide_model, tmp_path):
    (plain,) = convert_to_gguf(wide_model, tmp_path / "plain.gguf", "q4_k_m")
    importance = {
        name: torch.rand(info.shape[-1])
        for name, info in GGUFFile(plain).tensors.items()
        if "ffn" in name and "norm" not in name
    }
    (weighted,) = convert_to_gguf(wide_model, tmp_path / "weighted.gguf", "q4_k_m", imatrix=importance)
    first, second = GGUFFile(plain), GGUFFile(weighted)
    changed = {name for name in first.tensors if not np.array_equal(first.data(name), second.data(name))}
    assert changed == importance.keys()
    original, name = convert_to_gguf(wide_model, tmp_path / "f32.gguf", "f32")[0], "blk.1.ffn_up.weight"
    exact = load_tensor(GGUFFile(original), name)
    lost = [((load_tensor(file, name) - exact).square() * importance[name]).sum() for file in (first, second)]
    assert lost[1] < lost[0]


def test_wrong_importance_is_refused(wide_model, tmp_path):
    with pytest.raises(ValueError, match="q2_k_s needs an importance matrix"):
        convert_to_gguf(wide_model, tmp_path / "x.gguf", "q2_k_s")
    with pytest.raises(ValueError, match="not of this model: blk.0.ffn_up.weight is .7,., in the model .512, 256."):
        convert_to_gguf(wide_model, tmp_path / "x.gguf", "q2_k", imatrix={"blk.0.ffn_up.weight": torch.ones(7)})
    for number in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="importance of blk.0.ffn_up.weight holds NaN"):
            convert_to_gguf(
                wide_model, tmp_path / "x.gguf", "q2_k", imatrix={"blk.0.ffn_up.weight": torch.full((256,), number)}
            )
    (file,) = convert_to_gguf(wide_model, tmp_path / "y.gguf", "bf16")
    with pytest.raises(ValueError, match="not an importance matrix"):
        quantize_gguf(file, tmp_path / "x.gguf", "q2_k", imatrix=file)
    assert not (tmp_path / "x.gguf").exists()
