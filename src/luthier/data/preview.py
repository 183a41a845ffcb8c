"""The dataset as the model will see it: every token of a row, the ones that train marked."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.text import Text

from luthier.data.masks import IGNORED, count_trained
from luthier.data.pieces import Pieces

TRAINED, MASKED = ("green underline", "bright_green underline"), ("bright_black", "dim")  # in turn, to tell tokens apart
OPEN, CLOSE = "⟦", "⟧"  # around what trains, where there are no colours


def preview(dataset: Dataset, tokenizer: Any, rows: int = 3, console: Console | None = None) -> None:
    """Print the first ``rows`` rows of a prepared dataset (``input_ids`` and ``labels``) to the terminal.

    Tokens that train are green and underlined, the others dim, neighbours in two shades; where there are no colours,
    what trains stands in ⟦ ⟧.
    """
    console = console or Console()
    shown = _coloured if console.is_terminal and not console.no_color else _bracketed
    for number, row in enumerate(preview_rows(dataset, tokenizer, rows), start=1):
        length, trained = row["length"], row["trained_tokens"]
        title = f"Row {number} of {len(dataset)}: {length} tokens, {trained} of them train ({trained / max(length, 1):.0%})"
        console.print(title, style="bold", highlight=False)
        console.print(shown(row["tokens"]))


def preview_rows(dataset: Dataset, tokenizer: Any, rows: int = 3) -> list[dict[str, Any]]:
    """The same for machines: a row is its counts and ``tokens``, each {id, text, trained}."""
    pieces = Pieces(tokenizer)
    shown = []
    for row in dataset.select(range(min(rows, len(dataset)))):
        ids, labels = row["input_ids"], row.get("labels") or row["input_ids"]
        tokens = [
            {"id": token, "text": text, "trained": index > 0 and label != IGNORED}
            for index, (token, text, label) in enumerate(zip(ids, pieces(ids), labels, strict=True))
        ]
        shown.append({"length": len(ids), "trained_tokens": count_trained(labels), "tokens": tokens})
    return shown


def _coloured(tokens: list[dict[str, Any]]) -> Text:
    text = Text()
    for index, token in enumerate(tokens):
        styles = TRAINED if token["trained"] else MASKED
        text.append(_visible(token["text"]), style=styles[index % 2])
    return text


def _bracketed(tokens: list[dict[str, Any]]) -> Text:
    text = ""
    for trained, run in groupby(tokens, key=itemgetter("trained")):
        words = "".join(_visible(token["text"]) for token in run)
        text += f"{OPEN}{words}{CLOSE}" if trained else words
    return Text(text)


def _visible(text: str) -> str:
    return text.replace("\n", "↵\n") or "∅"
