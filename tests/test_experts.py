"""Mixtures of experts in training: loss and gradients of stock transformers and peft, and stock where ours does not fit."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from stock_pairs import TARGETS, batch, difference, loss_and_gradients
from tiny import FAMILIES, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from luthier.model.accelerate import accelerate, dial_of, restore
from luthier.model.blocks import Mode
from luthier.model.cost import LayerPlan
from luthier.model.experts import expert_stacks
from luthier.model.fused_experts import ExpertsState
from luthier.ops import experts as op

MIXTURES = [name for name, (family, _) in FAMILIES.items() if family in ("mixtral", "qwen3_moe", "gpt_oss")]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model: torch.nn.Module, **settings) -> PeftModel:
    """peft's adapter on every projection and stack, away from zero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "target_parameters": STACKS, "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return PeftModel(model, LoraConfig(**config | settings))


def accelerated(model: torch.nn.Module, mode: Mode) -> torch.nn.Module:
    dial = dial_of(accelerate(model))
    dial.set_plan([LayerPlan(mode)] * dial.layers)
    return model


@pytest.fixture
def calls(monkeypatch):
    """The inputs that went through our products."""
    seen, original = [], op._Experts.apply
    monkeypatch.setattr(op._Experts, "apply", lambda *inputs: seen.append(inputs) or original(*inputs))
    return seen


CHANGES = {
    "usual": {},
    "one expert each": {"num_experts_per_tok": 1},
    "every expert": {"num_experts_per_tok": 4},
}


def changed(family: str, changes: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    if not CHANGES[changes]:
        return tiny_model(family, dtype=dtype)
    config = tiny_config(family)
    for name, value in CHANGES[changes].items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("mode", [Mode.RECOMPUTE, Mode.KEEP])
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("family", MIXTURES)
def test_16_bit_experts_train_as_stock_ones(family, changes, mode, calls):
    """Padded rows, masked labels; an expert that gets no token and one that gets all of them are among the cases."""
    inputs = batch()
    expected, truth = loss_and_gradients(adapted(changed(family, changes)), **inputs)
    loss, gradients = loss_and_gradients(accelerated(adapted(changed(family, changes)), mode), **inputs)
    assert len(calls) == 2 * (1 + (mode < Mode.KEEP))  # the second run of a checkpoint gives it its inputs again
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert difference(gradients, truth) < 2e-5
    assert sum("experts" in name for name in gradients) == 8


@pytest.mark.parametrize("family", MIXTURES)
def test_bf16_gradients_are_as_good_as_stock_ones(family):
    """Over several batches: a last bit may send a token to another expert, in stock as in ours."""
    batches = [batch(rows=3, length=40, seed=seed) for seed in range(4)]
    exact_model = adapted(tiny_model(family, dtype=torch.bfloat16)).float()
    exact = [loss_and_gradients(exact_model, **inputs)[1] for inputs in batches]
    model = adapted(tiny_model(family, dtype=torch.bfloat16))

    def error() -> float:
        ours = [loss_and_gradients(model, **inputs)[1] for inputs in batches]
        return sum(difference(*pair) for pair in zip(ours, exact, strict=True))

    allowed = 2 * error()
    for mode in (Mode.KEEP, Mode.RECOMPUTE):
        accelerated(model, mode)
        assert error() <= allowed


def test_an_adapter_may_come_after_accelerate_and_leave_with_restore(calls):
    inputs = batch()
    model = adapted(accelerate(tiny_model("qwen3_moe")))
    state = [module for module in model.modules() if isinstance(module.__dict__.get("luthier_state"), ExpertsState)]
    assert len(state) == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parametrised = loss_and_gradients(model, **inputs)
    assert not calls and len([w for w in caught if "peft itself adds the adapter" in str(w.message)]) == 1
    ours = loss_and_gradients(accelerate(model), **inputs)
    assert len(calls) == 2
    restored = loss_and_gradients(restore(model), **inputs)
    assert len(calls) == 2 and not any("luthier_state" in module.__dict__ for module in model.modules())
    assert difference(ours[1], restored[1]) < 2e-5 and difference(parametrised[1], restored[1]) < 2e-5


def test_evaluation_is_stock(calls):
    ids = batch()["input_ids"]
    model = adapted(tiny_model("mixtral")).eval()
    expected = model(ids).logits
    assert torch.equal(accelerate(model)(ids).logits, expected) and not calls


def several(model: PeftModel) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


def trained(model: PeftModel) -> None:
    for stack in expert_stacks(model).values():
        stack.requires_grad_()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(several, "peft itself adds the adapter"), (trained, "own weights are trained")],
    ids=["several", "trained"],
)
def test_what_does_not_fit_is_stock_and_said_once(change, reason, calls):
    inputs = batch()
    pair = [adapted(tiny_model("qwen3_moe")) for _ in range(2)]
    for model in pair:
        torch.manual_seed(2)
        change(model)
    truth = loss_and_gradients(pair[0], **inputs)
    accelerate(pair[1])
    with pytest.warns(UserWarning, match=f"Qwen3MoeExperts runs its stock forward.*{reason}") as caught:
        loss, gradients = loss_and_gradients(pair[1], **inputs)
        loss_and_gradients(pair[1], **inputs)
    assert len([warning for warning in caught if re.search(reason, str(warning.message))]) == 1 and not calls
    torch.testing.assert_close(loss, truth[0])
    assert difference(gradients, truth[1]) < 2e-5


@pytest.mark.parametrize(
    ("mode", "reason"), [(Mode.KEEP, "modified by an inplace operation"), (Mode.RECOMPUTE, "used up what it had kept")]
)
def test_a_second_backward_is_an_error(mode, reason):
    model = accelerated(adapted(tiny_model("gpt_oss")), mode).train()
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=reason):
        loss.backward()


def test_under_autocast_products_are_in_bf16(calls):
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, truth = loss_and_gradients(adapted(tiny_model("gpt_oss")), **inputs)
        loss, gradients = loss_and_gradients(accelerate(adapted(tiny_model("gpt_oss"))), **inputs)
    assert {inputs[0].dtype for inputs in calls} == {torch.bfloat16}
    exact = loss_and_gradients(adapted(tiny_model("gpt_oss")), **inputs)[1]
    assert difference(gradients, exact) <= 2 * difference(truth, exact)
