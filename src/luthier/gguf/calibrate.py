"""The importance matrix of a loaded model, from text of the user's own: hooks add up the squares of what goes in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.data.render import render, text_tokenizer
from luthier.gguf import architectures
from luthier.gguf.imatrix import Importance, write_importance
from luthier.gguf.plan import route
from luthier.terminal import progress

WRAPPERS = ("base_model.model.", "base_layer.")  # what peft puts into the names of modules


@dataclass
class Calibration:
    """Sums of squared inputs by GGUF tensor name (float32 ``[columns]``), over so many tokens."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0

    @property
    def importance(self) -> Importance:
        """Mean square of every input column, what ``imatrix=`` takes."""
        return {name: sums / self.tokens for name, sums in self.sums.items()}

    def save(self, path: str | Path) -> Path:
        """Write a file that llama.cpp's quantiser reads, too."""
        counts = {name: torch.tensor([float(self.tokens)]) for name in self.sums}
        return write_importance(path, self.sums, counts, self.tokens)


def calibrate(
    model: nn.Module, tokenizer: Any, data: Iterable[str | Mapping[str, Any]], length: int = 512, max_tokens: int = 200_000
) -> Calibration:
    """Run ``data`` through the model and note how strongly every column of its weight matrices is used.

    ``data``: texts, or rows with ``messages``, ``text`` or ``input_ids``; of each the first ``length`` tokens count, until
    ``max_tokens``. Experts and the output head are left out: they are quantised without importance. Raises ``ValueError``
    where the data holds no text.
    """
    sequences = text_sequences(tokenizer, data, length, max_tokens)
    result = Calibration(tokens=sum(map(len, sequences)))
    hooks = [module.register_forward_pre_hook(_adder(result, name)) for name, module in _matrices(model)]
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad(), progress("Importance matrix", total=len(sequences)) as bar:
            for ids in sequences:
                model(torch.tensor([ids], device=device))
                bar.advance(1)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return result


def text_sequences(tokenizer: Any, data: Iterable[str | Mapping[str, Any]], length: int, max_tokens: int) -> list[list[int]]:
    """Token ids of texts or rows, as `calibrate` takes them; ``ValueError`` where there are none."""
    sequences, seen = [], 0
    for row in data:
        ids = _ids(text_tokenizer(tokenizer), row)[: min(length, max_tokens - seen)]
        if ids:
            sequences.append(ids)
        seen += len(ids)
        if seen >= max_tokens:
            break
    if not sequences:
        raise ValueError("The data holds no text: give texts, or rows with messages, text or input_ids.")
    return sequences


def _ids(tokenizer: Any, row: str | Mapping[str, Any]) -> list[int]:
    if isinstance(row, str):
        return tokenizer(row)["input_ids"]
    if row.get("input_ids") is not None:
        return list(row["input_ids"])
    if row.get("messages"):
        return tokenizer(render(tokenizer, row["messages"]), add_special_tokens=False)["input_ids"]
    return tokenizer(row["text"])["input_ids"] if row.get("text") else []


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(GGUF tensor name, module) of every linear layer inside of the decoder layers, around its adapter if it has one."""
    architecture, seen = architectures.find(model.config), set()
    for path, module in model.named_modules():
        for wrapper in WRAPPERS:
            path = path.replace(wrapper, "")
        path = path.removesuffix(".base_layer")
        pieces = route(architecture, model.config, f"{path}.weight") if hasattr(module, "in_features") else None
        for piece in pieces or ():
            if piece.name.startswith("blk.") and piece.name not in seen:
                seen.add(piece.name)
                yield piece.name, module


def _adder(result: Calibration, name: str) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        sums = x.square().sum(0).cpu()
        result.sums[name] = result.sums[name] + sums if name in result.sums else sums

    return add
