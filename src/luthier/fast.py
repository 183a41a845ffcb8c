"""What a user holds in the hand: load a model, attach an adapter, and save what came out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from luthier.model.accelerate import accelerate, base_model, state_of
from luthier.model.checkpointing import set_checkpointing
from luthier.model.clock import Clock
from luthier.model.compute import set_compute
from luthier.model.generation import generate
from luthier.model.load import load_model
from luthier.model.lora import get_peft_model
from luthier.model.rope import save_scaling
from luthier.model.save import push_to_hub_merged, save_pretrained_merged
from luthier.model.source import find_files, is_vision, read_config
from luthier.model.vision import load_vision_model
from luthier.proof.export import push_to_hub_gguf, save_pretrained_gguf
from luthier.rl.engine import fast_generate, load_lora, save_lora
from luthier.terminal import say

SAVERS = {
    "save_pretrained_merged": save_pretrained_merged,
    "push_to_hub_merged": push_to_hub_merged,
    "save_pretrained_gguf": save_pretrained_gguf,
    "push_to_hub_gguf": push_to_hub_gguf,
    "save_lora": save_lora,
    "load_lora": load_lora,
}


class FastLanguageModel:
    """Text models."""

    @staticmethod
    @functools.wraps(load_model)
    def from_pretrained(*args: Any, **kwargs: Any) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        return _loaded(load_model, args, kwargs)

    @staticmethod
    @functools.wraps(get_peft_model)
    def get_peft_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PeftModel:
        state = state_of(model)
        clock = state.clock if state is not None and state.clock is not None else Clock()
        with clock.part("adapters"):
            adapted = accelerate(get_peft_model(model, *args, **kwargs))
        tokenizer = model.fast_generate.keywords["tokenizer"] if "fast_generate" in model.__dict__ else None
        return _with_methods(adapted, tokenizer)

    @staticmethod
    def for_inference(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """Evaluation mode, nothing recomputed; gives the model back. ``model.generate`` does not need it."""
        set_checkpointing(model, False)
        return model.eval()

    @staticmethod
    def for_training(
        model: PreTrainedModel | PeftModel, use_gradient_checkpointing: bool | str | None = None
    ) -> PreTrainedModel | PeftModel:
        """Training mode, recomputing as asked or as the model was loaded; gives the model back."""
        mode = model.luthier.use_gradient_checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing
        return set_checkpointing(model, mode).train()


class FastVisionModel(FastLanguageModel):
    """Vision-language models: ``from_pretrained`` gives the processor instead of a tokenizer."""

    @staticmethod
    @functools.wraps(load_vision_model)
    def from_pretrained(*args: Any, **kwargs: Any) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
        return _loaded(load_vision_model, args, kwargs)


class FastModel(FastLanguageModel):
    """Either kind, told apart by the checkpoint's config."""

    @staticmethod
    @functools.wraps(load_model)
    def from_pretrained(model_name: str | Path, *args: Any, **kwargs: Any) -> tuple:
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        source = find_files(model_name, kwargs.get("subfolder"), **hub)
        config = read_config(source.base, kwargs.get("trust_remote_code", False))
        kind = FastVisionModel if is_vision(config) and not kwargs.get("text_only") else FastLanguageModel
        return kind.from_pretrained(model_name, *args, **kwargs)


def PatchFastRL(*args: Any, **kwargs: Any) -> None:  # noqa: N802, the name that scripts call
    """Does nothing: GRPO needs no patch here."""
    say("PatchFastRL: no patch is needed; luthier.GRPOTrainer and TRL's trainers work as they are.")


def _loaded(load: Callable, args: tuple, kwargs: dict) -> tuple:
    """What ``load`` gives, ready to train, with a clock that says when it has."""
    with Clock().part("loading") as clock:
        model, processor = _ready(*load(*args, **kwargs))
    state = state_of(model)
    if state is not None:
        state.clock = clock
    return model, processor


def _ready(
    model: PreTrainedModel | PeftModel, processor: PreTrainedTokenizerBase | ProcessorMixin
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Recomputation as asked, our forward passes, and the methods that save and generate."""
    set_checkpointing(model, model.luthier.use_gradient_checkpointing)
    set_compute(accelerate(model), model.luthier.compute)
    return _with_methods(model, getattr(processor, "tokenizer", processor)), processor


def _with_methods(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel | PeftModel:
    base = base_model(model)
    base.generate = _bound(generate, base)
    if isinstance(model, PeftModel):
        model.save_pretrained = _bound(_save_adapter, model)
    for name, method in SAVERS.items():
        setattr(model, name, _bound(method, model))
    if tokenizer is not None:
        model.fast_generate = functools.partial(fast_generate, model, tokenizer=tokenizer)
    return model


def _bound(method: Callable, model: nn.Module) -> Callable:
    """No MethodType: pickle would look for the method in the class, where it is not."""
    bound = functools.partial(method, model)
    bound.__doc__ = method.__doc__
    return bound


def _save_adapter(model: PeftModel, save_directory: str | Path, **kwargs: Any) -> None:
    """peft's ``save_pretrained``, and the RoPE scaling that the adapter was trained with, which peft does not save."""
    type(model).save_pretrained(model, save_directory, **kwargs)
    save_scaling(model.config, read_config(model.luthier.base_path, model.luthier.trust_remote_code), Path(save_directory))
