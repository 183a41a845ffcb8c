"""Loading a vision-language model and its processor. What is not about pictures is load.py's."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from luthier import adapters
from luthier.errors import UnsupportedError, missing_extra
from luthier.model.checkpointing import checkpointing_mode
from luthier.model.compute import require_compute
from luthier.model.load import HUB_OPTIONS, LoadInfo, check_options, completed, given_dtype, load_model, load_weights
from luthier.model.precision import choose_dtype, choose_precision, quantisation
from luthier.model.rope import restore_scaling, scale_positions
from luthier.model.source import find_files, is_vision, read_config, require_width
from luthier.model.torchvision_repair import repair_torchvision

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_vision_model(model_name: str | Path, *args: object, **kwargs: object) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor; the arguments are those of ``load_model``.

    In 4 and 8 bits the vision tower and its projector stay in 16: they are a small share of the weights, and all that the
    language part learns of a picture comes through them. Everything that can be wrong with the arguments or the files is
    an error before a weight is read; a model without a vision part is one that says which class to use.
    """
    bound = inspect.signature(load_model).bind(model_name, *args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    options = dict(given.hf_kwargs)

    # 1. The arguments
    precision = choose_precision(
        given.load_in_4bit, given.load_in_8bit, given.load_in_16bit, given.load_in_fp8, given.full_finetuning
    )
    precision_given = given.load_in_4bit is not None or precision != "nf4"
    values = {name: getattr(given, name) for name in inspect.signature(check_options).parameters if name != "hf_kwargs"}
    check_options(options, **values)
    require_compute(given.compute, given.full_finetuning)
    if given.text_only:
        raise ValueError("text_only=True loads the language part alone: use FastLanguageModel.from_pretrained for that.")
    dtype = given_dtype(given.dtype, options)

    # 2. The files and the config
    repair_torchvision()
    hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    source = find_files(model_name, options.pop("subfolder", None), revision=given.revision, token=given.token, **hub)
    config = read_config(source.base, given.trust_remote_code)
    require_vision(config, model_name)
    require_width(config, source.checkpoint)
    restore_scaling(config, source.adapter)
    scale_positions(config, given.max_seq_length, given.rope_scaling)
    info = LoadInfo(
        **{field.name: getattr(given, field.name) for field in fields(LoadInfo) if hasattr(given, field.name)}
        | {
            "model_name": str(model_name),
            "base_name": source.base_name,
            "base_path": source.base,
            "precision": precision,
            "dtype": choose_dtype(dtype, trains_all=precision == "full"),
            "dtype_given": dtype not in (None, "auto"),
            "use_gradient_checkpointing": checkpointing_mode(given.use_gradient_checkpointing),
        }
    )

    # 3. Processor, weights, adapter
    with_processor = [
        path for path in (source.tokenizer, source.base) if any((path / name).exists() for name in PROCESSOR_FILES)
    ]
    processor = load_processor(with_processor[0] if with_processor else source.base, given.trust_remote_code)
    options |= {"device_map": given.device_map, "attn_implementation": given.attn_implementation}
    ours = None
    if getattr(config, "quantization_config", None) is None and "quantization_config" not in options:
        ours = options["quantization_config"] = quantisation_of_language(info, config)
    model = load_weights(AutoModelForImageTextToText, config, info, precision_given and ours is None, options)
    if ours is not None:
        info.precision = precision
    model, processor.tokenizer = completed(
        model, processor.tokenizer, source.adapter, given.resize_model_vocab, given.fix_tokenizer, given.random_state
    )
    return model, processor


def require_vision(config: PreTrainedConfig, name: str | Path) -> None:
    """Raise ``ValueError`` unless the config is that of a model that answers about pictures in text."""
    if not is_vision(config):
        raise ValueError(f"{name} is a text model ({config.model_type}): load it with FastLanguageModel.")
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UnsupportedError(
            f"{name} is a {config.model_type!r} model, which does not answer in text. docs/architectures.md lists the families."
        )


def quantisation_of_language(info: LoadInfo, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """The quantisation that ``info.precision`` stands for, less vision tower, projector and head."""
    settings = quantisation(info.precision, info.dtype, config)
    spec = adapters.find(config)
    if settings is not None and (spec is None or spec.vision is None):
        warnings.warn(
            f"{config.model_type} has no file in luthier/adapters, so its vision part cannot be told apart and is quantised "
            "too; load_in_16bit=True leaves it as it is.",
            UserWarning,
            stacklevel=4,
        )
    elif settings is not None:
        settings.llm_int8_skip_modules = ["lm_head", spec.vision.vision_prefix, *spec.vision.projector_prefixes]
    return settings


def load_processor(directory: Path, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a checkpoint directory; the chat template is both its own and its tokenizer's."""
    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, TypeError, ValueError) as error:
        if importlib.util.find_spec("torchvision") is None:
            raise missing_extra("torchvision", "vision", f"The processor of {directory}") from error
        raise ValueError(
            f"{directory} has no processor that can be read ({error}). Copy preprocessor_config.json or processor_config.json "
            "and the tokenizer's files of the model into it."
        ) from error
    if getattr(processor, "image_processor", None) is None:  # AutoProcessor falls back to the tokenizer
        raise ValueError(
            f"{directory} has a tokenizer but no image processor. Copy preprocessor_config.json or processor_config.json of "
            "the model into it."
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    processor.tokenizer.chat_template = processor.tokenizer.chat_template or processor.chat_template
    return processor
