"""Going through the rows of a dataset, with malformed ones reported together by their number, counted from 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

AnyDataset = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
Row = Mapping[str, Any]
SHOWN_BAD_ROWS = 5
SHOWN_CHARACTERS = 80


class BadRow(ValueError):
    """One malformed row: its number, counted from 1, and why."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number}: {reason}")
        self.number = number


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a dataset; those of its first row where a stream does not know them."""
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise TypeError(f"The dataset is a {type(dataset).__name__} of the splits {splits}: give one of them.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The dataset is a {type(dataset).__name__}, but must be a datasets.Dataset: "
            "datasets.Dataset.from_list(rows) or luthier.data.read.read_dataset(path) makes one."
        )
    names = dataset.column_names or list(next(iter(dataset), {}))
    if not names:
        raise ValueError("The dataset is empty: it must hold at least one row with at least one column.")
    return names


def map_rows(dataset: Dataset | IterableDataset, convert: Callable[[Row], dict[str, Any]], **map_arguments: Any):
    """``dataset.map(convert)`` where ``convert`` may raise ``ValueError``; one error then names the malformed rows.

    Never from the cache: its key knows nothing of the library's version, and a stale mask would train in silence.
    """
    function = partial(_converted, convert=convert)
    if isinstance(dataset, IterableDataset):
        map_arguments.pop("desc", None)  # a stream has no progress to describe, and raises at the first bad row
        return dataset.map(function, with_indices=True, **map_arguments)
    try:
        return dataset.map(function, with_indices=True, load_from_cache_file=False, **map_arguments)
    except BadRow as first:
        bad = [first, *_bad_rows(dataset, convert, start=first.number)]
        shown = "\n".join(map(str, bad[:SHOWN_BAD_ROWS])) + ("\n..." if len(bad) > SHOWN_BAD_ROWS else "")
        raise ValueError(f"{len(bad)} of {len(dataset)} rows cannot be used:\n{shown}") from first


def shown(value: object) -> str:
    """A value as an error message shows it: its beginning."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _converted(row: Row, index: int, convert: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    try:
        return convert(row)
    except ValueError as error:
        raise BadRow(index + 1, str(error)) from error


def _bad_rows(dataset: Dataset, convert: Callable[[Row], dict[str, Any]], start: int) -> list[BadRow]:
    bad = []
    for index in range(start, len(dataset)):
        try:
            _converted(dataset[index], index, convert)
        except BadRow as error:
            bad.append(error)
    return bad
