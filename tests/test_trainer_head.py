"""What trainers ask of the head: our scores of tokens are TRL's own, and TRL's are left where ours would not be."""

from __future__ import annotations

import inspect
from unittest import mock

import pytest
import torch
from runs import token_rows, trainer, with_lora
from stock_pairs import difference
from tiny import VOCAB, tiny_model
from trl.trainer.utils import add_fused_lm_head

from luthier.model.accelerate import accelerate, base_model
from luthier.ops import token_logprobs as op
from luthier.training.head import own_head

FIELDS = ("log_probs", "entropy", "is_top1", "label_mask")


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Three rows, one whole, one padded, one without a label."""
    ids = torch.randint(5, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(11, None) if side == "right" else slice(0, 6)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :7] = -100
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def asked(model, inputs, temperature: float = 1.0, own: bool = True):
    """The scores, and the gradients of what trains under a random factor of every token."""
    base = base_model(model)
    with own_head(model, temperature) if own else mock.MagicMock():
        add_fused_lm_head(base, temperature, outputs=FIELDS[:3])
    model.zero_grad()
    found = model(**inputs, fused_lm_head=True)
    factors = torch.randn(found.log_probs.shape, generator=torch.Generator().manual_seed(1))
    (found.log_probs * factors).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(found, name).detach() for name in FIELDS}, gradients


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama3", "gemma2", "granite", "qwen3"])  # a soft cap, a divisor
def test_scores_and_gradients_are_trls(family, side):
    ours, gradients = asked(accelerate(with_lora(tiny_model(family))), batch(side), temperature=0.7)
    theirs, wanted = asked(accelerate(with_lora(tiny_model(family))), batch(side), temperature=0.7, own=False)
    for name in FIELDS:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys() and difference(gradients, wanted) < 1e-5


def test_a_batch_without_labels_is_a_differentiable_zero():
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    scores, gradients = asked(accelerate(with_lora(tiny_model("llama3"))), inputs)
    assert not any(scores[name].any() for name in FIELDS) and gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_padding_on_the_right_needs_no_mask():
    model, seen = accelerate(with_lora(tiny_model("llama3"))), []
    hook = base_model(model).model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for side in ("right", "left"):
        asked(model, batch(side))
    hook.remove()
    assert seen[0] is None and seen[1] is not None


def test_generation_finds_the_models_own_signature():
    model = accelerate(tiny_model("llama3"))
    stock = inspect.signature(model.forward)
    with own_head(model):
        add_fused_lm_head(model)
    assert inspect.signature(model.forward) == stock


@pytest.fixture
def calls():
    with mock.patch.object(op._TokenLogprobs, "apply", side_effect=op._TokenLogprobs.apply) as called:
        yield called


def test_the_trainer_asks_here(calls, tmp_path):
    trainer(accelerate(with_lora(tiny_model("llama3"))), tmp_path, max_steps=2).train()
    assert calls.call_count == 2


def test_a_stock_model_is_left_to_trl(calls, tmp_path):
    trainer(with_lora(tiny_model("llama3")), tmp_path, max_steps=1).train()
    assert not calls.called


def trained_head(model):
    return with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("adapter", [trained_head, lambda model: model], ids=["in the adapter", "with everything"])
def test_a_trained_head_is_left_to_trl(adapter, calls, tmp_path):
    trainer(accelerate(adapter(tiny_model("llama3"))), tmp_path, token_rows(8), max_steps=1).train()
    assert not calls.called
