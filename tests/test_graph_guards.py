"""What is done to a model around a step that runs from CUDA graphs: it is right, or an error by name.

The graphs are those of ``test_graphs``: run again in Python, on the objects that they were recorded with.
"""

from __future__ import annotations

import contextlib
import gc
import types
import weakref

import pytest
import torch
from graph_pairs import Again, assert_equal, batch, change_scaling, counters, gradients_of, graphed, pair, step, warm  # noqa: F401
from stock_pairs import difference, nf4_model, with_lora
from tiny import tiny_model

from luthier.model import arena as arena_module
from luthier.model import device_memory
from luthier.model import dial as dial_module
from luthier.model.accelerate import base_model, dial_of, graphs_of, restore
from luthier.model.arena import Arena
from luthier.model.passes import flags
from luthier.model.read_layer import Unfused, read_part
from luthier.model.recording import Recording
from luthier.ops.workspace import Workspace


def an_adapter(model, part="lora_A"):
    return next(p for name, p in model.named_parameters() if part in name)


def in_place(model):
    with torch.no_grad():
        an_adapter(model).mul_(1.5)


def optimizer_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def load(model):
    model.load_state_dict(model.state_dict())


def replace(model):
    an_adapter(model).data = an_adapter(model).data * 2


def free(model):
    an_adapter(model).untyped_storage().resize_(0)


@pytest.mark.parametrize("change", [in_place, optimizer_step, load, replace, free], ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["graphs", "eager"])
def test_weights_that_change_between_a_forward_and_its_backward(kind, change):
    """The loss was that of other weights: as in torch's own layers it has no backward any more."""
    if kind == "eager" and change in (replace, free):
        pytest.skip("what a parameter's data is replaced by counts, as in torch's own layers")
    models = pair()
    warm(models)
    graphs_of(models[0]).enabled = kind == "graphs"
    loss = models[0](**batch(seed=1)).loss
    change(models[0])
    before = Again.replayed
    with pytest.raises(RuntimeError, match="changed in place|moved, replaced or freed|by an inplace"):  # the last: torch's
        loss.backward()
    assert Again.replayed == before
    if change is not free:
        models[1].load_state_dict(models[0].state_dict())
        assert_equal(models, batch(seed=2))


def evaluate(model):
    model.eval()(**batch(seed=7))
    model.train()


def forward_without_gradients(model):
    with torch.no_grad():
        model(**batch(seed=7))


def another_forward(model):
    model(**batch(seed=7))


def hooks(model):
    base_model(model).model.layers[0].register_forward_hook(lambda module, args, output: None)


def stay_in_evaluation(model):
    model.eval()


BETWEEN = [evaluate, forward_without_gradients, another_forward, hooks, stay_in_evaluation, change_scaling]


@pytest.mark.parametrize("what", BETWEEN, ids=lambda what: what.__name__)
def test_between_a_forward_and_its_backward(what):
    models, results = pair(), []
    warm(models)
    before = Again.replayed
    for model in models:
        model.zero_grad()
        loss = model(**batch(seed=1)).loss
        what(model)
        loss.backward()
        results.append((loss.detach(), gradients_of(model)))
    assert Again.replayed == before + 1
    assert torch.equal(results[0][0], results[1][0]) and difference(results[0][1], results[1][1]) == 0


def test_a_graph_whose_weights_were_freed_is_not_started_early(monkeypatch):
    """Others have their memory by now (FSDP frees storages under their tensors): even a start in vain would read it."""
    models, started = pair(), []
    warm(models)
    start = Recording.start
    monkeypatch.setattr(Recording, "start", lambda self, taken: (started.append(1), start(self, taken)))
    assert_equal(models, batch(seed=1), replays=1)
    assert len(started) == 1
    for model in models:
        weight = an_adapter(model)
        values, storage = weight.detach().clone(), weight.untyped_storage()
        size, where, taken = storage.size(), weight.data_ptr(), []
        while weight.data_ptr() == where:
            storage.resize_(0)
            taken.append(torch.ones_like(values))  # the next time it has to lie elsewhere
            storage.resize_(size)
        weight.detach().copy_(values)
    assert_equal(models, batch(seed=1), replays=0)
    assert len(started) == 1


class Interrupted(Again):
    at = None

    def record(self, function):
        if function.__name__ == Interrupted.at:
            Interrupted.at = None
            raise KeyboardInterrupt
        return super().record(function)


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_an_interrupted_recording(at):
    models = pair()
    graphs = graphs_of(models[0])
    graphs.arena_class, Interrupted.at = Interrupted, at
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            assert_equal(models, batch(), replays=0)
    assert not graphs.recordings and graphs.dial.graph_bytes == graphs.arena.bytes > 0
    assert gc.isenabled()
    assert_equal(models, batch(), replays=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_a_layer_or_in_the_loss(error, monkeypatch):
    models = pair()
    warm(models)

    def fail(*_, **__):
        raise error

    last = base_model(models[0]).model.layers[-1]
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(type(last), "forward", fail)
        models[0](**batch(seed=1))
    assert_equal(models, batch(seed=2), replays=1)
    with pytest.raises(error):
        models[0](**batch(seed=1)).loss.register_hook(fail)
        models[0](**batch(seed=1)).loss.backward(torch.tensor(fail()))
    gc.collect()
    assert_equal(models, batch(seed=3), replays=1)


@pytest.mark.parametrize("to_none", [True, False])
def test_loops_that_add_up_clip_and_scale(to_none):
    models, results = pair(), []
    warm(models)
    for model in models:
        model.zero_grad()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=True)
        for index in range(4):
            (model(**batch(seed=index)).loss * 8).backward()
            if index % 2:
                torch._foreach_div_([p.grad for p in parameters], 8)  # as a scaler does
                norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
        results.append([norm, *(p.detach().clone() for p in parameters)])
    assert Again.replayed == 5
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_every_gradient_is_a_tensor_of_its_own(tmp_path):
    """What is saved, resized or freed of one is no other's."""
    models = pair()
    warm(models)
    step(models[0], batch())
    for parameter in models[0].parameters():
        if parameter.grad is not None:
            assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes
            parameter.grad.detach_()


def test_flags_that_choose_kernels_belong_to_the_key(monkeypatch):
    matmul = torch.backends.cuda.matmul
    seen = {flags()}
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"):
        before = getattr(matmul, name)
        setattr(matmul, name, not before)
        try:
            seen.add(flags())
        finally:
            setattr(matmul, name, before)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "another")
    seen.add(flags())
    monkeypatch.undo()
    assert len(seen) == 5 and flags() in seen


def test_a_model_does_not_count_on_the_graphs_of_another(monkeypatch):
    models, others = pair(), pair("qwen3")
    dial = dial_of(others[0])
    monkeypatch.setattr(dial_module, "available_memory", lambda device, budget: 1 << 40)
    cpu = torch.device("cpu")
    before = device_memory.held_by_others(None, cpu)  # by models of other tests
    assert dial.room(cpu) == (1 << 40) - before
    warm(models)
    held = dial_of(models[0]).graph_bytes
    assert held > 0 and dial.room(cpu) == (1 << 40) - before - held
    assert dial_of(models[0]).room(cpu) == (1 << 40) - before
    assert dial.room(torch.device("meta")) == 1 << 40
    warm(others)
    assert dial_of(models[0]).room(cpu) == (1 << 40) - before - dial.graph_bytes
    graphs_of(models[0]).clear()
    assert dial.room(cpu) == (1 << 40) - before


def merge_4_bits(model):
    model.merge_and_unload()


def load_others(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def drop_the_adapter(model):
    model.delete_adapter("default")


def of_4_bits(tmp_path):
    return graphed(with_lora(nf4_model(tmp_path)))


@pytest.mark.parametrize("change", [merge_4_bits, drop_the_adapter, load_others, restore], ids=lambda change: change.__name__)
def test_weights_that_went_are_not_kept(tmp_path, change):
    """Nobody calls a merged model again, perhaps: the graphs go at once, with the weights that they read."""
    model = graphed(with_lora(tiny_model("llama3"))) if change is load_others else of_4_bits(tmp_path)
    for _ in range(3):
        step(model, batch())
    graphs = graphs_of(model)
    for recording in graphs.recordings.values():
        recording.forward_graph = recording.backward_graph = None  # those of a card hold no modules
    assert graphs.recordings
    layer = base_model(model).model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight if change in (merge_4_bits, load_others) else layer.lora_A["default"].weight
    known = weakref.ref(getattr(weight, "luthier_quantised", weight))
    del layer, weight, recording
    change(model)
    gc.collect()
    assert not graphs.recordings and graphs.arena is None and graphs.dial.graph_bytes == 0
    assert known() is None or change is restore


def test_weights_that_were_merged_safely_are_kept_no_longer_than_to_the_next_pass():
    models = pair()
    warm(models)
    for model in models:
        model.merge_adapter(safe_merge=True)  # puts other memory into the same parameters
    models[0].eval()(input_ids=batch()["input_ids"])
    assert not graphs_of(models[0]).recordings
    for model in models:
        model.unmerge_adapter()
        model.train()
    warm(models)


def test_other_memory_in_the_same_parameters_takes_the_place_of_the_old():
    models = pair()
    warm(models)
    for model in models:
        replace(model)
    warm(models)
    assert len(graphs_of(models[0]).recordings) == 1


def test_two_streams(monkeypatch):
    """The buffers, and the graphs' memory, are one for all streams: the next one waits."""
    waits, streams = [], []
    for name in "ab":
        streams.append(types.SimpleNamespace(wait_stream=lambda other, name=name: waits.append((name, streams.index(other)))))
    workspace, current = Workspace(), [streams[0]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for index in (0, 0, 1, 1, 0):
        current[0] = streams[index]
        workspace.follow(torch.device("cuda"))
    assert waits == [("b", 0), ("a", 1)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    current[0] = streams[1]
    workspace.follow(torch.device("cuda"))
    assert len(waits) == 2, "nobody may wait for a stream outside of his own recording"


@pytest.mark.parametrize("kind", ["graphs", "eager"])
def test_every_use_of_shared_memory_follows_its_stream(kind, monkeypatch):
    models = pair()
    warm(models)
    graphs_of(models[0]).enabled = kind == "graphs"
    followed = []
    monkeypatch.setattr(Workspace, "follow", lambda self, device: followed.append(device))
    loss = models[0](**batch()).loss
    assert len(followed) == (1 if kind == "graphs" else 2)
    loss.backward()
    assert len(followed) == (2 if kind == "graphs" else 4)


def test_a_recording_makes_its_own_workspaces(monkeypatch):
    """cuBLAS keeps one for every stream, which torch.compile frees, or the end of any graph that was recorded on it."""
    done = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("clear"), raising=False)
    for name in ("empty_cache", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: contextlib.nullcontext())
    arena = Arena.__new__(Arena)
    arena.device = arena.pool = arena.stream = None
    arena.bytes = 0
    arena.record(lambda: done.append("record"))
    assert done == ["clear", "record", "clear"]


def test_other_threads_may_pin_memory_while_a_recording_that_failed_is_made_up_for(monkeypatch):
    modes = []

    @contextlib.contextmanager
    def graph(graph, capture_error_mode="global", **how):
        modes.append(capture_error_mode)
        yield

    for name in ("current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    monkeypatch.setattr(arena_module, "_emptied", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    arena = Arena.__new__(Arena)
    arena.device, arena.pool, arena.stream = torch.device("cpu"), None, None

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        arena.record(fails)
    assert modes == ["thread_local"] * 2


def test_a_first_forward_in_inference_mode():
    """Its buffers serve the training that follows."""
    models = pair()
    with torch.inference_mode():
        losses = [model(**batch(), use_cache=False).loss for model in models]
    assert torch.equal(*losses) and graphs_of(models[0]).workspace.buffers
    warm(models)


def test_an_adapter_that_two_projections_share():
    models = [with_lora(tiny_model("llama3")) for _ in range(2)]
    for model in models:
        attention = base_model(model).model.layers[0].self_attn
        attention.k_proj.lora_A = attention.q_proj.lora_A
    graphed(models[0])
    truth = step(models[1].train(), batch())[1]
    for _ in range(3):
        found = step(models[0], batch())[1]
        assert found.keys() == truth.keys() and difference(found, truth) < 1e-5
    assert Again.replayed == 1


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["model", "layers"])
def test_sharded_weights_run_without(mesh, wrapped):
    """FSDP2 gathers weights for a pass and frees them behind it: the layers are right there, and no graph may be made."""
    from torch.distributed.fsdp import fully_shard

    models = pair()
    graphs, layer = graphs_of(models[0]), base_model(models[0]).model.layers[0]
    for part in base_model(models[0]).model.layers if wrapped == "layers" else ():
        fully_shard(part, mesh=mesh)
    fully_shard(models[0], mesh=mesh)
    for index in range(4):
        (loss, gradients), (expected, truth) = (step(model, batch(seed=index)) for model in models)
        assert torch.equal(loss, expected)
        assert difference({name: value.full_tensor() for name, value in gradients.items()}, truth) == 0
    assert graphs.why == ("hooks are attached to layers" if wrapped == "layers" else graphs.why) and graphs.why
    assert not graphs.seen and not graphs.recordings
    with pytest.raises(Unfused, match="spread over devices"):
        read_part(layer.self_attn.q_proj)  # outside of a pass
