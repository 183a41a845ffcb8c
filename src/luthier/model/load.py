"""Loading: a name or directory becomes a model that is ready to train, and its tokenizer."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier.errors import unknown
from luthier.model import checkpoint
from luthier.model.attention_interface import implementation_for
from luthier.model.checkpointing import checkpointing_mode
from luthier.model.compute import require_compute
from luthier.model.cpu_4bit import repair_cpu_4bit
from luthier.model.experts import expert_stacks
from luthier.model.lora import attach_adapter
from luthier.model.precision import Precision, choose_dtype, choose_precision, quantisation
from luthier.model.random_state import seeded
from luthier.model.rope import native_length, restore_scaling, scale_positions
from luthier.model.source import find_files, read_config, require_causal_lm, require_width, text_config
from luthier.model.tokenizer import load_tokenizer, repair_tokenizer
from luthier.model.vocab import require_rows, resize_embeddings

DEFAULT_LENGTH = 2048  # tokens
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only")
MODEL_OPTIONS = (
    "experts_implementation",
    "ignore_mismatched_sizes",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "quantization_config",
    "subfolder",
    "torch_dtype",
    "use_safetensors",
)


@dataclass
class LoadInfo:
    """How a model was loaded: its attribute ``luthier``, which a PeftModel around it shows too."""

    model_name: str  # as given
    base_name: str  # Hub name, or absolute path, of the base model
    base_path: Path  # the directory that its weights were read from
    max_seq_length: int | None  # None: filled in by load_weights
    precision: Precision | str  # nf4, int8, 16bit, full, or how the checkpoint itself is quantised: "bitsandbytes", "gptq" ...
    dtype: torch.dtype
    dtype_given: bool = False
    stored_dtype: torch.dtype | None = None  # of the checkpoint's own weights
    vocabulary: int | None = None  # rows of the checkpoint's embeddings
    revision: str | None = None
    trust_remote_code: bool = False
    text_only: bool = False
    use_gradient_checkpointing: bool | str = "auto"
    memory_budget: float | None = None
    compute: str = "bf16"
    random_state: int = 3407
    key_mapping: dict[str, str] = field(default_factory=dict)  # checkpoint prefix -> model prefix, of a text-only load


def load_model(
    model_name: str | Path,
    max_seq_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    load_in_fp8: bool = False,
    full_finetuning: bool = False,
    device_map: str | dict | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rope_scaling: dict | None = None,
    fix_tokenizer: bool = True,
    resize_model_vocab: int | None = None,
    use_gradient_checkpointing: bool | str = "auto",
    memory_budget: float | None = None,
    compute: str = "bf16",
    attn_implementation: str | None = None,
    fast_inference: bool = False,
    gpu_memory_utilization: float = 0.5,
    float8_kv_cache: bool = False,
    max_lora_rank: int = 64,
    random_state: int = 3407,
    text_only: bool = False,
    **hf_kwargs: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text model and its tokenizer; an adapter directory gives its base with the adapter attached, trainable.

    The arguments are those of ``FastLanguageModel.from_pretrained``. ``max_seq_length=None`` is 2048, or the model's native
    length where that is less: only a length that was asked for scales positions. ``fast_inference``, ``float8_kv_cache``,
    ``gpu_memory_utilization`` and ``max_lora_rank`` are for a rollout engine that is not here yet: they change nothing.
    Everything that can be wrong with the arguments or the files is an error before a weight is read.
    """
    # 1. The arguments
    precision = choose_precision(load_in_4bit, load_in_8bit, load_in_16bit, load_in_fp8, full_finetuning)
    precision_given = load_in_4bit is not None or precision != "nf4"
    check_options(hf_kwargs, max_seq_length, memory_budget, gpu_memory_utilization, max_lora_rank, resize_model_vocab)
    require_compute(compute, full_finetuning)
    dtype = given_dtype(dtype, hf_kwargs)
    compute_dtype = choose_dtype(dtype, trains_all=precision == "full")

    # 2. The files
    hub = {name: hf_kwargs.pop(name) for name in HUB_OPTIONS if name in hf_kwargs}
    source = find_files(model_name, hf_kwargs.pop("subfolder", None), revision=revision, token=token, **hub)

    # 3. The config
    config = read_config(source.base, trust_remote_code)
    config, key_mapping = text_config(config, source.checkpoint, model_name, text_only)
    require_causal_lm(config, source.base)
    require_width(config, source.checkpoint)
    restore_scaling(config, source.adapter)
    scale_positions(config, max_seq_length, rope_scaling)
    require_rows(config.get_text_config().vocab_size, resize_model_vocab)
    hf_kwargs |= {"key_mapping": key_mapping} if key_mapping else {}

    info = LoadInfo(
        model_name=str(model_name),
        base_name=source.base_name,
        base_path=source.base,
        max_seq_length=max_seq_length,
        precision=precision,
        dtype=compute_dtype,
        dtype_given=dtype not in (None, "auto"),
        revision=revision,
        trust_remote_code=trust_remote_code,
        text_only=text_only,
        use_gradient_checkpointing=checkpointing_mode(use_gradient_checkpointing),
        memory_budget=memory_budget,
        compute=compute,
        random_state=random_state,
        key_mapping=key_mapping,
    )

    # 4. Tokenizer, weights, adapter
    tokenizer = load_tokenizer(source.tokenizer, trust_remote_code)
    options = {"device_map": device_map, "attn_implementation": attn_implementation, **hf_kwargs}
    model = load_weights(AutoModelForCausalLM, config, info, precision_given, options)
    return completed(model, tokenizer, source.adapter, resize_model_vocab, fix_tokenizer, random_state)


def check_options(
    hf_kwargs: dict,
    max_seq_length: int | None,
    memory_budget: float | None,
    gpu_memory_utilization: float,
    max_lora_rank: int,
    resize_model_vocab: int | None,
) -> None:
    """The arguments whose value alone says that they are wrong."""
    allowed = {*HUB_OPTIONS, *MODEL_OPTIONS, *inspect.signature(load_model).parameters} - {"hf_kwargs"}
    for name in hf_kwargs:
        if name not in allowed:
            raise TypeError(str(unknown("argument", name, allowed)))
    if hf_kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False would read pickle, and that can run code. Leave it out.")
    counts = {"max_seq_length": max_seq_length, "max_lora_rank": max_lora_rank, "resize_model_vocab": resize_model_vocab}
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be a whole number, not {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1.")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}: give a number of GiB above 0, or leave it out.")
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}: it must be above 0 and at most 1.")


def given_dtype(dtype: torch.dtype | str | None, hf_kwargs: dict) -> torch.dtype | str | None:
    """``dtype``, or what ``hf_kwargs`` call torch_dtype, which is taken out of them."""
    if "torch_dtype" in hf_kwargs and dtype is not None:
        raise ValueError(f"dtype={dtype} and torch_dtype={hf_kwargs['torch_dtype']} were given: leave torch_dtype out.")
    return hf_kwargs.pop("torch_dtype", dtype)


def load_weights(
    auto_class: type, config: PreTrainedConfig, info: LoadInfo, precision_given: bool, options: dict
) -> PreTrainedModel:
    """Read the weights of ``info.base_path`` in ``info.precision``; sets ``info.precision`` of a quantised checkpoint."""
    if info.max_seq_length is None:
        info.max_seq_length = min(DEFAULT_LENGTH, native_length(config) or DEFAULT_LENGTH)
    info.stored_dtype = checkpoint.open_checkpoint(info.base_path).dtype
    settings = {name: value for name, value in options.items() if value is not None}
    settings["device_map"] = settings.get("device_map", default_device_map())
    settings = {"attn_implementation": implementation_for(config)} | settings
    settings["quantization_config"] = _quantisation_of(config, info, precision_given, settings.pop("quantization_config", None))
    if settings["quantization_config"] is None:
        del settings["quantization_config"]
    may_differ = settings.pop("ignore_mismatched_sizes", False)
    settings |= {"dtype": info.dtype, "use_safetensors": True, "trust_remote_code": info.trust_remote_code}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that all of it is found and said at once
    with checkpoint.without_adapter(info.base_path) as directory:
        model, found = auto_class.from_pretrained(directory, config=config, **settings)
    _require_whole(found, info, may_differ)
    model.config._name_or_path = model.name_or_path = info.base_name
    model.luthier = info
    info.vocabulary = model.get_input_embeddings().weight.shape[0]
    repair_cpu_4bit(model)
    _warn_about_large_experts(model, info)
    if info.precision == "full":
        model.requires_grad_(True).train()
    elif info.precision != "16bit":
        model.requires_grad_(False)  # a quantised model trains through an adapter alone, its norms too
    return model


def _require_whole(found: Mapping[str, Iterable], info: LoadInfo, may_differ: bool) -> None:
    """Refuse weights that would start at random: transformers only logs what a checkpoint lacks or has in another shape."""
    missing = sorted(found["missing_keys"])
    different = [] if may_differ else sorted(name for name, *_ in found["mismatched_keys"])
    faults = [f"it has no {missing[0]} ({len(missing)} tensors are missing)"] if missing else []
    faults += [f"{different[0]} has another shape ({len(different)} tensors have)"] if different else []
    if faults:
        raise ValueError(
            f"The weights in {info.base_path} are not those of its config.json: {', '.join(faults)}. Copy or download the "
            "checkpoint again."
        )
    unread = [] if info.text_only else sorted(found["unexpected_keys"])
    if unread:
        warnings.warn(
            f"{len(unread)} tensors of {info.model_name} have no place in the model and are left out, such as {unread[0]}.",
            UserWarning,
            stacklevel=5,
        )


def default_device_map() -> dict[str, str | int]:
    """The whole model on this process's GPU, or on the CPU."""
    if not torch.cuda.is_available():
        return {"": "cpu"}
    return {"": int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))}  # set by torchrun and accelerate launch


def _quantisation_of(config: PreTrainedConfig, info: LoadInfo, precision_given: bool, given: object) -> object | None:
    """What to pass as ``quantization_config``; a checkpoint that is already quantised is taken as it is."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        if given is not None:
            if precision_given:
                raise ValueError("quantization_config and a load_in_... argument were both given: choose one.")
            info.precision = "nf4" if getattr(given, "load_in_4bit", False) else str(given.quant_method)
            return given
        return quantisation(info.precision, info.dtype, config)
    own = own if isinstance(own, dict) else own.to_dict()
    method = str(own.get("quant_method", "bitsandbytes"))
    if method == "mxfp4":
        from transformers import Mxfp4Config

        wanted = info.precision
        info.precision = "full" if wanted == "full" else "16bit"
        warnings.warn(
            f"{info.model_name} is stored in MXFP4, which cannot be trained: its experts are dequantised to 16 bits"
            + (f", although {wanted} was asked for." if precision_given and wanted not in ("16bit", "full") else "."),
            UserWarning,
            stacklevel=4,
        )
        return Mxfp4Config(dequantize=True)
    if info.precision == "full":
        raise ValueError(
            f"{info.model_name} is stored quantised ({method}), and full_finetuning=True trains 16-bit weights. "
            "Give the 16-bit checkpoint, or leave full_finetuning out and train an adapter."
        )
    stored = "nf4" if own.get("load_in_4bit") else "int8" if own.get("load_in_8bit") else method
    if precision_given and stored != info.precision:
        warnings.warn(
            f"{info.model_name} is stored quantised ({stored}) and loaded as it is, although {info.precision} was asked for.",
            UserWarning,
            stacklevel=4,
        )
    info.precision = stored
    return None


def _warn_about_large_experts(model: PreTrainedModel, info: LoadInfo) -> None:
    if info.precision not in ("nf4", "int8"):
        return
    stacks = [stack for stack in expert_stacks(model).values() if stack.dtype.is_floating_point]
    if stacks:
        size = sum(stack.numel() * stack.element_size() for stack in stacks)
        warnings.warn(
            f"The experts of this model are not quantised: they take {size / 2**30:.2f} GiB in {stacks[0].dtype}.",
            UserWarning,
            stacklevel=5,
        )


def completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | None,
    resize_model_vocab: int | None,
    fix_tokenizer: bool,
    random_state: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Rows of the vocabulary, repairs of the tokenizer and the adapter, as asked for; what is new and random has one seed."""
    with seeded(model, random_state):
        if resize_model_vocab is not None:
            resize_embeddings(model, resize_model_vocab)
        if fix_tokenizer:
            tokenizer, changes = repair_tokenizer(tokenizer, model)
            if changes:
                repairs = f"The tokenizer was repaired (fix_tokenizer=False leaves it alone): {'; '.join(changes)}."
                warnings.warn(repairs, UserWarning, stacklevel=3)
        if adapter is not None:
            model = attach_adapter(model, adapter)
    return model, tokenizer
