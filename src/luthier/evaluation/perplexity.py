"""Perplexity of a model on tokenised rows, weighted by tokens: a long row counts for more than a short one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood (nats per token) over ``tokens`` scored tokens of ``rows`` rows."""

    loss: float
    tokens: int
    rows: int

    @property
    def value(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def perplexity(model: Any, dataset: Iterable[Mapping[str, Any]], batch_size: int = 8) -> Perplexity:
    """Score rows of ``input_ids`` and, where present, ``labels`` (same length, -100 where a token does not count).

    The first token of a row is never scored. Runs in evaluation mode and leaves the model's mode as it was.
    Raises ``ValueError`` where a row has no ``input_ids``, labels of another length, or no row has a scored token.
    """
    device = next(model.parameters()).device
    total, tokens, rows = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(dataset, batch_size):
                input_ids, attention_mask, labels = (part.to(device) for part in _padded(batch, rows))
                logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
                total += _summed_loss(logits, labels)
                tokens += int((labels[:, 1:] != IGNORED).sum())
                rows += len(batch)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError(f"None of the {rows} rows has a token to score: are all labels {IGNORED}, or the rows empty?")
    return Perplexity(total / tokens, tokens, rows)


def _batches(dataset: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(dataset)
    while batch := list(islice(rows, size)):
        yield batch


def _padded(batch: list[Mapping[str, Any]], first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded input ids, attention mask and labels, each (rows, longest), int64."""
    ids, labels = [], []
    for number, row in enumerate(batch, start=first):
        if "input_ids" not in row:
            raise ValueError(f"Row {number} has the columns {', '.join(row)}: perplexity needs 'input_ids' (see prepare_chat)")
        ids.append([int(token) for token in row["input_ids"]])
        labels.append([int(token) for token in row.get("labels", ids[-1])])
        if len(labels[-1]) != len(ids[-1]):
            raise ValueError(f"Row {number} has {len(ids[-1])} input_ids but {len(labels[-1])} labels")
    width = max(max(map(len, ids)), 1)
    return (
        torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    )


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of the negative log-likelihoods, in fp32 and a slice of tokens at a time."""
    flat_logits, flat_labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    pieces = zip(flat_logits.split(TOKENS_PER_BATCH), flat_labels.split(TOKENS_PER_BATCH), strict=True)
    return sum(F.cross_entropy(some.float(), right, ignore_index=IGNORED, reduction="sum").item() for some, right in pieces)
