"""Every field of every architecture's data file, against the transformers module that it describes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from luthier import adapters
from luthier.adapters.spec import Spec, Vision
from luthier.ops.rms_norm import rms_norm_reference
from luthier.ops.rotary import half_tables, rotary_reference

TEXT_FAMILIES = list(FAMILIES)
VISION_TYPES = [
    name for name in adapters.model_types() if hasattr(importlib.import_module(f"luthier.adapters.{name}"), "VISION")
]
DOCS = Path(__file__).parents[1] / "docs" / "architectures.md"


def layers_of(model: nn.Module, spec: Spec) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in spec.layer_classes]


@pytest.fixture(scope="module", params=TEXT_FAMILIES)
def described(request) -> tuple[nn.Module, Spec]:
    model = tiny_model(request.param)
    return model, adapters.find(model.config)


def test_the_layers_are_found(described):
    model, spec = described
    assert len(layers_of(model, spec)) == model.config.num_hidden_layers


def test_the_norms_are_bit_equal_in_bf16(described):
    model, spec = described
    norms = [module for module in model.modules() if type(module).__name__ in spec.norm_classes]
    named = [name for name, module in model.named_modules() if "norm" in name.split(".")[-1]]
    assert len(norms) == len(named) > 0
    for norm in norms:
        norm = norm.to(torch.bfloat16)
        x = torch.randn(64, norm.weight.shape[0], generator=torch.Generator().manual_seed(0)).bfloat16()
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        assert torch.equal(rms_norm_reference(x, norm.weight, eps, spec.norm), norm(x))
        norm.float()


def test_the_norms_stand_where_the_file_says(described):
    model, spec = described
    for layer in layers_of(model, spec):
        named = {name for name, child in layer.named_children() if type(child).__name__ in spec.norm_classes}
        assert named == {name for name in (*spec.attention_norms, *spec.mlp_norms) if name}


def test_the_rotation_is_that_of_the_model(described):
    model, spec = described
    module = importlib.import_module(type(model).__module__)
    config, backbone = model.config, model.model
    generator = torch.Generator().manual_seed(0)
    head = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    q, k = (torch.randn(2, heads, 11, head, generator=generator) for heads in (4, 2))
    positions = torch.randint(0, 99, (2, 11), generator=generator)
    kinds = [(kind,) for kind in getattr(backbone.rotary_emb, "layer_types", [])] or [()]
    for kind in kinds:
        cos, sin = backbone.rotary_emb(q, positions, *kind)
        expected = module.apply_rotary_pos_emb(q, k, cos, sin)
        tables = half_tables(cos, sin, spec.rotary)
        for x, y in zip((q, k), expected, strict=True):
            ours = rotary_reference(x.transpose(1, 2), *tables, interleaved=spec.rotary.startswith("interleaved"))
            torch.testing.assert_close(ours.transpose(1, 2), y)


def test_names_of_modules_and_attributes_exist(described):
    model, spec = described
    for layer in layers_of(model, spec):
        linear = {name.split(".")[-1] for name, child in layer.named_modules() if isinstance(child, nn.Linear)}
        assert linear == set(spec.attention_targets + spec.mlp_targets) or spec.mlp == "experts"
        assert set(spec.attention_targets) <= linear
        assert hasattr(layer.self_attn, "qkv_proj") == (spec.qkv == "fused")
        assert hasattr(layer.mlp, "gate_up_proj") == (spec.mlp == "fused")
        assert hasattr(layer.mlp, "experts") == (spec.mlp == "experts")
        assert hasattr(layer.self_attn, "q_norm") == (spec.qk_norm is not None)
        if spec.qk_norm:
            head_wide = layer.self_attn.q_norm.weight.shape[0] == layer.self_attn.head_dim
            assert head_wide == (spec.qk_norm == "head")
        assert hasattr(layer, "residual_multiplier") == (spec.residual_scale is not None)
        assert hasattr(layer.self_attn, "sinks") == (spec.sinks is not None)
        assert hasattr(layer.self_attn, "use_rope") == (spec.rotary_switch == "use_rope")
        assert hasattr(layer.self_attn, "sliding_window") == (spec.window == "attention")
        assert (spec.window == "config") <= hasattr(model.config, "sliding_window")
    head = {name: getattr(model.config, name) for name in vars(spec.head).values() if name}
    assert all(value is None or isinstance(value, float | int) for value in head.values())


def test_every_family_of_the_tests_has_a_file_and_an_unknown_one_has_none():
    assert all(isinstance(adapters.find(tiny_config(family)), Spec) for family in FAMILIES)
    assert adapters.find(transformers.GPT2Config()) is None


@pytest.mark.parametrize("model_type", VISION_TYPES)
def test_vision_names_exist(model_type):
    """On a model of the default size without memory: every name that the file gives leads to a linear layer."""
    config = AutoConfig.for_model(model_type)
    config.get_text_config().pad_token_id = config.pad_token_id = None  # SmolVLM's default is beyond its vocabulary
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    spec = adapters.find(config)
    vision = spec.vision
    assert isinstance(vision, Vision) and layers_of(model, spec)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = {name for name, _ in model.named_modules()}
    assert {vision.vision_prefix, *vision.projector_prefixes} <= modules
    tower = {name for name in linear if name.startswith(vision.vision_prefix + ".")}
    inside = {name for name in tower if not name.startswith(vision.projector_prefixes)}
    leaves = {name.split(".")[-1] for name in inside}
    assert leaves <= set(vision.attention_targets + vision.mlp_targets)
    assert leaves & set(vision.attention_targets) and leaves & set(vision.mlp_targets)
    outside = (vision.vision_prefix, *vision.projector_prefixes, "lm_head")
    decoder = {name.split(".")[-1] for name in linear if not name.startswith(outside)}
    assert decoder == set(spec.attention_targets + spec.mlp_targets)


def test_the_docs_have_a_line_for_every_file():
    rows = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"\w+", row)} - {"model_type"}
    assert listed == set(adapters.model_types())
