"""A mixture of tensor types of one's own: which tensor gets how many bits, decided by what its rounding costs this model.

Each matrix is rounded alone to each type, and the divergence of the model's logits on the user's text is measured. Then
bits go where they save most divergence, from the smallest file up to the budget. Costs of tensors are taken to add up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from luthier.errors import UnsupportedError
from luthier.gguf import architectures
from luthier.gguf.calibrate import text_sequences
from luthier.gguf.dequantize import dequantize
from luthier.gguf.experts import expert_tensors, experts_of
from luthier.gguf.imatrix import Importance
from luthier.gguf.metadata import is_tied
from luthier.gguf.plan import route
from luthier.gguf.quantize import encode
from luthier.gguf.types import TENSOR_TYPES, TensorType
from luthier.terminal import progress, table

CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FOR_OTHER_WIDTHS = ("Q4_0", "Q5_0", "Q8_0")  # rows that cannot be cut into superblocks of 256


@dataclass(frozen=True)
class Choice:
    """``types``: tensor type by GGUF tensor name, what ``overrides=`` takes. ``costs``: divergence by tensor and type."""

    types: Mapping[str, TensorType]
    costs: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, int]

    @property
    def bits(self) -> float:
        """Bits per weight of the chosen tensors."""
        total = sum(self.weights[name] * kind.size * 8 / kind.block for name, kind in self.types.items())
        return total / sum(self.weights.values())

    @property
    def divergence(self) -> float:
        """What all roundings together are expected to cost."""
        return sum(self.costs[name][kind.name] for name, kind in self.types.items())

    def show(self) -> None:
        """Print a table: every tensor, its type and its cost."""
        rows = [(name, kind.name, f"{self.costs[name][kind.name]:.2e}") for name, kind in self.types.items()]
        table(
            f"{self.bits:.2f} bits per weight, divergence about {self.divergence:.1e}", ["tensor", "type", "divergence"], rows
        )


def choose_types(
    model: nn.Module,
    tokenizer: Any,
    data: Iterable[str | Mapping[str, Any]],
    bits: float,
    imatrix: Importance | None = None,
    length: int = 256,
    max_tokens: int = 4096,
) -> Choice:
    """Choose a type for every matrix of ``model`` so that the file has at most ``bits`` bits per weight.

    ``model``: with its weights in 16 or 32 bits, adapters merged. ``data``: as for `calibrate`. Raises ``ValueError`` for a
    budget below the smallest types, ``UnsupportedError`` for quantised weights or an adapter that is not merged.
    """
    matrices = dict(_matrices(model))
    sequences = list(text_sequences(tokenizer, data, length, max_tokens))
    reference = _log_probabilities(model, sequences)
    costs: dict[str, dict[str, float]] = {}
    with progress("Measuring", total=len(matrices)) as bar:
        for name, weight in matrices.items():
            costs[name] = {}
            for kind in _candidates(weight):
                with _rounded(weight, kind, (imatrix or {}).get(name)):
                    costs[name][kind.name] = _divergence(reference, _log_probabilities(model, sequences))
            bar.advance(1, note=name)
    weights = {name: weight.numel() for name, weight in matrices.items()}
    return Choice(_spend(costs, weights, bits), costs, weights)


def _spend(costs: Mapping[str, Mapping[str, float]], weights: Mapping[str, int], bits: float) -> dict[str, TensorType]:
    """From the smallest types up: again and again the step that saves most divergence for its bits."""
    chosen = {name: TENSOR_TYPES[min(kinds, key=lambda kind: _size(kind, 1))] for name, kinds in costs.items()}
    left = bits * sum(weights.values()) - sum(_size(kind.name, weights[name]) for name, kind in chosen.items())
    if left < 0:
        least = bits - left / sum(weights.values())
        raise ValueError(f"{bits} bits per weight are too few: the smallest types take {least:.2f} for this model.")
    while True:
        best, gain = None, 0.0
        for name, kinds in costs.items():
            now = chosen[name].name
            for kind, cost in kinds.items():
                extra = _size(kind, weights[name]) - _size(now, weights[name])
                if 0 < extra <= left and (kinds[now] - cost) / extra > gain:
                    best, gain = (name, kind, extra), (kinds[now] - cost) / extra
        if best is None:
            return chosen
        name, kind, extra = best
        chosen[name], left = TENSOR_TYPES[kind], left - extra


def _size(kind: str, weights: int) -> float:
    """Bits of so many weights."""
    return weights * TENSOR_TYPES[kind].size * 8 / TENSOR_TYPES[kind].block


def _candidates(weight: torch.Tensor) -> list[TensorType]:
    columns = weight.shape[-1]
    names = CANDIDATES if columns % 256 == 0 else FOR_OTHER_WIDTHS if columns % 32 == 0 else ("F16",)
    return [TENSOR_TYPES[name] for name in names]


def _matrices(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(GGUF tensor name, parameter or a part of it) of every matrix that becomes one tensor of the file."""
    architecture = architectures.find(model.config)
    for prefix, experts in experts_of(model):
        yield from expert_tensors(prefix, experts).items()
    for path, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if not parameter.is_floating_point() or "base_layer" in path or "lora_" in path:
            raise UnsupportedError(f"{path} is quantised or part of an adapter: load the merged model in 16 bits.")
        if path == "lm_head.weight" and is_tied(model.config):
            continue
        pieces = route(architecture, model.config, path) or ()
        if len(pieces) == 1 and not re.search(r"ffn_gate_inp|_exps\.", pieces[0].name):
            yield pieces[0].name, parameter


@contextlib.contextmanager
def _rounded(weight: torch.Tensor, kind: TensorType, importance: torch.Tensor | None) -> Iterator[None]:
    """The parameter as it would come back from the file."""
    original = weight.detach().clone()
    rows = original.reshape(-1, original.shape[-1])
    if importance is not None:  # of all rows, or of those of every expert
        importance = importance.to(rows.device)
        importance = importance[:, None].expand(original.shape).reshape(rows.shape) if importance.ndim > 1 else importance
        importance = importance.expand(rows.shape)
    with torch.no_grad():
        weight.copy_(dequantize(encode(rows, kind, importance), kind).reshape(weight.shape))
        try:
            yield
        finally:
            weight.copy_(original)


def _log_probabilities(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        result = [model(torch.tensor([list(ids)], device=device)).logits[0].float().log_softmax(-1) for ids in sequences]
    model.train(training)
    return result


def _divergence(reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Mean KL divergence over positions, in nats."""
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(reference, found, strict=True))
    return total / sum(map(len, reference))
