"""Short batches from CUDA graphs: the same numbers as without, whatever has changed since they were made."""

from __future__ import annotations

import contextlib
import copy
import gc
import types
import warnings
import weakref
from functools import partial

import pytest
import torch
from graph_pairs import Again, assert_equal, batch, change_scaling, counters, gradients_of, graphed, packed, pair, step, warm  # noqa: F401
from stock_pairs import difference, nf4_model, with_lora
from tiny import tiny_model
from torch.utils.checkpoint import checkpoint

from luthier.model import arena as arena_module
from luthier.model import dial as dial_module
from luthier.model import graph_rules as rules_module
from luthier.model import graphs as graphs_module
from luthier.model import offload as offload_module
from luthier.model import passes as passes_module
from luthier.model.accelerate import dial_of, graphs_of
from luthier.model.arena import Arena
from luthier.model.blocks import Mode
from luthier.model.checkpointing import set_checkpointing
from luthier.model.compute import set_compute
from luthier.model.cost import LayerPlan
from luthier.model.graphs import REPEATS
from luthier.model.layer_blocks import Blocks
from luthier.model.offload import GraphOffload, Host, Offload
from luthier.model.passes import padded
from luthier.model.recording import Gradients, handed_out
from luthier.ops import attention as attention_module


@pytest.mark.parametrize("family", ["llama3", "gemma3", "cohere2", "olmo2", "phi3", "smollm3"])
def test_training_from_graphs_is_training_without(family):
    models = pair(family)
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in models]
    for index in range(REPEATS + 4):
        assert_equal(models, batch(seed=index), replays=1 if index >= REPEATS else 0)
        for optimizer in optimizers:
            optimizer.step()
    assert Again.made == 2


@pytest.mark.parametrize("mode", list(Mode))
def test_every_mode_runs_from_graphs(mode):
    models = pair("qwen3")
    for model in models:
        dial_of(model).set_plan([LayerPlan(mode)] * 2)
    warm(models)
    assert_equal(models, batch(seed=5), replays=1)


def test_4_bit_weights(tmp_path):
    models = [graphed(with_lora(nf4_model(tmp_path, num_hidden_layers=3))) for _ in range(2)]
    graphs_of(models[1]).enabled = False
    warm(models)
    assert_equal(models, batch(seed=5), replays=1)


def test_rows_of_any_length_share_the_graph_of_the_next_round_one():
    models = pair()
    for length in (61, 50, 64, 37, 64, 50):  # what a longer row has left behind it changes nothing either
        assert_equal(models, batch(length=length, seed=length), exact=False)
    assert Again.made == 2 and Again.replayed == 4
    assert_equal(models, batch(length=65), replays=1, exact=False)
    for length in (64, 70, 33):
        assert_equal(models, batch(length=length), replays=1, exact=False)
    assert Again.made == 6, "the longer one needs more memory, and they are made again in it"
    assert padded(64) == 64 and padded(65) == 128 and padded(1025) == 1152


def change_weights(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.5)


def replace_data(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data * 2


def replace_base(model):
    for name, parameter in model.named_parameters():
        if "down_proj.base_layer" in name:
            parameter.data = parameter.data * 1.25


def replace_norms(model):
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = parameter.data * 0.9


def merge(model):
    model.enable_input_require_grads()  # nothing else wants a gradient then
    model.merge_adapter()


def freeze_one(model):
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)


def inputs_want_gradients(model):
    model.enable_input_require_grads()


def another_adapter(model):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                torch.nn.init.normal_(parameter, std=0.1)


def other_plan(model):
    dial_of(model).set_plan([LayerPlan(Mode.RECOMPUTE), LayerPlan(Mode.KEEP)])


CHANGES = [change_weights, change_scaling, replace_data, replace_base, replace_norms, merge, freeze_one]
CHANGES += [inputs_want_gradients, another_adapter, other_plan]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    models = pair()
    warm(models)
    for model in models:
        change(model)
    for index in range(REPEATS + 2):
        at_once = change in (change_weights, inputs_want_gradients, other_plan)  # nothing has moved
        assert_equal(models, batch(seed=index), replays=1 if index >= REPEATS or at_once else 0)


def test_a_disabled_adapter_and_the_one_before_it():
    models = pair()
    warm(models)
    losses = []
    for _ in range(2):
        before = Again.replayed
        with models[0].disable_adapter(), models[1].disable_adapter():
            losses += [model(**batch()).loss for model in models]
        assert Again.replayed == before and losses[-1] == losses[-2]
        assert_equal(models, batch(seed=3), replays=1)


def test_a_second_forward_before_the_first_backward():
    models = pair()
    warm(models)
    results, before = [], Again.replayed
    for model in models:
        model.zero_grad()
        first, second = (model(**batch(seed=seed)).loss for seed in (1, 2))
        (first + 2 * second).backward()
        results.append((first.detach(), second.detach(), gradients_of(model)))
    assert Again.replayed - before == 1
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert difference(results[0][2], results[1][2]) == 0


def test_a_forward_whose_backward_never_comes():
    models = pair()
    warm(models)
    loss = models[0](**batch()).loss
    assert_equal(models, batch(seed=1), replays=0)
    del loss
    gc.collect()
    assert_equal(models, batch(seed=1), replays=1)


def test_gradients_add_up_over_several_backwards():
    models = pair()
    warm(models)
    for model in models:
        model.zero_grad()
        for seed in range(3):
            model(**batch(seed=seed)).loss.backward()
    assert Again.replayed == 1 + 3
    kept = gradients_of(models[0])
    assert difference(kept, gradients_of(models[1])) == 0
    held = {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}
    for parameter in models[0].parameters():
        parameter.grad = None
    models[0](**batch(seed=9)).loss.backward()
    assert difference(held, kept) == 0, "a later backward wrote into gradients that were handed out"


def test_a_second_backward_is_refused():
    models = pair()
    warm(models)
    loss = models[0](**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_backward_over_weights_that_have_changed_is_refused():
    models = pair()
    warm(models)
    loss = models[0](**batch()).loss
    with torch.no_grad():
        next(p for p in models[0].parameters() if p.requires_grad).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant):
    """It runs everything twice, once with a graph and once without, and what it sees being saved must be the same."""
    models = pair()
    for rows, length in ((2, 24), (3, 5)):
        inputs = batch(rows, length)
        inputs["attention_mask"][0, :2] = 0
        for model in models:
            model.zero_grad()
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            rest = {name: inputs[name] for name in ("attention_mask", "labels")}
            checkpoint(lambda x, m=model, r=rest: m(inputs_embeds=x, **r).loss, embeds, use_reentrant=reentrant).backward()
        assert difference(*map(gradients_of, models)) < 1e-6


def test_what_is_no_plain_batch_runs_without():
    models = pair()
    warm(models)
    hole = batch()
    hole["attention_mask"][0, 3:6] = 0
    for inputs in (hole, packed(40, 24)):  # the kernel of a CPU takes packed rows one by one
        for _ in range(REPEATS + 1):
            assert_equal(models, inputs, replays=0)
    with torch.no_grad():
        assert models[0](**batch()).loss == models[1](**batch()).loss
    assert Again.replayed == 1
    models[0].eval()
    logits = models[0](input_ids=batch()["input_ids"]).logits
    assert torch.equal(logits, models[1].eval()(input_ids=batch()["input_ids"]).logits)
    generated = models[0].generate(batch()["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 8) and Again.replayed == 1
    for model in models:
        model.train()
    assert_equal(models, batch(seed=2), replays=1)


def test_long_batches_run_without(monkeypatch):
    models = pair()
    with monkeypatch.context() as patch:
        patch.setattr(dial_module, "LAUNCHES", 0.0)
        for _ in range(REPEATS + 1):
            assert_equal(models, batch(), replays=0)
    assert graphs_of(models[0]).why == "its kernels take longer than their launches"
    for model in models:
        dial_of(model).set_plan([LayerPlan(Mode.KEEP), LayerPlan(Mode.RECOMPUTE)])
    warm(models)
    assert graphs_of(models[0]).why == ""


PARKED = [
    (Mode.RECOMPUTE, Host.NARROW),
    (Mode.ALL_BUT_GATE_UP, Host.NARROW),
    (Mode.KEEP, Host.INPUT),
    (Mode.KEEP, Host.EVERYTHING),
]


@pytest.mark.parametrize(("mode", "host"), PARKED)
def test_what_waits_in_host_memory_waits_there_from_graphs_too(monkeypatch, tmp_path, mode, host):
    monkeypatch.setattr(offload_module, "SMALL", 0)
    models = [graphed(with_lora(nf4_model(tmp_path, num_hidden_layers=4))) for _ in range(2)]
    graphs_of(models[1]).enabled = False
    for model in models:
        dial_of(model).set_plan([LayerPlan(mode, host)] * 3 + [LayerPlan(Mode.KEEP)])
    warm(models)
    graphs, pool = graphs_of(models[0]), dial_of(models[0]).offload.pool
    recording = next(iter(graphs.recordings.values()))
    assert len(recording.slabs) == 3 and not pool.free, "graphs have taken over what passes without had pinned"
    assert {*map(id, recording.slabs)} == {*map(id, graphs.copies.pool.free)}
    for length in (64, 40, 128, 64):  # shorter ones in the same slabs
        assert_equal(models, batch(length=length, seed=length), replays=1, exact=length in (64, 128))
    assert {*map(id, recording.slabs)} <= {id(slab) for made in graphs.recordings.values() for slab in made.slabs}
    results = []
    for model in models:  # the second forward runs without, and must not write over what the first one has parked
        model.zero_grad()
        first, second = (model(**batch(seed=seed)).loss for seed in (1, 2))
        (first + 2 * second).backward()
        results.append(gradients_of(model))
    assert difference(*results) == 0
    graphs.clear()
    assert {*map(id, recording.slabs)} <= {*map(id, pool.free)}, "and have given it back"
    warm(models)


@pytest.mark.parametrize("family", ["gemma3", "cohere2", "olmo2", "phi3", "qwen3"])
def test_every_family_finds_its_slabs_prepared(monkeypatch, family):
    """Nothing can be pinned while a graph is recorded."""
    monkeypatch.setattr(offload_module, "SMALL", 0)
    for mode in (Mode.ATTENTION, Mode.KEEP):
        models = pair(family)
        for model in models:
            dial_of(model).set_plan([LayerPlan(mode, Host.EVERYTHING), LayerPlan(Mode.KEEP)])
        warm(models)
        graphs = graphs_of(models[0])
        recording = next(iter(graphs.recordings.values()))
        assert len(recording.slabs) == 1 and [*map(id, recording.slabs)] == [*map(id, graphs.copies.pool.free)]


def test_a_recording_leaves_others_the_host_memory_that_it_does_not_need():
    other, copies, device = Offload(), GraphOffload(), torch.device("cpu")
    other.prepare([100, 200, 300, 300], device)
    for _ in range(3):  # nor does it take more the next time
        copies.adopt(other, [150, 50], device)
        assert sorted(slab.capacity for slab in copies.pool.free) == [100, 200]
        assert [slab.capacity for slab in other.pool.free] == [300, 300]
        other.take_over(copies)
        other.pool.prepare([300, 300])
        assert other.pool.held == 900
        copies = GraphOffload()


def test_what_a_recording_that_broke_off_waited_for_is_forgotten(monkeypatch):
    """Its events are no others' to wait for, and its tensors lie in the graphs' memory."""
    copies, device = GraphOffload(), torch.device("cpu")
    copies.under_way, copies.chain = [(object(), [torch.zeros(1)])], [(0, object())]
    copies.adopt(None, [100], device)
    assert not copies.under_way and not copies.chain
    slab = copies.pool.free[0]

    def start(self, kept):
        slab.read = slab.waits = object()

    monkeypatch.setattr(Offload, "_start", start)
    copies.fetch(types.SimpleNamespace(parked=types.SimpleNamespace(slab=slab, ready=None, back={}), before=None))
    assert slab.read is slab.waits is None


class Uncopied(Again):
    def record(self, function):
        if function.__self__.copies is not None:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        return super().record(function)


def test_copies_that_cannot_be_recorded_leave_other_plans_their_graphs():
    """Where a system lets no memory be pinned, for one."""
    models = pair()
    graphs_of(models[0]).arena_class = Uncopied
    parked, kept = [LayerPlan(Mode.ALL_BUT_GATE_UP, Host.NARROW), LayerPlan(Mode.KEEP)], [LayerPlan(Mode.KEEP)] * 2
    for plan, replays in ((parked, 0), (kept, 1), (parked, 0), (kept, 1)):
        for model in models:
            dial_of(model).set_plan(plan)
        first = plan is parked and not graphs_of(models[0]).uncopied
        for index in range(REPEATS + 1):
            says = partial(pytest.warns, UserWarning, match="in host memory: .*Cannot copy")
            with says() if first and index == REPEATS else contextlib.nullcontext():
                assert_equal(models, batch(), replays=replays if index == REPEATS else None)
    assert graphs_of(models[0]).enabled


def test_copies_of_a_recording_wait_for_no_event_of_another():
    """Nor for one of a pass without: such an event is none that a graph knows."""
    other, copies, device = Offload(), GraphOffload(), torch.device("cpu")
    other.prepare([100, 200], device)
    slabs = list(other.pool.free)
    slabs[0].read, slabs[0].waits = object(), object()
    copies.adopt(other, [150, 50], device)
    assert {*map(id, copies.pool.free)} == {*map(id, slabs)} and not other.pool.free
    assert all(slab.read is slab.waits is None for slab in slabs)


def test_a_switch():
    models = pair()
    warm(models)
    graphs_of(models[0]).enabled = False
    assert_equal(models, batch(), replays=0)
    graphs_of(models[0]).enabled = True
    assert_equal(models, batch(), replays=1)
    graphs_of(models[0]).clear()
    warm(models)


@pytest.mark.parametrize("where", ["layer", "part", "everywhere"])
def test_hooks_see_every_layer(where):
    models = pair()
    warm(models)
    seen = []
    layer = models[0].base_model.model.model.layers[1]

    def watch(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    if where == "everywhere":
        handle = torch.nn.modules.module.register_module_forward_hook(watch)
    else:
        handle = (layer if where == "layer" else layer.self_attn.q_proj).register_forward_hook(watch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hooked projection runs its layer stock
        assert_equal(models, batch(seed=1), replays=0, exact=False)
        assert seen
    handle.remove()
    assert_equal(models, batch(seed=1), replays=1)


def test_hidden_states_can_be_asked_for():
    models = pair()
    warm(models)
    states, expected = (model(**batch(), output_hidden_states=True).hidden_states for model in models)
    assert len(states) == 3 and all(torch.equal(*both) for both in zip(states, expected, strict=True))


def shifted(layer_class: type) -> type:
    """That class, called with another input than the layer before it gave."""

    def call(self, x, **kwargs):
        return layer_class.__call__(self, x + 1, **kwargs)

    return type("Shifted", (layer_class,), {"__call__": call})


def test_something_between_the_layers_is_found():
    """A backbone that adds something between its layers, once it had not (as one with pictures in a batch)."""
    models = pair()
    warm(models)
    for model in models:
        second = model.get_base_model().model.layers[1]
        second.__class__ = shifted(type(second))
    assert_equal(models, batch(seed=1), replays=0)
    assert not graphs_of(models[0]).enabled and not graphs_of(models[0]).recordings


def test_a_skipped_layer():
    models = pair()
    warm(models)
    for model in models:
        model.config.num_hidden_layers = 1
    assert_equal(models, batch(seed=1), replays=0)


def test_another_autocast():
    models = pair()
    warm(models)
    for model in models:
        model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = [model(**batch()).loss for model in models]
    assert torch.equal(*losses) and Again.replayed == 1


class Broken(Again):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_runs_without_and_says_so_once():
    models = pair()
    graphs_of(models[0]).arena_class = Broken
    for _ in range(REPEATS):
        assert_equal(models, batch(), replays=0)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing\\).$"):
        assert_equal(models, batch(), replays=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(models, batch(), replays=0)


def test_graphs_do_not_fill_their_inputs_where_algorithms_are_deterministic():
    """torch fills new memory with NaN then, and a graph does again in every replay what was done while it was recorded."""
    models, made = pair(), []

    class Noted(Again):
        def record(self, function):
            made.append(torch.empty(99))
            return super().record(function)

    graphs_of(models[0]).arena_class = Noted
    torch.use_deterministic_algorithms(True)
    try:
        warm(models)
        assert torch.empty(99).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(made) == 2 and torch.stack(made).isfinite().all()


def test_two_models_and_a_copy_have_graphs_of_their_own():
    models, others = pair(), pair("qwen3")
    warm(models)
    warm(others)
    copied = copy.deepcopy(models[0])
    assert graphs_of(copied) is not graphs_of(models[0]) and not graphs_of(copied).recordings
    assert graphs_of(copied).dial is dial_of(copied)
    change_weights(copied)
    loss, _ = step(copied, batch())
    assert_equal(models, batch(), replays=1)
    assert_equal(others, batch(), replays=1)
    assert loss != step(models[0], batch())[0]


def test_an_experts_model_runs_without():
    model = graphed(with_lora(tiny_model("qwen3_moe")))
    for _ in range(REPEATS + 1):
        step(model, batch())
    assert not Again.made


def test_gradients_of_several_dtypes():
    tensors = [torch.full((2, 3), 0.0), torch.full((4,), 1.0, dtype=torch.bfloat16), torch.full((5,), 2.0).expand(3, 5)]
    layers = [Gradients(tensors[:2]), Gradients([]), Gradients(tensors[2:])]
    copied = handed_out(layers)
    for layer in layers:
        for piece in layer.pieces.values():
            piece.fill_(9)
    for index, (copy_, tensor) in enumerate(zip(copied, tensors, strict=True)):
        assert copy_.shape == tensor.shape and copy_.dtype == tensor.dtype and (copy_ == index).all()
    alone = handed_out([Gradients(tensors[:1])])[0]
    assert alone.data_ptr() != tensors[0].data_ptr()


@pytest.mark.parametrize("compute", ["fp8-backward", "fp8"])
def test_8_bit_compute(tmp_path, compute):
    models = [graphed(with_lora(nf4_model(tmp_path))) for _ in range(2)]
    graphs_of(models[1]).enabled = False
    warm(models)
    for model in models:
        with pytest.warns(UserWarning, match="less exact"):
            set_compute(model, compute)
    warm(models)
    assert_equal(models, batch(seed=3), replays=1)


def test_dropout_and_several_adapters_run_without():
    dropped, several = pair(lora_dropout=0.5), pair()
    for model in several:
        another_adapter(model)
        model.base_model.set_adapter(["default", "other"])
    for models in (dropped, several):
        for index in range(REPEATS + 3):
            results = []
            for model in models:
                torch.manual_seed(index)
                results.append(step(model, batch(seed=index)))
            assert torch.equal(results[0][0], results[1][0]) and difference(results[0][1], results[1][1]) == 0
        assert not Again.made and not graphs_of(models[0]).seen
        assert "anew in every pass" in graphs_of(models[0]).why


def padded_rows(*sides: tuple[int, int], length: int = 60, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows with padding at their left and right ends, which does not train."""
    inputs = batch(len(sides), length, seed)
    for row, (left, right) in enumerate(sides):
        inputs["attention_mask"][row, :left] = 0
        inputs["attention_mask"][row, length - right :] = 0
    before = torch.cat((torch.zeros_like(inputs["labels"][:, :1]), inputs["attention_mask"][:, :-1]), dim=1)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] * before == 0, -100)  # nor is it trained from
    return inputs


STRUCTURED = {
    "packed": [packed(40, 20), packed(9, 30, 20), packed(64), packed(*[1] * 5, 57), packed(63)],
    "padded": [padded_rows((0, 7), (0, 0)), padded_rows((5, 0), (0, 9)), padded_rows((3, 3), (50, 0), length=64)],
}


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gemma3"])
@pytest.mark.parametrize("kind", list(STRUCTURED))
def test_packed_and_padded_rows_whose_kernel_reads_bands(monkeypatch, kind, family):
    """One graph for all of them, and another for whole rows, whatever they hold."""
    for module in (attention_module, rules_module):
        monkeypatch.setattr(module, "kernel_for", lambda *given: "reference")
    models = pair(family)
    inputs = STRUCTURED[kind]
    for index in range(REPEATS):
        assert_equal(models, inputs[index % 2], replays=0)
    for given in (*inputs, *inputs):
        assert_equal(models, given, replays=1, exact=False)
    assert_equal(models, batch(length=50), replays=1, exact=False)
    assert_equal(models, inputs[1], replays=1, exact=False)
    lengths = {padded(given["input_ids"].shape[1]) for given in inputs}
    assert len(graphs_of(models[0]).recordings) == len(lengths) + 1


def test_a_pass_without_graphs_gets_their_memory(monkeypatch):
    """What is free holds either; the graphs come back, later each time."""
    models = pair()
    warm(models)
    graphs, dial = graphs_of(models[0]), dial_of(models[0])
    rows = packed(40, 24)
    assert_equal(models, rows, replays=0)
    assert graphs.recordings and "packed" in graphs.why
    monkeypatch.setattr(type(dial), "room", lambda self, device: dial.graph_bytes + dial.planned.needed - 1)
    for retreats in (1, 2):
        assert_equal(models, rows, replays=0)
        assert not graphs.recordings and dial.graph_bytes == 0 and graphs.retreats == retreats
        for _ in range(REPEATS << retreats):
            assert_equal(models, batch(), replays=0)
        assert_equal(models, batch(), replays=1)


def test_a_second_shape_needs_no_pass_without_a_graph(monkeypatch):
    """It would need its memory beside that of the graphs."""
    models = pair()
    warm(models)
    monkeypatch.setattr(type(dial_of(models[0])), "room", lambda self, device: 0)
    for length in (30, 100, 64, 7):
        assert_equal(models, batch(length=length), replays=1, exact=False)
    assert not graphs_of(models[0]).retreats


def test_evaluation_gets_the_memory_of_graphs_where_they_hold_most_of_it(monkeypatch):
    models = pair()
    warm(models)
    graphs = graphs_of(models[0])
    for times, kept in ((2.5, True), (1.5, False)):
        assert_equal(models, batch(seed=1), replays=1)
        free = times * graphs.dial.graph_bytes
        monkeypatch.setattr(graphs_module, "available_memory", lambda device, budget, free=free: free)
        for model in models:
            with torch.no_grad():
                model.eval()(**batch())
            model.train()
        assert bool(graphs.recordings) == kept
    warm(models)


def test_rows_of_many_lengths_get_graphs_when_they_come():
    models = pair()
    for length in (64, 128):
        assert_equal(models, batch(length=length), replays=0)
    for length in (192, 256, 320, 128, 64):
        assert_equal(models, batch(length=length), replays=1)


class Full(Again):
    full = True

    def record(self, function):
        if Full.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().record(function)


def test_graphs_leave_room_for_others(monkeypatch):
    """The one that was used longest ago goes, and those of settings that are gone."""
    monkeypatch.setattr(graphs_module, "GRAPHS", 2)
    models = pair()
    warm(models, batch(length=192))  # the longest first: a longer one makes all anew
    for length, made in ((64, 2), (192, 2), (128, 3), (192, 3), (64, 4), (192, 4), (128, 5)):
        assert_equal(models, batch(length=length), replays=1)
        assert Again.made == 2 * made and len(graphs_of(models[0]).recordings) == min(made, 2)
    for model in models:
        change_scaling(model)
    warm(models)
    graphs = graphs_of(models[0])
    assert {*map(id, graphs.latest.values())} == {*map(id, graphs.recordings.values())}  # nothing else holds the others
    assert_equal(models, batch(length=128), replays=1)


def test_what_a_failed_warm_up_has_launched_is_waited_for(monkeypatch):
    """It writes into the buffers that the pass without a graph uses next."""
    waits, stream = [], types.SimpleNamespace(wait_stream=lambda stream: None)
    current = types.SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(arena_module, "_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    with pytest.raises(torch.OutOfMemoryError):
        Arena.aside(full, torch.device("cpu"))
    assert waits == [stream]


def full():
    raise torch.OutOfMemoryError


class Logged(Again):
    """What comes when: a warm-up, the arena's bytes."""

    log: list = []

    def __init__(self, size, device):
        super().__init__(size, device)
        Logged.log.append(size)

    @staticmethod
    def aside(function, device):
        function()
        Logged.log.append("warm")


def pair_of_logged() -> tuple[torch.nn.Module, torch.nn.Module]:
    models, Logged.log = pair(), []
    graphs_of(models[0]).arena_class = Logged
    return models


def test_layers_are_warmed_up_before_there_is_an_arena_or_beside_one_where_they_fit(monkeypatch):
    models = pair_of_logged()
    graphs = graphs_of(models[0])
    warm(models)
    first = graphs.arena
    assert Logged.log == ["warm", first.size]
    assert_equal(models, batch(length=30), replays=1, exact=False)  # the same graph
    assert_equal(models, batch(rows=1), replays=1)
    assert graphs.arena is first and Logged.log[2:] == ["warm"]
    assert_equal(models, batch(length=128), replays=1)
    larger = graphs.arena
    assert Logged.log[3:] == ["warm", larger.size] and len(graphs.recordings) == 1
    monkeypatch.setattr(type(dial_of(models[0])), "room", lambda self, device: larger.bytes + 1)
    assert_equal(models, batch(rows=3), replays=1)
    smaller = graphs.arena
    assert Logged.log[5:] == ["warm", smaller.size] and smaller.size < larger.size, "there was no room beside the larger one"


def test_shapes_that_find_no_room_beside_each_other_do_not_take_turns(monkeypatch):
    models = pair_of_logged()
    graphs = graphs_of(models[0])
    monkeypatch.setattr(type(dial_of(models[0])), "room", lambda self, device: 0)
    warm(models)
    for _ in range(3):
        for rows in (1, 2):
            assert_equal(models, batch(rows=rows), replays=1)
    sizes = [entry for entry in Logged.log if entry != "warm"]
    assert len(sizes) == 3 and sizes[0] == sizes[2] == graphs.arena.size and len(graphs.recordings) == 2


def test_weights_that_go_when_python_ends_clear_nothing():
    """Of which too little is left by then: a script that ends with its model gave an error for every weight."""
    models = pair()
    warm(models)
    graphs = graphs_of(models[0])
    graphs_module._weight_went(weakref.ref(graphs), None, ends=lambda: True)
    assert graphs.recordings
    graphs_module._weight_went(weakref.ref(graphs), None)
    assert not graphs.recordings


@pytest.mark.parametrize(
    ("compute", "modes", "layers"),
    [("bf16", [Mode.KEEP] * 2, 1), ("bf16", [Mode.KEEP, Mode.RECOMPUTE], 2), ("fp8-backward", [Mode.KEEP] * 2, 2)],
)
@pytest.mark.filterwarnings("ignore:compute=")
def test_layers_that_are_alike_are_warmed_up_once(compute, modes, layers, monkeypatch):
    ran, forward = [], Blocks.forward

    class Counting(Again):
        @staticmethod
        def aside(function, device):
            monkeypatch.setattr(Blocks, "forward", lambda self, *given: ran.append(self) or forward(self, *given))
            function()
            monkeypatch.setattr(Blocks, "forward", forward)

    monkeypatch.setattr(passes_module, "ALIGNED", 64)  # a CPU's memory is no more than that
    models = pair()
    graphs_of(models[0]).arena_class = Counting
    for model in models:
        set_compute(model, compute)
        dial_of(model).set_plan([LayerPlan(mode) for mode in modes])
    warm(models)
    assert_equal(models, batch(seed=1), replays=1)
    assert len(ran) == layers


def test_a_warm_up_for_which_there_is_no_memory():
    models = pair_of_logged()
    graphs = graphs_of(models[0])
    graphs.arena_class = types.SimpleNamespace(**{**vars(Logged), "fits": Again.fits, "aside": lambda function, device: full()})
    for _ in range(REPEATS + 1):
        assert_equal(models, batch(), replays=0)
    assert graphs.why == "the device had no memory for them" and not graphs.arena and not Logged.log


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync", "pluggable"])
def test_an_allocator_without_blocks_gets_no_graphs(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    assert Arena.fits(types.SimpleNamespace(is_cuda=True)) == (backend == "native")


def test_a_device_that_is_full_is_asked_again_later():
    models = pair()
    graphs_of(models[0]).arena_class = Full
    for _ in range(REPEATS + 1):
        assert_equal(models, batch(), replays=0)
    assert graphs_of(models[0]).why == "the device had no memory for them"
    Full.full = False
    for _ in range(2 * REPEATS):
        assert_equal(models, batch(), replays=0)
    assert_equal(models, batch(), replays=1)


def test_trained_weights():
    models = [graphed(tiny_model("qwen3")) for _ in range(2)]
    graphs_of(models[1]).enabled = False
    warm(models)
    assert_equal(models, batch(seed=3), replays=1)


def test_what_is_left_of_a_pass_holds_neither_its_graphs_nor_its_batch():
    models = pair()
    warm(models)
    graphs = graphs_of(models[0])
    recording = weakref.ref(next(iter(graphs.recordings.values())))
    loss = models[0](**batch()).loss
    loss.backward()
    assert recording().program.new_buffers is None
    graphs.clear()
    assert recording() is None and loss.grad_fn is not None


def test_moving_a_model_gives_up_its_graphs():
    models = pair()
    warm(models)
    models[0].to("cpu")
    assert not graphs_of(models[0]).recordings
    warm(models)


def test_new_settings_give_up_the_graphs_of_old_plans():
    models = pair()
    warm(models)
    set_checkpointing(models[0], False)
    assert not graphs_of(models[0]).recordings
    warm(models)
