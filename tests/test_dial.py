"""The memory dial: what plans come out of budgets, and who decides."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stock_pairs import batch, with_lora
from tiny import tiny_model

from luthier.model import dial as dial_module
from luthier.model.accelerate import accelerate, dial_of
from luthier.model.blocks import Mode
from luthier.model.checkpointing import checkpointing_mode, set_checkpointing
from luthier.model.dial import GIB, Dial, LayerPlan, Shape, describe, offload_plan, plan_for

LLAMA_8B = Shape(hidden=4096, attention=6144, heads=4096, mlp=14336, low=16 * 7, size=2)


def needs(plan: list[LayerPlan], tokens: int) -> float:
    return sum(tokens * LLAMA_8B.kept(layer.mode) for layer in plan if not layer.offload) + LLAMA_8B.transient(tokens, 4096)


def test_a_layer_keeps_the_kibibytes_that_the_modes_promise():
    shape = dataclasses.replace(LLAMA_8B, low=0)
    assert [shape.kept(mode) / 1024 for mode in Mode] == [8, 16, 36, 92]


@pytest.mark.parametrize("tokens", [512, 4096, 16384, 131072])
@pytest.mark.parametrize("gib", [1, 4, 12, 30, 60, 130])
def test_a_plan_stays_within_its_budget_and_uses_it(tokens, gib):
    plan = plan_for(LLAMA_8B, tokens, 32, gib * GIB)
    if any(layer.offload for layer in plan):
        assert needs([LayerPlan(Mode.RECOMPUTE)] * 32, tokens) > gib * GIB, "the inputs alone would have fitted"
        return
    assert needs(plan, tokens) <= gib * GIB
    for index, layer in enumerate(plan):
        if layer.mode < Mode.KEEP:
            more = [*plan[:index], LayerPlan(Mode(layer.mode + 1)), *plan[index + 1 :]]
            assert needs(more, tokens) > gib * GIB, "one layer more could have kept more"


def test_more_memory_never_means_more_computing():
    modes = [sum(layer.mode for layer in plan_for(LLAMA_8B, 16384, 32, gib * GIB)) for gib in range(1, 90, 3)]
    assert modes == sorted(modes) and modes[-1] == 32 * Mode.KEEP and modes[0] == 0


def test_offloading_keeps_as_much_as_the_host_takes():
    tokens = 16384
    assert {layer.mode for layer in offload_plan(LLAMA_8B, tokens, 32, 64 * GIB)} == {Mode.ALL_BUT_GATE_UP}
    assert {layer.mode for layer in offload_plan(LLAMA_8B, tokens, 32, 10 * GIB)} == {Mode.ATTENTION}
    plan = offload_plan(LLAMA_8B, tokens, 32, 1 * GIB)
    assert {layer.mode for layer in plan} == {Mode.RECOMPUTE}
    assert [layer.offload for layer in plan] == [True] * 31 + [False], "the last layer is needed at once"


def test_the_description_counts_layers():
    text = describe(plan_for(LLAMA_8B, 16384, 32, 30 * GIB), 16384)
    assert "16384 tokens" in text and sum(int(word) for word in text.split(":")[1].split() if word.isdigit()) == 32


class TestWhoDecides:
    def modes(self, model, flag=False):
        dial = dial_of(model)
        return [dial.of_layer(index, LLAMA_8B, torch.zeros(48, 64), flag).mode for index in range(dial.layers)]

    @pytest.fixture()
    def model(self):
        return accelerate(with_lora(tiny_model("llama3")))

    def test_without_a_plan_the_flag_does(self, model):
        assert self.modes(model) == [Mode.KEEP] * 2 and self.modes(model, flag=True) == [Mode.RECOMPUTE] * 2

    def test_true_and_false(self, model):
        flags = lambda: {layer.gradient_checkpointing for layer in model.get_base_model().model.layers}  # noqa: E731
        set_checkpointing(model, True)
        assert flags() == {True} and self.modes(model, flag=True) == [Mode.RECOMPUTE] * 2
        set_checkpointing(model, False)
        assert flags() == {False} and self.modes(model) == [Mode.KEEP] * 2

    def test_a_cpu_keeps_everything_unless_there_is_a_budget(self, model):
        assert self.modes(set_checkpointing(model, "auto"), flag=True) == [Mode.KEEP] * 2
        assert self.modes(set_checkpointing(model, "auto", memory_budget=1)) == [Mode.RECOMPUTE] * 2

    def test_a_gpu_plans_for_its_longest_batch(self, model, monkeypatch):
        monkeypatch.setattr(dial_module, "available_memory", lambda device, budget: budget * GIB)
        said = []
        monkeypatch.setattr(dial_module, "say", said.append)
        dial = dial_of(set_checkpointing(model, "auto", memory_budget=2))
        device = lambda n: torch.zeros(n, 64, device="meta")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        for tokens in (64, 32, 4096, 4096):
            dial.of_layer(0, LLAMA_8B, device(tokens), False)
        assert ["for 64 tokens" in said[0], "for 4096 tokens" in said[1], len(said)] == [True, True, 2]

    def test_by_hand(self, model):
        dial = dial_of(model)
        dial.set_plan([LayerPlan(Mode.ATTENTION), LayerPlan(Mode.KEEP)])
        assert self.modes(model, flag=True) == [Mode.ATTENTION, Mode.KEEP]
        assert model.train()(**batch()).loss.isfinite()
        with pytest.raises(ValueError, match="describes 1 layers, the model has 2"):
            dial.set_plan([LayerPlan(Mode.KEEP)])

    def test_a_plan_that_parks_gets_its_streams(self, model, monkeypatch):
        """A budget too small for the layers' inputs: they wait in host memory, and the step is the same."""
        expected = model.train()(**batch()).loss
        monkeypatch.setattr(dial_module.Dial, "_within", lambda self, *rest: plan_for(LLAMA_8B, 48, self.layers, 0))
        set_checkpointing(model, "auto", memory_budget=1)
        loss = model(**batch()).loss
        loss.backward()
        assert torch.equal(loss, expected) and dial_of(model).offload is not None

    def test_offload_without_a_gpu_is_the_same_step(self, model):
        set_checkpointing(model, "offload")
        assert self.modes(model) == [Mode.ALL_BUT_GATE_UP] * 2
        model.train()(**batch()).loss.backward()

    @pytest.mark.parametrize("budget", [0, -1, True])
    def test_a_budget_that_is_none_is_an_error(self, model, budget):
        with pytest.raises(ValueError, match="memory_budget"):
            set_checkpointing(model, "auto", memory_budget=budget)


@pytest.mark.parametrize(
    ("given", "meant"),
    [(None, "auto"), ("unsloth", "offload"), ("True", True), ("false", False), ("auto", "auto"), (True, True)],
)
def test_spellings(given, meant):
    assert checkpointing_mode(given) == meant


def test_a_stock_model_has_no_dial_and_checkpoints_as_transformers_does():
    model = with_lora(tiny_model("llama3"))
    assert dial_of(model) is None
    assert set_checkpointing(model, True).is_gradient_checkpointing
    assert Dial(3).plan is None
