"""GRPO: TRL's trainer, with checked rewards, prompts that are measured, and clean rollouts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import RepeatSampler

from luthier.errors import UnsupportedError, unknown
from luthier.model.cpu_4bit import repair_cpu_4bit
from luthier.rl.engine import context_length, generating, stop_token_ids
from luthier.rl.prompts import PromptLedger, check_prompts, fit_prompts, prompt_token_ids
from luthier.rl.rewards import checked, require_columns
from luthier.rl.sampling import SamplingParams
from luthier.terminal import notice_once
from luthier.training.common import (
    TrainerMixin,
    one_tokenizer,
    require_model,
    require_trainable,
    trainable_weights_kept,
)
from luthier.training.grpo_arguments import GRPOConfig, run_arguments
from luthier.training.head import own_head
from luthier.training.inputs import as_dataset, each


class GRPOTrainer(TrainerMixin, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` for models loaded by Luthier (or plain ones).

    ``reward_funcs``: one reward or a list (see ``luthier.rl.rewards``), or reward models as TRL takes them. Each is
    checked: what raises, returns the wrong length or a number that is not finite is an error naming the function and row.
    ``train_dataset`` has a column ``prompt`` (text, or messages without the answer); the others go to the rewards.
    """

    _tag_names = ["luthier", "trl", "grpo"]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | list[dict] | None = None,
        eval_dataset: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **trl_arguments: Any,
    ) -> None:
        require_model(model)
        processing_class = one_tokenizer(processing_class, tokenizer)
        _refuse_unknown(trl_arguments)
        require_trainable(model, trl_arguments.get("peft_config"))
        args = run_arguments(args, model)
        repair_cpu_4bit(model)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        self.prompt_limit = _prompt_limit(args, model)
        self.ledgers: dict[str, PromptLedger] = {}

        def fitted(rows: Any, name: str) -> Any:
            return self._fitted(as_dataset(rows, name), name, processing_class, args, rewards)

        with trainable_weights_kept(model), reference_configured(args, model), _head(args, model):
            super().__init__(
                model=model,
                reward_funcs=[reward if _is_model(reward) else checked(reward, args.reward_timeout) for reward in rewards],
                args=args,
                train_dataset=None if train_dataset is None else fitted(train_dataset, "train_dataset"),
                eval_dataset=each(eval_dataset, "eval_dataset", fitted),
                processing_class=processing_class,
                **trl_arguments,
            )
        self._add_stop_tokens()
        self.finish_setup()

    @property
    def ledger(self) -> PromptLedger | None:
        """What became of the prompts of ``train_dataset``; None for a stream and for images, which are read as they come."""
        return self.ledgers.get("train_dataset")

    def _add_stop_tokens(self) -> None:
        """Let the template's stop token end a rollout too, not only the tokenizer's EOS and the checkpoint's list."""
        params = self.args.vllm_sampling_params
        wanted = [*stop_token_ids(self.model, self._tokenizer), *(_stop_tokens(params, self._tokenizer) if params else ())]
        self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *wanted]))
        if self.use_vllm:
            self.vllm_generation.generation_kwargs = {
                **(self.vllm_generation.generation_kwargs or {}),
                "stop_token_ids": self.eos_token_ids,
            }
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _fitted(self, dataset: Any, name: str, processing_class: Any, args: GRPOConfig, rewards: list) -> Any:
        """The dataset without the rows whose prompts are too long; raises for one that cannot be used."""
        check_prompts(dataset)
        if dataset.column_names:
            require_columns([reward for reward in rewards if not _is_model(reward)], dataset.column_names, name)
        if not isinstance(dataset, Dataset) or not isinstance(processing_class, PreTrainedTokenizerBase):
            if args.max_prompt_length is not None:
                raise UnsupportedError("max_prompt_length needs a dataset that is not a stream, and prompts without images")
            return dataset
        fitted, ledger = fit_prompts(
            dataset, processing_class, self.prompt_limit, args.too_long, **(args.chat_template_kwargs or {})
        )
        self.ledgers[name] = ledger
        per_rollout = args.generation_batch_size // args.num_generations
        if name == "train_dataset" and ledger.kept < per_rollout:
            # TRL leaves incomplete rollouts out: it would end after no step at all and call that a success.
            raise ValueError(
                f"A rollout takes {per_rollout} prompts (generation_batch_size {args.generation_batch_size} / num_generations "
                f"{args.num_generations}), but only {ledger.kept} are there: lower per_device_train_batch_size, "
                "gradient_accumulation_steps or steps_per_generation, or give more prompts"
            )
        if args.should_log:
            ledger.table(f"Prompts of {name}")
        return fitted

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """As transformers', which sees the directory of the reference adapter and then leaves out the trained one beside it."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if isinstance(model, PeftModel) and len(model.peft_config) > 1:
            model.load_adapter(resume_from_checkpoint, model.active_adapter, is_trainable=True)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__ = EpochSampler
        return sampler

    def _save_rng_state(self, output_dir: str) -> None:
        """As transformers', in every process; and the completions that the next steps were still to learn from."""
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            torch.save({"step": self._step, "inputs": self._buffered_inputs}, self._rollouts_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._rollouts_file(checkpoint).exists():
            saved = torch.load(self._rollouts_file(checkpoint), map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["inputs"]

    def _rollouts_file(self, directory: str) -> Path:
        return Path(directory) / f"rollouts_{self.args.process_index}.pt"

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, dict]:
        """TRL's, without a doubled BOS, and cut where ``too_long="truncate"`` asks for it."""
        if isinstance(prompts[0], str) and not self._is_vlm:
            ids, images, fields = [prompt_token_ids(prompt, self._tokenizer) for prompt in prompts], None, {}
        else:
            ids, images, fields = super()._tokenize_prompts(prompts)
        if self.args.too_long == "truncate" and self.prompt_limit is not None and images is None:
            ids = [row[-self.prompt_limit :] for row in ids]
        return ids, images, fields

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, which switches recomputation off and on again its own way, forgetting how the model had planned it."""
        with recomputation_kept(self.model):
            return super()._generate_and_score_completions(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        cut = self._metrics["train"].get("completions/clipped_ratio")  # shares of the rollouts since the last log
        if self.mask_truncated_completions and cut and min(cut) == 1:
            notice_once(
                self,
                "all cut",
                f"Step {self.state.global_step}: every completion was cut at max_completion_length="
                f"{self.args.max_completion_length}, and mask_truncated_completions leaves cut ones out: nothing is learned.",
            )
        super().log(logs, *args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        """TRL's, without dropout and without sampling settings of the checkpoint that the trainer does not know of."""
        with generating(self.accelerator.unwrap_model(self.model)):
            return super()._generate_single_turn(*args, **kwargs)


class EpochSampler(RepeatSampler):
    """TRL's order of the prompts, in a run that was resumed in a later epoch too: TRL would begin again with the first's."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def reward_change(log_history: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Means over the first and the last fifth of the logged training steps: of the whole reward, and of each function."""
    steps = [entry for entry in log_history if "reward" in entry]
    part = max(1, len(steps) // 5)
    functions = [key for key in (steps[0] if steps else ()) if key.startswith("rewards/") and key.endswith("/mean")]
    keys = {"whole reward": "reward", **{key.split("/")[1]: key for key in functions}}
    return {name: (_mean(steps[:part], key), _mean(steps[-part:], key)) for name, key in keys.items()}


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return sum(values) / len(values) if values else float("nan")


@contextmanager
def recomputation_kept(model: nn.Module) -> Iterator[None]:
    """Give each module back its own way of recomputing activations, whatever is done to it meanwhile."""
    settings = {
        module: (module.gradient_checkpointing, module._gradient_checkpointing_func)
        for module in model.modules()
        if "_gradient_checkpointing_func" in vars(module)
    }
    try:
        yield
    finally:
        for module, (is_on, function) in settings.items():
            module.gradient_checkpointing, module._gradient_checkpointing_func = is_on, function


@contextmanager
def reference_configured(args: GRPOConfig, model: nn.Module) -> Iterator[None]:
    """Give the reference that TRL loads anew beside a model without an adapter the model's own config: scaled positions."""
    given = args.model_init_kwargs
    if args.beta and not isinstance(model, PeftModel):
        args.model_init_kwargs = {"config": copy.deepcopy(model.config), **(given or {})}
    try:
        yield
    finally:
        args.model_init_kwargs = given  # a config is not to be written as JSON


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    known = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)[1:]
    for name in arguments:
        if name not in known:
            raise TypeError(str(unknown("argument of GRPOTrainer:", name, [*known, "tokenizer"])))


def _prompt_limit(args: GRPOConfig, model: PreTrainedModel) -> int | None:
    """Longest prompt in tokens, so that prompt and completion fit the model together; None: unknown."""
    context = context_length(model)
    room = None if context is None else context - args.max_completion_length
    if room is not None and room < 1:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's {context} tokens: "
            "lower it, or load the model with a larger max_seq_length"
        )
    if args.max_prompt_length is None:
        return room
    if room is not None and args.max_prompt_length > room:
        raise ValueError(
            f"max_prompt_length={args.max_prompt_length} and max_completion_length={args.max_completion_length} exceed the "
            f"model's {context} tokens: lower one, or load the model with a larger max_seq_length"
        )
    return args.max_prompt_length


def _stop_tokens(params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that ``params`` stops at; a stop text that is not a single token is refused."""
    vocabulary = tokenizer.get_vocab()
    texts = [text for text in params.stop if text not in vocabulary]
    if texts:
        raise UnsupportedError(
            f"vllm_sampling_params stops at {texts[0]!r}, which is not a token of the tokenizer: rollouts of a trainer stop at "
            "tokens. Train the model to end with its stop token, or score only what stands before the text"
        )
    return [*params.stop_token_ids, *(vocabulary[text] for text in params.stop)]


def _head(args: GRPOConfig, model: PreTrainedModel) -> AbstractContextManager:
    """Around TRL's constructor: our scores of tokens, unless their entropies train too, or are to be of a head in fp32."""
    more = args.entropy_coef != 0 or args.use_adaptive_entropy or args.cast_lm_head_to_fp32
    return nullcontext() if more else own_head(model, args.temperature)


def _is_model(reward: Any) -> bool:
    """Whether TRL runs the reward as a model: a name of one, or a module."""
    return isinstance(reward, str | nn.Module)
