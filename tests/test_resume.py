"""Checkpoints: complete or absent, whatever happens while they are written; a resumed run is the uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import losses, nf4_model, token_rows, trainer, with_lora
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from torch.testing import assert_close
from transformers import TrainerCallback

from luthier.training.checkpoints import faults, find_checkpoint, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAVING = {"save_strategy": "steps", "save_steps": 1}


class Interrupted(Exception):
    """Stands for a machine that goes away."""


class InterruptAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


def trained(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def logged(run) -> list[dict]:
    """The log without what depends on the clock."""
    clock = ("runtime", "per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(clock)} for entry in run.state.log_history]


def loras(**changes):
    return with_lora(tiny_model("llama3"), **changes)


# --- resuming --------------------------------------------------------------------------------------------------------

RUNS = {
    "lora with dropout": (lambda base: loras(lora_dropout=0.1), {}),
    "stopped between two logs": (lambda base: loras(), {"logging_steps": 2}),
    "nf4": (lambda base: with_lora(nf4_model(base)), {"optim": "adamw_8bit"}),
    "full": (lambda base: tiny_model("qwen3"), {}),  # tied head
    "full, experts saved under other names": (lambda base: tiny_model("mixtral"), {}),
    "packed, accumulated, embeddings whole": (
        lambda base: loras(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        {"packing": True, "max_length": 48, "gradient_accumulation_steps": 2, "embedding_learning_rate": 1e-3},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Bit for bit, all that is logged and all that is trained; stopped in the middle of an epoch, and over the end of one."""
    build, changes = RUNS[name]
    base = save_tiny("llama3", tmp_path / "base")
    rows = token_rows(10)
    changes = {"max_steps": 7, "lr_scheduler_type": "cosine", "warmup_steps": 2, **SAVING, **changes}
    whole = trainer(build(base), tmp_path / "whole", rows, **changes)
    whole.train()

    broken = trainer(build(base), tmp_path / "broken", rows, callbacks=[InterruptAfter(3)], **changes)
    with pytest.raises(Interrupted):
        broken.train()
    resumed = trainer(build(base), tmp_path / "broken", rows, **changes)
    resumed.train(resume_from_checkpoint=True)

    assert logged(resumed) == logged(whole) and len(losses(whole)) == 7 // changes.get("logging_steps", 1)
    for parameter, tensor in trained(whole).items():
        assert torch.equal(tensor, trained(resumed)[parameter]), parameter
    final = [load_file(next((tmp_path / name / "checkpoint-7").glob("*.safetensors"))) for name in ("whole", "broken")]
    assert final[0].keys() == final[1].keys() and all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_the_best_checkpoint_of_a_whole_model_is_given_back(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 4, **SAVING}
    run = trainer(tiny_model("mixtral"), tmp_path, eval_dataset=token_rows(4, seed=9), learning_rate=0.05, **changes)
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(evaluations) != evaluations[-1] and run.evaluate()["eval_loss"] == min(evaluations)


def test_early_stopping_goes_on_counting(tmp_path):
    """Stopped one bad evaluation before the end, and resumed, a run ends where it would have ended."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 30, "learning_rate": 0.5, **SAVING}
    changes |= {"early_stopping_patience": 3}
    whole = trainer(loras(), tmp_path / "whole", eval_dataset=token_rows(4, seed=9), **changes)
    whole.train()
    last = whole.state.global_step
    broken = trainer(
        loras(), tmp_path / "broken", eval_dataset=token_rows(4, seed=9), callbacks=[InterruptAfter(last - 1)], **changes
    )
    with pytest.raises(Interrupted):
        broken.train()
    resumed = trainer(loras(), tmp_path / "broken", eval_dataset=token_rows(4, seed=9), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{last - 1}"))
    assert resumed.state.global_step == last < 30
    assert Path(resumed.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]

    again = trainer(loras(), tmp_path / "whole", eval_dataset=token_rows(4, seed=9), **changes)
    assert again.train(resume_from_checkpoint=True).global_step == last  # it had stopped, and stays so
    assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_a_resumed_run_goes_by_its_own_intervals(tmp_path):
    trainer(loras(), tmp_path, max_steps=2, **SAVING).train()
    resumed = trainer(loras(), tmp_path, max_steps=6, save_strategy="steps", save_steps=2, logging_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (1, 2, 4, 6)]


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    run = trainer(loras(), tmp_path, max_steps=2, **SAVING)
    run.train()
    again = trainer(loras(), tmp_path, max_steps=2)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(run).items())


def test_early_stopping_may_be_added_when_resuming(tmp_path):
    trainer(loras(), tmp_path, max_steps=1, **SAVING).train()
    changes = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, **SAVING}
    run = trainer(loras(), tmp_path, max_steps=3, eval_dataset=token_rows(4, seed=9), **changes)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3 and len(list_checkpoints(tmp_path)) == 3


def test_a_second_run_in_a_directory_of_checkpoints_says_so(tmp_path):
    trainer(loras(), tmp_path, max_steps=2, **SAVING).train()
    with pytest.warns(UserWarning, match="already holds checkpoint-1, checkpoint-2 of another run"):
        trainer(loras(), tmp_path, max_steps=1, **SAVING).train()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output directory of a run of two steps; tests work on copies of it."""
    directory = tmp_path_factory.mktemp("finished")
    trainer(loras(), directory, max_steps=2, **SAVING).train()
    return directory


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "output"))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "it has no trainer_state.json": lambda c: (c / "trainer_state.json").unlink(),
    "its trainer_state.json is damaged": lambda c: truncate(c / "trainer_state.json"),
    "its trainer_state.json is damage": lambda c: (c / "trainer_state.json").write_text("{}"),
    "optimizer.pt is damaged": lambda c: truncate(c / "optimizer.pt"),
    "rng_state.pth is damaged": lambda c: (c / "rng_state.pth").write_bytes(b""),
    "it has no weights": lambda c: (c / "adapter_model.safetensors").unlink(),
    "adapter_model.safetensors is damaged": lambda c: truncate(c / "adapter_model.safetensors"),
    "its weights are pickled, which is never read": lambda c: (c / "adapter_model.safetensors").rename(c / "adapter_model.bin"),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_passed_over(reason, output):
    DAMAGE[reason](output / "checkpoint-2")
    assert any(reason in fault for fault in faults(output / "checkpoint-2"))
    run = trainer(loras(), output, max_steps=3)
    with pytest.raises(ValueError, match=f"checkpoint-2 is not a checkpoint to resume from: .*{reason}") as error:
        run.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert f"Checkpoints there are: {output / 'checkpoint-1'}" in str(error.value)
    assert find_checkpoint(True, output) == output / "checkpoint-1"


def test_what_is_no_checkpoint_is_refused_with_a_list_of_those_there_are(output, tmp_path):
    run = trainer(loras(), output, max_steps=3)
    both = f"{output / 'checkpoint-1'}, {output / 'checkpoint-2'}"
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        run.train(resume_from_checkpoint=output / "checkpoint-9")
    assert both in str(error.value)
    for wrong in (output, tmp_path, output / "README.md"):
        with pytest.raises(ValueError, match="is not a checkpoint to resume from") as error:
            run.train(resume_from_checkpoint=str(wrong))
        assert both in str(error.value)
    with pytest.raises(ValueError, match="is not a checkpoint to resume from"):
        run.train(resume_from_checkpoint="")
    with pytest.raises(TypeError, match="must be a path"):
        run.train(resume_from_checkpoint=2)
    empty = trainer(loras(), tmp_path / "empty", max_steps=3)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        empty.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_adapter_is_refused(output):
    for changes, tensor in (({"r": 8}, r"\[4, \d+\]"), ({"target_modules": ["q_proj"]}, "has none")):
        run = trainer(loras(**changes), output, max_steps=3)
        before = trained(run)
        with pytest.raises(ValueError, match=f"is not the one this run trains: .*{tensor}"):
            run.train(resume_from_checkpoint=True)
        assert all(torch.equal(before[name], tensor) for name, tensor in trained(run).items())
    with pytest.raises(ValueError, match="holds an adapter, but the model has none"):
        trainer(tiny_model("llama3"), output, max_steps=3).train(resume_from_checkpoint=True)
    whole = output / "whole"
    trainer(tiny_model("llama3"), whole, max_steps=1, **SAVING).train()
    with pytest.raises(ValueError, match="holds a whole model, but this run trains an adapter"):
        trainer(loras(), output).train(resume_from_checkpoint=whole / "checkpoint-1")
    with pytest.raises(ValueError, match="does not fit the model: [0-9]+ tensors differ"):
        trainer(tiny_model("qwen3"), output).train(resume_from_checkpoint=whole / "checkpoint-1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_the_optimizer_is_refused(name, output):
    (output / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}, so a resumed run would begin its optimizer anew"):
        trainer(loras(), output, max_steps=3).train(resume_from_checkpoint=True)


def test_another_optimizer_is_refused_and_settings_that_do_not_count_are_named(output):
    with pytest.raises(ValueError, match="had optim='adamw_torch.*', and this one has 'sgd'"):
        trainer(loras(), output, max_steps=3, optim="sgd").train(resume_from_checkpoint=True)
    run = trainer(loras(), output, max_steps=3, learning_rate=0.5, per_device_train_batch_size=4)
    with pytest.warns(UserWarning) as warned:
        run.train(resume_from_checkpoint=True)
    said = " ".join(str(warning.message) for warning in warned)
    assert "the checkpoint's stands): learning_rate=0.01 in checkpoint-2, 0.5 here" in said
    assert "other rows follow than in the uninterrupted run): per_device_train_batch_size=2 in checkpoint-2, 4 here" in said
    assert run.state.log_history[-2]["learning_rate"] == 0.01


# --- being stopped while a checkpoint is written ---------------------------------------------------------------------


def fail_at(monkeypatch, name: str, error: BaseException | None) -> None:
    """Writing the file ``name`` of the second checkpoint fails, or kills the process, half way."""
    real = torch.save

    def save(what, path, *args, **kwargs):
        real(what, path, *args, **kwargs)
        if Path(path).name == name and "checkpoint-2" in str(path):
            truncate(Path(path))
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_full_disk_leaves_no_half_checkpoint(name, tmp_path, monkeypatch):
    fail_at(monkeypatch, name, OSError(errno.ENOSPC, "No space left on device"))
    run = trainer(loras(), tmp_path, max_steps=3, **SAVING)
    with pytest.raises(OSError, match="checkpoint-2: the disk is full: free some space"):
        run.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "README.md"}


def test_a_full_disk_that_torch_does_not_name(tmp_path, monkeypatch):
    """What torch.save says on a full disk: "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"."""
    fail_at(monkeypatch, "optimizer.pt", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"))
    run = trainer(loras(), tmp_path, max_steps=3, **SAVING)
    with pytest.raises(RuntimeError, match="unexpected pos"):  # the disk is not full: it is something else
        run.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "README.md"}
    free = iter([10**9, 10**9, 100])  # at the first checkpoint, before the second, and after it failed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, next(free)))
    with pytest.raises(OSError, match="checkpoint-2: the disk is full: free some space"):
        trainer(loras(), tmp_path, max_steps=3, **SAVING).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "README.md"}


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="needs 0.00 GB but only 0.00 GB are free"):
        trainer(loras(), tmp_path, max_steps=1, **SAVING).train()
    assert list_checkpoints(tmp_path) == []


def start(work) -> int:
    """Run ``work`` in a copy of this process; gives its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, the copy does not go on with the tests
            os._exit(1)
    return child


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_kill_9_while_saving_then_resume_equals_the_uninterrupted_run(name, tmp_path, monkeypatch):
    whole = trainer(loras(), tmp_path / "whole", max_steps=4, **SAVING)
    whole.train()

    def be_killed():
        fail_at(monkeypatch, name, None)
        trainer(loras(), tmp_path / "killed", max_steps=4, **SAVING).train()

    assert os.WTERMSIG(os.waitpid(start(be_killed), 0)[1]) == signal.SIGKILL
    assert list((tmp_path / "killed").glob(".checkpoint-2.*.tmp"))
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-1"]

    resumed = trainer(loras(), tmp_path / "killed", max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(tensor, trained(resumed)[key]) for key, tensor in trained(whole).items())
    assert not list((tmp_path / "killed").glob(".*"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_one_and_write_one_checkpoint(tmp_path):
    """Data parallel over gloo, a row each, against one process with both rows."""
    changes = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    alone = trainer(loras(), tmp_path / "alone", **changes)
    alone.train()
    port = free_port()

    def train_as(rank: int):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer(loras(), tmp_path / "both", **changes | {"per_device_train_batch_size": 1})
        run.train()
        if rank == 0:
            (tmp_path / "losses.json").write_text(json.dumps(losses(run)))
        torch.distributed.destroy_process_group()

    children = [start(partial(train_as, rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert_close(json.loads((tmp_path / "losses.json").read_text()), losses(alone))
    checkpoint = tmp_path / "both" / "checkpoint-3"
    assert faults(checkpoint) == [] and not list((tmp_path / "both").glob(".*"))
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    one, two = (load_file(tmp_path / name / "checkpoint-3" / "adapter_model.safetensors") for name in ("alone", "both"))
    for name, tensor in one.items():
        assert_close(tensor, two[name])


def test_what_a_checkpoint_holds(output):
    """Nothing pickled but what torch reads with weights_only; the best checkpoint under its own name."""
    checkpoint = output / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert "training_args.bin" not in names and json.loads((checkpoint / "training_args.json").read_text())["max_steps"] == 2
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)


def test_old_checkpoints_go_but_not_the_best(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1, **SAVING}
    run = trainer(loras(), tmp_path, eval_dataset=token_rows(4, seed=9), learning_rate=0.5, max_steps=5, **changes)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best in list_checkpoints(tmp_path) and len(list_checkpoints(tmp_path)) <= 2
    state = json.loads((list_checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best) and not list(tmp_path.glob(".*"))
