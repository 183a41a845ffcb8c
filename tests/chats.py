"""Conversations, and tokenizers with a chat template, for the tests of chat templates.

``renderings/`` holds the conversations, and for each template what its owner's template makes of them
(docs/chat-templates.md names the sources): a text, or null where the owner refuses. A conversation on which the owner's
template breaks, or prints a Python list, is left out there.
"""

import functools
import json
from datetime import datetime
from pathlib import Path

from tiny import tiny_tokenizer
from transformers.utils import chat_template_utils

from luthier.data.chat import TABLE, get_chat_template, strip_generation_marks
from luthier.data.render import render, render_spans

RENDERINGS = Path(__file__).parent / "renderings"
CONVERSATIONS = json.loads((RENDERINGS / "conversations.json").read_text(encoding="utf-8"))
NAMES = [template.name for template in TABLE]
TOKENS = (
    "<s> </s> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> [INST] "
    "[/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|user|> <|assistant|> "
    "<|system|> <|end|> <|im_sep|> <think> </think> <tool_call> </tool_call> <|start|> <|message|> <|channel|> "
    "<|return|> <|call|> <|end_of_turn|> <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> "
    "<|tool_response> <tool_response|> <|tool_call_start|> <|tool_call_end|>"
).split()
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def tokenizer_with(name: str | None = None, bos: bool = False):
    tokenizer = tiny_tokenizer(chat=False, extra_tokens=tuple(TOKENS), bos=bos)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return get_chat_template(tokenizer, name) if name else tokenizer


@functools.cache
def tokenizer_of(name: str):
    return tokenizer_with(name)


def unmarked(name: str):
    tokenizer = tokenizer_with(name)
    tokenizer.chat_template = strip_generation_marks(tokenizer.chat_template)
    return tokenizer


class NewYear(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 1, 1)


def set_date(monkeypatch) -> None:
    """Templates that print today's date print 1 January 2025. (transformers 5.24 takes no function from a caller.)"""
    monkeypatch.setattr(chat_template_utils, "datetime", NewYear)


def spoken(tokenizer, case: dict) -> list[str]:
    """The texts that train."""
    settings = {key: value for key, value in case.get("kwargs", {}).items() if key != "add_generation_prompt"}
    text, spans = render_spans(tokenizer, case["messages"], case.get("tools"), **settings)
    assert text == render(tokenizer, case["messages"], case.get("tools"), **settings)
    return [text[start:end] for start, end in spans]
