"""Luthier: fine-tune language and vision-language models, and prove that the model you keep is the one you trained.

Names are loaded when they are first used; ``import luthier`` itself imports nothing heavy and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "luthier.fast": ("FastLanguageModel", "FastVisionModel", "FastModel", "PatchFastRL"),
    "luthier.data.chat": ("CHAT_TEMPLATES", "get_chat_template"),
    "luthier.data.formats": ("standardize_sharegpt", "standardize_data_formats", "to_sharegpt", "apply_chat_template"),
    "luthier.data.vision": ("VisionDataCollator",),
    "luthier.training.responses": ("train_on_responses_only",),
    "luthier.training.trainer": ("Trainer",),
    "luthier.training.arguments": ("TrainingArguments",),
    "luthier.training.grpo": ("GRPOTrainer",),
    "luthier.training.grpo_arguments": ("GRPOConfig",),
    "luthier.rl.sampling": ("SamplingParams",),
    "luthier.model.accelerate": ("accelerate", "restore"),
    "luthier.model.lora": ("get_peft_model",),
    "luthier.model.vocab": ("add_new_tokens",),
    "luthier.model.precision": ("is_bfloat16_supported",),
    "luthier.gguf.types": ("ALLOWED_QUANTS", "print_quantization_methods"),
    "luthier.gguf.ollama": (
        "MODEL_TO_OLLAMA_TEMPLATE_MAPPER",
        "OLLAMA_TEMPLATES",
        "create_ollama_model",
        "create_ollama_modelfile",
    ),
    "luthier.gguf": ("fix_sentencepiece_gguf", "quantize_gguf"),
    "luthier.proof.export": ("convert_to_gguf",),
    "luthier.errors": ("ExportProofError", "UnsupportedError"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from luthier.errors import unknown

        raise AttributeError(str(unknown("name of luthier:", name, __all__)))
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
