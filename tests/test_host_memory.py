"""Host memory: how much there is, slabs on loan, and an embedding table that waits there."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from stock_pairs import batch, difference, loss_and_gradients, with_lora
from tiny import tiny_model

from luthier.model import host_memory, offload
from luthier.model.accelerate import accelerate, dial_of, restore
from luthier.model.blocks import Mode
from luthier.model.checkpointing import set_checkpointing
from luthier.model.cost import LayerPlan
from luthier.model.host_memory import Slab, SlabPool, anonymous, free_host_memory, movable
from luthier.model.offload import Host

CPU = torch.device("cpu")


def test_a_control_group_bounds_what_is_free(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(host_memory, "GROUPS", ((str(limit), str(used)),))
    everything = psutil.virtual_memory().available
    assert free_host_memory() == pytest.approx(everything, rel=0.2)
    used.write_text("1000\n")
    limit.write_text("max\n")
    assert free_host_memory() == pytest.approx(everything, rel=0.2)
    limit.write_text("5000\n")
    assert free_host_memory() == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_memory() == 1000
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    limit.write_text("500\n")
    assert free_host_memory() == 0


def test_pages_are_ours_alone():
    memory = anonymous(10_000)
    memory.zero_()[:3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert memory.shape == (10_000,) and memory.sum() == 6 and anonymous(10_000).data_ptr() != memory.data_ptr()


class TestSlabs:
    def test_prepared_ones_are_handed_out_and_come_back(self):
        pool = SlabPool(CPU)
        pool.prepare([1000, 3000, 1000])
        taken = [pool.take(size) for size in (900, 1000, 2000)]
        assert [slab.capacity for slab in taken] == [1000, 1000, 3000] and not pool.free
        assert len({slab.memory.data_ptr() for slab in taken}) == 3
        for slab in taken:
            pool.give(slab)
        pool.prepare([3000, 1000])
        assert pool.take(3000) is taken[2] and pool.take(1) in taken[:2]

    def test_one_more_than_prepared_is_made_at_once(self):
        pool = SlabPool(CPU)
        assert pool.take(100).memory.shape == (100,)

    def test_longer_batches_replace_slabs_and_shorter_ones_use_them(self):
        pool = SlabPool(CPU)
        pool.prepare([100] * 3)
        pool.prepare([200] * 3)
        assert [slab.capacity for slab in pool.free] == [200] * 3
        pool.prepare([100] * 3)
        assert [slab.capacity for slab in pool.free] == [200] * 3

    @pytest.mark.parametrize("error", [OSError, UserWarning])  # the second: a warning about pinning, where those are errors
    def test_memory_that_is_not_there_is_an_error_where_it_is_needed(self, error, monkeypatch):
        def short(size):
            raise error("Cannot allocate memory")

        monkeypatch.setattr(host_memory, "anonymous", short)
        pool = SlabPool(CPU)
        pool.prepare([100])
        with pytest.raises(error, match="Cannot allocate"):
            pool.take(100)._made.result(timeout=10)

    def test_garbage_collected_while_one_is_taken_comes_back(self):
        pool = SlabPool(CPU)

        def collected():
            with pool.lock:
                pool.give(Slab(100, CPU))

        thread = threading.Thread(target=collected, daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive() and pool.held == 100


def test_without_gradients_nothing_is_parked(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 0)
    model = accelerate(with_lora(tiny_model("llama3"))).train()
    dial = dial_of(model)
    dial.set_plan([LayerPlan(Mode.KEEP, Host.EVERYTHING)] * dial.layers)
    with torch.no_grad():
        model(**batch())
    assert dial.offload is None


class TestABackwardThatBreaksOff:
    """In the last layer, when the tensors of the one before are on their way back and nobody has fetched them."""

    @pytest.mark.parametrize("mode", [Mode.RECOMPUTE, Mode.KEEP])
    def test_the_next_step_is_that_of_a_fresh_model(self, mode, monkeypatch):
        monkeypatch.setattr(offload, "SMALL", 0)

        def fresh():
            model = accelerate(with_lora(tiny_model("llama3")))
            dial = dial_of(model)
            dial.set_plan([LayerPlan(mode, Host.EVERYTHING)] * dial.layers)
            return model

        def break_off(grad):
            raise KeyboardInterrupt

        model, started = fresh(), []
        loss_and_gradients(model, **batch())
        pool = dial_of(model).offload.pool
        slabs = {id(slab) for slab in pool.free}
        start = offload.Offload._start
        monkeypatch.setattr(offload.Offload, "_start", lambda self, kept: (start(self, kept), started.append(kept.parked.back)))
        for seed in (1, 2):
            started.clear()
            trained = model.get_base_model().model.layers[-1].mlp.down_proj.lora_A["default"].weight
            hook = trained.register_hook(break_off)
            with pytest.raises(KeyboardInterrupt):
                loss_and_gradients(model, **batch(seed=seed))
            hook.remove()
            assert len(started) == 2, "the tensors of the last layer, and of the one before it"
        started.clear()
        loss, gradients = loss_and_gradients(model, **batch(seed=9))
        expected, truth = loss_and_gradients(fresh(), **batch(seed=9))
        assert torch.equal(loss, expected) and all(torch.equal(gradients[name], truth[name]) for name in truth)
        gc.collect()
        assert {id(slab) for slab in pool.free} >= slabs and len(pool.free) <= len(slabs) + 1, (
            "autograd holds a layer of a backward that broke off until the next one, no longer"
        )

    def test_memory_of_a_copy_that_nobody_fetched_is_free_behind_it(self):
        """On a GPU the copy writes beside the stream that takes the memory next; here a list stands for that stream."""
        waited, parked = [], offload.Parked({"x": torch.ones(3)}, Slab(256, CPU))
        parked.back = {"x": torch.ones(3)}
        memory, pool = weakref.ref(parked.back["x"]), SlabPool(CPU)
        parked.slab.read = "copied"
        parked.slab.waits = SimpleNamespace(wait_event=lambda event: waited.append((event, memory() is not None)))
        weakref.finalize(parked, offload._give_back, parked.slab, pool)
        del parked
        assert waited == [("copied", True)] and memory() is None and pool.free[0].waits is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands for a device here")
class TestEmbedding:
    @pytest.fixture(autouse=True)
    def a_device(self, monkeypatch):
        """The CPU's own memory stands for what a device sees of it."""
        monkeypatch.setattr(host_memory, "seen_by_device", lambda slab, device: slab.memory)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: isinstance(tensor, torch.nn.Parameter)))

    def in_host_memory(self, family="llama3"):
        model = accelerate(with_lora(tiny_model(family)))
        dial = dial_of(model)
        dial.set_plan([LayerPlan(Mode.KEEP)] * dial.layers, embedding_in_host_memory=True)
        return model

    def test_a_step_is_the_same_and_the_table_comes_back(self):
        truth = loss_and_gradients(with_lora(tiny_model("llama3")), **batch())
        model = self.in_host_memory()
        table = model.get_base_model().get_input_embeddings().weight
        before, values = table.data_ptr(), table.clone()
        loss, gradients = loss_and_gradients(model, **batch())
        assert torch.equal(loss, truth[0]) and difference(gradients, truth[1]) < 2e-5
        there = table.data_ptr()
        assert there != before and torch.equal(table, values) and table is model.get_base_model().model.embed_tokens.weight
        assert set(model.state_dict()) == set(with_lora(tiny_model("llama3")).state_dict())
        loss_and_gradients(model, **batch())
        assert table.data_ptr() == there, "moved once"
        twin = copy.deepcopy(model)
        assert torch.equal(loss_and_gradients(twin, **batch())[0], loss)
        restore(model)
        assert table.data_ptr() != there and torch.equal(table, values)

    def test_one_that_was_moved_meanwhile_is_left_alone(self):
        model = self.in_host_memory()
        loss_and_gradients(model, **batch())
        table = model.get_base_model().get_input_embeddings().weight
        table.data = table.data.clone()
        before = table.data_ptr()
        set_checkpointing(model, False)
        assert table.data_ptr() == before

    def test_only_a_frozen_table_of_rows_leaves_the_device(self):
        model = with_lora(tiny_model("llama3")).get_base_model()
        table = model.get_input_embeddings()
        assert movable(table, tied=False) is table
        assert movable(table, tied=True) is None and movable(None, tied=False) is None
        table.weight.requires_grad_(True)
        assert movable(table, tied=False) is None

    def test_a_tied_table_stays(self):
        model = self.in_host_memory("gemma2")
        table = model.get_base_model().get_input_embeddings().weight
        assert table is model.get_base_model().get_output_embeddings().weight
        before = table.data_ptr()
        loss_and_gradients(model, **batch())
        assert table.data_ptr() == before

    def test_a_trained_table_stays(self):
        model = accelerate(with_lora(tiny_model("llama3"), modules_to_save=["embed_tokens"]))
        dial = dial_of(model)
        dial.set_plan([LayerPlan(Mode.KEEP)] * dial.layers, embedding_in_host_memory=True)
        loss_and_gradients(model, **batch())
        assert dial.host_embedding is None
