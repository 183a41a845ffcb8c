"""The progress of a training run: a live bar on a terminal, one line per log elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

import psutil
import torch
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback
from transformers.trainer_utils import has_length

from luthier.model.accelerate import state_of
from luthier.model.clock import Clock
from luthier.terminal import console, say


class ProgressCallback(TrainerCallback):
    """Shows loss, tokens per second, memory and the time left; evaluations too."""

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain
        self.bar: Progress | None = None
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None
        self.started = self.last_log = time.monotonic()
        self.first_step = 0
        self.tokens = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.started = self.last_log = time.monotonic()
        self.first_step = state.global_step
        self.tokens = max(self.tokens, state.num_input_tokens_seen)  # a second run of one trainer counts on
        clock = _clock(kwargs["model"])
        if clock is not None:
            clock.waits_for_trainer = True
        self._start(state)
        if self.bar:
            self.training = self.bar.add_task("Training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        clock = _clock(kwargs["model"])
        if clock is not None:
            clock.step_ends(args.device)
        if self.bar:
            self.bar.update(self.training, completed=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader: DataLoader | None = None, **kwargs) -> None:
        self._start(state)
        if self.bar:
            if self.evaluation is None:
                self.evaluation = self.bar.add_task("Evaluating", total=_length(eval_dataloader), note="")
            self.bar.advance(self.evaluation)

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        note = " · ".join(self._facts(state, logs))
        if self.bar:
            self.bar.update(self.training, note=note)
        else:
            say(f"step {state.global_step}/{state.max_steps} · {note}")

    def on_evaluate(self, args, state, control, metrics: dict[str, float] | None = None, **kwargs) -> None:
        if state.is_world_process_zero and metrics:
            speed = ("_runtime", "_per_second", "_num_tokens", "_entropy")
            shown = {name: value for name, value in metrics.items() if isinstance(value, float) and not name.endswith(speed)}
            parts = [f"{name} {value:.4g}" for name, value in shown.items() if name.startswith("eval_")]
            self._print(f"step {state.global_step}/{state.max_steps} · {' · '.join(parts)}")
        self._end_evaluation()

    def on_predict(self, args, state, control, **kwargs) -> None:
        self._end_evaluation()

    def on_train_end(self, args, state: TrainerState, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also called when training ends with an error."""
        if self.bar:
            self.bar.stop()
        self.bar = self.training = self.evaluation = None

    def _start(self, state: TrainerState) -> None:
        if self.bar or self.plain or not state.is_world_process_zero or not console().is_interactive:
            return
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")]
        self.bar = Progress(*columns, console=console())
        self.bar.start()

    def _end_evaluation(self) -> None:
        if self.bar and self.evaluation is not None:
            self.bar.remove_task(self.evaluation)
        self.evaluation = None
        if self.training is None:
            self.close()

    def _print(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, markup=False)
        else:
            say(line)

    def _facts(self, state: TrainerState, logs: dict[str, float]) -> list[str]:
        now = time.monotonic()
        # the reward is None where no function applied to any completion
        facts = [f"{name} {logs[name]:.4f}" for name in ("loss", "reward") if logs.get(name) is not None]
        if "num_tokens" in logs:
            facts.append(f"{(logs['num_tokens'] - self.tokens) / (now - self.last_log):,.0f} tokens/s")
            self.tokens = logs["num_tokens"]
        self.last_log = now
        facts.append(f"{memory_in_use() / 2**30:.1f} GiB")
        done = state.global_step - self.first_step
        left = (state.max_steps - state.global_step) * (now - self.started) / max(done, 1)
        facts.append(f"{timedelta(seconds=round(left))} left")
        return facts


def _clock(model: nn.Module) -> Clock | None:
    state = state_of(model) if isinstance(model, PreTrainedModel | PeftModel) else None
    return None if state is None else state.clock


def _length(loader: DataLoader) -> int | None:
    return len(loader) if has_length(loader) else None


def memory_in_use() -> int:
    """Bytes: the most that this process has held on the GPU, or what it holds in RAM where there is none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def show_progress(trainer: Trainer) -> ProgressCallback:
    """Give ``trainer`` our progress instead of transformers' bar or dictionaries; ``disable_tqdm`` means plain lines."""
    ours = ProgressCallback(plain=trainer.args.disable_tqdm)
    replaced = [trainer.pop_callback(callback) for callback in (TqdmCallback, PrinterCallback)]
    if any(replaced):  # a notebook has another one, which stays
        trainer.add_callback(ours)
    return ours
