"""The memory dial: what plans come out of budgets, and who decides."""

from __future__ import annotations

import dataclasses
import re
import types

import pytest
import torch
from stock_pairs import batch, with_lora
from tiny import tiny_model

from luthier.model import dial as dial_module
from luthier.model import offload
from luthier.model.accelerate import accelerate, dial_of, restore
from luthier.model.blocks import LONG, Mode
from luthier.model.card import Speeds
from luthier.model.checkpointing import checkpointing_mode, set_checkpointing
from luthier.model.cost import SCRATCH, Cost, LayerPlan, Shape, candidates, offload_plan, plan_for
from luthier.model.device_memory import GIB
from luthier.model.dial import Dial, Plan, bucket, describe
from luthier.model.offload import Host

LLAMA_8B = Shape(hidden=4096, attention=6144, heads=4096, mlp=14336, low=16 * 7, size=2)
FIXED = 6.35  # GiB: NF4 weights, embeddings, head, adapter with gradients and moments, one layer written out
# on an H200: tokens, one sequence, a plan of 32 layers, the peak of the allocator in GiB
MEASURED = [
    (4096, 2048, LayerPlan(Mode.RECOMPUTE), 7.87),
    (16384, 2048, LayerPlan(Mode.RECOMPUTE), 11.78),
    (8192, 8192, LayerPlan(Mode.RECOMPUTE), 9.25),
    (32768, 32768, LayerPlan(Mode.RECOMPUTE), 17.25),
    (4096, 2048, LayerPlan(Mode.KEEP), 18.39),
    (16384, 2048, LayerPlan(Mode.KEEP), 53.31),
    (8192, 8192, LayerPlan(Mode.KEEP), 30.03),
    (32768, 32768, LayerPlan(Mode.KEEP), 99.89),
]


def budget(gib: float) -> float:
    """What a whole budget leaves for the layers and the head."""
    return (gib - FIXED) * GIB


def test_a_layer_keeps_the_kibibytes_that_the_modes_promise():
    shape = dataclasses.replace(LLAMA_8B, low=0)
    lse = [0, 1 / 8, 1 / 8, 1 / 8]
    assert [shape.kept(mode) / 1024 - rows for mode, rows in zip(Mode, lse, strict=True)] == [8, 16, 36, 92]
    parked = [shape.parked(LayerPlan(Mode.KEEP, host)) / 1024 for host in Host]
    assert parked == [0, 8, 36.125, 92.125]


def test_8_bit_compute_needs_the_same_buffers_and_less_time():
    shapes = [dataclasses.replace(LLAMA_8B, compute=compute) for compute in ("bf16", "fp8-backward", "fp8")]
    weights = 4096 * (6144 + 4096 + 3 * 14336)
    assert {shape.written() for shape in shapes} == {2 * weights}
    exact, backward, always = (Cost(shape, 8192, 2048).work for shape in shapes)
    assert exact.forward == backward.forward > always.forward and exact.backward > backward.backward == always.backward
    assert exact.again[Mode.ALL_BUT_GATE_UP] > backward.again[Mode.ALL_BUT_GATE_UP] == always.again[Mode.ALL_BUT_GATE_UP]
    assert exact.again[Mode.ATTENTION] > backward.again[Mode.ATTENTION] > always.again[Mode.ATTENTION]
    assert exact.again[Mode.KEEP] == always.again[Mode.KEEP] == 0


@pytest.mark.parametrize(("tokens", "length", "layer", "measured"), MEASURED)
def test_the_peak_is_what_was_measured(tokens, length, layer, measured):
    found = FIXED + Cost(LLAMA_8B, tokens, length).device([layer] * 32) / GIB
    assert found == pytest.approx(measured, rel=0.03)


# what today's bars ask for: the bytes of a budget in GiB, and the plan that a throw-away prototype was fastest with
FASTEST = [
    (4096, 2048, 40, {LayerPlan(Mode.KEEP)}),
    (8192, 8192, 40, {LayerPlan(Mode.KEEP)}),
    (16384, 2048, 40, {LayerPlan(Mode.KEEP), LayerPlan(Mode.KEEP, Host.INPUT), LayerPlan(Mode.KEEP, Host.NARROW)}),
    (
        32768,
        32768,
        40,
        {
            LayerPlan(Mode.KEEP, Host.NARROW),
            LayerPlan(Mode.ALL_BUT_GATE_UP, Host.NARROW),
            LayerPlan(Mode.ALL_BUT_GATE_UP),
        },
    ),
    (16384, 2048, 130, {LayerPlan(Mode.KEEP)}),
]


@pytest.mark.parametrize(("tokens", "length", "gib", "kinds"), FASTEST)
def test_the_fastest_plan_of_an_h200(tokens, length, gib, kinds):
    plan = plan_for(Cost(LLAMA_8B, tokens, length), 32, budget(gib), 60 * GIB)
    assert set(plan) == kinds and FIXED + Cost(LLAMA_8B, tokens, length).device(plan) / GIB <= gib


def test_half_of_the_layers_keep_everything_at_32k():
    plan = plan_for(Cost(LLAMA_8B, 32768), 32, budget(40), 60 * GIB)
    assert 14 <= sum(layer.mode == Mode.KEEP for layer in plan) <= 18, "10 of them ran at 35.2 GiB"


def test_without_host_memory_it_computes_again():
    plan = plan_for(Cost(LLAMA_8B, 16384), 32, budget(40))
    assert {layer.host for layer in plan} == {Host.NOTHING} and {layer.mode for layer in plan} == {2, 3}


def test_a_slow_bus_is_left_alone():
    """PCIe 3.0 with four lanes takes longer than computing gate, up and the rest once more."""
    slow = plan_for(Cost(LLAMA_8B, 16384, 2048, Speeds(link=3e9)), 32, budget(40), 60 * GIB)
    assert sum(layer.host > Host.NOTHING for layer in slow) <= 3


@pytest.mark.parametrize("tokens", [512, 4096, 16384, 131072])
@pytest.mark.parametrize("gib", [1, 4, 12, 30, 60, 130])
def test_a_plan_stays_within_its_budgets_and_is_the_fastest_of_its_neighbours(tokens, gib):
    cost = Cost(LLAMA_8B, tokens)
    fits = lambda plan: cost.device(plan) <= gib * GIB and cost.host(plan) <= 20 * GIB  # noqa: E731
    plan = plan_for(cost, 32, gib * GIB, 20 * GIB)
    every = list(candidates(32))
    if not fits(plan):
        assert not any(map(fits, every)) and cost.host(plan) <= 20 * GIB
        return
    assert cost.seconds(plan) == pytest.approx(min(map(cost.seconds, filter(fits, every))))


def test_more_memory_is_never_slower():
    cost = Cost(LLAMA_8B, 16384, 2048)
    plans = [plan_for(cost, 32, gib * GIB, 20 * GIB) for gib in range(3, 60, 4)]
    seconds = [cost.seconds(plan) for plan in plans]
    assert seconds == sorted(seconds, reverse=True) and set(plans[-1]) == {LayerPlan(Mode.KEEP)}


def test_a_copy_that_is_late_is_waited_for():
    """Compute that hides a copy, and a bus so slow that the step is as long as the copies."""
    plan = offload_plan(LLAMA_8B, 16384, 32, 64 * GIB)
    seconds = lambda link: Cost(LLAMA_8B, 16384, 2048, Speeds(link=link)).seconds(plan)  # noqa: E731
    kept = Cost(LLAMA_8B, 16384, 2048).seconds([LayerPlan(layer.mode) for layer in plan])
    copies = 2 * 31 * 16384 * LLAMA_8B.parked(plan[0])
    assert kept < seconds(55e9) < 1.06 * kept
    assert seconds(1e9) == pytest.approx(copies / 1e9, rel=0.1)


def test_offloading_keeps_as_much_as_the_host_takes():
    tokens = 16384
    assert {layer.mode for layer in offload_plan(LLAMA_8B, tokens, 32, 64 * GIB)} == {Mode.ALL_BUT_GATE_UP}
    assert {layer.mode for layer in offload_plan(LLAMA_8B, tokens, 32, 10 * GIB)} == {Mode.ATTENTION}
    plan = offload_plan(LLAMA_8B, tokens, 32, 1 * GIB)
    assert {layer.mode for layer in plan} == {Mode.RECOMPUTE}
    assert [layer.host > Host.NOTHING for layer in plan] == [True] * 31 + [False], "the last layer is needed at once"


def test_the_description_counts_layers():
    plan = Plan(tuple(plan_for(Cost(LLAMA_8B, 16384), 32, 30 * GIB, 60 * GIB)), embedding_in_host_memory=True)
    text = describe(plan, 16384, 9 * GIB)
    assert "16384 tokens" in text and sum(map(int, re.findall(r"(\d+) layers?", text))) == 32
    assert "embeddings in host memory" in text and "9.0 GiB" in text


def test_plans_are_made_for_a_few_lengths_that_hold_all_others():
    for tokens in (*range(1, 400), 8191, 8192, 8193, 12345, 100_000):
        assert tokens <= bucket(tokens) <= max(tokens * 9 / 8, tokens + 1) and bucket(bucket(tokens)) == bucket(tokens)
    assert len({bucket(tokens) for tokens in range(4097, 8193)}) == 8 and bucket(8192) == 8192


class TestWhoDecides:
    def modes(self, model, flag=False):
        dial = dial_of(model)
        return [dial.of_layer(index, LLAMA_8B, torch.zeros(48, 64), 24, flag).mode for index in range(dial.layers)]

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

    def test_a_gpu_plans_for_every_length(self, model, monkeypatch):
        """A short batch after a long one keeps more again."""
        monkeypatch.setattr(dial_module, "available_memory", lambda device, budget: budget * GIB)
        monkeypatch.setattr(dial_module, "card_speeds", lambda device: Speeds())
        said = []
        monkeypatch.setattr(dial_module, "say", said.append)
        dial = dial_of(set_checkpointing(model, "auto", memory_budget=1.8))
        batch = lambda n: types.SimpleNamespace(shape=(n, 4096), device=torch.device("cuda"))  # noqa: E731
        plans = [
            [dial.of_layer(index, LLAMA_8B, batch(tokens), tokens, False) for index in (0, 1)]
            for tokens in (64, 8192, 64, 8192)
        ]
        assert plans[0] == plans[2] == [LayerPlan(Mode.KEEP)] * 2 and plans[1] == plans[3] != plans[0]
        assert ["for 64 tokens" in said[0], "for 8192 tokens" in said[1], len(said)] == [True, True, 2]

    def test_by_hand(self, model):
        dial = dial_of(model)
        dial.set_plan([LayerPlan(Mode.ATTENTION), LayerPlan(Mode.KEEP)])
        assert self.modes(model, flag=True) == [Mode.ATTENTION, Mode.KEEP]
        assert model.train()(**batch()).loss.isfinite()
        with pytest.raises(ValueError, match="describes 1 layers, the model has 2"):
            dial.set_plan([LayerPlan(Mode.KEEP)])

    def test_a_plan_that_parks_gets_its_host_memory(self, model, monkeypatch):
        expected = model.train()(**batch()).loss
        plan = Plan((LayerPlan(Mode.KEEP, Host.NARROW), LayerPlan(Mode.KEEP)))
        monkeypatch.setattr(offload, "SMALL", 0)
        monkeypatch.setattr(dial_module.Dial, "_within", lambda self, *rest: plan)
        set_checkpointing(model, "auto", memory_budget=1)
        loss = model(**batch()).loss
        pool = dial_of(model).offload.pool
        assert not pool.free, "on loan"
        loss.backward()
        assert torch.equal(loss, expected) and len(pool.free) == 1
        restore(model)
        assert dial_of(model) is None

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
    assert Dial(3).plans == {}


def planner(monkeypatch, room: float) -> Dial:
    """The dial of 32 layers on a GPU with ``room`` bytes for a step, after its first one."""
    monkeypatch.setattr(Dial, "room", lambda self, device: room)
    monkeypatch.setattr(Dial, "host_room", 100 * GIB)
    monkeypatch.setattr(dial_module, "card_speeds", lambda device: Speeds())
    dial = Dial(32)
    dial.has_run = True
    return dial


def batch_of(rows: int, length: int, graphs: bool = True, shape: Shape = LLAMA_8B) -> dial_module.Batch:
    return dial_module.Batch(shape, rows * length, length, torch.device("cuda"), graphs)


# rows, tokens of one, the bytes of a budget in GiB, whether graphs pay there, and which layers they run
FROM_GRAPHS = [
    (1, 512, 10, True, {LayerPlan(Mode.KEEP)}),
    (1, 1024, 10, True, {LayerPlan(Mode.KEEP)}),
    (2, 2048, 19, True, {LayerPlan(Mode.KEEP)}),
    (2, 2048, 40, True, {LayerPlan(Mode.KEEP)}),
    (2, 2048, 7, False, None),  # they would compute everything again
    (2, 2048, 10, False, None),  # nor as much as launching costs
    (4, 2048, 40, False, None),
    (8, 2048, 60, False, None),
]


@pytest.mark.parametrize(("rows", "length", "gib", "pays", "kinds"), FROM_GRAPHS)
def test_graphs_where_launching_takes_longer_than_computing(monkeypatch, rows, length, gib, pays, kinds):
    dial = planner(monkeypatch, budget(gib))
    dial.set_automatic()
    dial.has_run = True
    plan = dial.planner(batch_of(rows, length))
    assert plan.from_graphs == pays
    if pays:
        cost = Cost(LLAMA_8B, rows * length, length, from_graphs=True)
        assert set(plan.layers) == kinds and cost.device(plan.layers) <= budget(gib)
        assert describe(plan, rows * length).endswith("from CUDA graphs")
    assert not dial.planner(batch_of(rows, length, graphs=False)).from_graphs


def test_in_8_bits_graphs_pay_in_longer_batches(monkeypatch):
    dial = planner(monkeypatch, budget(100))
    dial.set_automatic()
    pays = {
        kind: dial.planner(batch_of(4, 2048, shape=dataclasses.replace(LLAMA_8B, compute=kind))) for kind in ("bf16", "fp8")
    }
    assert [plan.from_graphs for plan in pays.values()] == [False, True]


@pytest.mark.parametrize("gib", [0.5, 4])
def test_offload_keeps_short_batches_on_the_device_where_there_is_room(monkeypatch, gib):
    dial = planner(monkeypatch, gib * GIB)
    dial.set_offload()
    plan, other = (dial.planner(batch_of(1, 1024, graphs)) for graphs in (True, False))
    assert any(layer.host for layer in other.layers) and not other.from_graphs
    assert plan.from_graphs == (gib == 4) and (set(plan.layers) == {LayerPlan(Mode.RECOMPUTE)}) == (gib == 4)


def test_a_step_from_graphs_needs_little_more_than_one_without():
    """The memory of the head and of the layers at work is not the same any more."""
    for rows, length in ((1, 512), (2, 2048), (4, 2048)):
        plan = [LayerPlan(Mode.KEEP)] * 32
        eager, graphs = (Cost(LLAMA_8B, rows * length, length, from_graphs=kind).device(plan) for kind in (False, True))
        assert eager < graphs < eager + 1.5 * GIB


def alternating(one: Mode, other: Mode, count: int, layers: int = 32) -> list[LayerPlan]:
    """``count`` layers of the first kind, among them the last."""
    is_one = [(index + 1) * count // layers > index * count // layers for index in range(layers)]
    return [LayerPlan(one if chosen else other) for chosen in is_one]


# GiB that the pieces of both graphs of 2x2048 take in one block, each in the smallest gap that holds it, as the allocator does
IN_ONE_BLOCK = [
    ("bf16", [LayerPlan(Mode.KEEP)] * 8, 3.157),
    ("fp8", [LayerPlan(Mode.RECOMPUTE)] * 16, 1.095),
    ("fp8-backward", [LayerPlan(Mode.RECOMPUTE)] * 32, 1.595),
    ("fp8-backward", alternating(Mode.ALL_BUT_GATE_UP, Mode.RECOMPUTE, 5), 2.034),
    ("bf16", alternating(Mode.ALL_BUT_GATE_UP, Mode.RECOMPUTE, 5), 2.018),
    ("bf16", alternating(Mode.KEEP, Mode.RECOMPUTE, 6), 3.250),
    ("fp8-backward", alternating(Mode.ATTENTION, Mode.RECOMPUTE, 6, 12), 1.175),
]


@pytest.mark.parametrize(("compute", "plan", "taken"), IN_ONE_BLOCK)
def test_graphs_fit_into_their_block(compute, plan, taken):
    cost = Cost(dataclasses.replace(LLAMA_8B, compute=compute), 4096, 2048, from_graphs=True, gradients=len(plan) * 5 << 20)
    assert taken <= cost.block(plan) / GIB <= 1.04 * taken
    assert cost.block(plan) < cost.pool(plan) < cost.block(plan) + 0.06 * GIB
    assert cost.warming_up(plan) < cost.device(plan)


def test_8_bit_graphs_of_4096_tokens_fit_into_8_gib(monkeypatch):
    """One step of 2x2048 after another, the embedding table in host memory."""
    shape, trainable, table = dataclasses.replace(LLAMA_8B, compute="fp8-backward"), 160 << 20, 128256 * 4096 * 2
    fixed = 5.22 * GIB + SCRATCH  # weights, head, adapters, moments and buffers, and what libraries have taken
    dial = planner(monkeypatch, 8 * GIB - fixed - table)
    dial.set_automatic(8.0, trainable)
    dial.has_run, dial.embedding = True, types.SimpleNamespace(weight=types.SimpleNamespace(nbytes=table))
    plan = dial.planner(batch_of(2, 2048, shape=shape))
    assert plan.from_graphs and plan.embedding_in_host_memory
    kept = [layer.mode for layer in plan.layers]
    assert kept[-1] == Mode.KEEP and kept.count(Mode.ALL_BUT_GATE_UP) >= 3
    cost = Cost(shape, 4096, 2048, from_graphs=True, gradients=trainable)
    assert fixed + trainable + cost.pool(plan.layers) + cost.beside <= 8 * GIB
    inputs = [LayerPlan(Mode.RECOMPUTE)] * 32
    longest = [*inputs[:-1], LayerPlan(Mode.KEEP)]
    assert cost.device(longest) < cost.device(inputs) + (1 << 20), "kept where it would be computed again"


def test_graphs_copy_what_waits_in_host_memory_where_launching_takes_longer(monkeypatch):
    dial = planner(monkeypatch, 1.7 * GIB)
    dial.set_automatic()
    plans = [
        dial.planner(batch_of(2, 2048, shape=dataclasses.replace(LLAMA_8B, compute=kind))) for kind in ("bf16", "fp8-backward")
    ]
    assert [plan.from_graphs for plan in plans] == [False, True]
    for plan in plans:
        assert sum(layer.host > Host.NOTHING for layer in plan.layers) > 25 and not plan.layers[-1].host
    cost = Cost(dataclasses.replace(LLAMA_8B, compute="fp8-backward"), 4096, 2048, from_graphs=True, gradients=160 << 20)
    parked = [*offload_plan(cost.shape, 4096, 32, 64 * GIB)[:-1], LayerPlan(Mode.KEEP)]
    assert 0.984 < cost.block(parked) / GIB < 1.15, "as of the other plans above, with larger gaps"


def test_moments_have_room_in_every_plan_of_a_first_step_over_several_lengths(monkeypatch):
    """Gradients add up over batches, each of which is planned when it comes, before the optimizer makes its moments."""
    dial, rooms = planner(monkeypatch, 100 * GIB), []
    fastest = Dial._fastest

    def watched(self, batch, device, **rest):
        rooms.append(device)
        return fastest(self, batch, device, **rest)

    def room() -> float:
        rooms.clear()
        dial.planner(batch_of(1, 512))
        return rooms[0]

    monkeypatch.setattr(Dial, "_fastest", watched)
    weight, dial.has_run = torch.nn.Parameter(torch.zeros(3)), False
    dial.set_automatic(None, GIB, weight)
    optimizer = torch.optim.AdamW([weight])
    assert room() == 97 * GIB - LLAMA_8B.written()
    dial.has_run, weight.grad = True, torch.ones(3)
    before = room()
    assert 97 * GIB <= before < 98 * GIB
    optimizer.step()
    assert room() == before + 2 * GIB
    dial.has_run = False
    room()
    dial.has_run = True
    assert room() == before
    weight.grad = None  # an optimizer that writes past torch has stepped, too, when its gradients are gone
    assert room() == before + 2 * GIB
    del weight, optimizer
    assert room() == before + 2 * GIB


def test_rows_are_planned_with_what_graphs_pad_them_by(monkeypatch):
    dial = planner(monkeypatch, 100 * GIB)
    dial.set_automatic()
    x = types.SimpleNamespace(shape=(64 * 65, 4096), device=torch.device("cuda"))
    for graphs, tokens in ((64 * 128, 64 * 128), (0, bucket(64 * 65))):
        dial.of_layer(0, LLAMA_8B, x, 65, False, graphs)
        assert dial.planned.batch.tokens == tokens


def test_rows_are_not_planned_as_the_long_sequence_of_as_many_tokens(monkeypatch):
    """The sequence came first; the same number of tokens in rows needs more memory for the same plan."""
    monkeypatch.setattr(Dial, "room", lambda self, device: 56 * GIB)
    monkeypatch.setattr(Dial, "host_room", 100 * GIB)
    monkeypatch.setattr(dial_module, "card_speeds", lambda device: Speeds())
    monkeypatch.setattr(dial_module.Offload, "prepare", lambda self, sizes, device: None)
    dial, tokens = Dial(32), LONG
    dial.set_automatic()
    dial.has_run = True
    rows = types.SimpleNamespace(shape=(tokens, 4096), device=torch.device("cuda"))
    for length in (tokens, 4096):
        plan = [dial.of_layer(index, LLAMA_8B, rows, length, False) for index in range(32)]
        assert Cost(LLAMA_8B, tokens, length).device(plan) <= 56 * GIB
