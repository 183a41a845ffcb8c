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
from luthier.gguf.experts import expert_tensors, experts_of, squared_inputs
from luthier.gguf.imatrix import Importance, mean_squares, write_importance
from luthier.gguf.metadata import is_tied
from luthier.gguf.plan import route
from luthier.terminal import progress

WRAPPERS = ("base_model.model.", "base_layer.")  # what peft puts into the names of modules


@dataclass
class Calibration:
    """Sums of squared inputs by GGUF tensor name, float32 ``[columns]`` or ``[experts, columns]``, and over how many tokens:
    ``[1]`` or ``[experts]``.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0

    @property
    def importance(self) -> Importance:
        """Mean square of every input column, what ``imatrix=`` takes."""
        return {name: mean_squares(sums, self.counts[name]) for name, sums in self.sums.items()}

    def save(self, path: str | Path) -> Path:
        """Write a file that llama.cpp's quantiser reads, too."""
        return write_importance(path, self.sums, self.counts, self.tokens)

    def add(self, name: str, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Add the sums of some tokens."""
        sums, counts = sums.cpu(), counts.float().cpu()
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts


def calibrate(
    model: nn.Module, tokenizer: Any, data: Iterable[str | Mapping[str, Any]], length: int = 512, max_tokens: int = 200_000
) -> Calibration:
    """Run ``data`` through the model and note how strongly every column of its weight matrices is used.

    ``data``: texts, or rows with ``messages``, ``text`` or ``input_ids``; of each the first ``length`` tokens count, until
    ``max_tokens``. Every expert is measured on the tokens that it gets; all columns of one that gets none count the same.
    Raises ``ValueError`` where the data holds no text.
    """
    sequences = text_sequences(tokenizer, data, length, max_tokens)
    result = Calibration(tokens=sum(map(len, sequences)))
    hooks = [module.register_forward_pre_hook(_adder(result, name)) for name, module in _matrices(model)]
    hooks += [
        module.register_forward_pre_hook(_expert_adder(result, prefix), with_kwargs=True)
        for prefix, module in experts_of(model)
    ]
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
    """(GGUF tensor name, module) of every linear layer, around its adapter if it has one. A head that is the embeddings, too,
    counts as the head: there its columns add up.
    """
    architecture, seen = architectures.find(model.config), set()
    for path, module in model.named_modules():
        for wrapper in WRAPPERS:
            path = path.replace(wrapper, "")
        path = path.removesuffix(".base_layer")
        if not hasattr(module, "in_features"):
            continue
        tied_head = path.endswith("lm_head") and is_tied(model.config)
        names = [piece.name for piece in route(architecture, model.config, f"{path}.weight") or ()]
        for name in ["token_embd.weight"] if tied_head else names:
            if name not in seen:
                seen.add(name)
                yield name, module


def _adder(result: Calibration, name: str) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        result.add(name, x.square().sum(0), torch.tensor([len(x)]))

    return add


def _expert_adder(result: Calibration, prefix: str) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]) -> None:
        hidden, chosen, *_ = (*inputs, *named.values())  # the routing weights come last
        first, last, counts = squared_inputs(module, hidden.reshape(-1, hidden.shape[-1]), chosen)
        for name in expert_tensors(prefix, module):
            result.add(name, last if "_down_" in name else first, counts)

    return add
