"""A question made of several columns: ``"{instruction}[[\\nYour input is:\\n{input}]]"``.

Column names stand in braces (``{{`` and ``}}`` are braces themselves); a part in double brackets is left out of a row
in which a column it names is empty.
"""

from __future__ import annotations

import itertools
import re
import string
from dataclasses import dataclass

from luthier.data.rows import Row


@dataclass(frozen=True)
class PromptPart:
    """A stretch of a merged prompt: its text, the columns it names, and whether a row may leave it out."""

    text: str
    columns: tuple[str, ...]
    optional: bool

    def fill(self, row: Row) -> str:
        """The text with the row's values; "" if it is optional and one is empty; ``ValueError`` if one is missing."""
        lacking = [name for name in self.columns if row[name] is None or (self.optional and row[name] == "")]
        if lacking and not self.optional:
            raise ValueError(f"{lacking[0]!r} is missing: put its part of merged_prompt in [[double brackets]]")
        if lacking:
            return ""
        pieces = string.Formatter().parse(self.text)
        return "".join(words + ("" if name is None else str(row[name])) for words, name, _, _ in pieces)


def parse_merged_prompt(merged_prompt: str) -> list[PromptPart]:
    """The parts of a merged prompt; ``ValueError`` if brackets or braces do not match or no column is named."""
    pieces = re.split(r"(\[\[|\]\])", merged_prompt)
    if pieces[1::4] != ["[["] * (len(pieces) // 4) or pieces[3::4] != ["]]"] * (len(pieces) // 4) or len(pieces) % 4 != 1:
        raise ValueError(f"merged_prompt {merged_prompt!r} has unmatched or nested brackets: every [[ needs its ]].")
    parts = [_part(text, optional) for text, optional in zip(pieces[::2], itertools.cycle((False, True)), strict=False)]
    for part in parts:
        if part.optional and not part.columns:
            raise ValueError(f"merged_prompt {merged_prompt!r} names no column in [[{part.text}]], so that is never left out.")
    if not any(part.columns for part in parts):
        raise ValueError(f"merged_prompt {merged_prompt!r} names no column: write them in braces, as in '{{instruction}}'.")
    return parts


def _part(text: str, optional: bool) -> PromptPart:
    try:
        columns = tuple(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)
    except ValueError as error:
        raise ValueError(f"merged_prompt has unmatched braces in {text!r}: {error}.") from error
    return PromptPart(text, columns, optional)
