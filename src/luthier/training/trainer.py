"""``luthier.Trainer``: TRL's SFTTrainer with right defaults, a data ledger, and checkpoints that can be trusted."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from luthier.data.ledger import Ledger
from luthier.errors import unknown
from luthier.model.cpu_4bit import repair_cpu_4bit
from luthier.terminal import notice_once
from luthier.training.arguments import TrainingArguments, fit_arguments, warn_contradictions
from luthier.training.collate import pack_rows, settle_padding
from luthier.training.common import (
    TrainerMixin,
    one_tokenizer,
    require_model,
    require_trainable,
    trainable_weights_kept,
)
from luthier.training.head import own_head
from luthier.training.inputs import (
    as_dataset,
    as_text,
    each,
    prepare_rows,
    prepare_stream,
    require_known_tokens,
    takes_raw_rows,
)


class Trainer(TrainerMixin, SFTTrainer):
    """Supervised fine-tuning of a loaded model. Everything of TRL's ``SFTTrainer``, and:

    * ``train_dataset`` may be chat data in any known format, prompt/completion, ``text``, or ``input_ids`` with ``labels``.
      Of chat data only the assistant's answers train (``args.train_on``). ``trainer.ledger`` counts what became of the rows.
    * The loss of accumulated batches, packed rows and padding-free batches is the loss of the one big padded batch.
    * ``eval_loss`` is the mean over all evaluated tokens, whatever the batches.
    * A setting of ``TrainingArguments`` may be given directly: ``Trainer(model, tokenizer=tokenizer, packing=True, ...)``.

    Raises ``TypeError``, ``ValueError`` or ``UnsupportedError`` before any work for what cannot train or would train wrong.
    """

    _tag_names = ["luthier", "trl", "sft"]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: transformers.TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | list[dict] | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | list[dict] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **trl_arguments: Any,
    ) -> None:
        # 1. What was given
        require_model(model)
        processing_class = one_tokenizer(processing_class, tokenizer)
        if not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
            raise TypeError(f"processing_class must be the model's tokenizer or processor, not {processing_class!r}")
        settings = {name: trl_arguments.pop(name) for name in list(trl_arguments) if name in _setting_names()}
        _refuse_unknown(trl_arguments)
        args = _arguments(args, settings, model)

        # 2. The rows
        raw = takes_raw_rows(data_collator)
        if raw:
            args.remove_unused_columns = False
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        checked = partial(as_dataset, raw=True) if raw else as_text
        train_dataset = checked(train_dataset, "train_dataset")
        eval_dataset = each(eval_dataset, "eval_dataset", checked)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset: give one, or leave it out")
        self.ledger: Ledger | None = None  # None for a stream and for images, which are prepared as they come
        self.max_length = args.max_length or getattr(getattr(model, "luthier", None), "max_seq_length", None)
        self.known_tokens = model.config.get_text_config().vocab_size

        # 3. How they go into batches
        require_trainable(model, trl_arguments.get("peft_config"))
        repair_cpu_4bit(model)
        settle_padding(args, model, has_collator=data_collator is not None)
        if trl_arguments.get("compute_metrics") and args.eval_packing is None:
            args.eval_packing = False  # so that predictions come row by row
        args.max_length = self.max_length if args.packing else None  # rows are measured before TRL sees them

        # 4. TRL's trainer
        with trainable_weights_kept(model), own_head(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **trl_arguments,
            )
        self.args.max_length = self.max_length
        self.model_accepts_loss_kwargs = True  # TRL's compute_loss divides by the tokens of the whole accumulated batch
        self.finish_setup()

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Rows of input_ids and labels, measured and counted; packed last, so that a packer never cuts one."""
        if isinstance(dataset, IterableDataset):
            return self._prepare_stream(dataset, processing_class, args, packing, formatting_func, dataset_name)
        rows, ledger = prepare_rows(dataset, processing_class, args, self.max_length, formatting_func)
        require_known_tokens(rows, self.known_tokens)
        if dataset_name == "train":
            self.ledger = ledger
        if args.should_log:
            ledger.table(f"Data: {dataset_name}")
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        return pack_rows(rows, args, self.max_length) if packing else rows

    def _prepare_stream(self, stream, processing_class, args, packing, formatting_func, dataset_name):
        unmeasured = copy.copy(args)
        unmeasured.max_length = None

        def by_trl(rows):
            return super(Trainer, self)._prepare_dataset(
                rows, processing_class, unmeasured, False, formatting_func, dataset_name
            )

        rows = prepare_stream(stream, processing_class, args, self.max_length, formatting_func, by_trl)
        return pack_rows(rows, args, self.max_length) if packing else rows

    def _get_grad_norm(self, *args, **kwargs) -> torch.Tensor | float:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm == 0:
            notice_once(
                self,
                "no gradient",
                f"Step {self.state.global_step + 1}: every gradient is zero, so nothing is learned. The weights have diverged "
                "(lower learning_rate), or what trains does not reach the loss.",
            )
        return norm

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As TRL's, padded where ``compute_metrics`` reads the logits, so that they come row by row."""
        flat = self.data_collator
        is_flat = isinstance(flat, DataCollatorForLanguageModeling) and flat.padding_free
        if self.compute_metrics is None or not is_flat or self.args.eval_packing:
            return super().get_eval_dataloader(eval_dataset)
        self.data_collator = dataclasses.replace(flat, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = flat

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if "labels" in inputs:
            tokens = int((inputs["labels"][..., 1:] != -100).sum())
            self._evaluated += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As transformers', whose loss is a mean of batch means: here every token counts the same."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # the sum of the losses of all tokens, their number
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.world_size > 1:
            self._evaluated = self.accelerator.reduce(self._evaluated.to(self.args.device), reduction="sum")
        loss, tokens = self._evaluated.tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output


def _setting_names() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainingArguments)} | {"max_seq_length"}


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    known = {
        "callbacks", "compute_loss_func", "compute_metrics", "formatting_func", "optimizers", "optimizer_cls_and_kwargs",
        "peft_config", "preprocess_logits_for_metrics", "quantization_config",
    }  # fmt: skip
    for name in arguments:
        if name not in known:
            raise TypeError(str(unknown("argument of Trainer:", name, known | _setting_names())))


def _arguments(args: Any, settings: dict[str, Any], model: nn.Module) -> TrainingArguments:
    """A copy of the arguments that this run goes by; the user's own object stays as it is."""
    if "max_seq_length" in settings:
        settings["max_length"] = settings.pop("max_seq_length")
    if args is None:
        return fit_arguments(TrainingArguments(**settings), model)
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(f"args must be luthier.TrainingArguments or trl.SFTConfig, not {type(args).__name__}")
    if not isinstance(args, TrainingArguments):
        theirs = {field.name for field in dataclasses.fields(args)} & settings.keys()
        args = dataclasses.replace(args, **{name: settings.pop(name) for name in theirs})
        args = TrainingArguments.from_trl(warn_contradictions(args, model))
    if settings:
        automatic = args.precision_is_automatic and not {"bf16", "fp16"} & settings.keys()
        args = dataclasses.replace(args, **settings)
        args.precision_is_automatic = automatic
    return fit_arguments(args, model)
