"""Recipes: one frozen dataclass per workflow. A recipe checks itself; the docstring under a field is its ``--help``.

The keys of a YAML recipe are the field names; the flags of the command line are the same names with dashes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import pydantic
import yaml

from luthier.errors import UnsupportedError, unknown

SaveMethod = Literal["lora", "merged_16bit", "merged_4bit"]
Recipe = TypeVar("Recipe", bound="ModelRecipe")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What every workflow needs to know about the model."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str = ""
    """Hub id or local directory of the model; an adapter directory continues that adapter."""
    max_seq_length: int | None = None
    """Longest row in tokens. Default: 2048, or the model's native length if that is shorter. Beyond the native length RoPE
    scaling is applied, with a warning."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Compute dtype. Default: bfloat16 where the device has it, else float16; float32 on a CPU."""
    load_in_4bit: bool | None = None
    """NF4 with double quantisation. The default unless another precision is asked for."""
    load_in_8bit: bool = False
    """LLM.int8 base weights."""
    load_in_16bit: bool = False
    """16-bit base weights with LoRA."""
    full_finetuning: bool = False
    """Train every weight in 16 bits; no adapter."""
    attn_implementation: str | None = None
    """Attention of transformers to use instead of ours: sdpa, eager, flex_attention, flash_attention_2."""
    use_gradient_checkpointing: Literal["auto", "offload", "true", "false"] = "auto"
    """Recompute activations: as the memory needs (auto), every layer (true), none (false), inputs to host memory (offload)."""
    memory_budget: float | None = None
    """GiB of device memory the whole run may take. Default: what is free less a reserve."""
    compute: Literal["bf16", "fp8-backward", "fp8"] = "bf16"
    """How frozen weights multiply: exactly (bf16), or in 8 bits in the backward or always; docs/speed.md has the cost."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint. Never needed for the families Luthier knows."""
    seed: int = 3407
    """Seed of the adapter's initial weights, the order of the rows, and sampling."""

    def __post_init__(self) -> None:
        names = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
        precisions = [name for name in names if getattr(self, name)]
        if len(precisions) > 1:
            raise ValueError(f"{' and '.join(precisions)} are both set: choose one precision")
        self.at_least("max_seq_length", 1)
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise ValueError(f"memory_budget is {self.memory_budget}: give a number of GiB above 0, or leave it out")

    def at_least(self, name: str, minimum: float) -> None:
        """Raise ``ValueError`` if the field is set and below ``minimum``."""
        value = getattr(self, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} is {value}: it must be at least {minimum}")

    def require(self, *names: str) -> None:
        """Raise ``ValueError`` for the fields that a run cannot do without."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise ValueError(f"The recipe does not say: {', '.join(missing)}. Add the key to the YAML file or give {flags}.")

    def checkpointing(self) -> bool | str:
        """``use_gradient_checkpointing`` in the form that the model API takes."""
        return {"true": True, "false": False}.get(self.use_gradient_checkpointing, self.use_gradient_checkpointing)

    def loading(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` beside the name."""
        same = ("max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
        same += ("attn_implementation", "memory_budget", "compute", "revision", "trust_remote_code")
        values = {name: getattr(self, name) for name in same}
        return values | {"use_gradient_checkpointing": self.checkpointing(), "random_state": self.seed}


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(ModelRecipe):
    """What the three training workflows share: data, adapter, run, and what is saved at the end."""

    data: str = ""
    """Training rows: a .json, .jsonl, .csv or .parquet file, a directory of them, or a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    eval_data: str | None = None
    """Rows for evaluation during training, in the same format."""
    output: str = "outputs"
    """Directory for checkpoints, the adapter, and what is exported."""

    r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 16
    """The adapter's output is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapter. Above 0 a slower path is taken."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    modules_to_save: list[str] | None = None
    """Modules trained whole beside the adapter, such as embed_tokens and lm_head."""
    use_rslora: bool = False
    """Rank-stabilised LoRA."""
    use_dora: bool = False
    """Weight-decomposed LoRA. A slower path is taken."""

    learning_rate: float = 2e-4
    """Peak learning rate of the adapter (of the model with full_finetuning: try 1e-5)."""
    embedding_learning_rate: float | None = None
    """Learning rate of embeddings and head, where they train. Default: learning_rate."""
    per_device_train_batch_size: int = 2
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches per optimizer step. The loss equals that of one big batch."""
    num_train_epochs: float = 1.0
    """Passes over the rows, unless max_steps is set."""
    max_steps: int = -1
    """Optimizer steps; -1 means num_train_epochs."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate falls."""
    optim: str = "adamw_torch"
    """Optimizer, by its name in transformers: adamw_torch, adamw_8bit, paged_adamw_8bit, ..."""
    weight_decay: float = 0.001
    """Weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    logging_steps: int = 1
    """Optimizer steps between two logged losses."""
    eval_steps: int | None = None
    """Optimizer steps between two evaluations. Default: at the end of each epoch, where eval_data is given."""
    save_steps: int | None = None
    """Optimizer steps between two checkpoints. Default: none but the final adapter."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a better loss, and keep the best checkpoint. Needs eval_data."""
    report_to: list[str] | Literal["none"] = "none"
    """Where to log beside the terminal: tensorboard, wandb, trackio."""
    resume: str | None = None
    """Checkpoint directory to resume from, or "latest" (--resume alone) for the newest in output."""

    save_method: SaveMethod | None = None
    """What to save beside the adapter: merged_16bit or merged_4bit."""
    base: Literal["16bit", "nf4"] = "16bit"
    """Weights to merge onto: the original checkpoint's, or the 4-bit ones that were trained against."""
    gguf: list[str] = field(default_factory=list)
    """GGUF types to export, such as q8_0 or q4_k_m."""

    def adapter(self) -> dict[str, Any]:
        """The arguments of ``get_peft_model`` beside the model."""
        same = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
        return {name: getattr(self, name) for name in same} | {"random_state": self.seed}

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("r", "per_device_train_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "logging_steps", "eval_steps", "save_steps", "early_stopping_patience"):
            self.at_least(name, 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be at least 0 and below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}: it is a share between 0 and 1")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}: give a number of steps above 0, or -1 for num_train_epochs")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}: it must be above 0 unless max_steps is set")
        for name in ("learning_rate", "embedding_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        if self.early_stopping_patience is not None and self.eval_data is None:
            raise ValueError("early_stopping_patience needs eval_data: without evaluations nothing can stop early")
        if self.full_finetuning and self.use_dora:
            raise UnsupportedError("use_dora has no meaning with full_finetuning, which trains no adapter")


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(TrainRecipe):
    """QLoRA fine-tuning on chat rows."""

    chat_template: str | None = None
    """Chat template by name (see docs/chat-templates.md) or .jinja file. Default: the tokenizer's own, else chatml."""
    system_message: str | None = None
    """System message to use instead of the template's default."""
    train_on: Literal["responses", "all"] = "responses"
    """Which tokens train: the assistant's answers, or everything."""
    too_long: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to a row longer than max_seq_length. Dropped rows are counted and shown."""
    packing: bool = False
    """Fill each row of a batch with several examples. None attends to another."""


@dataclass(frozen=True, kw_only=True)
class GRPORecipe(TrainRecipe):
    """GRPO reinforcement learning with reward functions."""

    rewards: list[str] = field(default_factory=list)
    """Reward functions, as file.py:function or package.module:function."""
    reward_weights: list[float] | None = None
    """Weight of each reward. Default: 1 each."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward may take."""
    num_generations: int = 8
    """Completions per prompt; the advantage compares them with each other."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens. Default: max_seq_length - max_completion_length. Longer prompts are dropped and counted."""
    max_completion_length: int = 512
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    top_p: float = 1.0
    """Nucleus of the rollouts."""
    top_k: int = 0
    """Number of tokens kept in the rollouts; 0 keeps all."""
    beta: float = 0.0
    """Weight of the KL term against the policy at the start of the run (for a continued adapter: that adapter)."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo"] = "dapo"
    """The loss."""
    epsilon: float = 0.2
    """Lower clip of the probability ratio."""
    epsilon_high: float | None = None
    """Upper clip of the probability ratio. Default: epsilon, and 5 for cispo."""
    mask_truncated_completions: bool = False
    """Leave completions that hit max_completion_length out of the loss."""
    rollout: Literal["transformers", "vllm"] = "transformers"
    """Engine that samples the completions."""
    chat_template: str | None = None
    """Chat template by name or .jinja file. Default: the tokenizer's own, else chatml."""
    learning_rate: float = 5e-6
    """Peak learning rate of the adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("num_generations", 2)
        self.at_least("max_completion_length", 1)
        self.at_least("max_prompt_length", 1)
        given, wanted = len(self.reward_weights or self.rewards), len(self.rewards)
        if given != wanted:
            raise ValueError(f"reward_weights has {given} entries for {wanted} rewards: give one each (--reward-weights)")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: rollouts need one above 0, or a group is all the same")


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(TrainRecipe):
    """Fine-tuning of a vision-language model on rows with images."""

    finetune_vision_layers: bool = True
    """Put adapters into the vision tower."""
    finetune_language_layers: bool = True
    """Put adapters into the language model."""
    finetune_attention_modules: bool = True
    """Put adapters into attention projections."""
    finetune_mlp_modules: bool = True
    """Put adapters into MLPs."""
    resize: Literal["min", "max"] | int | None = "min"
    """min: shrink images to the model's default size, where it has one. max: leave them as they are. A number: at most so
    many pixels on the longer side."""
    too_long: Literal["drop", "raise"] = "drop"
    """What happens to a row longer than max_seq_length. An image is never cut."""
    train_on: Literal["responses", "all"] = "responses"
    """Which tokens train: the assistant's answers, or everything but padding and images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.finetune_vision_layers or self.finetune_language_layers):
            raise ValueError("finetune_vision_layers and finetune_language_layers are both false: nothing would train")
        if not (self.finetune_attention_modules or self.finetune_mlp_modules):
            raise ValueError("finetune_attention_modules and finetune_mlp_modules are both false: nothing would train")


COMMANDS: dict[str, type[TrainRecipe]] = {"sft": SFTRecipe, "grpo": GRPORecipe, "vision": VisionRecipe}


def load_recipe(path: str | Path, kind: type[Recipe]) -> Recipe:
    """Read and check a YAML recipe.

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` for anything wrong in it, naming the key.
    """
    return make_recipe(_read_keys(Path(path)), kind, where=str(path))


def load_options(path: str | Path, function: Callable) -> dict[str, Any]:
    """Those keys of a YAML file that ``function`` takes, checked by its annotations; a training recipe may hold others.

    Raises as ``load_recipe``.
    """
    keys, hints = _read_keys(Path(path)), get_type_hints(function)
    known = {*hints, *(entry.name for kind in COMMANDS.values() for entry in dataclasses.fields(kind))}
    for key in keys:
        if key not in known - {"return"}:
            raise unknown(f"key in {path}:", key, known - {"return"})
    options = {}
    for key in keys.keys() & hints.keys():
        value = _as_meant(key, keys[key], hints[key])
        try:
            options[key] = pydantic.TypeAdapter(hints[key]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{path} has a value that cannot be used: {key} = {value!r}: {reason}") from error
    return options


def _as_meant(key: str, value: Any, hint: Any) -> Any:
    """A value of YAML as its key takes it: true and false by name, names in one text as a list of names."""
    if key == "use_gradient_checkpointing":
        return str(value).lower()
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    named = [name for part in parts if get_origin(part) is Literal for name in get_args(part)]
    if isinstance(value, str) and list[str] in parts and value not in named:
        return value.replace(",", " ").split()
    return value


def _read_keys(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}: give the path of a YAML file, or only flags (see --help)")
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} must hold keys and values such as 'model: NAME', but holds {type(keys).__name__}")
    return keys


class _EachKeyOnce(yaml.SafeLoader):
    """YAML whose second value of a key is an error, where YAML's own readers forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is there twice", problem_mark=node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep)


def make_recipe(keys: dict[str, Any], kind: type[Recipe], where: str = "recipe") -> Recipe:
    """Build a recipe from plain values; types are checked and converted, unknown keys refused with the nearest name."""
    allowed = [entry.name for entry in dataclasses.fields(kind)]
    for key in keys:
        if key not in allowed:
            commands = [command for command, other in COMMANDS.items() if key in get_type_hints(other)]
            raise unknown(f"key in {where}:", key, allowed, f"It belongs to luthier {commands[0]}." if commands else "")
    hints = get_type_hints(kind)
    keys = {key: _as_meant(key, value, hints[key]) for key, value in keys.items()}
    try:
        return pydantic.TypeAdapter(kind).validate_python(keys)
    except pydantic.ValidationError as error:
        own = [entry["ctx"]["error"] for entry in error.errors() if not entry["loc"] and "error" in entry.get("ctx", {})]
        if own:  # what a recipe's own check raised
            raise type(own[0])(f"{where}: {own[0]}") from error
        lines = [f"  {entry['loc'][0]} = {entry['input']!r}: {entry['msg']}" for entry in error.errors()]
        raise ValueError(f"{where} has values that cannot be used:\n" + "\n".join(dict.fromkeys(lines))) from error


def schema(kind: type[ModelRecipe]) -> str:
    """JSON schema of a recipe, for editors that complete and check YAML; the docstrings of the fields describe them."""
    described = pydantic.TypeAdapter(kind).json_schema()
    for owner in reversed(kind.__mro__[:-1]):
        for field_of_owner in docstring_parser.parse_from_object(owner).params:
            entry = described["properties"][field_of_owner.arg_name]
            entry["description"] = " ".join(field_of_owner.description.split())
    described["properties"]["use_gradient_checkpointing"]["enum"] += [True, False]  # as YAML reads true and false
    del described["properties"]["use_gradient_checkpointing"]["type"]
    return json.dumps(described, indent=1) + "\n"
