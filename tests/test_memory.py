"""The estimate: against what runs measured on a card took, and against tiny models counted byte by byte."""

import bitsandbytes as bnb
import pytest
import tiny
import tiny_vision
from transformers import LlamaConfig

from luthier.model.device_memory import GIB
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.memory import estimate

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
# peak of the allocator in GiB, measured on an H200: NF4, r=16 on all linears
MEASURED = [
    (2 * 2048, True, 7.87),
    (8 * 2048, True, 11.78),
    (32768, True, 17.25),
    (2 * 2048, False, 18.39),
    (8 * 2048, False, 53.31),
]


def test_what_does_not_grow_is_what_was_measured():
    found = estimate(LLAMA_8B)
    measured = 5.94 + 0.41  # weights, embeddings, adapter with gradients and moments; and one layer's expanded weights
    assert found.fixed / GIB == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("tokens", "checkpointing", "measured"), MEASURED)
def test_the_total_is_what_was_measured(tokens, checkpointing, measured):
    found = estimate(LLAMA_8B, batch_tokens=tokens, use_gradient_checkpointing=checkpointing)
    assert found.total / GIB == pytest.approx(measured, rel=0.04)
    assert found.total == sum(found.parts.values()) == found.to_dict()["total"]


def test_a_budget_is_kept_and_used():
    totals = [estimate(LLAMA_8B, memory_budget=budget).total / GIB for budget in (9, 14, 30)]
    assert totals == sorted(set(totals)), "more is kept where there is more room"
    assert all(0.85 * budget < total <= budget for budget, total in zip((9, 14), totals, strict=False))
    assert totals[2] == estimate(LLAMA_8B, use_gradient_checkpointing=False).total / GIB, "and all of it where it fits"


@pytest.mark.parametrize(("family", "leaves"), [("qwen2_vl", True), ("mistral3", False)])
def test_embeddings_that_are_not_the_head_too_wait_in_host_memory(family, leaves):
    config = tiny_vision.tiny_vision_config(family)
    on_device = [estimate(config, use_gradient_checkpointing=m).parts["embeddings, head and norms"] for m in (True, "offload")]
    assert (on_device[1] < on_device[0]) == leaves


@pytest.mark.parametrize("family", ["llama3", "llama3.1", "mixtral", "gpt_oss", "phi3"])
def test_weights_and_adapter_are_counted_as_they_load(tmp_path, family):
    directory = tiny.save_tiny(family, tmp_path)
    model, _ = load_model(directory, dtype="bfloat16")
    model = get_peft_model(model, r=8)
    found = estimate(model.get_base_model().config, r=8)
    packed = [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters()) - adapter - sum(p.numel() for p in packed)
    state = [p.quant_state for p in packed]
    stored = sum(p.nbytes + s.absmax.nbytes + s.state2.absmax.nbytes for p, s in zip(packed, state, strict=True))
    assert found.parts["weights in nf4"] == pytest.approx(stored, rel=0.01)
    assert found.parts["embeddings, head and norms"] == 2 * others
    assert found.parts["adapter"] == 4 * adapter and found.parts["optimizer"] == 8 * adapter


def test_precisions_and_optimizers_cost_what_they_cost():
    count = sum(estimate(LLAMA_8B, "full", batch_tokens=1).parts[name] for name in ("weights",)) // 2
    assert estimate(LLAMA_8B, "16bit").parts["weights"] == 2 * count
    assert estimate(LLAMA_8B, optim="adamw_8bit").parts["optimizer"] * 4 == estimate(LLAMA_8B).parts["optimizer"]
    assert estimate(LLAMA_8B, target_modules=["q_proj"]).parts["adapter"] == 4 * 16 * 32 * 2 * 4096
    heads = estimate(LLAMA_8B, modules_to_save=["lm_head"]).parts["gradients"] - estimate(LLAMA_8B).parts["gradients"]
    assert heads == 4 * 128256 * 4096
    with pytest.raises(ValueError, match="'4bit'.*nf4"):
        estimate(LLAMA_8B, "4bit")


def test_8_bit_compute_writes_weights_out_into_the_memory_that_16_bits_take():
    parts = [estimate(LLAMA_8B, compute=compute).parts["one expanded layer"] for compute in ("bf16", "fp8-backward", "fp8")]
    assert len({*parts}) == 1
