"""Checkpoints that appear whole or not at all, and a resume that refuses what it cannot continue from.

A checkpoint is TRL's: adapter or model as safetensors, optimizer, scheduler and random state as tensors (read with
``weights_only``), the trainer's state as JSON. It is written to a hidden sibling and renamed, so a directory with a
checkpoint's name is complete wherever the run was killed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import EarlyStoppingCallback, ExportableState
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from luthier.files import atomic_directory, require_space
from luthier.terminal import say
from luthier.training.collate import is_sharded

NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER, MODEL, MODEL_INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
ARGUMENTS = "training_args.json"
OF_THE_OPTIMIZER = ("optim", "embedding_learning_rate")  # another kind, or other groups of parameters
RESTORED = ("learning_rate", "weight_decay")  # with the state of the optimizer
ORDER = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "packing", "max_length")
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in ``directory``, the earliest first."""
    directory = Path(directory)
    named = [path for path in directory.glob("checkpoint-*") if NAME.fullmatch(path.name)] if directory.is_dir() else []
    return [path for path in sorted(named, key=step_of) if not faults(path)]


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(NAME.fullmatch(checkpoint.name)[1])


def faults(checkpoint: Path) -> list[str]:
    """Why ``checkpoint`` cannot be resumed from; empty if it can."""
    if not checkpoint.is_dir():
        return ["it is not a directory"]
    found = []
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.append(f"it has no {TRAINER_STATE_NAME}")
    except ValueError:  # not JSON, or not text at all
        state = None
    if not found and not (isinstance(state, dict) and {"global_step", "train_batch_size"} <= state.keys()):
        found.append(f"its {TRAINER_STATE_NAME} is damaged")
    found += [f"{file.name} is damaged" for file in sorted(checkpoint.glob("*.pt*")) if not zipfile.is_zipfile(file)]
    weights = [file for file in checkpoint.rglob("*.safetensors") if file.is_file()]
    if not weights:
        pickled = any((checkpoint / name).exists() for name in PICKLES)
        found.append("its weights are pickled, which is never read" if pickled else "it has no weights (*.safetensors)")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            found.append(f"{file.name} is damaged ({error})")
    return found


def find_checkpoint(resume: str | Path | bool, output_dir: str | Path) -> Path:
    """The checkpoint that ``resume`` means: a path, or True for the latest complete one in ``output_dir``.

    Raises ``FileNotFoundError`` for a path that does not exist, ``ValueError`` for one that is not a complete checkpoint;
    both list the checkpoints there are.
    """
    if resume is True:
        complete = list_checkpoints(output_dir)
        if not complete:
            raise ValueError(f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint")
        return complete[-1]
    if not isinstance(resume, str | Path):
        raise TypeError(f"resume_from_checkpoint must be a path, True or False, not {resume!r} of type {type(resume).__name__}")
    path = Path(resume)
    if not path.exists():
        raise FileNotFoundError(f"The checkpoint {path} does not exist. {_there_are(output_dir, path)}")
    reasons = faults(path)
    if reasons:
        raise ValueError(f"{path} is not a checkpoint to resume from: {', '.join(reasons)}. {_there_are(output_dir, path)}")
    return path


def _there_are(*places: str | Path) -> str:
    directories = dict.fromkeys(directory for place in map(Path, places) for directory in (place, place.parent))
    found = [str(checkpoint) for directory in directories for checkpoint in list_checkpoints(directory)]
    if found:
        return f"Checkpoints there are: {', '.join(dict.fromkeys(found))}"
    return f"There is none in {places[0]} either; start without resume_from_checkpoint."


def require_fit(checkpoint: Path, model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if ``checkpoint`` holds other weights than ``model`` trains: names and shapes are compared."""
    if not isinstance(model, PeftModel):
        if not (checkpoint / MODEL).exists() and not (checkpoint / MODEL_INDEX).exists():
            raise ValueError(f"{checkpoint} holds an adapter, but the model has none: call get_peft_model before training")
        return
    if not (checkpoint / ADAPTER).exists():
        if list(checkpoint.glob(f"*/{ADAPTER}")):
            return  # several adapters, each in its own directory: peft loads them by name
        raise ValueError(f"{checkpoint} holds a whole model, but this run trains an adapter")
    expected = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    with safe_open(checkpoint / ADAPTER, framework="pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
    different = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"The adapter in {checkpoint} is not the one this run trains: {len(different)} tensors differ, such as {name} "
            f"(checkpoint {saved.get(name, 'has none')}, model {expected.get(name, 'has none')}). Use the r, target_modules "
            "and modules_to_save of the run that wrote it."
        )


def require_same_run(checkpoint: Path, args: TrainingArguments) -> None:
    """Raise ``ValueError`` if the optimizer of ``checkpoint`` is missing or another one; warn of settings that the resumed
    run does not get as it asks for them: transformers says nothing of either."""
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).exists()]
    if missing and not is_sharded():
        raise ValueError(
            f"{checkpoint} has no {' and no '.join(missing)}, so a resumed run would begin its optimizer anew. To go on from "
            "its weights, load it as the model of a new run."
        )
    if not (checkpoint / ARGUMENTS).exists():
        return
    before, now = json.loads((checkpoint / ARGUMENTS).read_text(encoding="utf-8")), json.loads(args.to_json_string())
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    for name in changed & set(OF_THE_OPTIMIZER):
        raise ValueError(
            f"The run in {checkpoint} had {name}={before[name]!r}, and this one has {now[name]!r}: its optimizer cannot go on. "
            "Resume with the same, or load the checkpoint as the model of a new run."
        )
    for names, why in ((RESTORED, "the checkpoint's stands"), (ORDER, "other rows follow than in the uninterrupted run")):
        differing = [f"{name}={before[name]!r} in {checkpoint.name}, {now[name]!r} here" for name in names if name in changed]
        if differing:
            warnings.warn(f"Resuming with other settings ({why}): {'; '.join(differing)}.", UserWarning, stacklevel=3)


class RunningTotals(TrainerCallback, ExportableState):
    """What a trainer has added up since its last log, and the tokens it has seen, through a checkpoint and back.

    transformers and TRL begin again at zero, so that the first log of a resumed run is not that of the uninterrupted one.
    With several processes each has sums of its own, and only one writes the checkpoint: there they do begin again.
    """

    NUMBERS = ("_globalstep_last_logged", "_total_loss_scalar", "_total_train_tokens")

    def __init__(self, trainer: CheckpointMixin) -> None:
        self.trainer = trainer
        self.saved: dict | None = None  # read from a checkpoint, and not yet put back

    def state(self) -> dict:
        trainer = self.trainer
        if "_tr_loss" not in vars(trainer) or trainer.args.world_size > 1:
            return {"args": {}, "attributes": {"saved": None}}
        saved = {name: getattr(trainer, name) for name in self.NUMBERS if name in vars(trainer)}
        sums = {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()}
        return {"args": {}, "attributes": {"saved": {**saved, "loss": trainer._tr_loss.item(), "metrics": sums}}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        saved, self.saved = self.saved, None
        if saved is None:
            return
        trainer = self.trainer
        trainer._tr_loss += saved.pop("loss")
        trainer._metrics["train"].update(saved.pop("metrics"))
        for name, value in saved.items():
            setattr(trainer, name, value)
        trainer._initial_global_step = 0  # transformers 5.24 divides by the steps since this one, and the sums are of all


class CheckpointMixin:
    """Overrides of transformers' ``Trainer``: atomic checkpoints, checked resume. Put it before a trainer class."""

    _staging: Path | None = None  # while a checkpoint is being written: where

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs):
        """As transformers'; ``resume_from_checkpoint`` is a directory, or True for the latest checkpoint in output_dir."""
        if self.args.should_save:
            for leftover in Path(self.args.output_dir).glob(".checkpoint-*.tmp"):  # of a run killed while it saved
                shutil.rmtree(leftover)
        if resume_from_checkpoint not in (None, False):
            checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
            require_fit(checkpoint, self.accelerator.unwrap_model(self.model))
            require_same_run(checkpoint, self.args)
            if self.is_world_process_zero():
                say(f"Resuming from {checkpoint}")
            resume_from_checkpoint = str(checkpoint)
        elif self.args.save_strategy != SaveStrategy.NO and (found := list_checkpoints(self.args.output_dir)):
            warnings.warn(
                f"{self.args.output_dir} already holds {', '.join(path.name for path in found)} of another run: a later resume "
                "could take one of them. Choose another output_dir, delete them, or give resume_from_checkpoint=True "
                "(of a recipe: --resume).",
                UserWarning,
                stacklevel=2,
            )
        result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if not self.state.global_step:
            raise ValueError(
                "Nothing was trained: the dataset gave no batch. A stream has no row that is short enough and trains, or there "
                "are fewer rows than a batch and dataloader_drop_last=True."
            )
        return result

    def _save_checkpoint(self, model: PreTrainedModel, trial: object) -> None:
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best == final or best.is_dir() else None
        best_checkpoint = self.state.best_model_checkpoint
        with self._staged(final) as staging:
            super()._save_checkpoint(model, trial)  # into staging/checkpoint-N, as _get_output_dir says
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = best_checkpoint  # TRL recorded where it is being written
            if self.args.should_save:
                for file in (staging / final.name).iterdir():
                    file.rename(staging / file.name)
                (staging / final.name).rmdir()
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(str(final.parent), self.args.save_total_limit, best_checkpoint, use_mtime=True)

    @contextmanager
    def _staged(self, final: Path) -> Iterator[Path]:
        """The hidden directory that all processes write to, and that the one that saves makes into ``final``."""
        own = self._written(final) if self.args.should_save else nullcontext()
        try:
            with own as staging:
                self._staging = Path(broadcast_object_list([str(staging)])[0])
                yield self._staging
        finally:
            self._staging = None

    @contextmanager
    def _written(self, final: Path) -> Iterator[Path]:
        """``atomic_directory``, with a full disk seen before it happens, or named where torch says "unexpected pos"."""
        needed = checkpoint_bytes(self.accelerator.unwrap_model(self.model), self.optimizer)
        require_space(final.parent, needed)
        with atomic_directory(final) as staging:
            try:
                yield staging
            except (RuntimeError, SafetensorError) as error:
                if shutil.disk_usage(staging).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise

    def _get_output_dir(self, trial: object) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # what is still being written is pushed once it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As transformers', with the arguments as JSON: no pickle is written beside the weights."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # transformers 5.24 calls this in every process
            return
        directory = Path(output_dir or self.args.output_dir)
        (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (directory / ARGUMENTS).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial):
        """As transformers', but this run's own intervals stand, and a run that had ended stays ended.

        transformers would train one step more. Gives (epochs done, batches done in the current one).
        """
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # transformers fails to save one that the checkpoint did not have
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if resume_from_checkpoint and (self.state.global_step >= max_steps or self._had_stopped_early()):
            say(f"The run had ended at step {self.state.global_step}: nothing is left to train.")
            return num_train_epochs, 0
        return progress

    def _had_stopped_early(self) -> bool:
        stops = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
        return any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops)

    def _load_callback_state(self) -> None:
        """Give callbacks back what they had counted (early stopping), not their settings: those are this run's."""
        for callback in self.callback_handler.callbacks:
            saved = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel) or is_sharded():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_whole(model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """As transformers', which leaves an adapter frozen: what trained stays trainable."""
        if not isinstance(self.model, PeftModel) and not is_sharded():
            load_whole(self.model, Path(self.state.best_model_checkpoint))
            return
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        super()._load_best_model()
        for parameter in trained:
            parameter.requires_grad_(True)


def load_whole(model: PreTrainedModel, checkpoint: Path) -> None:
    """Fill ``model`` with the weights of ``checkpoint``; ``ValueError`` if their names or shapes differ.

    Through ``from_pretrained``, which knows that some models are saved under other names than they have in memory (the
    experts of a mixture). transformers' trainer matches names as they are, and trains on with what did not match.
    """
    saved, info = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
    saved, own = saved.state_dict(), model.state_dict()
    different = [
        name
        for name in own.keys() | saved.keys()
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    ]
    different += [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if different:
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit the model: {len(different)} tensors differ, such as "
            f"{min(map(str, different))}. Resume with the base model and the settings of the run that wrote it."
        )
    model.load_state_dict(saved)


def checkpoint_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """About how many bytes a checkpoint takes: the weights that are saved and the optimizer's state."""
    weights = model.parameters() if not isinstance(model, PeftModel) else get_peft_model_state_dict(model).values()
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*weights, *state])
