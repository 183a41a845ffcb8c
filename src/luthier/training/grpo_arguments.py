"""The arguments of a GRPO run: TRL's, with losses by their names, and every value checked before work begins."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import trl
from transformers import PreTrainedModel

from luthier.errors import UnsupportedError, missing_extra, unknown
from luthier.rl.losses import TRL_DEFAULTS, trl_settings
from luthier.rl.prompts import TOO_LONG
from luthier.rl.sampling import SamplingParams
from luthier.training.arguments import SharedArguments, fit_arguments, warn_contradictions

ROLLOUTS = ("transformers", "vllm", "embedded")
SCALES = ("group", "batch", "none")
LEVELS = ("token", "sequence")
# field: (type, what is allowed in words, test)
NUMBERS: dict[str, tuple[type, str, Callable[[float], bool]]] = {
    "num_generations": (int, "at least 2, or there is nothing to compare", lambda v: v >= 2),
    "max_prompt_length": (int, "at least 1 token, or None", lambda v: v >= 1),
    "max_completion_length": (int, "at least 1 token", lambda v: v >= 1),
    "temperature": (Real, "above 0, or all completions of a group are the same", lambda v: v > 0),
    "top_p": (Real, "above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": (int, "a number of tokens, or 0 for all", lambda v: v >= 0),
    "min_p": (Real, "from 0 to 1, or None", lambda v: 0 <= v <= 1),
    "beta": (Real, "zero or more", lambda v: v >= 0),
    "epsilon": (Real, "zero or more", lambda v: v >= 0),
    "epsilon_high": (Real, "zero or more, or None", lambda v: v >= 0),
    "num_iterations": (int, "at least 1", lambda v: v >= 1),
    "reward_timeout": (Real, "above 0 seconds, or None", lambda v: v > 0),
}
OPTIONAL = ("max_prompt_length", "min_p", "epsilon_high", "reward_timeout")


@dataclass
class GRPOConfig(SharedArguments, trl.GRPOConfig):
    """Arguments of ``luthier.GRPOTrainer``: every field of TRL's ``GRPOConfig`` and of transformers' ``TrainingArguments``."""

    loss_type: str = "dapo"
    """grpo, dr_grpo, dapo, bnpo, gspo, cispo or sapo (see ``luthier.rl.losses``)."""
    importance_sampling_level: str | None = None
    """"token" or "sequence"; None: what the loss means."""
    scale_rewards: str | bool | None = None
    """Divide advantages by the standard deviation of the "group", of the "batch", or "none"; None: what the loss means."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens; None: the model's max_seq_length less max_completion_length."""
    too_long: str = "drop"
    """Longer prompts are dropped and counted ("drop"), lose their first tokens ("truncate") or are an error ("raise")."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take; None: no limit."""
    rollout: str = "transformers"
    """What samples the completions: transformers' generate, or vllm (in process, or a server: see vllm_mode)."""
    vllm_sampling_params: SamplingParams | None = None
    """Sampling of the rollouts in vLLM's form: its settings are taken over into the fields here."""

    def __post_init__(self) -> None:
        if self.vllm_sampling_params is not None:
            self._take_sampling(self.vllm_sampling_params)
        self.top_k = 0 if self.top_k == -1 else self.top_k
        _check(self)
        self._settle_loss()
        self._settle_rollout()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience is not None):
            self.metric_for_best_model = "reward"  # the loss of GRPO says nothing about how good the model is
        self._require_whole_groups()
        super().__post_init__()

    def _require_whole_groups(self) -> None:
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun and accelerate
        rollout = self.generation_batch_size or self.per_device_train_batch_size * micro_batches * processes
        if rollout % self.num_generations:
            raise ValueError(
                f"A rollout of {rollout} completions (per_device_train_batch_size x gradient_accumulation_steps, or "
                f"steps_per_generation) is not divisible by num_generations={self.num_generations}: change one of them"
            )

    def _settle_loss(self) -> None:
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        settings = trl_settings(self.loss_type, {name: getattr(self, name) for name in TRL_DEFAULTS})
        for name, value in settings.items():
            setattr(self, name, value)
        for name, allowed in (("scale_rewards", SCALES), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)

    def _settle_rollout(self) -> None:
        if self.rollout not in ROLLOUTS:
            raise unknown("rollout", self.rollout, ROLLOUTS)
        if self.rollout == "embedded":
            raise UnsupportedError("rollout='embedded' is not in this version: use rollout='transformers' or rollout='vllm'")
        if self.use_vllm:
            self.rollout = "vllm"
        if self.rollout == "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise missing_extra("vllm", "vllm", "rollout='vllm'")
            self.use_vllm = True

    def _take_sampling(self, params: SamplingParams) -> None:
        """Take over what ``params`` sets; what the rollouts of a trainer cannot do is refused by name."""
        names = {"max_tokens": "max_completion_length", "n": "num_generations"}
        default, ours = SamplingParams(), {field.name: field.default for field in dataclasses.fields(self)}
        for field in dataclasses.fields(params):
            value, name = getattr(params, field.name), names.get(field.name, field.name)
            if value == getattr(default, field.name) or field.name in ("stop", "stop_token_ids", "include_stop_str_in_output"):
                continue  # stop texts need the tokenizer: the trainer settles them
            if name not in ours:
                raise UnsupportedError(
                    f"vllm_sampling_params sets {field.name}={value!r}, which rollouts do not support: leave it out"
                )
            if getattr(self, name) not in (ours[name], value):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} contradicts vllm_sampling_params, which sets {field.name}={value!r}"
                )
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As TRL's, with plain values all the way down: checkpoints and loggers write it as JSON."""
        values = super().to_dict()
        if self.vllm_sampling_params is not None:
            values["vllm_sampling_params"] = dataclasses.asdict(self.vllm_sampling_params)
        return values

    @classmethod
    def from_trl(cls, config: trl.GRPOConfig) -> GRPOConfig:
        """Our arguments with the values of a TRL config, all of which count as chosen by the user."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        del values["generation_batch_size"]  # follows from steps_per_generation; TRL takes one of the two
        return cls(**values)


def run_arguments(args: trl.GRPOConfig | None, model: PreTrainedModel) -> GRPOConfig:
    """A copy of the arguments that this run goes by; the user's own object stays as it is."""
    if args is None:
        args = GRPOConfig(output_dir="outputs")
    if not isinstance(args, GRPOConfig):
        if not isinstance(args, trl.GRPOConfig):
            raise TypeError(f"args must be a GRPOConfig, not {type(args).__name__}")
        args = GRPOConfig.from_trl(warn_contradictions(args, model))
    return fit_arguments(args, model)


def _check(args: GRPOConfig) -> None:
    """Every number of GRPO that a user may set wrong; all mistakes in one message."""
    wrong_type, wrong_value = [], []
    for name, (kind, allowed, fits) in NUMBERS.items():
        value = getattr(args, name)
        if value is None and name in OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            wrong_type.append(f"{name} must be a number ({allowed}), not {value!r} of type {type(value).__name__}")
        elif not fits(value):
            wrong_value.append(f"{name} must be {allowed}, not {value!r}")
    if wrong_type:
        raise TypeError("; ".join(wrong_type + wrong_value))
    if wrong_value:
        raise ValueError("; ".join(wrong_value))
    if args.too_long not in TOO_LONG:
        raise unknown("too_long", args.too_long, TOO_LONG)
