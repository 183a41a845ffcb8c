"""The arguments of a training run: TRL's, with our defaults, our additions, and every value checked before work begins."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from luthier.data.prepare import TOO_LONG_POLICIES, TRAIN_ON
from luthier.errors import missing_extra, unknown
from luthier.files import require_writable
from luthier.model.precision import is_bfloat16_supported

# field: (type, what is allowed in words, test); None is allowed where it is the field's default
NUMBERS: dict[str, tuple[type, str, Callable[[float], bool]]] = {
    "learning_rate": (Real, "zero or more, such as 2e-4", lambda v: v >= 0),
    "embedding_learning_rate": (Real, "above zero, usually a tenth to a half of learning_rate", lambda v: v > 0),
    "weight_decay": (Real, "zero or more", lambda v: v >= 0),
    "max_grad_norm": (Real, "zero (no clipping) or more", lambda v: v >= 0),
    "warmup_ratio": (Real, "from 0 up to 1", lambda v: 0 <= v < 1),
    "warmup_steps": (Real, "zero or more steps, or a ratio below 1", lambda v: v >= 0),
    "num_train_epochs": (Real, "above zero", lambda v: v > 0),
    "max_steps": (Integral, "at least 1, or -1 for as many as num_train_epochs needs", lambda v: v == -1 or v >= 1),
    "per_device_train_batch_size": (Integral, "at least 1", lambda v: v >= 1),
    "per_device_eval_batch_size": (Integral, "at least 1", lambda v: v >= 1),
    "gradient_accumulation_steps": (Integral, "at least 1", lambda v: v >= 1),
    "max_length": (Integral, "at least 2 tokens, or None for the model's max_seq_length", lambda v: v >= 2),
    "logging_steps": (Real, "above zero: steps, or a ratio below 1", lambda v: v > 0),
    "save_steps": (Real, "above zero: steps, or a ratio below 1", lambda v: v > 0),
    "eval_steps": (Real, "above zero: steps, or a ratio below 1", lambda v: v > 0),
    "save_total_limit": (Integral, "at least 1, or None to keep every checkpoint", lambda v: v >= 1),
    "early_stopping_patience": (Integral, "at least 1 evaluation", lambda v: v >= 1),
    "seed": (Integral, "zero or more", lambda v: v >= 0),
}
CHOICES = {
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
}
SWITCHES = ("bool", "bool | None", str(bool), str(bool | None))  # how the classes above ours and ours write the type
REPORT_EXTRA = ("tensorboard", "wandb", "trackio")  # what `pip install "luthier[report]"` brings


@dataclass
class SharedArguments:
    """What the arguments of every Luthier trainer add to TRL's, and the defaults that differ from TRL's.

    Put it before a TRL config among the bases: ``class TrainingArguments(SharedArguments, SFTConfig)``.
    Raises ``TypeError`` for an unknown name or a wrong type, ``ValueError`` for a wrong value, ``ImportError`` for a
    logger that is not installed.
    """

    embedding_learning_rate: float | None = None
    """Learning rate of the embeddings and the head, whether trained whole or as LoRA; None: the same as the rest."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better result, and give back the best checkpoint."""
    warmup_ratio: float | None = None
    """Share of the steps in which the learning rate rises from zero; another spelling of a warmup_steps below 1."""
    gradient_checkpointing: bool | None = None
    """None: as the model was loaded (the memory dial); True: recompute every layer; False: recompute nothing."""
    bf16: bool | None = None
    """Mixed precision in bfloat16; None: where the device has it and the model is not in float32 or float16."""
    report_to: None | str | list[str] = "none"
    """Where metrics go besides the terminal: tensorboard, wandb, trackio, ..., or a list of them."""
    disable_tqdm: bool | None = False
    """True: progress in lines instead of a bar. (transformers' own default depends on how much it is told to talk.)"""

    def __new__(cls, *args: object, **kwargs: object):
        """Refuse unknown names with the nearest valid one."""
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        for name in kwargs:
            if name not in names:
                raise TypeError(str(unknown(f"argument of {cls.__name__}:", name, names)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        self.report_to = _installed_reporters(self.report_to)
        self._settle_warmup()
        self._settle_early_stopping()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        self.precision_is_automatic = self.bf16 is None and not self.fp16
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and is_bfloat16_supported()
        newer = getattr(self, "activation_checkpointing", None)
        asked = self.gradient_checkpointing if newer is None else newer
        super().__post_init__()
        set_recomputation(self, asked)  # transformers 5.24 makes False of None

    def _settle_warmup(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps:
                raise ValueError(f"Give warmup_steps ({self.warmup_steps}) or warmup_ratio ({self.warmup_ratio}), not both")
            self.warmup_steps = self.warmup_ratio
            self.warmup_ratio = None  # so that a copy made from the fields says it once

    def _settle_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        if self.eval_strategy in (None, "no", IntervalStrategy.NO):
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} needs evaluations: set eval_strategy to 'steps' or "
                "'epoch' and give an eval_dataset"
            )
        self.load_best_model_at_end = True


@dataclass
class TrainingArguments(SharedArguments, SFTConfig):
    """Arguments of ``luthier.Trainer``: every field of TRL's ``SFTConfig`` and of transformers' ``TrainingArguments``."""

    max_length: int | None = None
    """Longest row in tokens; None: the model's max_seq_length. What happens to longer rows: too_long."""
    too_long: str = "drop"
    """Rows longer than max_length are dropped and counted ("drop"), cut ("truncate") or an error ("raise")."""
    train_on: str = "responses"
    """For chat data: only the assistant's answers train ("responses") or every token does ("all")."""
    padding_free: bool | None = None
    """Batches without padding; None: where the model keeps the rows of such a batch apart."""

    def __post_init__(self) -> None:
        if self.train_on not in TRAIN_ON:
            raise unknown("train_on", self.train_on, TRAIN_ON)
        if self.too_long not in TOO_LONG_POLICIES:
            raise unknown("too_long", self.too_long, TOO_LONG_POLICIES)
        super().__post_init__()

    @classmethod
    def from_trl(cls, config: transformers.TrainingArguments) -> TrainingArguments:
        """Our arguments with the values of a config of TRL's or transformers', which count as chosen by the user."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        return cls(**values)


def fit_arguments(args: SharedArguments, model: PreTrainedModel) -> SharedArguments:
    """A copy of ``args`` that agrees with ``model``: its precision, and how the memory dial plans recomputation.

    ``gradient_checkpointing``: None leaves the model as its loader set it up, False switches recomputation off, True lets
    the trainer switch it on for every layer.
    """
    args = copy.copy(args)
    _require_output(args, model)
    if args.precision_is_automatic and not args.use_cpu:
        trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        args.bf16 = args.bf16 and model.dtype == torch.bfloat16
        args.fp16 = model.dtype == torch.float16
        if torch.float16 in trained:
            raise ValueError(
                "The weights that train are in float16, where most of what they learn is rounded away and a gradient scaler "
                "cannot work. Train an adapter, whose weights are float32, or load with dtype='float32' or 'bfloat16'."
            )
        args.mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if args.ddp_find_unused_parameters is None and getattr(model.config, "vision_config", None) is None:
        args.ddp_find_unused_parameters = False  # rows without pictures leave a vision part unused, nothing else is ever
    if args.gradient_checkpointing is None:
        set_recomputation(args, False)  # for transformers: leave the model alone
    elif not args.gradient_checkpointing and model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return args


def set_recomputation(args: transformers.TrainingArguments, value: bool | None) -> None:
    """``gradient_checkpointing`` under all its names: transformers 5.24 reads it as ``activation_checkpointing``."""
    args.gradient_checkpointing = value
    if hasattr(args, "activation_checkpointing"):
        args.activation_checkpointing = value


def _require_output(args: SharedArguments, model: PreTrainedModel) -> None:
    require_writable(args.output_dir)
    base = getattr(getattr(model, "luthier", None), "base_path", None)
    if base is not None and Path(args.output_dir).resolve() == base.resolve():
        raise ValueError(f"output_dir {args.output_dir} is the base model's own directory. Choose another one.")


def warn_contradictions(config: transformers.TrainingArguments, model: PreTrainedModel) -> transformers.TrainingArguments:
    """A copy of a raw ``config`` of TRL's or transformers' that goes with a model loaded by Luthier; any other is untouched.

    ``gradient_checkpointing`` at the class's own default counts as not chosen: the plan that the model was loaded with
    stands. ``max_length`` is honoured. Warns where one contradicts the model.
    """
    config = copy.copy(config)
    info = getattr(model, "luthier", None)
    if info is None:
        return config
    kind = type(config).__name__
    default = bool(next(field.default for field in dataclasses.fields(config) if field.name == "gradient_checkpointing"))
    if bool(config.gradient_checkpointing) == default:
        if default and not model.is_gradient_checkpointing:
            warnings.warn(
                f"{kind}(gradient_checkpointing=True) contradicts the model, which was loaded to recompute nothing: the "
                "model's setting stands. Use luthier.TrainingArguments, or load with use_gradient_checkpointing=True.",
                UserWarning,
                stacklevel=4,
            )
        set_recomputation(config, None)
    warn_length(config, model, stacklevel=5)
    return config


def warn_length(config: transformers.TrainingArguments, model: nn.Module, stacklevel: int) -> None:
    """Warn if the ``max_length`` of TRL's own ``config`` is not the length that Luthier loaded ``model`` for."""
    limit, info = getattr(config, "max_length", None), getattr(model, "luthier", None)
    if limit is None or info is None or limit == info.max_seq_length or isinstance(config, SharedArguments):
        return
    warnings.warn(
        f"{type(config).__name__}(max_length={limit}) contradicts the model, which was loaded with "
        f"max_seq_length={info.max_seq_length}: rows longer than {min(limit, info.max_seq_length)} tokens do not train as "
        f"they are. Use luthier.TrainingArguments, or set max_length={info.max_seq_length}.",
        UserWarning,
        stacklevel=stacklevel,
    )


def _check_types(args: SharedArguments) -> None:
    """Every number that a user may set wrong, by type and range, and every switch; all mistakes in one message."""
    wrong_type, wrong_value = [], []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None and field.default is None:
            continue
        if str(field.type) in SWITCHES and not isinstance(value, bool):
            wrong_type.append(f"{field.name} must be True or False, not {value!r} of type {type(value).__name__}")
        if field.name not in NUMBERS:
            continue
        kind, allowed, is_allowed = NUMBERS[field.name]
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = "a whole number" if kind is Integral else "a number"
            wrong_type.append(f"{field.name} must be {wanted} ({allowed}), not {value!r} of type {type(value).__name__}")
        elif not math.isfinite(value) or not is_allowed(value):
            wrong_value.append(f"{field.name} must be {allowed}, not {value!r}")
    if wrong_type:
        raise TypeError("; ".join(wrong_type + wrong_value))
    if wrong_value:
        raise ValueError("; ".join(wrong_value))


def _check_choices(args: SharedArguments) -> None:
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        names = [choice.value for choice in choices]
        if getattr(value, "value", value) not in names:
            raise unknown(name, value, names)


def _installed_reporters(report_to: None | str | list[str]) -> list[str] | str:
    """The names in ``report_to`` as a list; an unknown or missing one is an error."""
    if report_to in ("all", ["all"]):
        return "all"
    if report_to in (None, "none", ["none"], [], ()):
        return []
    if not isinstance(report_to, str | list | tuple):
        raise TypeError(f"report_to must be a name or a list of names, not {report_to!r}")
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("report_to", name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
        packages = (name, "tensorboardX") if name == "tensorboard" else (name,)
        if name not in ("kubeflow", "azure_ml") and not any(importlib.util.find_spec(package) for package in packages):
            purpose = f"report_to={name!r}"
            if name in REPORT_EXTRA:
                raise missing_extra(name, "report", purpose)
            raise ImportError(f"{purpose} needs the package {name!r}, which is not installed: pip install {name}")
    return names
