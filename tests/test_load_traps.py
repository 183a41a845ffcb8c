"""The traps of the stack on a CPU, each met on purpose: bitsandbytes' 4-bit layers, and torchvision beside a CPU torch."""

import subprocess
import sys

import bitsandbytes as bnb
import pytest
import tiny
import torch

from luthier.model.cpu_4bit import repair_cpu_4bit
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.ops.nf4 import dequantise, quantised

IDS = torch.arange(5, 45)[None]


def gradients(model):
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_evaluation_changes_neither_the_weights_nor_the_gradients(tmp_path):
    model, _ = load_model(tiny.save_tiny("llama3", tmp_path))
    model = get_peft_model(model, r=4, init_lora_weights=False)
    packed = {name: p for name, p in model.named_parameters() if isinstance(p, bnb.nn.Params4bit)}
    before, fresh = {name: p.data.clone() for name, p in packed.items()}, gradients(model)
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for name, parameter in packed.items():
        assert parameter.data.shape == before[name].shape and torch.equal(parameter.data, before[name])
        assert parameter.quant_state.nested
    assert packed and all(torch.equal(gradient, fresh[name]) for name, gradient in gradients(model).items())
    assert torch.equal(model.train()(IDS).logits, evaluated)


@pytest.mark.parametrize("capable", [True, False])
def test_the_repair_holds_whatever_the_cpu_can_do(capable):
    """As on a CPU that has AVX512-BF16: the layer would repack its weight at the first evaluation."""
    layer = torch.nn.Sequential(bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4").to("cpu"))
    layer[0].support_avx512bf16_for_cpu = capable
    before = layer[0].weight.data.clone()
    repair_cpu_4bit(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64))
    assert torch.equal(layer[0].weight.data, before)


@pytest.mark.parametrize("width", [32, 64, 96, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4bit_layer_computes_with_the_weight_it_holds(width, dtype):
    """bitsandbytes quantises in blocks over the whole matrix, and on a CPU reads them as if each row began a new one."""
    torch.manual_seed(0)
    weight = torch.randn(64, width)
    layer = bnb.nn.Linear4bit(width, 64, bias=True, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    repair_cpu_4bit(torch.nn.Sequential(layer))
    held = dequantise(quantised(layer.weight))
    # an NF4 code is at most half the widest gap between codes away (0.15 of the block's largest), scales in 8 bits
    assert (held.float() - weight).abs().max() < 0.16 * weight.abs().max()
    x = torch.randn(5, width, dtype=dtype, requires_grad=True)
    y = layer(x)
    exact = torch.nn.functional.linear(x.double(), held.double(), layer.bias.double())
    torchs = torch.nn.functional.linear(x, held) + layer.bias.to(dtype)
    assert (y - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    y.sum().backward()
    torch.testing.assert_close(x.grad, held.sum(0, keepdim=True).expand(5, width))


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_odd_widths_load_and_train_in_4_bits(tmp_path, monkeypatch, family):
    monkeypatch.setitem(tiny.BASE, "intermediate_size", 96)
    model, _ = load_model(tiny.save_tiny(family, tmp_path))
    stock = tiny.tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, bnb.nn.Params4bit):
                stock.get_parameter(name).copy_(dequantise(quantised(parameter)))
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
    assert all(gradient.isfinite().all() for gradient in gradients(get_peft_model(model, r=4)).values())


REAL = """
import torch
if {imported_first}:
    try:
        from transformers import LlamaForCausalLM
    except (ImportError, RuntimeError):
        pass
import luthier.model.load
from transformers import LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration
from luthier.model.torchvision_repair import repair_torchvision
import torchvision.transforms.v2
repair_torchvision(), repair_torchvision()
print("loaded", hasattr(torch.ops.torchvision, "nms"))
"""


@pytest.mark.parametrize("imported_first", [False, True])
def test_a_torchvision_that_does_not_fit_breaks_nothing(imported_first):
    """Here torchvision is a CUDA wheel beside a CPU torch, or it fits: both must import, also after a failed import."""
    run = subprocess.run(
        [sys.executable, "-c", REAL.format(imported_first=imported_first)], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip().endswith("loaded True"), run.stderr
