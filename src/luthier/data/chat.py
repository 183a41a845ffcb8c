"""The chat templates: one jinja file each in ``templates/``, and how a tokenizer is given one.

A template follows its owner's published format byte for byte and marks what trains with ``{% generation %}``: the
answer's words, its thoughts and tool calls, and the stop token; not the header, not the newline behind the stop token,
not an empty block of thoughts. docs/chat-templates.md is made from the table in this file.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.render import parts, render, require_syntax, text_tokenizer
from luthier.data.spans import Parts
from luthier.errors import suggesting_names, unknown

TEMPLATES = Path(__file__).parent / "templates"
EOS = "eos_token"
"""Stands among stop tokens for the tokenizer's own end-of-text token."""


@dataclass(frozen=True)
class ChatTemplate:
    """One chat template.

    ``stop_tokens``: what ends an answer, the usual one first; ``EOS`` for the tokenizer's own. ``system``: where a system
    message goes: "turn" (it is shown), "default" (the same, and a default text where there is none), "none" (refused).
    ``file``: the file in ``templates/``, where it is not named after the template. ``prelude`` goes before its text.
    """

    name: str
    user_header: str
    assistant_header: str
    stop_tokens: tuple[str, ...]
    source: str
    system: str = "turn"
    aliases: tuple[str, ...] = ()
    file: str | None = None
    prelude: str = ""
    own_jinja: str | None = None

    @property
    def jinja(self) -> str:
        """The template's text, with generation marks."""
        return self.own_jinja if self.own_jinja is not None else self.prelude + _read(self.file or self.name)

    @property
    def eos_token(self) -> str:
        """The token that ends an answer; ``EOS`` for the tokenizer's own."""
        return self.stop_tokens[0]


@functools.cache
def _read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n", ("<|im_end|>",))
LLAMA_3 = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n")
GEMMA = ("<start_of_turn>user\n", "<start_of_turn>model\n", ("<end_of_turn>",))
PHI_3 = ("<|user|>\n", "<|assistant|>\n", ("<|end|>",))

TABLE = (
    ChatTemplate("chatml", *CHATML, "OpenAI's ChatML"),
    ChatTemplate("yi-chat", *CHATML, "01-ai/Yi-34B-Chat", aliases=("yi",), file="chatml"),
    ChatTemplate(
        "alpaca",
        "### Instruction:\n",
        "### Response:\n",
        (EOS,),
        "the prompt of tatsu-lab/stanford_alpaca, a newline behind `### Response:` as in tloen/alpaca-lora",
        system="default",
    ),
    ChatTemplate("vicuna", "USER:", "ASSISTANT:", (EOS,), "lm-sys/FastChat, weights v1.1 to v1.5", system="default"),
    ChatTemplate(
        "vicuna_old",
        "### Human:",
        "### Assistant:",
        (EOS,),
        "lm-sys/FastChat, weights v0, whose end `###` is no token: here the end-of-text token",
        system="default",
        aliases=("vicuna-old",),
    ),
    ChatTemplate("zephyr", "<|user|>\n", "<|assistant|>\n", (EOS,), "HuggingFaceH4/zephyr-7b-beta"),
    ChatTemplate("mistral", "[INST]", "[/INST]", (EOS,), "mistralai/Mistral-7B-Instruct-v0.3", aliases=("mistral-v0.3",)),
    ChatTemplate("mistral-nemo", "[INST]", "[/INST]", (EOS,), "mistralai/Mistral-Nemo-Instruct-2407"),
    ChatTemplate("llama", "[INST]", "[/INST]", (EOS,), "meta-llama/Llama-2-7b-chat-hf", aliases=("llama-2",)),
    ChatTemplate("llama-3", *LLAMA_3, ("<|eot_id|>",), "meta-llama/Meta-Llama-3-8B-Instruct"),
    ChatTemplate("llama-3.1", *LLAMA_3, ("<|eot_id|>", "<|eom_id|>"), "meta-llama/Llama-3.1-8B-Instruct"),
    ChatTemplate("llama-3.2", *LLAMA_3, ("<|eot_id|>",), "meta-llama/Llama-3.2-3B-Instruct"),
    ChatTemplate("llama-3.3", *LLAMA_3, ("<|eot_id|>", "<|eom_id|>"), "meta-llama/Llama-3.3-70B-Instruct", file="llama-3.1"),
    ChatTemplate("gemma", *GEMMA, "google/gemma-7b-it", system="none"),
    ChatTemplate("gemma-2", *GEMMA, "google/gemma-2-2b-it", system="none", file="gemma"),
    ChatTemplate("gemma-3", *GEMMA, "google/gemma-3-4b-it"),
    ChatTemplate("gemma-3n", *GEMMA, "google/gemma-3n-E4B-it"),
    ChatTemplate(
        "gemma-4",
        "<|turn>user\n",
        "<|turn>model\n",
        ("<turn|>", "<|tool_response>"),
        "google/gemma-4-31B-it, canonical template of 2026-07-09",
        aliases=("gemma-4-31b", "gemma-4-26b"),
    ),
    ChatTemplate(
        "gemma-4-e4b",
        "<|turn>user\n",
        "<|turn>model\n",
        ("<turn|>", "<|tool_response>"),
        "google/gemma-4-E4B-it, the same without an empty block of thoughts in the prompt",
        aliases=("gemma-4-e2b",),
        file="gemma-4",
        prelude="{%- set plain_prompt = true -%}",
    ),
    ChatTemplate("phi-3", *PHI_3, "microsoft/Phi-3-mini-4k-instruct"),
    ChatTemplate("phi-3.5", *PHI_3, "microsoft/Phi-3.5-mini-instruct"),
    ChatTemplate("phi-4", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", ("<|im_end|>",), "microsoft/phi-4"),
    ChatTemplate("qwen-2.5", *CHATML, "Qwen/Qwen2.5-7B-Instruct", system="default"),
    ChatTemplate("qwen-3", *CHATML, "Qwen/Qwen3-0.6B"),
    ChatTemplate("qwen3-instruct", *CHATML, "Qwen/Qwen3-4B-Instruct-2507", aliases=("qwen-3-instruct",)),
    ChatTemplate("qwen3-thinking", *CHATML, "Qwen/Qwen3-4B-Thinking-2507", aliases=("qwen-3-thinking",)),
    ChatTemplate(
        "gpt-oss",
        "<|start|>user<|message|>",
        "<|start|>assistant",
        ("<|return|>", "<|call|>"),
        "openai/gpt-oss-120b (harmony)",
        aliases=("harmony",),
    ),
    ChatTemplate(
        "starling",
        "GPT4 Correct User:",
        "GPT4 Correct Assistant:",
        ("<|end_of_turn|>",),
        "Nexusflow/Starling-LM-7B-beta (openchat/openchat-3.5-0106)",
        aliases=("openchat",),
    ),
    ChatTemplate("lfm-2", *CHATML, "LiquidAI/LFM2-1.2B, revision with tool calls"),
)


def _spellings(template: ChatTemplate) -> Iterator[str]:
    """A template's name and aliases, each with and without the first dash and the dots: llama-3.1, llama3.1, llama-31."""
    for name in (template.name, *template.aliases):
        for spelling in (name, name.replace("-", "", 1)):
            yield from dict.fromkeys((spelling, spelling.replace(".", "")))


CHAT_TEMPLATES: Mapping[str, ChatTemplate] = {spelling: template for template in TABLE for spelling in _spellings(template)}
"""Every template by its name and the usual other spellings of it."""


def markdown_table() -> str:
    """The table of docs/chat-templates.md."""
    rows = ["| name | assistant header | stop tokens | system message | source |", "|---|---|---|---|---|"]
    for template in TABLE:
        names = ", ".join(f"`{name}`" for name in (template.name, *template.aliases))
        stops = ", ".join("the tokenizer's EOS" if stop == EOS else f"`{stop}`" for stop in template.stop_tokens)
        system = {"turn": "shown", "default": "shown, has a default", "none": "refused"}[template.system]
        cells = (names, f"`{template.assistant_header}`", stops, system, template.source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells) + " |")
    return "\n".join(rows)


@suggesting_names
def get_chat_template(
    tokenizer: Any,
    chat_template: str | Path | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give ``tokenizer`` (or a processor) a chat template, and return it.

    Args:
        chat_template: a name of ``CHAT_TEMPLATES``; the path of a ``.jinja`` file; or ``(jinja, stop token)``, where the
            stop token may be "eos_token" for the tokenizer's own.
        mapping: other names in the rows, for ShareGPT ``{"role": "from", "content": "value", "user": "human",
            "assistant": "gpt"}``. Rows with the usual names work as before.
        map_eos_token: the template's stop token becomes the tokenizer's ``eos_token``, so that generation stops there.
            If the vocabulary does not have it, the template ends its turns with the tokenizer's own ``eos_token``
            instead, with a warning. False leaves ``eos_token`` alone and refuses a stop token that is no token.
        system_message: stands where a conversation brings no system message, instead of the template's default.

    Raises:
        ValueError: an unknown name, no valid jinja, no usable stop token, a ``system_message`` for a template without a
            place for one.
        FileNotFoundError: a path to nothing.
    """
    inner = text_tokenizer(tokenizer)
    if not callable(getattr(inner, "convert_tokens_to_ids", None)):
        raise TypeError(f"tokenizer must be a model's tokenizer or processor, not {tokenizer!r}.")
    template = _of_this_size(find_template(chat_template), tokenizer)
    jinja = template.jinja
    require_syntax(jinja)
    if system_message is not None:
        jinja = _with_system(jinja, template, system_message)
    if mapping is not None:
        jinja = _with_mapping(jinja, mapping)
    if template.stop_tokens:
        jinja = _with_stop(jinja, template, inner, map_eos_token)
    for holder in {id(tokenizer): tokenizer, id(inner): inner}.values():
        holder.chat_template = jinja
    if not template.stop_tokens and map_eos_token:  # a file: it shows itself what ends an answer
        _set_eos(inner, parts(tokenizer).stop_tokens[0])
    return tokenizer


def template_parts(tokenizer: Any) -> Parts:
    """What stands around the turns in the tokenizer's (or processor's) own template: ``instruction_part`` before a user's
    words, ``response_part`` before an answer, ``stop_tokens`` behind it.

    Derived by rendering conversations, so it holds for any template. Raises ``ValueError`` where it does not show them.
    """
    return parts(tokenizer)


def strip_generation_marks(jinja: str) -> str:
    """The template without ``{% generation %}`` marks, for programs that do not know them. It renders the same bytes.

    A tag takes away white space beside it (``-``), and otherwise its own line; that is taken away here, too.
    """
    result, place = "", 0
    for tag in re.finditer(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", jinja):
        before, after = jinja[place : tag.start()], tag.end()
        if tag[1] == "-":
            before = before.rstrip()
        elif tag[1] == "" and re.search(r"(^|\n)[ \t]*$", before):
            before = before.rstrip(" \t")
        if tag[2] == "-":
            after += len(jinja[after:]) - len(jinja[after:].lstrip())
        elif tag[2] == "" and jinja.startswith("\n", after):
            after += 1
        result, place = result + before, after
    return result + jinja[place:]


def find_template(chat_template: str | Path | tuple[str, str]) -> ChatTemplate:
    if isinstance(chat_template, tuple | list):
        if len(chat_template) < 2 or not all(isinstance(item, str) for item in chat_template[:2]):
            raise TypeError(f"A chat template of one's own is a tuple (jinja, stop token), not {chat_template!r}.")
        jinja, stop = chat_template[:2]
        return ChatTemplate("own", "", "", (stop,), "given", own_jinja=jinja)
    if isinstance(chat_template, Path) or str(chat_template).endswith((".jinja", ".jinja2", ".j2")):
        path = Path(chat_template)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no chat template file {path}: give the path of a .jinja file, or a template's name."
            )
        return ChatTemplate(path.stem, "", "", (), str(path), own_jinja=path.read_text(encoding="utf-8"))
    if not isinstance(chat_template, str):
        raise TypeError(f"chat_template must be a name, a path, or a tuple (jinja, stop token), not {chat_template!r}.")
    if chat_template not in CHAT_TEMPLATES:
        names = [template.name for template in TABLE]
        raise unknown("chat template", chat_template, names, "A .jinja file or a tuple (jinja, stop token) works, too.")
    return CHAT_TEMPLATES[chat_template]


def _of_this_size(template: ChatTemplate, tokenizer: Any) -> ChatTemplate:
    """Gemma 4 has two templates, by the size of the model: the one that the tokenizer came with tells which."""
    if template.name == "gemma-4" and "<|turn>" in str(tokenizer.chat_template):
        prompt = render(tokenizer, [{"role": "user", "content": "Question"}], add_generation_prompt=True)
        if prompt.endswith(template.assistant_header):
            return CHAT_TEMPLATES["gemma-4-e4b"]
    return template


def _with_system(jinja: str, template: ChatTemplate, system_message: str) -> str:
    if template.system == "none":
        raise ValueError(
            f"The chat template {template.name!r} has no place for a system message (its owner's refuses one), so "
            f"system_message={system_message!r} cannot be shown. Leave it out, or put it into the first question."
        )
    system = f"{{'role': 'system', 'content': {_literal(system_message)}}}"
    return (
        "{%- if not messages or messages[0].role not in ['system', 'developer'] -%}"
        f"{{%- set messages = [{system}] + messages -%}}"
        "{%- endif -%}" + jinja
    )


def _with_mapping(jinja: str, mapping: Mapping[str, str]) -> str:
    """A template that first gives the messages their usual names."""
    usual = ("role", "content", "system", "user", "assistant", "tool")
    for key in mapping:
        if key not in usual:
            raise unknown("key in mapping", key, usual, "A mapping goes from the usual name to that in the data.")
    role, content = _literal(mapping.get("role", "role")), _literal(mapping.get("content", "content"))
    roles = ", ".join(f"{_literal(mapping[name])}: {_literal(name)}" for name in usual[2:] if name in mapping)
    return (
        "{%- set renamed = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        f"{{%- set role = message[{role}] if {role} in message else message.role -%}}"
        f"{{%- set content = message[{content}] if {content} in message else message.content -%}}"
        f"{{%- set named = dict(message, role={{{roles}}}.get(role, role), content=content) -%}}"
        "{%- set renamed.messages = renamed.messages + [named] -%}"
        "{%- endfor -%}"
        "{%- set messages = renamed.messages -%}" + jinja
    )


def _literal(text: str) -> str:
    """A jinja string, with no other escapes than every jinja knows (llama.cpp's has no \\u)."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f"'{text}'"


def _with_stop(jinja: str, template: ChatTemplate, tokenizer: Any, map_eos_token: bool) -> str:
    """Make the template's stop token one token of this vocabulary, or say why it cannot be."""
    stop = template.eos_token
    if stop == EOS:
        _require_eos(tokenizer, template)
        return jinja
    for other in template.stop_tokens[1:]:
        if not _is_token(tokenizer, other):
            warnings.warn(
                f"{other!r}, with which the chat template {template.name!r} ends some tool calls, is no token of this "
                f"vocabulary. If your data has such calls: add_new_tokens(model, tokenizer, {[other]!r}) before "
                "get_chat_template.",
                UserWarning,
                stacklevel=4,
            )
    if _is_token(tokenizer, stop):
        if map_eos_token:
            if "eos_token" in jinja and template.own_jinja is None:  # Phi closes a text with the owner's, whatever stops
                jinja = f"{{%- set eos_token = {_literal(_closing(tokenizer, stop))} -%}}" + jinja
            _set_eos(tokenizer, stop)
        return jinja
    pieces = len(tokenizer(stop, add_special_tokens=False)["input_ids"])
    remedy = f"add_new_tokens(model, tokenizer, {[stop]!r}) before get_chat_template makes it a token."
    if not map_eos_token:
        raise ValueError(
            f"{stop!r}, with which the chat template {template.name!r} ends a turn, is no token of this vocabulary: it would "
            f"be split into {pieces}, and nothing would stop generation. {remedy} Or pass map_eos_token=True to end turns with "
            f"the tokenizer's own eos_token."
        )
    eos = _require_eos(tokenizer, template)
    warnings.warn(
        f"{stop!r}, with which the chat template {template.name!r} ends a turn, is no token of this vocabulary (it would be "
        f"split into {pieces}), so turns now end with the tokenizer's own {eos!r}. To keep {stop!r}: {remedy}",
        UserWarning,
        stacklevel=4,
    )
    return jinja.replace(stop, eos)


def _closing(tokenizer: Any, stop: str) -> str:
    """The token that closes a text: the tokenizer's EOS, unless an earlier call made the stop token its EOS."""
    if tokenizer.eos_token not in (stop, None):
        return tokenizer.eos_token
    return "<|endoftext|>" if _is_token(tokenizer, "<|endoftext|>") else ""


def _is_token(tokenizer: Any, text: str) -> bool:
    token = tokenizer.convert_tokens_to_ids(text)
    return token not in (None, tokenizer.unk_token_id) and tokenizer(text, add_special_tokens=False)["input_ids"] == [token]


def _require_eos(tokenizer: Any, template: ChatTemplate) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The chat template {template.name!r} would end turns with the tokenizer's eos_token, but this tokenizer has none: "
            "set tokenizer.eos_token to a token of its vocabulary first."
        )
    return tokenizer.eos_token


def _set_eos(tokenizer: Any, stop: str) -> None:
    if tokenizer.eos_token != stop:
        tokenizer.add_special_tokens({"eos_token": stop})
    if tokenizer.pad_token == stop:
        warnings.warn(
            f"{stop!r} is both the stop token and the padding token: whatever masks the padding then masks the stop token, and "
            "the model never learns to stop. Set tokenizer.pad_token to another token.",
            UserWarning,
            stacklevel=5,
        )
