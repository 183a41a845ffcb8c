"""From a dataset in any known format to token ids and labels, with a ledger of what became of every row."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from datasets import Dataset, Features, List, Value

from luthier.data.encoders import Encoder, encoder_for
from luthier.data.ledger import EMPTY_ANSWER, EMPTY_ROW, NO_TRAINED_TOKEN, TOO_LONG, Ledger
from luthier.data.masks import ResponseMask, count_trained, nothing_trains
from luthier.data.rows import Row, column_names, map_rows, processes_for
from luthier.errors import unknown

TRAIN_ON = ("responses", "all")
TOO_LONG_POLICIES = ("drop", "truncate", "raise")
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int64"),
        "length_in": Value("int64"),  # before truncation
        "trained": Value("int64"),
        "empty_answer": Value("bool"),
    }
)


def prepare_chat(
    dataset: Dataset,
    tokenizer: Any,
    max_length: int | None = None,
    train_on: str = "responses",
    too_long: str = "drop",
    num_proc: int | None = None,
) -> tuple[Dataset, Ledger]:
    """Token ids and labels of every row that trains, in the order of ``dataset``, and the ledger of all rows.

    The rows hold conversations in any format of formats.py, rendered with the tokenizer's chat template; or ``text``, or
    ``prompt`` and ``completion`` as text, which are tokenised as they are, with the EOS token behind them; or
    ``input_ids``, with ``labels`` or without. ``text`` goes before a conversation in the same row, ``input_ids`` before both.

    ``train_on="responses"``: labels are -100 outside the assistant's answers (or the completion). A row longer than
    ``max_length`` tokens is dropped, cut to its first ``max_length`` tokens, or an error, by ``too_long``. Rows that are
    empty, whose answers are all empty, or in which no token trains are dropped and counted.

    ``num_proc`` processes share the work; None: as many as there are cores, where there are thousands of rows. The result is
    the same, and so are the errors.

    Raises:
        ValueError: an argument that is not allowed, malformed rows, a row too long (``"raise"``), or no row left: because
            ``max_length`` is shorter than every row, or because every token is masked.
    """
    if train_on not in TRAIN_ON:
        raise unknown("train_on", train_on, TRAIN_ON)
    if too_long not in TOO_LONG_POLICIES:
        raise unknown("too_long", too_long, TOO_LONG_POLICIES)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, one to see and one to predict, but is {max_length}.")
    columns = column_names(dataset)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: it must hold at least one row.")
    encoder = encoder_for(dataset, columns, tokenizer, everything=train_on == "all")
    convert = partial(_encoded, encoder=encoder, cut=max_length if too_long == "truncate" else None)
    processes = processes_for(len(dataset), convert) if num_proc is None else num_proc
    how = {"features": FEATURES, "desc": "Tokenising", "num_proc": processes if processes > 1 else None}
    rows = map_rows(dataset, convert, remove_columns=columns, **how)

    reasons = [_reason(row, max_length) for row in rows.remove_columns(["input_ids", "labels"])]
    dropped = Counter(filter(None, reasons))
    if too_long == "raise" and dropped[TOO_LONG]:
        raise _too_long(rows["length"][:], max_length, dropped[TOO_LONG])
    trained = rows.select([index for index, reason in enumerate(reasons) if reason is None])
    if len(trained) == 0:
        raise _nothing_left(rows, reasons, tokenizer, max_length)
    ledger = Ledger.count(
        lengths=trained["length"][:],
        trained=trained["trained"][:],
        dropped=dropped,
        longest_in=max(rows["length_in"]),
        truncated=sum(length < whole for length, whole in zip(trained["length"], trained["length_in"], strict=True)),
    )
    return trained.select_columns(["input_ids", "labels"]), ledger


def _encoded(row: Row, encoder: Encoder, cut: int | None) -> dict[str, Any]:
    encoded = encoder(row)
    ids, labels = encoded or ([], [])
    return {
        "input_ids": ids[:cut],
        "labels": labels[:cut],
        "length": len(ids[:cut]),
        "length_in": len(ids),
        "trained": count_trained(labels[:cut]),
        "empty_answer": encoded is None,
    }


def _reason(row: Row, max_length: int | None) -> str | None:
    """Why a row is dropped; None if it trains."""
    if row["empty_answer"]:
        return EMPTY_ANSWER
    if row["length"] == 0:
        return EMPTY_ROW
    if max_length is not None and row["length"] > max_length:
        return TOO_LONG
    return None if row["trained"] else NO_TRAINED_TOKEN


def _too_long(lengths: list[int], max_length: int, count: int) -> ValueError:
    number = next(number for number, length in enumerate(lengths, start=1) if length > max_length)
    return ValueError(
        f"{count} of {len(lengths)} rows are longer than max_length {max_length}: the first is row {number}, the longest has "
        f"{max(lengths)} tokens. Raise max_length to {max(lengths)}, or set too_long to 'drop' or 'truncate'."
    )


def _nothing_left(rows: Dataset, reasons: list[str], tokenizer: Any, max_length: int | None) -> ValueError:
    counts = Counter(reasons)
    lengths = rows["length_in"][:]
    if counts[TOO_LONG] == len(rows):
        return ValueError(
            f"max_length {max_length} is shorter than every row: the shortest has {min(lengths)} tokens, the longest "
            f"{max(lengths)}. Set max_length (of a recipe: max_seq_length) to at least {min(lengths)}, or too_long='truncate'."
        )
    if counts[NO_TRAINED_TOKEN]:
        row = rows[reasons.index(NO_TRAINED_TOKEN)]
        if row["length"] < row["length_in"]:
            return ValueError(
                f"max_length {max_length} cuts off every answer: the rows have {min(lengths)} to {max(lengths)} tokens. "
                f"Raise max_length to {max(lengths)}, or as far as the memory allows."
            )
        return nothing_trains("the dataset", tokenizer, row["input_ids"], _looked_for(tokenizer))
    return ValueError(
        f"No row is left to train on: {', '.join(f'{count} x {why}' for why, count in counts.items())}. "
        "Look at the rows with `luthier inspect`."
    )


def _looked_for(tokenizer: Any) -> str:
    try:
        return str(ResponseMask(tokenizer))
    except ValueError:  # no template from which to derive the parts
        return "the spans that the chat template or the given labels mark"
