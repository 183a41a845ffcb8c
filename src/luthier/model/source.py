"""What a model's name stands for: its directories and its config, checked before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from luthier import adapters
from luthier.errors import UnsupportedError
from luthier.model import checkpoint

TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")


@dataclass(frozen=True)
class Source:
    """The directories that a model comes from, checked."""

    base: Path
    base_name: str
    checkpoint: checkpoint.Checkpoint
    adapter: Path | None
    tokenizer: Path


def find_files(name: str | Path, subfolder: str | None = None, **hub: object) -> Source:
    """Find the base model, adapter and tokenizer that ``name`` stands for, and check their weight files."""
    directory = checkpoint.locate(name, **hub)
    if subfolder is not None:
        directory = directory / subfolder
        if not directory.is_dir():
            raise FileNotFoundError(f"{name} has no folder {subfolder!r}. Leave subfolder out, or name one that it has.")
    is_hub = not Path(name).expanduser().exists()
    if not checkpoint.is_adapter(directory):
        base_name = str(name) if is_hub else str(directory)
        if not (directory / "config.json").exists():
            raise FileNotFoundError(
                f"{name} has neither config.json nor {checkpoint.ADAPTER_CONFIG}: it is no model and no adapter. "
                "Give the directory that save_pretrained wrote."
            )
        return Source(directory, base_name, checkpoint.open_checkpoint(directory), None, directory)
    checkpoint.check_adapter(directory)
    base_name = checkpoint.base_of_adapter(directory)
    local = Path(base_name).expanduser()
    if local.is_absolute() and not local.exists():
        raise FileNotFoundError(
            f"The adapter {directory} belongs to the base model {base_name}, which no longer exists. Put it back, or write its "
            f"new place into 'base_model_name_or_path' of {directory / checkpoint.ADAPTER_CONFIG}."
        )
    hub["revision"] = checkpoint.read_json(directory / checkpoint.ADAPTER_CONFIG).get("revision")
    base = checkpoint.locate(base_name, **hub)
    base_name = str(base) if local.exists() else base_name
    tokenizer = directory if (directory / "tokenizer_config.json").exists() else base
    return Source(base, base_name, checkpoint.open_checkpoint(base), directory, tokenizer)


def read_config(directory: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint directory; broken JSON and an unknown architecture are ``ValueError``."""
    raw = checkpoint.read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():  # transformers passes over a broken one without a word
        checkpoint.read_json(generation)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES and not (trust_remote_code and "auto_map" in raw):
        own_code = "auto_map" in raw
        remedy = (
            "It brings its own code: read it, and if you trust it pass trust_remote_code=True."
            if own_code
            else "A newer transformers may know it: pip install -U transformers."
        )
        raise ValueError(
            f"{directory / 'config.json'} describes an unknown architecture, model_type {model_type!r}. {remedy} "
            "docs/architectures.md lists the families that are tested."
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{directory / 'config.json'} describes no model: {why} Copy or download it again.") from error


def is_vision(config: PreTrainedConfig) -> bool:
    return getattr(config, "vision_config", None) is not None


def text_config(
    config: PreTrainedConfig, files: checkpoint.Checkpoint, name: str | Path, text_only: bool
) -> tuple[PreTrainedConfig, dict[str, str]]:
    """What of a config a language model is made from -> (config, prefixes of the checkpoint that become ``model.``)."""
    if not is_vision(config):
        return config, {}
    if not text_only:
        raise ValueError(
            f"{name} is a vision model ({config.model_type}): load it with FastVisionModel, or its language part alone with "
            "text_only=True."
        )
    text = config.get_text_config()
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"transformers has no text-only class for {config.model_type}: use FastVisionModel, which trains on text too."
        )
    text = type(text).from_dict(text.to_dict())
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    prefix = next((prefix for prefix in TEXT_PREFIXES if any(name.startswith(prefix) for name in files.files)), "")
    mapping = {f"^{prefix}".replace(".", r"\."): "model."} if prefix else {}
    if any(name.startswith("language_model.lm_head.") for name in files.files):
        mapping = {r"^language_model\.lm_head\.": "lm_head.", **mapping}
    return text, mapping


def require_causal_lm(config: PreTrainedConfig, directory: Path) -> None:
    custom = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in custom:
        raise ValueError(
            f"{directory} is a {config.model_type!r} model, which is not a language model that generates text. "
            "Give a causal language model."
        )


def require_width(config: PreTrainedConfig, files: checkpoint.Checkpoint) -> None:
    """Refuse a config of another size than its weights before a model of that size is made, which may not fit in memory.

    A config.json that lacks its numbers gets the defaults of its class, often those of a model of 7 billion parameters.
    """
    tables = [entry["shape"] for name, entry in files.headers.items() if name.endswith("embed_tokens.weight")]
    width = getattr(config.get_text_config(), "hidden_size", None)
    if adapters.find(config) is not None and tables and tables[0][-1] != width:
        raise ValueError(
            f"{files.directory / 'config.json'} describes a model of hidden_size {width}, but its weights are of "
            f"{tables[0][-1]}. Copy or download the checkpoint again."
        )
