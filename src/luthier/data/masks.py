"""Which tokens of a row train: the assistant's answers, found by the text that surrounds them.

Markers are searched in the text that the token ids spell, not among the ids: the same marker becomes other tokens
behind another word (a newline merges with a newline before it, a space with the word behind it), its text does not change.
"""

from __future__ import annotations

import contextlib
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from luthier.data.chat import template_parts
from luthier.data.pieces import Pieces
from luthier.data.render import render, render_spans
from luthier.data.spans import ANSWER, CALL, EMPTY_THOUGHTS, USER, Parts

IGNORED = -100
SHOWN_CHARACTERS = 600
RESULTS = {"call0000a": "42", "call0000b": "there", "call0000c": '{"at": [1]}'}  # of tools; what follows all is the template's


@dataclass(frozen=True)
class Markers:
    """Patterns over the text of a row. An answer begins behind ``response`` and ends with ``stop`` or before ``turn``."""

    response: re.Pattern[str]
    turn: re.Pattern[str]
    stop: re.Pattern[str]


def mask_non_responses(
    input_ids: Sequence[int], pieces: Sequence[str], markers: Markers, last_response_only: bool = False
) -> list[int]:
    """Labels: the id of a token that has a character of an answer or its stop token, -100 for every other.

    ``pieces`` is the text of each token. A row without an answer is -100 throughout.
    """
    spans = answer_spans("".join(pieces), markers)
    if last_response_only:
        spans = spans[-1:]
    labels, remaining = [IGNORED] * len(input_ids), iter(spans)
    span = next(remaining, None)
    for index, (piece, end) in enumerate(zip(pieces, accumulate(map(len, pieces)), strict=True)):
        while span and span[1] <= end - len(piece):
            span = next(remaining, None)
        if span and span[0] < end:
            labels[index] = input_ids[index]
    return labels


def answer_spans(text: str, markers: Markers) -> list[tuple[int, int]]:
    """The [start, end) of every answer in ``text``, its stop token included."""
    spans, header = [], markers.response.search(text)
    while header:
        start = header.end()
        stop, turn = markers.stop.search(text, start), markers.turn.search(text, start)
        if stop and not (turn and turn.start() < stop.start()):
            end = stop.end()
        else:
            end = turn.start() if turn else len(text)
        if start < end:
            spans.append((start, end))
        header = markers.response.search(text, max(end, start))
    return spans


class ResponseMask:
    """``labels = ResponseMask(tokenizer)(input_ids)``: the ids of the assistant's answers, -100 elsewhere.

    ``instruction_part`` and ``response_part`` are the texts before a user's and an assistant's turn; None: those of the
    tokenizer's own template. A processor will do for a tokenizer.

    Raises:
        ValueError: one part without the other, an empty or equal part, or a template whose parts cannot be derived.
    """

    def __init__(
        self,
        tokenizer: Any,
        instruction_part: str | None = None,
        response_part: str | None = None,
        last_response_only: bool = False,
    ) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.last_response_only = last_response_only
        if (instruction_part is None) != (response_part is None):
            raise ValueError("Give both instruction_part and response_part, or neither.")
        own = None
        with contextlib.nullcontext() if response_part is None else contextlib.suppress(ValueError):
            own = template_parts(self.tokenizer)
        if response_part is None:
            instruction_part, response_part = own.instruction_part, own.response_part
        is_own = own is not None and own.response_part.strip() == response_part.strip()
        more = template_habits(self.tokenizer, own) if is_own else Habits()
        if not instruction_part.strip() or not response_part.strip() or instruction_part == response_part:
            raise ValueError(
                f"instruction_part {instruction_part!r} and response_part {response_part!r} must be two different texts."
            )
        self.instruction_part, self.response_part = instruction_part, response_part
        self.stop_tokens = stop_tokens(self.tokenizer, instruction_part, response_part)
        self.pieces = Pieces(self.tokenizer)
        headers = "|".join([self._marker(response_part), *map(re.escape, more.other_headers)])
        opened = "|".join([EMPTY_THOUGHTS.pattern, *map(re.escape, more.openings)])
        ends = [token for token in (self.tokenizer.pad_token, *more.ends) if token]
        self.markers = Markers(
            response=re.compile(rf"(?:{headers})(?:\s*(?:{opened}))?"),
            turn=re.compile("|".join([self._marker(instruction_part), *map(re.escape, ends)])),
            stop=re.compile("|".join(map(re.escape, self.stop_tokens)) or r"(?!)"),
        )

    def __str__(self) -> str:
        stops = " or ".join(map(repr, self.stop_tokens))
        return f"answers behind {self.response_part!r}, up to {stops} or {self.instruction_part!r}"

    def __call__(self, input_ids: Sequence[int]) -> list[int]:
        return mask_non_responses(input_ids, self.pieces(input_ids), self.markers, self.last_response_only)

    def _marker(self, part: str) -> str:
        """The pattern of a marker: as written; as the tokenizer spells it; with more or less space between its words.

        Some tokenizers put a space behind a special token or swallow the newline there.
        """
        spelled = "".join(self.pieces(self.tokenizer.encode(part, add_special_tokens=False)))
        words = part.split()
        behind = len(part) - len(part.rstrip())
        loose = r"\s*".join(map(re.escape, words)) + rf"\s{{0,{behind + 1}}}" * bool(behind)
        return "|".join([re.escape(part), *[re.escape(spelled)] * bool(spelled), loose])


@dataclass(frozen=True)
class Habits:
    """What a template does besides its parts: headers of answers behind a tool's result, words with which it begins an
    answer itself, and what it puts behind an earlier answer instead of the stop token."""

    other_headers: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


def template_habits(tokenizer: Any, parts: Parts) -> Habits:
    """The habits of the tokenizer's template, from its renderings of a few conversations."""
    opening = render(tokenizer, [USER], add_generation_prompt=True).rpartition(parts.response_part)[2]
    text, spans = render_spans(tokenizer, [USER, ANSWER, USER, ANSWER])
    end = text[spans[0][1] :].partition(parts.instruction_part)[0].strip()
    before = []
    with contextlib.suppress(ValueError):  # a template without tools
        for key, content in RESULTS.items():
            call = {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": key}]}
            result = {"role": "tool", "name": "look", "tool_call_id": key, "content": content}
            text, spans = render_spans(tokenizer, [USER, call, result, ANSWER])
            before.append(text[: spans[-1][0]][::-1])
    header = os.path.commonprefix(before)[::-1]
    other = bool(header.strip()) and parts.response_part not in header
    return Habits((header,) * other, (opening,) * bool(opening), (end,) * bool(end))


def stop_tokens(tokenizer: Any, *markers: str) -> list[str]:
    """What ends an answer: EOS, and the stop tokens of the tokenizer's template; where it shows none, any special token
    that is not in one of the ``markers``."""
    eos = [tokenizer.eos_token] if tokenizer.eos_token else []
    if tokenizer.chat_template:
        with contextlib.suppress(ValueError):  # the parts were given, so they need not be derivable
            return eos + [token for token in template_parts(tokenizer).stop_tokens if token not in eos]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    beside = (*eos, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
    return eos + [token for token in special if token not in beside and not any(token in marker for marker in markers)]


def count_trained(labels: Sequence[int]) -> int:
    """How many tokens have a loss: the first has none, since nothing stands before it to predict it from."""
    return sum(label != IGNORED for label in labels[1:])


def nothing_trains(name: str, tokenizer: Any, input_ids: Sequence[int], looked_for: str) -> ValueError:
    """The error for a dataset all of whose tokens are masked: it shows a row beside what was looked for in it."""
    text = getattr(tokenizer, "tokenizer", tokenizer).decode(list(input_ids), skip_special_tokens=False)
    row = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return ValueError(
        f"No token of {name} would train: every one is masked. Looked for: {looked_for}\nA row reads: {row!r}\n"
        "Give the instruction_part and response_part that the row shows, render the rows with the tokenizer's own chat "
        "template, or train on all tokens (train_on='all')."
    )
