"""Which characters of a rendered conversation train, for a chat template that has no generation marks.

The answer is read off the template's own renderings, not guessed from its source. Every string of the conversation is
wrapped in two private characters before it is rendered, so that the rendering shows where each string came to stand;
without those characters it must be the plain rendering, byte for byte. The header of an answer is what the template
prints for ``add_generation_prompt`` at that place; the stop token is the first token of the vocabulary that it prints
behind a last answer. What lies between is what the model must say itself, and that trains.

Everything here is a function of ``render(messages, add_generation_prompt) -> str``, one fixed template with its tools
and settings bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
Path = tuple[str | int, ...]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys under which data sets and templates keep an assistant's thoughts."""

# How thoughts begin: <think>, <|START_THINKING|>, [THINK], Gemma's and harmony's channels.
OPENING = (
    r"(?:[<\[]\|?(?:start_|begin_of_)?(?:think|thought|seed:think)[a-z]*\|?[>\]]|<\|channel>thought|<\|channel\|>analysis)"
)
# A block of thoughts that a template prints although there were none: it never trains.
EMPTY_THOUGHTS = re.compile(
    rf"{OPENING}\s*(?:</think>|</thinking>|<\|END_THINKING\|>|\[/THINK\])\n{{0,2}}|<\|channel>thought\n<channel\|>"
    r"|<\|channel\|>analysis<\|message\|><\|end\|><\|start\|>assistant",
    re.IGNORECASE,
)
# A prompt may open thoughts that the history of a conversation does not show.
OPENED_THOUGHTS = re.compile(rf"\s*{OPENING}", re.IGNORECASE)

USER: Message = {"role": "user", "content": "Question"}
ANSWER: Message = {"role": "assistant", "content": "Answer"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}],
}
REMEDY = "Choose a template of Luthier with get_chat_template, or put {% generation %} marks around the answers of this one."


class Underivable(ValueError):
    """A template does not show where its answers begin or end."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The trained part of a conversation cannot be read off this chat template: {why} {REMEDY}")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What stands before a user's words, what stands before an answer, and the tokens that end an answer."""

    instruction_part: str
    response_part: str
    stop_tokens: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Habits:
    """What holds for every conversation of a template."""

    user: Message  # a question and
    answer: Message  # an answer in the shape that the template prints
    stop: str  # ends a last answer
    prompts: bool  # prints something for add_generation_prompt
    tokens: re.Pattern[str]  # matches any token that the template usually prints
    vocabulary: frozenset[str]  # the tokenizer's added tokens


@dataclasses.dataclass(frozen=True)
class Located:
    """A rendering, and per message where each of its strings begins and ends, None where that does not show."""

    text: str
    strings: tuple[dict[Path, tuple[int | None, int | None]], ...]

    def shown(self, message: int) -> list[int]:
        """All positions known of one message's strings."""
        return [position for ends in self.strings[message].values() for position in ends if position is not None]

    def behind(self, message: int) -> str:
        """The text behind the last string of one message."""
        return self.text[max(self._required(message)) :]

    def between(self, earlier: int, later: int) -> str:
        """What the template prints between two messages."""
        return self.text[max(self._required(earlier)) : min(self._required(later))]

    def _required(self, message: int) -> list[int]:
        positions = self.shown(message)
        if not positions:
            raise Underivable(f"message {message} does not show in {self.text!r}.")
        return positions


def study(render: Render, vocabulary: Iterable[str]) -> Habits:
    """Learn a template's ``Habits`` from a question and an answer. ``vocabulary``: the tokenizer's added tokens."""
    user, answer = _probes(render)
    chat = locate(render, [user, answer])
    prompt, question = render([user], True), render([user], False)
    texts = [chat.text, prompt]
    with contextlib.suppress(ValueError):  # a template without tool calls may refuse one
        texts.append(render([user, CALL], False))
    vocabulary = frozenset(filter(str.strip, vocabulary))
    printed = [token for token in vocabulary if any(token in text for text in texts)]
    # <|END_RESPONSE|><|END_OF_TURN|>: the last token before any white space is the one that stops.
    ending = next(iter(chat.behind(1).split()), "")
    stop = list(_any_of(printed).finditer(ending)) if printed else []
    if not stop:
        raise Underivable(
            f"behind an answer it prints {chat.behind(1)!r}, which holds no token of the vocabulary, so a model could not "
            "learn where to stop. Add the stop token to the vocabulary (add_new_tokens), or choose another template."
        )
    tokens = re.compile(f"{_any_of(printed).pattern}|{OPENING}", re.IGNORECASE)
    return Habits(user, answer, stop[-1].group(), prompt != question, tokens, vocabulary)


def _probes(render: Render) -> tuple[Message, Message]:
    """A question and an answer that the template prints: most take words as a string, some only as a list of parts."""
    failures = []
    for shape in (str, lambda words: [{"type": "text", "text": words}]):
        user, answer = ({**message, "content": shape(message["content"])} for message in (USER, ANSWER))
        try:
            locate(render, [user, answer]).between(0, 1)
            return user, answer
        except ValueError as failure:
            failures.append(failure)
    raise failures[0]


def parts_of(render: Render, habits: Habits) -> Parts:
    """The ``Parts`` of a template, from the renderings of two questions and two answers."""
    user, answer = habits.user, habits.answer
    chat = locate(render, [user, answer, user, answer])
    behind_question = locate(render, [user]).behind(0)
    behind_answer = locate(render, [user, answer]).behind(1)
    before_answer, before_question = chat.between(0, 1), chat.between(1, 2)

    # The header is what the prompt and the history have in common; the end of the question is no part of it.
    header = before_answer[: _common(before_answer, locate(render, [user], True).behind(0), habits)]
    response = header[_common(header, behind_question, habits) :]
    if not response.strip():
        response = before_answer[_common(before_answer, behind_question, habits) :]
    if not response.strip():  # nothing but the end of the question announces an answer: [/INST]
        response = before_answer
    ends = (_common(before_question, tail, habits) for tail in (behind_answer, behind_question))
    instruction = before_question[max(ends) :]
    if not response.strip() or not instruction.strip():
        raise Underivable(f"nothing stands between its turns in {chat.text!r}.")
    stops = dict.fromkeys([habits.stop, *_call_stop(render, habits)])
    return Parts(instruction.lstrip("\n").strip(" "), response.lstrip("\n").strip(" "), tuple(stops))


def trained_spans(render: Render, messages: Sequence[Message], habits: Habits) -> list[tuple[int, int]]:
    """Character spans [start, end) of ``render(messages, False)`` that train, one for each answer: from the end of its
    header through its stop token. Raises ``Underivable`` (a ValueError) where the template does not show one."""
    messages = list(messages)
    whole = locate(render, messages)
    return [_span(render, messages, index, whole, habits) for index, message in enumerate(messages) if _is_answer(message)]


def locate(render: Render, messages: Sequence[Message], prompt: bool = False) -> Located:
    """Render, and find where each string of the messages stands."""
    messages = list(messages)
    text = render(messages, prompt)
    paths = [(index, path) for index, message in enumerate(messages) for path in _strings(message)]
    first = _free_characters(text)
    located = _read(render(_wrapped(messages, paths, first), prompt), messages, paths, first)
    if located.text != text:  # some string is looked into by the template: keep those that may be wrapped unseen
        kept: list = []
        for path in paths:
            trial = [*kept, path]
            if _read(render(_wrapped(messages, trial, first), prompt), messages, trial, first).text == text:
                kept = trial
        located = _read(render(_wrapped(messages, kept, first), prompt), messages, kept, first)
    return located


def _span(render: Render, messages: list[Message], index: int, whole: Located, habits: Habits) -> tuple[int, int]:
    message, text = messages[index], whole.text
    shown = whole.shown(index)
    start = _header_end(render, messages, index, whole, habits)
    others = [position for other in range(len(messages)) if other != index for position in whole.shown(other)]
    end = max(shown) if shown else start
    limit = min((position for position in others if position >= end), default=len(text))
    if any(start < position < end for position in others):
        raise Underivable(f"message {index} stands in pieces, with another message between them.")
    if not shown and not message.get("tool_calls"):
        words = _words(message).strip()
        place = text.find(words, start, limit)
        if place < 0:
            raise Underivable(f"it does not print the words of message {index}: {words[:80]!r}.")
        end = place + len(words)

    stop = text.find(habits.stop, end, limit)
    if stop >= 0:
        return start, stop + len(habits.stop)
    if message.get("tool_calls"):
        return start, end + len(_call_ending(render, messages, index, whole, start, habits))
    if index == len(messages) - 1:
        raise Underivable(f"message {index}, the last one, has no stop token behind it.")
    # What ends an earlier answer here never ends a generation (harmony's <|end|>), so it must not be learned.
    behind = end + len(text[end:limit]) - len(text[end:limit].lstrip())
    return start, behind if habits.tokens.match(text, behind) else end


def _header_end(render: Render, messages: list[Message], index: int, whole: Located, habits: Habits) -> int:
    """Where the header of answer ``index`` ends, with the empty thoughts that the template may print behind it."""
    shown = whole.shown(index)
    if index:
        before = locate(render, messages[:index], True)
        place, prompt_place = _anchor(whole, before, index)
        prompt = EMPTY_THOUGHTS.sub("", before.text[prompt_place:])
    else:  # no prompt can be rendered for nothing: its header is the usual one
        prompt = parts_of(render, habits).response_part
        place = whole.text.rfind(prompt, 0, min(shown, default=None))
        if place < 0:
            raise Underivable(f"no header stands before message 0 in {whole.text!r}.")
    actual = whole.text[place : min(shown, default=None)]
    length = _common(actual, prompt, habits)
    if length < len(actual) and prompt[length:].strip() and not OPENED_THOUGHTS.match(prompt, length):
        raise Underivable(f"before message {index} it prints {actual!r}, but as a prompt {prompt!r}.")
    end = place + length
    if index and not habits.prompts:
        end = _unprompted_header_end(render, messages[:index], whole, place, end, habits.answer)
    if any(start == end for start, _ in whole.strings[index].values()):
        return end  # the answer's own words begin here, whatever they are
    empty = next((match for match in EMPTY_THOUGHTS.finditer(whole.text, place) if match.start() <= end < match.end()), None)
    return empty.end() if empty else end


def _unprompted_header_end(
    render: Render, earlier: list[Message], whole: Located, place: int, end: int, answer: Message
) -> int:
    """For a template that prints no prompt: the header is what stands before the words of a plain answer."""
    plain = locate(render, [*earlier, answer])
    _, plain_place = _anchor(whole, plain, len(earlier))
    rest = plain.text[plain_place : min(plain.shown(len(earlier)))][end - place :]
    if not rest.strip():
        return end  # a space belongs to the answer: the prompt ends before it
    if not whole.text.startswith(rest, end):
        raise Underivable(f"before message {len(earlier)} it does not print {rest!r} as before a plain answer.")
    return end + len(rest)


def _anchor(whole: Located, other: Located, messages: int) -> tuple[int, int]:
    """The end of the last string of the first ``messages`` that shows in both renderings: its place in each."""
    places = [
        (ends[1], other.strings[message][path][1])
        for message in range(messages)
        for path, ends in whole.strings[message].items()
        if ends[1] is not None and other.strings[message].get(path, (None, None))[1] is not None
    ]
    return max(places, key=lambda pair: pair[1], default=(0, 0))


def _call_ending(render: Render, messages: list[Message], index: int, whole: Located, start: int, habits: Habits) -> str:
    """The end of a tool call that the usual stop token does not follow, as it is printed when nothing follows at all."""
    alone = locate(render, messages[: index + 1])
    if whole.shown(index):
        place, ending = max(whole.shown(index)), alone.behind(index).rstrip()
    else:
        place, ending = start, alone.text[start:].rstrip()
    if not _last_token(ending, habits) or not whole.text.startswith(ending, place):
        raise Underivable(f"the end of the tool calls of message {index} is not a token of the vocabulary: {ending!r}.")
    return ending


def _call_stop(render: Render, habits: Habits) -> list[str]:
    """The token that ends a tool call, where that is another one than ends an answer."""
    with contextlib.suppress(ValueError):  # a template without tool calls may refuse one, or not show it
        ending = locate(render, [habits.user, CALL]).behind(1).rstrip()
        last = _last_token(ending, habits)
        if last and habits.stop not in ending:
            return [last]
    return []


def _last_token(text: str, habits: Habits) -> str | None:
    """The token that a text ends with, if it does."""
    return max(filter(text.endswith, habits.vocabulary), key=len, default=None)


def _common(text: str, other: str, habits: Habits) -> int:
    """The length of the common beginning of two texts, never ending inside a token of either."""
    length = len(os.path.commonprefix([text, other]))
    for side in (text, other):
        inside = (match.start() for match in habits.tokens.finditer(side) if match.start() < length < match.end())
        length = min(inside, default=length)
    return length


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _is_answer(message: Message) -> bool:
    return message.get("role") == "assistant"


def _words(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _strings(message: Message) -> list[Path]:
    """Paths of the strings of a message that a template may print: words, thoughts, values of tool calls' arguments.

    Blank ones are left out, unless there is nothing else to find the message by.
    """
    paths = list(_walk(message.get("content"), ("content",)))
    paths += [(key,) for key in THOUGHTS if isinstance(message.get(key), str)]
    for index, call in enumerate(message.get("tool_calls") or []):
        inner = ("function",) if "function" in call else ()
        arguments = (call["function"] if inner else call).get("arguments")
        paths += _walk(arguments, ("tool_calls", index, *inner, "arguments"))
    spoken = [path for path in paths if _get(message, path).strip()]
    return spoken if spoken or message.get("tool_calls") else paths[:1]


def _walk(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, str):
        yield path
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
    elif isinstance(value, dict):
        keys = ["text"] if "type" in value and "text" in value else [key for key in value if key != "type"]
        for key in keys:
            yield from _walk(value[key], (*path, key))


def _get(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _free_characters(text: str) -> int:
    """The first code point of a private plane of which the text has no character."""
    for first, last in ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        if not re.search(f"[{chr(first)}-{chr(last)}]", text):
            return first
    raise Underivable("the conversation uses both private planes of Unicode.")


def _wrapped(messages: list[Message], paths: Sequence[tuple[int, Path]], first: int) -> list[Message]:
    """The messages with string number k between the characters ``first + 2k`` and ``first + 2k + 1``.

    White space at its ends stays outside, where a template can trim it as before.
    """
    messages = _copied(messages)
    for number, (index, path) in enumerate(paths):
        holder = _get(messages[index], path[:-1])
        text = holder[path[-1]]
        lead = text[: len(text) - len(text.lstrip())]
        core = text.strip()
        holder[path[-1]] = lead + chr(first + 2 * number) + core + chr(first + 2 * number + 1) + text[len(lead) + len(core) :]
    return messages


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists that shares everything else."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read(rendered: str, messages: list[Message], paths: Sequence[tuple[int, Path]], first: int) -> Located:
    """Take the private characters out of a rendering and note where they stood."""
    strings: list[dict[Path, tuple[int | None, int | None]]] = [{} for _ in messages]
    if not paths:
        return Located(rendered, tuple(strings))
    places: dict[int, list[int]] = {}
    marks = re.compile(f"[{chr(first)}-{chr(first + 2 * len(paths) - 1)}]")
    for count, match in enumerate(marks.finditer(rendered)):
        places.setdefault(ord(match.group()) - first, []).append(match.start() - count)
    for number, (index, path) in enumerate(paths):
        once = [found[0] if len(found) == 1 else None for found in (places.get(2 * number, []), places.get(2 * number + 1, []))]
        strings[index][path] = (once[0], once[1])
    return Located(marks.sub("", rendered), tuple(strings))
