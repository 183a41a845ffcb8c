"""Going through the rows of a dataset, with malformed ones reported together by their number, counted from 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import dill
import multiprocess
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

AnyDataset = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
Row = Mapping[str, Any]
SHOWN_BAD_ROWS = 5
ROWS_A_PROCESS = 2000  # below, a process takes longer to start than to convert them
MOST_PROCESSES = 16
SHOWN_CHARACTERS = 80


class BadRow(ValueError):
    """One malformed row: its number, counted from 1, and why."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number}: {reason}")
        self.number, self.reason = number, reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[int, str]]:  # on its way from another process
        return BadRow, (self.number, self.reason)


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
        if map_arguments.get("num_proc") is None:
            bad = [first, *_bad_rows(dataset, convert, start=first.number)]
        else:  # of any of the processes
            bad = _bad_rows(dataset, convert, start=0)
        shown = "\n".join(map(str, bad[:SHOWN_BAD_ROWS])) + ("\n..." if len(bad) > SHOWN_BAD_ROWS else "")
        raise ValueError(f"{len(bad)} of {len(dataset)} rows cannot be used:\n{shown}") from first


def processes_for(rows: int, convert: Callable[[Row], dict[str, Any]]) -> int:
    """How many processes ``map_rows`` should share ``convert`` among: 1 where copies of this one cost more than they save, or
    cannot be made (other systems than Linux start them anew, and with them a script that has no ``__main__`` guard)."""
    if sys.platform != "linux" or multiprocess.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate
    processes = min(cores, MOST_PROCESSES, rows // ROWS_A_PROCESS)
    return processes if processes > 1 and dill.pickles(convert) else 1


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
