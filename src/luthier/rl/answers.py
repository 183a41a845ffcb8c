"""Reading the final answer out of a solution's text: ``\\boxed{...}`` first, the last number otherwise."""

from __future__ import annotations

import re

AIME_MAXIMUM = 999  # AIME answers are integers from 000 to 999

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_INTEGER = re.compile(r"[-+]?\d+")
_WRAPPERS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[!,;: ]|[\\]?\$|\\left|\\right|\s|°|\^\{?\\circ\}?")


def last_boxed(text: str) -> str | None:
    """The contents of the last complete ``\\boxed{...}`` or ``\\fbox{...}``, braces inside it balanced; else None."""
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for place in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[found.end() : place]
    return None


def last_number(text: str) -> str | None:
    """The last number of ``text``, thousands separators removed; None if there is none."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def normalised(answer: str) -> str:
    """``answer`` without LaTeX dressing, blanks and thousands separators; numbers in one spelling ("07.0" -> "7")."""
    plain = _NOISE.sub("", _WRAPPERS.sub(r"\1", answer)).rstrip(".")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain):
        whole, _, fraction = plain.partition(".")
        fraction = fraction.rstrip("0")
        return f"{int(whole)}.{fraction}" if fraction else str(int(whole))
    return plain.casefold()


def final_answer(text: str) -> str | None:
    """The answer a solution ends with: the last box, else the last number; normalised; None if there is neither."""
    answer = last_boxed(text)
    answer = last_number(text) if answer is None else answer
    return None if answer is None or not answer.strip() else normalised(answer)


def aime_answer(text: str) -> int | None:
    """The integer from 0 to 999 that a solution ends with, by AIME's rules; None if it gives none.

    A box counts as it stands: ``\\boxed{1000}`` or ``\\boxed{1/2}`` is a wrong answer, not a reason to search the
    text for another number. Without a box, the last number of the text counts if it is such an integer.
    """
    answer = final_answer(text)
    if answer is None or not _INTEGER.fullmatch(answer):
        return None
    return int(answer) if 0 <= int(answer) <= AIME_MAXIMUM else None
