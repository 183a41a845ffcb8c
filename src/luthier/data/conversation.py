"""What a conversation is: messages of known roles, at most one system message, at least one answer.

A row in any of the formats of formats.py becomes a list of messages ``{"role": ..., "content": ..., ...}`` here, or a
``ValueError`` that says what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.data.rows import Row, shown
from luthier.errors import unknown

Message = dict[str, Any]

ROLES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "customer", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "ai", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
}
ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
SYSTEM_COLUMNS = ("system", "system_prompt")


def row_messages(row: Row, source: tuple[str, ...], exact: bool = True) -> list[Message]:
    """The checked messages of one row: ``source`` is the column of its messages, or those of its question and answer.

    ``exact`` False: the table gave the messages of all rows the same keys, so a key that is None was never written.

    Raises:
        ValueError: why the row is malformed.
    """
    for name in source:
        if row.get(name) is None:
            raise ValueError(_why_missing(row, name, is_answer=len(source) == 2 and name == source[1]))
    messages = _pair(row, *source, exact) if len(source) == 2 else _conversation(row[source[0]], exact)
    system = next((row[name] for name in SYSTEM_COLUMNS if isinstance(row.get(name), str) and row[name]), None)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    check_messages(messages)
    return messages


def check_messages(messages: list[Message]) -> None:
    """Raise ``ValueError`` with the reason if this is no conversation that one can train on."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"it has no answer: none of its messages is the assistant's, only {', '.join(roles)}")
    systems = [number for number, role in enumerate(roles, start=1) if role in ("system", "developer")]
    if len(systems) > 1:
        raise ValueError(f"it has {len(systems)} system messages (messages {', '.join(map(str, systems))}): one is allowed")
    if systems and systems[0] != 1:
        raise ValueError(f"its system message is message {systems[0]}: it must be the first")


def row_tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools of a row, from a list or from JSON text; None where there are none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"its 'tools' are not JSON: {shown(tools)}") from error
    return tools or None


def _why_missing(row: Row, name: str, is_answer: bool) -> str:
    other = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    other += [key for key in ("instruction", "prompt", "question") if row.get(key)] if not is_answer else []
    if other:
        return f"mixed formats: it has no {name!r}, as other rows have, but {other[0]!r}"
    return f"it has no answer: {name!r} is missing" if is_answer else f"{name!r} is missing"


def _pair(row: Row, question: str, answer: str, exact: bool) -> list[Message]:
    if isinstance(row[question], list):
        asked = _conversation(row[question], exact)
    else:
        words = as_text(row[question], question)
        if question == "instruction" and row.get("input"):
            words = f"{words}\n\n{as_text(row['input'], 'input')}"
        asked = [{"role": "user", "content": words}]
    if isinstance(row[answer], list):
        return asked + _conversation(row[answer], exact)
    return asked + [{"role": "assistant", "content": as_text(row[answer], answer)}]


def as_text(value: object, column: str) -> str:
    """The text of a cell; a number counts as text, since some readers make one of a CSV's answer 42."""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{column!r} must be text, but is {shown(value)}")


def _conversation(messages: object, exact: bool) -> list[Message]:
    if not isinstance(messages, list):
        raise ValueError(f"its conversation must be a list of messages, but is {shown(messages)}")
    if not messages:
        raise ValueError("its conversation is empty")
    styles = {"from" in _present(message) for message in messages if isinstance(message, Mapping)}
    if len(styles) > 1:
        raise ValueError("mixed formats: some of its messages are from/value, others role/content")
    return [_message(message, number, exact) for number, message in enumerate(messages, start=1)]


def _message(message: object, number: int, exact: bool) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} must be an object with role and content, but is {shown(message)}")
    message = _present(message)
    name = message.pop("from" if "from" in message else "role", None)
    if name is None:
        raise ValueError(f"message {number} has no role: it needs 'role' and 'content', or 'from' and 'value'")
    role = ROLE_OF.get(str(name).lower())
    if role is None:
        raise ValueError(f"message {number}: {unknown('role', name, ROLE_OF)}")
    content = message.pop("value" if "value" in message else "content", None)
    if str(name).lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": [_function_call(content, number)]}
    if "tool_calls" in message and not exact:
        message["tool_calls"] = _without_none(message["tool_calls"])
    content = _content(content, f"message {number} ({role})", has_calls=bool(message.get("tool_calls")))
    return {"role": role, "content": content, **message}


def _content(content: object, place: str, has_calls: bool) -> str | list[Any]:
    if content is None and not has_calls:
        raise ValueError(f"{place} has no content")
    if isinstance(content, list):
        return [_present(part) if isinstance(part, Mapping) else part for part in content]
    if not isinstance(content, str | None):
        raise ValueError(f"{place}: its content must be text or a list of parts, but is {shown(content)}")
    return content or ""


def _function_call(text: object, number: int) -> dict[str, Any]:
    """ShareGPT's ``function_call`` turn, ``{"name": ..., "arguments": {...}}`` as JSON text, as a tool call."""
    try:
        call = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ValueError(f"message {number} (function_call) is not JSON: {shown(text)}") from error
    if not isinstance(call, Mapping) or "name" not in call:
        raise ValueError(f"message {number} (function_call) must be an object with name and arguments, but is {shown(text)}")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments") or {}}}


def _present(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
