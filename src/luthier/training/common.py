"""What every Luthier trainer adds to TRL's, whichever the algorithm.

``class Trainer(TrainerMixin, SFTTrainer)``; the mixin stands first. Inside ``__init__``:

    args = fit_arguments(args, model)            # luthier.training.arguments
    with trainable_weights_kept(model):
        super().__init__(model=model, args=args, ...)
    self.finish_setup()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import EarlyStoppingCallback

from luthier.training.checkpoints import CheckpointMixin, RunningTotals, list_checkpoints
from luthier.training.inputs import AnyTokenizer
from luthier.training.optimizer import require_embeddings, set_embedding_learning_rate
from luthier.training.progress import ProgressCallback, show_progress

NAMELESS = "[None](https://huggingface.co/None)"  # what TRL's model card makes of a base in a local directory


def require_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a loaded model (FastLanguageModel.from_pretrained), not {model!r}")


def require_trainable(model: nn.Module, peft_config: object) -> None:
    """``peft_config``: of the adapter that the trainer attaches, if it does."""
    if peft_config is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("No parameter of the model trains: call get_peft_model, or load it with full_finetuning=True")


def one_tokenizer(processing_class: AnyTokenizer | None, tokenizer: AnyTokenizer | None) -> AnyTokenizer | None:
    """What was given under one of these names."""
    if tokenizer is not None and processing_class is not None:
        raise TypeError("processing_class and tokenizer are two names of one argument: give one")
    return tokenizer if processing_class is None else processing_class


@contextmanager
def trainable_weights_kept(model: nn.Module) -> Iterator[None]:
    """Undo what TRL's constructors do to a quantised model: cast every trainable weight to bf16.

    An optimizer's steps are often smaller than bf16 can represent. The original tensors are put back, not upcast, so that
    an adapter that was trained before loses nothing either; one that the constructor made itself becomes float32.
    """
    before = {id(parameter): parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            original = before.get(id(parameter))
            parameter.data = parameter.data.float() if original is None else original


class TrainerMixin(CheckpointMixin):
    """Embedding learning rate, progress, early stopping, checkpoints, and a stop at the first loss that is not finite."""

    progress: ProgressCallback

    def finish_setup(self) -> None:
        """Last line of a trainer's ``__init__``."""
        self.progress = show_progress(self)
        self.add_callback(RunningTotals(self))
        if self.args.embedding_learning_rate is not None:
            if self.optimizer is not None:
                raise ValueError("Give embedding_learning_rate or an optimizer of your own, not both")
            require_embeddings(self.model, self.args.embedding_learning_rate)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.progress.close()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.embedding_learning_rate is not None:
            set_embedding_learning_rate(optimizer, self.model, self.args.embedding_learning_rate)
        return optimizer

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite("loss", loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        scales_loss = self.accelerator.scaler is not None  # fp16: infinite gradients are expected, the scaler skips the step
        if not scales_loss and not torch.isfinite(torch.as_tensor(grad_norm)):
            raise FloatingPointError(self._not_finite("norm of the gradients", grad_norm))
        return grad_norm

    def _not_finite(self, what: str, value: torch.Tensor | float) -> str:
        saved = list_checkpoints(self.args.output_dir)
        advice = f"Resume from {saved[-1]}" if saved else "Start again"
        return (
            f"Step {self.state.global_step + 1}: the {what} is {float(value)}; the run was stopped before these weights were "
            f"changed. {advice} with a lower learning_rate (it is {self.args.learning_rate}), and look at the rows with "
            "`luthier inspect`."
        )

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's, with the directory of a local base in its text; its metadata can only name one of the Hub."""
        super().create_model_card(*args, **kwargs)
        card, base = Path(self.args.output_dir) / "README.md", self.model.config._name_or_path
        if base and self.is_world_process_zero():
            card.write_text(card.read_text(encoding="utf-8").replace(NAMELESS, f"`{base}`"), encoding="utf-8")

    def _send_telemetry(self) -> None:
        """Luthier sends none; TRL would."""
