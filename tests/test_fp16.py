"""Training where there is no bfloat16 (Turing and older): float16 with a gradient scaler, through the fused blocks too."""

from __future__ import annotations

import warnings

import pytest
import torch
from stock_pairs import batch, difference, loss_and_gradients, with_lora
from tiny import tiny_model

from luthier import TrainingArguments
from luthier.model.accelerate import accelerate, dial_of
from luthier.model.blocks import Mode
from luthier.model.cost import LayerPlan
from luthier.model.precision import choose_dtype
from luthier.ops.linear_cross_entropy import linear_cross_entropy
from luthier.training.arguments import fit_arguments


@pytest.fixture(autouse=True)
def fallbacks_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stock forward")
        yield


def scaled_gradients(model: torch.nn.Module, scale: float) -> dict[str, torch.Tensor]:
    """As a trainer with fp16=True computes them, and divided by the scale again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**batch()).loss
    scaler.scale(loss).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2"])
def test_gradients_are_as_good_as_stock_ones(family):
    exact = loss_and_gradients(with_lora(tiny_model(family).half().float()), **batch())[1]
    model = with_lora(tiny_model(family, dtype=torch.float16))
    allowed = 2 * difference(scaled_gradients(model, 1024.0), exact)
    dial = dial_of(accelerate(model))
    for mode in Mode:
        dial.set_plan([LayerPlan(mode)] * dial.layers)
        gradients = scaled_gradients(model, 1024.0)
        assert difference(gradients, exact) <= allowed
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_a_plain_loop_with_a_scaler_learns_and_survives_an_overflow():
    """The first steps overflow and are left out; no weight ever sees an infinity."""
    model = accelerate(with_lora(tiny_model("llama3", dtype=torch.float16))).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    losses, before = [], [parameter.detach().clone() for parameter in trained]
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            losses.append(model(**batch()).loss)
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        if len(losses) == 1:
            assert all(torch.equal(*pair) for pair in zip(trained, before, strict=True)), "an overflow was not noticed"
        scaler.update()
        optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in trained)
    assert scaler.get_scale() < 2.0**24 and losses[-1] < losses[0] / 2


def test_a_scale_above_what_fp16_holds_reaches_the_hidden_states():
    """The scaler starts at 65536, one above the largest number; what it multiplies may well be small."""
    hidden, weight = (1e-3 * torch.randn(3, 8)).half().requires_grad_(), (1e-3 * torch.randn(11, 8)).half()
    (65536 * linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))).backward()
    exact = hidden.detach().double().requires_grad_()
    (65536 * torch.nn.functional.cross_entropy(exact @ weight.double().T, torch.tensor([1, 2, 3]), reduction="sum")).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-2, atol=0.1)


@pytest.fixture
def turing(monkeypatch):
    """A card that only emulates bfloat16, as far as the choice of a precision asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def arguments(tmp_path) -> TrainingArguments:
    made = TrainingArguments(str(tmp_path), use_cpu=True)  # a CUDA build of torch would look for the card at once
    made.use_cpu = False  # as on a machine with a GPU
    return made


def test_without_bf16_the_trainer_scales_fp16(tmp_path, turing):
    assert choose_dtype(None) == torch.float16
    args = fit_arguments(arguments(tmp_path), with_lora(tiny_model("llama3", dtype=torch.float16)))
    assert (args.fp16, args.bf16, args.mixed_precision) == (True, False, "fp16")


def test_weights_that_train_whole_are_not_in_fp16(tmp_path, turing):
    assert choose_dtype(None, trains_all=True) == torch.float32
    with pytest.raises(ValueError, match="float32"):
        fit_arguments(arguments(tmp_path), tiny_model("llama3", dtype=torch.float16))
