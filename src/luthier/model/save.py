"""Saving what was trained: the adapter, or the whole model with the adapter merged in; to disk and to the Hub."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from luthier.data.chat import strip_generation_marks
from luthier.data.render import text_tokenizer
from luthier.errors import suggesting_names, unknown
from luthier.files import atomic_directory, require_space
from luthier.model.checkpoint import HUB_NAME, INDEX, SINGLE, is_adapter
from luthier.model.merge import BASES, Base, Merge
from luthier.model.shards import parse_size, room_for, write_shards
from luthier.ops.nf4 import dequantise, quantised
from luthier.terminal import progress, say

SAVE_METHODS = ("merged_16bit", "merged_4bit", "lora")
SMALL_FILES = 64 * 2**20  # bytes allowed for tokenizer, config and the like when disk space is checked
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
NF4_BYTES = 0.53  # per weight: half a byte, a scale of one byte for 64, and their scales
STATISTICS_BYTES = 4096  # per matrix, at most: the two tables and the description

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin


@suggesting_names
def save_pretrained_merged(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    save_method: str = "merged_16bit",
    base: Base = "16bit",
    max_shard_size: int | str = "5GB",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
) -> Path:
    """Write a model that plain transformers loads -> its directory; all of it, or nothing.

    ``merged_16bit``: ``W + scale * B @ A`` in fp32, rounded once. ``merged_4bit``: the same in fp32, quantised once to NF4,
    and the gap printed. ``lora``: the adapter alone. ``base`` says what is merged onto: the original checkpoint's weights
    ("16bit") or those that were trained against ("nf4"). ``push_to_hub`` uploads it under the directory's name.
    """
    directory = Path(directory)
    repo_id = str(directory) if HUB_NAME.fullmatch(str(directory)) else directory.name
    if push_to_hub:
        require_hub_name(repo_id)
    _check(model, directory, save_method, base, max_shard_size)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer must be the model's tokenizer or processor, not {tokenizer!r}.")
    if tokenizer is None:
        warnings.warn(f"No tokenizer was given: {directory} will have none. Pass it to save it too.", UserWarning, stacklevel=3)
    elif len(text_tokenizer(tokenizer)) > (rows := model.get_input_embeddings().weight.shape[0]):
        warnings.warn(
            f"The tokenizer has {len(text_tokenizer(tokenizer))} tokens and the model {rows} rows: the others are an error in "
            "every text. Add tokens with add_new_tokens, before get_peft_model.",
            UserWarning,
            stacklevel=3,
        )
    if save_method == "lora":
        save_adapter(model, directory, tokenizer)
    else:
        _save_merged(model, directory, tokenizer, save_method, base, max_shard_size)
    if push_to_hub:
        upload(directory, repo_id, token, private)
    return directory


@suggesting_names
def push_to_hub_merged(
    model: nn.Module,
    repo_id: str,
    tokenizer: Tokenizer | None = None,
    save_method: str = "merged_16bit",
    base: Base = "16bit",
    max_shard_size: int | str = "5GB",
    token: str | bool | None = None,
    private: bool | None = None,
) -> str:
    """``save_pretrained_merged`` into a Hub repository, made if it is not there -> the address of the commit."""
    require_hub_name(repo_id)
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        directory = Path(place) / "upload"
        save_pretrained_merged(model, directory, tokenizer, save_method, base, max_shard_size)
        return upload(directory, repo_id, token, private)


def require_hub_name(repo_id: str) -> None:
    if not HUB_NAME.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not a Hub name. Give one such as 'you/your-model'.")


def upload(directory: Path, repo_id: str, token: str | bool | None = None, private: bool | None = None) -> str:
    """Upload a directory to a Hub repository, made if it is not there -> the address of the commit."""
    from huggingface_hub import HfApi, errors

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Upload from Luthier").commit_url
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id!r}: pass a token that may as token=..., or run 'hf auth login'."
            ) from error
        raise ConnectionError(f"The Hub did not take {repo_id!r}: {error}. What was saved is still in {directory}.") from error


def save_adapter(model: nn.Module, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the adapter alone, with the name or absolute path of its base, and the tokenizer."""
    if not isinstance(model, PeftModel):
        raise ValueError("save_method='lora' saves an adapter, and this model has none. Use save_method='merged_16bit'.")
    require_space(directory, sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + SMALL_FILES)
    with atomic_directory(directory) as place:
        # True where the vocabulary grew and is not trained whole: peft would otherwise ask the Hub
        model.save_pretrained(place, save_embedding_layers=_grown_vocabulary(model))
        (place / "README.md").unlink()  # an empty form, with a local path in it that the Hub refuses
        _save_tokenizer(tokenizer, place)


def _grown_vocabulary(model: PeftModel) -> bool:
    base = model.get_base_model()
    info = getattr(base, "luthier", None)
    saved = set().union(*(config.modules_to_save or () for config in model.peft_config.values()))
    return info is not None and info.vocabulary != base.get_input_embeddings().weight.shape[0] and not saved


def _check(model: nn.Module, directory: Path, save_method: str, base: str, max_shard_size: int | str) -> None:
    if save_method not in SAVE_METHODS:
        raise unknown("save_method", save_method, SAVE_METHODS)
    if base not in BASES:
        raise unknown("base", base, BASES)
    parse_size(max_shard_size)
    info = getattr(model, "luthier", None)
    is_base = info is not None and directory.resolve() == info.base_path.resolve()
    if save_method != "lora":
        if is_base:
            raise ValueError(f"{directory} is the base model that is merged onto. Choose another output directory.")
        if is_adapter(directory):
            raise ValueError(f"{directory} holds an adapter, which a model beside it would hide. Choose another directory.")
    elif not is_base and ((directory / SINGLE).exists() or (directory / INDEX).exists()):
        raise ValueError(f"{directory} holds a whole model, and not the base of this adapter. Choose another directory.")


def _save_merged(
    model: nn.Module, directory: Path, tokenizer: Tokenizer | None, save_method: str, base: Base, max_shard_size: int | str
) -> None:
    merge = Merge(model, base)
    config = merged_config(merge)
    names = [name for group in merge.groups for name in group.tensors]
    if save_method == "merged_4bit":
        quantiser = Quantiser(merge)
        names += [f"{name}.{part}" for name in quantiser.names for part in STATISTICS]
        tensors, size = quantiser.tensors(), quantiser.size
        config.quantization_config = quantiser.config
    else:
        tensors, size = merge.tensors(), merge.size
    require_space(directory, size + SMALL_FILES)
    with atomic_directory(directory) as place, progress(f"Saving {directory.name}", total=len(merge.groups)) as bar:
        write_shards(place, _counted(tensors, bar), parse_size(max_shard_size), room_for(names))
        config.save_pretrained(place)
        if merge.model.generation_config is not None:
            merge.model.generation_config.save_pretrained(place)
        _save_tokenizer(tokenizer, place)
        if merge.info is not None and merge.info.trust_remote_code:
            for file in merge.info.base_path.glob("*.py"):  # the code that the config names
                shutil.copy(file, place)
    if save_method == "merged_4bit":
        say(f"merged_4bit: the NF4 weights differ from the merged ones by {quantiser.gap:.2%} (relative, root mean square)")


def _counted(tensors: Iterator[tuple[str, Tensor]], bar) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        bar.advance(1)


def merged_config(merge: Merge) -> PreTrainedConfig:
    """The config of the merged model: architecture, dtype, vocabulary and ties as they are now, nothing quantised."""
    model: PreTrainedModel = merge.model
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = merge.dtype
    text = config.get_text_config()
    rows = model.get_input_embeddings().weight.shape[0]
    if merge.info is None or rows != merge.info.vocabulary:  # some families have more rows than vocab_size says
        text.vocab_size = rows
    for part in (config, text):
        if merge.is_untied:
            part.tie_word_embeddings = False
        if getattr(part, "use_cache", None) is False:  # training switches it off
            part.use_cache = True
    return config


def _save_tokenizer(tokenizer: Tokenizer | None, directory: Path) -> None:
    """Without the generation marks in its chat template, which only training reads and other programs do not know."""
    if tokenizer is None:
        return
    tokenizer = copy.deepcopy(tokenizer)
    for part in (tokenizer, text_tokenizer(tokenizer)):
        if isinstance(part.chat_template, str):
            part.chat_template = strip_generation_marks(part.chat_template)
    tokenizer.save_pretrained(directory)


class Quantiser:
    """Turns the fp32 tensors of a merge into those of an NF4 checkpoint, and measures what that costs."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.names, skipped = self._split()
        self.config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=merge.dtype,
            llm_int8_skip_modules=skipped,
        )
        self.error = self.norm = 0.0

    def _split(self) -> tuple[set[str], list[str]]:
        """Names of the weights to quantise, and the linear layers to leave alone: the head, and what was in 16 bits."""
        slots, head = self.merge.slots, self.merge.model.get_output_embeddings()
        already = any(slot.is_quantised for slot in slots.values())
        names, skipped = set(), [name for name, module in self.merge.model.named_modules() if module is head]  # tied ones too
        for group in self.merge.groups:
            slot = slots[group.parameters[0]]
            layer, _, part = group.parameters[0].rpartition(".")
            if part != "weight" or not isinstance(slot.owner, nn.Linear):
                continue
            if group.is_one_to_one and (slot.is_quantised if already else slot.owner is not head):
                names.add(next(iter(group.tensors)))
            elif layer not in skipped:
                skipped.append(layer)
        return names, skipped

    @property
    def size(self) -> int:
        """Bytes, at most."""
        counts = {name: shape.numel() for group in self.merge.groups for name, shape in group.tensors.items()}
        packed = sum(NF4_BYTES * counts[name] + STATISTICS_BYTES for name in self.names)
        return int(packed) + sum(self.merge.dtypes[name].itemsize * counts[name] for name in counts.keys() - self.names)

    @property
    def gap(self) -> float:
        """||NF4 - merged|| / ||merged|| over all quantised weights so far."""
        return (self.error / self.norm) ** 0.5 if self.norm else 0.0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.merge.tensors(rounded=False):
            if name not in self.names:
                yield name, tensor.to(self.merge.dtypes[name])
                continue
            tensor = tensor.to(self.merge.model.device, torch.float32)
            weight = bnb.nn.Params4bit(tensor, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
                tensor.device
            )
            self.error += (dequantise(quantised(weight)) - tensor).square().sum().item()
            self.norm += tensor.square().sum().item()
            weight.quant_state.dtype = self.merge.dtype
            yield name, weight.data.cpu()
            for part, value in weight.quant_state.as_dict(packed=True).items():
                yield f"{name}.{part}", value.cpu()
