"""From the model in memory to GGUF files, merging tensor by tensor on the way: no 16-bit copy is written in between."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from luthier.files import atomic_file
from luthier.gguf import architectures
from luthier.gguf.convert import output_paths, write_gguf
from luthier.gguf.ollama import create_ollama_modelfile
from luthier.model.merge import Base, Merge
from luthier.model.save import merged_config
from luthier.terminal import progress

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin


class MergeSource:
    """A merge as the source of an export: names and shapes at once, tensors in fp32, unrounded, one by one."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self.shapes = {name: tuple(shape) for group in merge.groups for name, shape in group.tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with progress("Merging and writing GGUF", total=len(self.shapes)) as bar:
            for name, tensor in self._merge.tensors(rounded=False):
                yield name, tensor
                bar.advance(1)


def write_merged_gguf(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Tokenizer,
    quantization_method: str | Sequence[str] = "q8_0",
    imatrix: str | Path | dict[str, torch.Tensor] | None = None,
    base: Base = "16bit",
) -> list[Path]:
    """Write GGUF files of the model, its adapter merged in, and an Ollama Modelfile for each -> paths of the GGUF files.

    ``save_pretrained_gguf`` (proof/export.py) is this, proved.

    ``quantization_method``: one of ``ALLOWED_QUANTS`` or a list, all written in one pass. ``base``: what the adapter is
    merged onto, the original checkpoint ("16bit") or the weights that were trained against ("nf4").
    Raises ``UnsupportedError`` for an architecture or tokenizer that is not covered, before anything is written.
    """
    directory = Path(directory)
    if tokenizer is None:
        raise TypeError("tokenizer is None: a GGUF file holds the tokenizer too, so give it.")
    outputs = output_paths(directory, directory.resolve().name, quantization_method)
    architectures.find(model.config)
    merge = Merge(model, base)
    with tempfile.TemporaryDirectory(prefix="luthier-") as place:
        tokenizer.save_pretrained(place)
        files = write_gguf(merged_config(merge), place, MergeSource(merge), outputs, imatrix, directory.resolve().name)
    for path in files:
        with atomic_file(path.parent / f"Modelfile-{path.stem}") as modelfile:
            modelfile.write_text(create_ollama_modelfile(tokenizer, path), encoding="utf-8")
    return files
