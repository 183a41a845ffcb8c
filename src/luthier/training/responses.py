"""``train_on_responses_only``: after a trainer has made its token ids, mask everything but the assistant's answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer

from luthier.data.ledger import NO_TRAINED_TOKEN, Ledger
from luthier.data.masks import IGNORED, ResponseMask, count_trained, nothing_trains
from luthier.data.rows import Row, column_names
from luthier.errors import suggesting_names
from luthier.training.arguments import warn_length

PROBED_ROWS = 8  # of a stream or of pictures, which cannot be looked through beforehand
COUNTS = ("lengths", "lengths_in", "trained")  # columns for the ledger only; a value for every conversation in the row


@suggesting_names
def train_on_responses_only(
    trainer: Trainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    last_response_only: bool = False,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Trainer | Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Set the labels of a trainer's training and evaluation sets to -100 outside the assistant's answers.

    ``instruction_part`` and ``response_part`` are the texts that stand before a user's and an assistant's turn, as in
    ``"<|im_start|>user\\n"`` and ``"<|im_start|>assistant\\n"``; None: those of the tokenizer's own chat template. The stop
    token of an answer trains, what stands behind it does not. ``last_response_only``: only the last answer of a row.

    Labels that are -100 already stay so, hence a second call can only narrow the first. Conversations in which nothing
    trains are dropped, out of packed rows too, and counted in ``trainer.ledger``. Rows that become tokens only in the
    collator (pictures) are masked there. With ``return_function`` the trainer stays as it is, and the answer is a function
    from a batch with ``input_ids`` to ``{"labels": ...}``.

    Raises:
        ValueError: no token of a whole set would train (shown with a row), or the parts cannot be derived.
        TypeError: not a trainer with a tokenizer.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    if tokenizer is None:
        raise TypeError(f"train_on_responses_only needs a trainer with a processing_class (tokenizer), not {trainer!r}.")
    mask = ResponseMask(tokenizer, instruction_part, response_part, last_response_only)
    if return_function:
        return partial(_batch_labels, mask=mask)
    warn_length(trainer.args, trainer.model, stacklevel=4)
    if trainer.train_dataset is None:
        raise ValueError("The trainer has no train_dataset to mask.")

    if getattr(trainer.args, "packing", False) and getattr(trainer.args, "packing_strategy", "bfd") == "wrapped":
        warnings.warn(
            "packing_strategy='wrapped' cuts conversations in two, and the rest of an answer cannot be told from other "
            "text: it will not train. packing_strategy='bfd' keeps conversations whole.",
            UserWarning,
            stacklevel=3,
        )

    # everything is masked before anything is changed: after an error the trainer is what it was
    evaluation = trainer.eval_dataset
    sets = {"train_dataset": trainer.train_dataset}
    if isinstance(evaluation, Mapping):
        sets |= {f"eval_dataset {name!r}": rows for name, rows in evaluation.items()}
    elif evaluation is not None:
        sets["eval_dataset"] = evaluation
    collator = MaskingCollator(trainer.data_collator, mask)
    masked = {name: _masked(rows, name, mask, collator, num_proc) for name, rows in sets.items()}
    if any(rows is sets[name] for name, (rows, _) in masked.items()):
        trainer.data_collator = collator
    trainer.train_dataset, ledger = masked.pop("train_dataset")
    evaluated = [rows for rows, _ in masked.values()]
    if isinstance(evaluation, Mapping):
        trainer.eval_dataset = dict(zip(evaluation, evaluated, strict=True))
    elif evaluation is not None:
        trainer.eval_dataset = evaluated[0]
    _keep_ledger(trainer, ledger)
    return trainer


class MaskingCollator:
    """A collator of rows that become tokens only now, with the labels of its batches masked."""

    def __init__(self, collator: Callable[[list[Row]], dict[str, Any]], mask: ResponseMask) -> None:
        self.collator, self.mask = collator, mask

    def __call__(self, examples: list[Row]) -> dict[str, Any]:
        batch = self.collator(examples)
        found = torch.tensor([self.mask(ids) for ids in batch["input_ids"].tolist()], device=batch["input_ids"].device)
        ignored = (found == IGNORED) | (batch["attention_mask"] == 0 if "attention_mask" in batch else False)
        batch["labels"] = batch.get("labels", batch["input_ids"]).masked_fill(ignored, IGNORED)
        return batch


def _masked(
    rows: Any, name: str, mask: ResponseMask, collator: MaskingCollator, num_proc: int | None
) -> tuple[Any, Ledger | None]:
    """The masked set and its ledger. Rows that are no tokens yet are given back as they are: the collator masks them."""
    if not isinstance(rows, (Dataset, IterableDataset)) or "input_ids" not in column_names(rows):
        probed = [dict(row) for row, _ in zip(rows, range(PROBED_ROWS), strict=False)]
        batch = collator(probed)
        if not any(map(count_trained, batch["labels"].tolist())):
            raise nothing_trains(_first_rows(name, probed), mask.tokenizer, batch["input_ids"][0].tolist(), str(mask))
        return rows, None
    if isinstance(rows, IterableDataset):
        probed = list(rows.take(PROBED_ROWS))
        if not any(_masked_row(row, mask)["input_ids"] for row in probed):
            raise nothing_trains(_first_rows(name, probed), mask.tokenizer, probed[0]["input_ids"], str(mask))
        return rows.map(partial(_masked_row, mask=mask)).filter(_is_left).remove_columns(list(COUNTS)), None

    counted = rows.with_format(None).map(
        partial(_masked_row, mask=mask), load_from_cache_file=False, num_proc=num_proc, desc=f"Masking {name}"
    )
    lengths, lengths_in, trained = (list(chain.from_iterable(counted[column])) for column in COUNTS)
    if not lengths:
        raise nothing_trains(name, mask.tokenizer, rows[0]["input_ids"], str(mask))
    ledger = Ledger.count(lengths, trained, {NO_TRAINED_TOKEN: len(lengths_in) - len(lengths)}, max(lengths_in))
    left = [index for index, kept in enumerate(counted["lengths"]) if kept]
    return counted.select(left).remove_columns(list(COUNTS)), ledger


def _masked_row(row: Row, mask: ResponseMask) -> dict[str, list[int]]:
    """The conversations of a row (several where it is packed) in which something trains, one behind the other."""
    ids, labels = list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
    lengths_in = row.get("seq_lengths") or [len(ids)]
    result: dict[str, list[int]] = {"input_ids": [], "labels": [], "lengths": [], "trained": []}
    start = 0
    for length in lengths_in:
        part = slice(start, start + length)
        start += length
        found = mask(ids[part])
        kept = [label if answer != IGNORED else IGNORED for label, answer in zip(labels[part], found, strict=True)]
        if trained := count_trained(kept):
            result["input_ids"] += ids[part]
            result["labels"] += kept
            result["lengths"].append(length)
            result["trained"].append(trained)
    packed = {"seq_lengths": result["lengths"]} if row.get("seq_lengths") else {}
    return {**result, **packed, "lengths_in": list(lengths_in)}


def _is_left(row: Row) -> bool:
    return bool(row["input_ids"])


def _batch_labels(batch: Mapping[str, Any], mask: ResponseMask) -> dict[str, Any]:
    ids = batch["input_ids"]
    if isinstance(ids, torch.Tensor):
        return {"labels": torch.tensor([mask(row) for row in ids.tolist()], device=ids.device)}
    if ids and isinstance(ids[0], int):  # one row
        return {"labels": mask(ids)}
    return {"labels": [mask(list(row)) for row in ids]}


def _first_rows(name: str, probed: Sequence[Row]) -> str:
    return f"the first {len(probed)} rows of {name}"


def _keep_ledger(trainer: Trainer, ledger: Ledger | None) -> None:
    before = getattr(trainer, "ledger", None)
    if before is not None and ledger is not None and before.trained == ledger.rows_in:
        ledger = before.followed_by(ledger)
    trainer.ledger = ledger
    if ledger is not None and trainer.args.should_log:
        ledger.table("Data: train, responses only")
