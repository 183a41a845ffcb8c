"""From messages to text, and from messages to token ids with a mask of those that train.

Templates are rendered in jinja's immutable sandbox, by the function that transformers itself uses, so the text is the
one that ``tokenizer.apply_chat_template`` gives at inference. Messages are dicts as in the OpenAI format: ``role``,
``content`` (a string, or a list of parts), ``tool_calls``, ``reasoning_content`` or ``thinking``.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from luthier.data.spans import THOUGHTS, Habits, Parts, Render, parts_of, study, trained_spans
from luthier.errors import UnsupportedError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""The tag that opens an answer in a template that marks what trains."""

RENAMED = frozenset({"reasoning_content", "thinking"})
"""The names under which a template finds thoughts of any name, where ``thoughts_are_renamed``."""

_habits: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], Habits]] = weakref.WeakKeyDictionary()


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[dict | Callable] | None = None,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> str:
    """The text of a conversation in the chat template of ``tokenizer`` (or of a processor).

    ``kwargs`` are the template's own settings, such as ``enable_thinking=False``. Raises ``ValueError`` where the
    template refuses the conversation (a system message for Gemma 2, turns that do not alternate), with its reason.
    """
    return _rendered(tokenizer, _template(tokenizer, tools), messages, tools, add_generation_prompt, False, kwargs)[0]


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[dict | Callable] | None = None,
    **kwargs: Any,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it trains; two lists of one length.

    The ids are those of ``render``, with the beginning-of-text token that the template prints and no second one. What
    trains is each answer's words, thoughts, tool calls and stop token: by the template's generation marks if it has
    them, otherwise by its renderings (``luthier.data.spans``). Raises ``ValueError`` where the template refuses the
    conversation, would silently drop a part of it, or does not show what trains.
    """
    text, spans = render_spans(tokenizer, messages, tools, **kwargs)
    fast = text_tokenizer(tokenizer)
    if not fast.is_fast:
        raise UnsupportedError(
            f"{type(fast).__name__} does not tell which characters a token stands for, so what trains cannot be known. "
            "Load the tokenizer from its tokenizer.json (a fast tokenizer)."
        )
    encoded = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), covered(encoded["offset_mapping"], spans)


def render_spans(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[dict | Callable] | None = None,
    **kwargs: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans [start, end) of it that train."""
    template = _template(tokenizer, tools)
    _refuse_losses(template, messages, tools)
    if GENERATION.search(template):
        text, spans = _rendered(tokenizer, template, messages, tools, False, True, kwargs)
        return text, _joined(_learned([_without_trailing_space(text, span) for span in spans], messages))
    renders = _bound(tokenizer, template, tools, kwargs)
    messages = [_stated(message) for message in messages]
    spans = trained_spans(renders, messages, _habits_of(tokenizer, template, renders))
    return renders(messages, False), _joined(_learned(spans, messages))


def covered(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token's characters [start, end) whether they touch one of the ``spans``, which are in order."""
    trained, rest = [], list(reversed(spans))
    for start, end in offsets:
        while rest and rest[-1][1] <= start:
            rest.pop()
        trained.append(bool(rest) and start < end and rest[-1][0] < end)
    return trained


def parts(tokenizer: Any) -> Parts:
    """What stands around the turns of the tokenizer's own template; see ``luthier.data.chat.template_parts``."""
    template = _template(tokenizer, None)
    renders = _bound(tokenizer, template, None, {})
    return parts_of(renders, _habits_of(tokenizer, template, renders))


def require_syntax(jinja: str) -> None:
    """Raise ``ValueError`` if ``jinja`` is no template."""
    try:
        render_jinja_template(conversations=[], chat_template=jinja)
    except TemplateError as error:
        raise ValueError(f"The chat template is no valid jinja: {error}. It begins with {jinja[:60]!r}.") from error


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one inside a processor."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def vocabulary(tokenizer: Any) -> set[str]:
    """The texts of the tokens that the tokenizer never splits: its added and special tokens."""
    inner = text_tokenizer(tokenizer)
    return {token.content for token in inner.added_tokens_decoder.values()} | set(inner.all_special_tokens)


def _template(tokenizer: Any, tools: Sequence[dict | Callable] | None) -> str:
    inner = text_tokenizer(tokenizer)
    template = getattr(tokenizer, "chat_template", None) or getattr(inner, "chat_template", None)
    if not template:
        raise ValueError(
            "This tokenizer has no chat template (a base model's, probably): give it one with "
            'get_chat_template(tokenizer, "chatml"), or another of luthier.CHAT_TEMPLATES.'
        )
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise ValueError(
                f"This tokenizer has the chat templates {', '.join(sorted(template))} and none named 'default': "
                "set tokenizer.chat_template to the one you want."
            )
        template = template[name]
    return template


def _bound(tokenizer: Any, template: str, tools: Sequence[dict | Callable] | None, kwargs: Mapping[str, Any]) -> Render:
    def renders(messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        return _rendered(tokenizer, template, messages, tools, prompt, False, kwargs)[0]

    return renders


def _rendered(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[dict | Callable] | None,
    add_generation_prompt: bool,
    marked: bool,
    kwargs: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    if not messages:
        raise ValueError("A conversation needs at least one message; this one has none.")
    try:
        texts, spans = render_jinja_template(
            conversations=[[_stated(message) for message in messages]],
            tools=list(tools) if tools else None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marked,
            **{**text_tokenizer(tokenizer).special_tokens_map, **kwargs},
        )
    except (TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
        roles = ", ".join(str(message.get("role", "?")) for message in messages)
        raise ValueError(
            f"The chat template refuses this conversation ({len(messages)} messages: {roles}): {error} "
            "Change the conversation, or choose another template with get_chat_template."
        ) from error
    return texts[0], spans[0] if marked else []


def _stated(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that are None: a table of rows (Arrow) gives every row the keys of all of them."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _refuse_losses(template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence | None) -> None:
    """Refuse what the template never reads: it would be dropped without a word, and never train."""
    read = [key for key in ("tool_calls", *THOUGHTS) if re.search(rf"[.'\"]{key}\b", template)]
    read += ["tools"] * bool(re.search(r"\btools\b", template))
    renamed = thoughts_are_renamed() and bool(RENAMED.intersection(read))
    given = {key for message in messages for key in _said(message, thoughts=not renamed)}
    lost = [key for key in ["tools"] * bool(tools) + sorted(given) if key not in read]
    if lost:
        raise ValueError(
            f"The chat template never prints {', '.join(map(repr, lost))}, so training would drop it silently. "
            f"Beside content it reads {', '.join(read) or 'nothing'}: rename the key, remove it, or choose another template "
            "with get_chat_template."
        )


def _said(message: Mapping[str, Any], thoughts: bool) -> list[str]:
    """The keys beside content under which a message says something; with ``thoughts`` False not that of its thoughts, if
    it has them under one name only."""
    names = [key for key in THOUGHTS if message.get(key)]
    return ["tool_calls"] * bool(message.get("tool_calls")) + (names if thoughts or len(names) > 1 else [])


@functools.cache
def thoughts_are_renamed() -> bool:
    """Whether transformers gives templates a message's thoughts under all names of ``RENAMED``, whatever they are called.

    Version 5.24 does; 5.17 hands them over as they come, so a template that reads another name drops them.
    """
    message = {"role": "assistant", "content": "", "thinking": "Hm."}
    texts, _ = render_jinja_template([[message]], chat_template="{{ messages[0].reasoning_content }}")
    return texts == ["Hm."]


def _learned(spans: list[tuple[int, int]], messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The spans, one for each answer, without those of answers of ``weight`` 0 (OpenAI's key), which are only context."""
    weights = [message.get("weight") for message in messages if message.get("role") == "assistant"]
    if all(weight in (None, 1) for weight in weights):
        return spans
    if len(spans) != len(weights) or not all(weight in (None, 0, 1) for weight in weights):
        raise ValueError(
            f"The weights of the answers are {weights}, for {len(spans)} answers in the text: give 0 (context only) or 1"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight != 0]


def _without_trailing_space(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """A mark's span without the newline that some templates include behind the stop token."""
    start, end = span
    stripped = text[start:end].rstrip()
    return (start, start + len(stripped)) if stripped.endswith(">") else span


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch each other as one, without empty ones."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _habits_of(tokenizer: Any, template: str, renders: Render) -> Habits:
    """The habits of a template, learned once for a tokenizer and its vocabulary."""
    inner = text_tokenizer(tokenizer)
    known = _habits.setdefault(inner, {})
    key = (template, len(inner))
    if key not in known:
        known[key] = study(renders, vocabulary(inner))
    return known[key]
