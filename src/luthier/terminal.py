"""What a person sees: notices, tables and progress; plain lines when the output is not a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0


def is_first_process() -> bool:
    """Whether this is the process that talks and writes, of those that train one model."""
    # torchrun and accelerate launch set both; RANK alone may be a scheduler's number of a run that has nobody beside it
    return int(os.environ.get("WORLD_SIZE") or 1) < 2 or int(os.environ.get("RANK") or 0) == 0


def console(quiet: bool | None = None) -> Console:
    """A console on the current standard error: results go to standard output, talk goes here. The first process talks."""
    return Console(file=sys.stderr, soft_wrap=True, highlight=False, quiet=not is_first_process() if quiet is None else quiet)


def say(message: str, quiet: bool | None = None) -> None:
    """One line for the person at the terminal; ``quiet=False``: from whichever process."""
    console(quiet).print(message, markup=False)


def notice_once(owner: object, key: str, message: str) -> None:
    """Warn once per ``owner`` (a model, a trainer) and ``key``."""
    said = owner.__dict__.setdefault("_luthier_notices", set())
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a small table to standard error."""
    view = Table(title=title, title_justify="left")
    for column in columns:
        view.add_column(column)
    for row in rows:
        view.add_row(*(Text(str(cell)) for cell in row))  # Text: brackets are no markup
    console().print(view)


class _PlainProgress:
    """Progress for logs and pipes: a line now and then."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        if time.monotonic() - self.last >= PLAIN_LINE_SECONDS:
            self.last = time.monotonic()
            share = f"{self.done / self.total:4.0%}" if self.total else f"{self.done:g}"
            say(f"{self.description}: {share} {note}".rstrip())


class _RichProgress:
    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        self.progress = progress
        self.task = progress.add_task(description, total=total, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.progress.update(self.task, advance=amount, **({"note": note} if note else {}))


@contextlib.contextmanager
def progress(description: str, total: float | None = None) -> Iterator[_PlainProgress | _RichProgress]:
    """A progress bar: ``with progress("Merging", total=n) as bar: bar.advance(1, note="...")``."""
    if not console().is_interactive:
        yield _PlainProgress(description, total)
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console(), transient=True) as bar:
        yield _RichProgress(bar, description, total)
