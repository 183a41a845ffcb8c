"""A chat template written as an example: text with {SYSTEM}, {INPUT} and {OUTPUT}, made into a Jinja template.

One example of a turn, ``"<preamble>### Instruction:\\n{INPUT}\\n\\n### Response:\\n{OUTPUT}"``, leaves open where the
preamble ends and the turn begins; two examples, the second straight behind the first, show it.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass

DEFAULT_SYSTEM = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
)


@dataclass(frozen=True)
class Turns:
    """The fixed text of a template: ``preamble (user_header input answer_header output end)*``."""

    preamble: str  # holds {SYSTEM}, or no system message is possible
    user_header: str
    answer_header: str
    end: str


def from_placeholders(template: str, bos_token: str | None, eos_token: str | None, default_system: str | None = None) -> str:
    """The Jinja template, with generation marks, of an example ``template``.

    An answer ends with the text that stands behind ``{OUTPUT}``, or with ``eos_token`` where no text does.
    ``default_system`` fills ``{SYSTEM}`` in conversations without a system message.

    Raises:
        ValueError: not one or two pairs of {INPUT} and {OUTPUT}, two pairs that differ, a misplaced {SYSTEM}, no stop.
    """
    turns = _parse(template, bos_token or "")
    if not turns.end.strip() and not eos_token:
        raise ValueError(
            "The chat template ends an answer with no text, and the tokenizer has no eos_token: nothing would stop it."
        )
    stop = turns.end.rstrip() or eos_token
    behind = turns.end[len(turns.end.rstrip()) :]
    head, has_system, tail = turns.preamble.partition("{SYSTEM}")
    no_system = "{{ raise_exception('The chat template has no {SYSTEM}, so no place for a system message') }}"
    return "".join(
        (
            "{%- set has_system = messages and messages[0].role == 'system' %}",
            _put(head),
            "{%- if has_system %}",
            "{{ messages[0].content }}" if has_system else no_system,
            "{%- else %}" + _put(default_system or DEFAULT_SYSTEM) if has_system else "",
            "{%- endif %}",
            _put(tail),
            "{%- for message in (messages[1:] if has_system else messages) %}",
            "{%- if message.role == 'user' %}",
            _put(turns.user_header) + "{{ message.content }}",
            "{%- elif message.role == 'assistant' %}",
            _put(turns.answer_header),
            "{%- generation %}{{ message.content }}" + _put(stop) + "{%- endgeneration %}",
            "{%- if not loop.last %}" + _put(behind) + "{%- endif %}",
            "{%- else %}{{ raise_exception('The chat template has no place for the role ' + message.role) }}",
            "{%- endif %}{%- endfor %}",
            "{%- if add_generation_prompt %}" + _put(turns.answer_header) + "{%- endif %}",
        )
    )


def _parse(template: str, bos_token: str) -> Turns:
    first, *rest = re.split(r"\{(?:INPUT|OUTPUT)\}", template)
    if re.findall(r"\{(INPUT|OUTPUT)\}", template) not in (["INPUT", "OUTPUT"], ["INPUT", "OUTPUT"] * 2):
        raise ValueError(
            "The chat template must hold {INPUT} and then {OUTPUT}, once or twice, and nothing else between turns."
        )
    if "{SYSTEM}" in "".join(rest) or first.count("{SYSTEM}") > 1:
        raise ValueError("The chat template must hold {SYSTEM} at most once, before the first {INPUT}.")
    if len(rest) == 4:
        answer_header, between, second_header, last = rest
        if answer_header != second_header:
            raise ValueError(f"The chat template has two examples that differ: {answer_header!r} and {second_header!r}.")
        if not between.startswith(last):
            raise ValueError(f"The chat template ends its first turn with {between!r} but its second with {last!r}.")
        user_header = os.path.commonprefix([first[::-1], between[len(last) :][::-1]])[::-1]
        end = between.removesuffix(user_header)
        return Turns(first.removesuffix(user_header), user_header, answer_header, end)
    answer_header, end = rest
    user_header = _last_header(first, end, bos_token)
    preamble = first.removesuffix(user_header)
    gap = preamble[len(preamble.rstrip()) :] if not end.strip() else ""  # turns are as far apart as preamble and turn
    return Turns(preamble, user_header, answer_header, end + gap)


def _last_header(first: str, end: str, bos_token: str) -> str:
    """What stands before {INPUT} and belongs to the turn: behind the system message's end, or its last paragraph."""
    _, has_system, behind_system = first.rpartition("{SYSTEM}")
    if end.strip() and end.strip() in behind_system:
        return behind_system.split(end.strip(), 1)[1]
    behind_system = behind_system if has_system else behind_system.removeprefix(bos_token)
    cut = behind_system.rstrip().rfind("\n\n")
    return behind_system[cut + 2 :] if cut >= 0 else behind_system


def _put(text: str) -> str:
    return "{{ " + repr(text) + " }}" if text else ""
