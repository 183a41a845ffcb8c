"""Run a script that was written for Unsloth, unchanged: ``python -m luthier.compat.unsloth script.py [args]``.

Importing this module changes nothing. The runner does, because its process is there for that one script, and until the
script ends:

* ``import unsloth`` and ``import unsloth_zoo`` give thin aliases of Luthier's names (``MODULES``). A name that is not there
  is an ``ImportError`` that says what to use instead.
* ``trl.SFTTrainer``, ``SFTConfig``, ``GRPOTrainer``, ``GRPOConfig`` and ``transformers.TrainingArguments`` are Luthier's, and
  take the arguments that such scripts give them (``max_seq_length=``, ``tokenizer=``, ``evaluation_strategy=`` ...).
* ``tokenizer.apply_chat_template`` gives token ids, as in transformers 4, unless ``return_dict=True`` is asked for.
* ``from vllm import SamplingParams`` gives Luthier's where vLLM is not installed.
* Without a GPU, the device "cuda" means the CPU.

An argument that only Unsloth, or an older TRL or transformers, has is left out with a ``UserWarning`` that says why (the
tables below); any other unknown argument is an error, as everywhere in Luthier.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import torch
import trl
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

import luthier
from luthier import fast, gguf
from luthier.data import chat, formats, vision
from luthier.errors import unknown
from luthier.gguf.ollama import create_ollama_modelfile
from luthier.model.precision import is_bfloat16_supported
from luthier.model.vocab import add_new_tokens
from luthier.rl.sampling import SamplingParams
from luthier.terminal import say
from luthier.training import arguments, grpo, trainer
from luthier.training.responses import train_on_responses_only

USAGE = "usage: python -m luthier.compat.unsloth script.py [args]\n\nRun a script that was written for Unsloth, unchanged."

# Arguments that are left out, and why. A value of None, False or {} asks for nothing and is not talked about.
NOT_NEEDED = "nothing here needs it"
OF_THE_MODEL = "a model has one length, given to from_pretrained"
IN_MEMORY = "weights are merged tensor by tensor, so that no limit is needed"
OWN_ENGINE = "completions are sampled on the model's own weights"
COMMIT = "the upload goes to the main branch as one commit, 'Upload from Luthier'"
LOADING = {
    "use_exact_model_name": "a name is taken as it stands, always",
    "disable_log_stats": OWN_ENGINE,
    "unsloth_vllm_standby": OWN_ENGINE,
    "unsloth_force_compile": NOT_NEEDED,
    "fullgraph": NOT_NEEDED,
    "return_logits": "logits are computed when they are read",
    "float32_mixed_precision": "weights that train are in float32 anyway",
    "offload_embedding": "the memory dial moves the embeddings to host memory where that pays",
    "auto_model": "the class of the model follows from its config",
    "auto_config": "the config is the checkpoint's",
    "tokenizer_name": "the tokenizer is the checkpoint's",
}
ADAPTING = {
    "max_seq_length": OF_THE_MODEL,
    "temporary_location": NOT_NEEDED,
    "qat_scheme": "the adapter is trained without quantisation in the loop",
    "ensure_weight_tying": "tied embeddings stay tied",
}
SAVING = {
    "maximum_memory_usage": IN_MEMORY,
    "temporary_location": IN_MEMORY,
    "first_conversion": "files are written straight from the weights",
    "safe_serialization": "safetensors are written, always",
    "use_temp_dir": NOT_NEEDED,
    **dict.fromkeys(("commit_message", "commit_description", "create_pr", "revision"), COMMIT),
    "tags": "the model card is left to you",
    "datasets": "the model card is left to you",
}
TRAINING = {
    "overwrite_output_dir": "checkpoints of an earlier run are kept",
    "logging_dir": "logs go below output_dir",
    "save_safetensors": "safetensors are written, always",
    "include_tokens_per_second": "tokens per second are shown anyway",
    **dict.fromkeys(("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite"), NOT_NEEDED),
    **dict.fromkeys(("half_precision_backend", "jit_mode_eval", "use_ipex"), NOT_NEEDED),
    **dict.fromkeys(("unsloth_num_chunks", "unsloth_logit_chunk_multiplier", "unsloth_grpo_mini_batch"), NOT_NEEDED),
}
ROLLOUTS = TRAINING | {
    "max_seq_length": OF_THE_MODEL,
    **dict.fromkeys(("vllm_device", "vllm_dtype", "vllm_max_model_len", "vllm_max_num_seqs"), OWN_ENGINE),
}
COLLATING = {
    "num_proc": NOT_NEEDED,
    "force_match": "parts that are nowhere in a row leave it without a trained token, and it is counted",
    "last_response_only": "every answer of a row trains",
    "resize_dimension": "the longer side is resized",
    "snap_to_patch_size": "the processor rounds to whole patches itself",
    "assistant_single_content": NOT_NEEDED,
}
# Arguments that are only called otherwise today
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
}


def settled(given: Mapping[str, Any], table: Mapping[str, str], renamed: Mapping[str, str] = MappingProxyType({})) -> dict:
    """The arguments without those of ``table``, each of which is warned about, and under today's names."""
    for name, value in given.items():
        if name in table and value not in (None, False, {}):
            warnings.warn(f"{name}={value!r} is left out: {table[name]}.", UserWarning, stacklevel=3)
    return {renamed.get(name, name): value for name, value in given.items() if name not in table}


# --- models ----------------------------------------------------------------------------------------------------------


class _Models:
    """Loading, adapters and saving with Unsloth's arguments. It stands before one of Luthier's classes among the bases."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> tuple:
        kwargs = settled(kwargs, LOADING)
        if not torch.cuda.is_available():
            kwargs.pop("device_map", None)
        model, processor = super().from_pretrained(*args, **kwargs)
        return _with_methods(model), processor

    @classmethod
    def get_peft_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_methods(super().get_peft_model(model, *args, **_tables_whole(settled(kwargs, ADAPTING))))


class FastModel(_Models, fast.FastModel):
    """Text and vision models."""


class FastLanguageModel(FastModel):
    """As ``FastModel``: Unsloth's takes either kind too."""


class FastVisionModel(_Models, fast.FastVisionModel):
    """Vision models."""


def _tables_whole(settings: dict[str, Any]) -> dict[str, Any]:
    """Embeddings and head among the targets train whole, as with Unsloth, and not through LoRA."""
    targets = settings.get("target_modules")
    whole = [] if isinstance(targets, str | None) else [name for name in targets if name in ("embed_tokens", "lm_head")]
    if not whole:
        return settings
    warnings.warn(f"{' and '.join(whole)} in target_modules: trained whole, not through LoRA.", UserWarning, stacklevel=3)
    saved = [*(settings.get("modules_to_save") or ()), *whole]
    rest = [name for name in targets if name not in whole]
    return settings | {"target_modules": rest, "modules_to_save": list(dict.fromkeys(saved))}


def _with_methods(model: Any) -> Any:
    for name in ("save_pretrained_merged", "push_to_hub_merged", "push_to_hub_gguf"):
        setattr(model, name, functools.partial(_save, getattr(model, name)))
    model.save_pretrained_gguf = functools.partial(_save_gguf, model.save_pretrained_gguf)
    if "fast_generate" in vars(model):  # not on a model that was loaded otherwise
        model.fast_generate = functools.partial(_fast_generate, model, **model.fast_generate.keywords)
    return model


def _save(method: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs = settled(kwargs, SAVING)
    if kwargs.get("save_method") == "merged_4bit_forced":
        kwargs["save_method"] = "merged_4bit"
    return method(*args, **kwargs)


def _save_gguf(method: Any, directory: str | Path, tokenizer: Any, *args: Any, **kwargs: Any) -> list[Path]:
    files = method(directory, tokenizer, *args, **settled(kwargs, SAVING))
    tokenizer._ollama_modelfile = create_ollama_modelfile(tokenizer, files[0])  # where such scripts look for it
    return files


def _fast_generate(model: Any, prompts: Any, sampling_params: Any = None, lora_request: Any = None, **kwargs: Any) -> list:
    return fast.fast_generate(model, prompts, _sampling(sampling_params), lora_request, **kwargs)


def _sampling(params: Any) -> Any:
    """Luthier's SamplingParams with the values of vLLM's."""
    if params is None or isinstance(params, SamplingParams):
        return params
    if isinstance(params, Sequence):
        return [_sampling(one) for one in params]
    names = [field.name for field in dataclasses.fields(SamplingParams) if hasattr(params, field.name)]
    return SamplingParams(**{name: getattr(params, name) for name in names})


# --- data and training -----------------------------------------------------------------------------------------------


def standardize_sharegpt(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """Messages of {role, content} in the column ``conversations``. Other names than the usual are found without being told."""
    return formats.standardize_sharegpt(dataset, column="conversations")


class UnslothVisionDataCollator(vision.VisionDataCollator):
    """``VisionDataCollator`` with Unsloth's arguments."""

    def __init__(self, model: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, processor, *args, **settled(kwargs, COLLATING))


class SFTConfig(arguments.TrainingArguments):
    """``luthier.TrainingArguments`` with the arguments of older versions of transformers and TRL, and Unsloth's own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> SFTConfig:
        return super().__new__(cls, *args, **{RENAMED.get(name, name): kwargs[name] for name in kwargs.keys() - TRAINING})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **settled(kwargs, TRAINING, RENAMED))


class SFTTrainer(trainer.Trainer):
    """``luthier.Trainer`` with the arguments of older versions of TRL."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **settled(kwargs, TRAINING, RENAMED))


class GRPOConfig(grpo.GRPOConfig):
    """``luthier.GRPOConfig`` with the arguments of older versions of TRL, and Unsloth's own.

    Where the batch holds no whole groups of completions, it grows to one group, as with Unsloth, with a warning.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> GRPOConfig:
        return super().__new__(cls, *args, **{RENAMED.get(name, name): kwargs[name] for name in kwargs.keys() - ROLLOUTS})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = settled(kwargs, ROLLOUTS, RENAMED)
        if settings.get("vllm_sampling_params") is not None:
            settings["vllm_sampling_params"] = _sampling(settings["vllm_sampling_params"])
        if settings.get("use_vllm") and not VLLM:
            settings["use_vllm"] = False
            warnings.warn("use_vllm=True, but vLLM is not installed: completions are sampled here.", UserWarning, stacklevel=2)
        if "generation_batch_size" not in settings and "steps_per_generation" not in settings:
            _whole_groups(settings)
        super().__init__(*args, **settings)


def _whole_groups(settings: dict[str, Any]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(grpo.GRPOConfig)}
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    batch, steps, group = (settings.get(name, defaults[name]) for name in names)
    if batch * steps % group:
        warnings.warn(
            f"per_device_train_batch_size={batch} with gradient_accumulation_steps={steps} holds no whole group of "
            f"num_generations={group} completions: per_device_train_batch_size={group} is used.",
            UserWarning,
            stacklevel=3,
        )
        settings["per_device_train_batch_size"] = group


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """``trainer.train()``: gradient accumulation is right in every trainer of Luthier."""
    return trainer.train(*args, **kwargs)


def no_patch_is_needed(*args: Any, **kwargs: Any) -> None:
    """What ``PatchDPOTrainer()`` and the like do: nothing."""


# --- the modules -----------------------------------------------------------------------------------------------------

DATA = {
    "CHAT_TEMPLATES": chat.CHAT_TEMPLATES,
    "apply_chat_template": formats.apply_chat_template,
    "get_chat_template": chat.get_chat_template,
    "standardize_data_formats": standardize_sharegpt,
    "standardize_sharegpt": standardize_sharegpt,
    "to_sharegpt": formats.to_sharegpt,
    "train_on_responses_only": train_on_responses_only,
}
TRAINERS = {
    "UnslothTrainer": SFTTrainer,
    "UnslothTrainingArguments": SFTConfig,
    "UnslothVisionDataCollator": UnslothVisionDataCollator,
    "unsloth_train": unsloth_train,
}
OLLAMA = {
    "MODEL_TO_OLLAMA_TEMPLATE_MAPPER": gguf.MODEL_TO_OLLAMA_TEMPLATE_MAPPER,
    "OLLAMA_TEMPLATES": gguf.OLLAMA_TEMPLATES,
}
EXPORT = {
    "ALLOWED_QUANTS": gguf.ALLOWED_QUANTS,
    "create_ollama_model": gguf.create_ollama_model,
    "create_ollama_modelfile": gguf.create_ollama_modelfile,
    "print_quantization_methods": gguf.print_quantization_methods,
}
TOKENIZERS = {"add_new_tokens": add_new_tokens, "fix_sentencepiece_gguf": gguf.fix_sentencepiece_gguf}
MODULES: dict[str, dict[str, Any]] = {
    "unsloth": {
        "__version__": luthier.__version__,
        "FastLanguageModel": FastLanguageModel,
        "FastModel": FastModel,
        "FastVisionModel": FastVisionModel,
        "PatchDPOTrainer": no_patch_is_needed,
        "PatchFastRL": fast.PatchFastRL,
        "PatchKTOTrainer": no_patch_is_needed,
        "is_bf16_supported": is_bfloat16_supported,
        "is_bfloat16_supported": is_bfloat16_supported,
        "vLLMSamplingParams": SamplingParams,
        **DATA,
        **TRAINERS,
        **EXPORT,
        **TOKENIZERS,
    },
    "unsloth.chat_templates": DATA,
    "unsloth.ollama_template_mappers": OLLAMA,
    "unsloth.save": EXPORT | OLLAMA,
    "unsloth.tokenizer_utils": TOKENIZERS,
    "unsloth.trainer": TRAINERS,
    "unsloth_zoo": {"__version__": luthier.__version__},
    "unsloth_zoo.dataset_utils": DATA,
    "unsloth_zoo.llama_cpp": {"convert_to_gguf": gguf.convert_to_gguf, "quantize_gguf": gguf.quantize_gguf},
    "unsloth_zoo.tokenizer_utils": TOKENIZERS,
    "unsloth_zoo.vision_utils": {"UnslothVisionDataCollator": UnslothVisionDataCollator},
}
INSTEAD = {
    **dict.fromkeys(("FastGemmaModel", "FastLlamaModel", "FastMistralModel", "FastQwen2Model"), "FastLanguageModel"),
    "FastSentenceTransformer": "the package sentence-transformers: Luthier trains models that generate text",
    "SyntheticDataKit": "a JSONL file of rows: luthier inspect FILE shows what is read from it",
    "RawTextDataLoader": "datasets.load_dataset('text', data_files=...)",
    "LLM": "model.fast_generate",
    "install_llama_cpp": "model.save_pretrained_gguf, which needs no llama.cpp",
    "process_vision_info": "UnslothVisionDataCollator, or the messages with their images as they are",
    "save_to_gguf": "model.save_pretrained_gguf",
    "unsloth_save_model": "model.save_pretrained_merged",
    "unsloth.kernels": "luthier.accelerate(model), which brings the kernels into any model",
    "unsloth.models": "FastLanguageModel, FastVisionModel or FastModel of unsloth",
    "unsloth_zoo.rl_replacements": "GRPOConfig(loss_type=...) and GRPOTrainer of trl",
}


def missing(module: str, name: str) -> ImportError:
    """The error for a name (or, with an empty one, a module) that Luthier does not have."""
    instead = INSTEAD.get(name or module)
    if instead is not None:
        return ImportError(f"Luthier has no {f'{module}.{name}' if name else module}. Use instead: {instead}.", name=module)
    known = [key for key in MODULES.get(module, ()) if not key.startswith("__")] if name else MODULES
    return ImportError(str(unknown(f"name of {module}" if name else "module", name or module, known)), name=module)


class _Alias(ModuleType):
    """One of ``MODULES``. Names that it does not have are an ``ImportError``, however they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        raise missing(self.__name__, name)


class _Finder(MetaPathFinder, Loader):
    """Makes ``MODULES`` importable, and nothing else of those packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in MODULES:
            return ModuleSpec(name, self, is_package=True)
        if name.split(".")[0] in MODULES:
            raise missing(name, "")
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(MODULES[module.__name__])


# --- the runner ------------------------------------------------------------------------------------------------------


class OnCpu(TorchFunctionMode):
    """The device "cuda" means the CPU: ``inputs.to("cuda")`` and ``tensor.cuda()`` stay where they are."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to:
            args = tuple(map(_on_cpu, args))
        if "device" in kwargs:
            kwargs = kwargs | {"device": _on_cpu(kwargs["device"])}
        return function(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu")
    return value


CPU = SimpleNamespace(name="CPU", total_memory=1, major=0, minor=0, multi_processor_count=os.cpu_count())


def apply_chat_template(self: PreTrainedTokenizerBase, *args: Any, return_dict: bool = False, **kwargs: Any) -> Any:
    """A tokenizer's, with what was the default of ``return_dict`` in transformers 4."""
    return TOKENIZE(self, *args, return_dict=return_dict, **kwargs)


VLLM = importlib.util.find_spec("vllm") is not None
TOKENIZE = PreTrainedTokenizerBase.apply_chat_template


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of ``owner`` inside the block; behind it they are what they were."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def surroundings(source: str) -> Iterator[None]:
    """All that the script with this text is to find in its process (see the top of this file), until the block ends."""
    modules, finder = dict(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    if not VLLM:
        sys.modules["vllm"] = _Alias("vllm")
        vars(sys.modules["vllm"]).update(SamplingParams=SamplingParams, __version__="0", __spec__=ModuleSpec("vllm", None))
    with contextlib.ExitStack() as stack:
        trainers = {"SFTTrainer": SFTTrainer, "SFTConfig": SFTConfig, "GRPOTrainer": grpo.GRPOTrainer, "GRPOConfig": GRPOConfig}
        stack.enter_context(replaced(trl, **trainers))
        stack.enter_context(replaced(trl.trainer, **trainers))
        stack.enter_context(replaced(sys.modules["transformers"], TrainingArguments=SFTConfig))
        stack.enter_context(replaced(PreTrainedTokenizerBase, apply_chat_template=apply_chat_template))
        if not torch.cuda.is_available() and "cuda" in source:
            say("There is no GPU: the device 'cuda' of the script is the CPU.")
            stack.enter_context(OnCpu())
            stack.enter_context(replaced(torch.cuda, get_device_properties=lambda *device: CPU))
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.split(".")[0] in ("unsloth", "unsloth_zoo", "vllm")]:
                if name not in modules:
                    del sys.modules[name]


def main(given: list[str] | None = None) -> int:
    """Run a script with its arguments; gives the exit code. What the script raises is raised."""
    given = sys.argv[1:] if given is None else given
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 2
    script = Path(given[0])
    if not script.is_file():
        say(f"Error: there is no script {given[0]!r}. {USAGE.splitlines()[0]}")
        return 2
    path = [str(script.resolve().parent), *sys.path]
    with surroundings(script.read_text(encoding="utf-8")), replaced(sys, argv=given, path=path):
        runpy.run_path(given[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    from luthier.compat.unsloth import main as run  # as a module with its own name, so that its classes can be found by it

    sys.exit(run())
