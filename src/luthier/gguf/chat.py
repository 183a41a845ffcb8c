"""What a GGUF file says about conversations: the chat template, and every token that ends an answer."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from luthier.data.chat import EOS, TABLE, ChatTemplate, strip_generation_marks, template_parts
from luthier.data.render import text_tokenizer
from luthier.gguf.vocabulary import read_json
from luthier.gguf.writer import Value

SYSTEM = {"role": "system", "content": "Speak briefly."}
QUESTION = {"role": "user", "content": "What is a lute?"}
ANSWER = {"role": "assistant", "content": "An instrument."}
CUT = ("It's 27 DON'Ts:\n  x = 1234 # and so on\r\n\n", "\t Straße/é 你好 e\u0301 ...?!\n")  # as no two tokenizers do
PROBES = ([QUESTION], [QUESTION, ANSWER, QUESTION], [SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION])


@dataclass(frozen=True)
class Known:
    """A template of ``luthier.data.chat`` that renders as a tokenizer's own does.

    ``stop``: what stands there for its stop token, where the vocabulary has no such token. ``system``: the system message
    that the tokenizer's template shows where a conversation brings none.
    """

    template: ChatTemplate
    stop: str | None = None
    system: str | None = None


def load_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer in a directory, the one inside a processor, or the one given.

    From a directory, text is cut as its tokenizer.json says, which is what a GGUF file follows. transformers cuts it by the
    model's type for some (qwen2), whatever stands there.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = _as_stored(Path(tokenizer), AutoTokenizer.from_pretrained(tokenizer, local_files_only=True))
    return text_tokenizer(tokenizer)


def _as_stored(directory: Path, tokenizer: Any) -> Any:
    """``tokenizer`` if it cuts text as the tokenizer.json in ``directory`` says, else one that does."""
    if not (directory / "tokenizer.json").is_file():
        return tokenizer
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    as_read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in CUT]
    if as_read == [stored.encode(text, add_special_tokens=False).ids for text in CUT]:
        return tokenizer
    warnings.warn(
        f"transformers reads the tokenizer in {directory} as a {type(tokenizer).__name__} and cuts text otherwise than its "
        "tokenizer.json says. The GGUF file follows tokenizer.json, and is compared with that.",
        UserWarning,
        stacklevel=3,
    )
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def chat_templates(directory: str | Path) -> dict[str, str]:
    """The Jinja chat templates in ``directory`` by name, ``"default"`` first; empty without one."""
    directory = Path(directory)
    templates: dict[str, str] = {}
    stored = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, str):
        templates["default"] = stored
    elif isinstance(stored, list):
        templates |= {entry["name"]: entry["template"] for entry in stored}
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = (directory / "chat_template.jinja").read_text("utf8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text("utf8")
    return templates


def chat_metadata(directory: str | Path) -> dict[str, Value]:
    """The chat templates as they render, without the marks that only training needs, and the tokens that end a turn."""
    result: dict[str, Value] = {}
    templates = chat_templates(directory)
    for name, jinja in templates.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        result[key] = strip_generation_marks(jinja)
    others = [name for name in templates if name != "default"]
    if others:
        result["tokenizer.chat_templates"] = others
    tokenizer = load_tokenizer(directory)  # says where transformers cuts text otherwise, template or not
    if templates:
        ends = [*stop_tokens(tokenizer), *_generation_stops(Path(directory), tokenizer)]
        ends = [token for token in dict.fromkeys(ends) if token != tokenizer.eos_token]
        for key, token in zip(("eot", "eom"), ends, strict=False):  # end of turn, end of message: two more is all there is
            result[f"tokenizer.ggml.{key}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    return result


def _generation_stops(directory: Path, tokenizer: Any) -> list[str]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ids = json.loads(path.read_text("utf8")).get("eos_token_id")
        ids = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
        if not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
            raise ValueError(f"eos_token_id is {ids}, where the tokenizer has {len(tokenizer)} tokens")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or download the file again.") from error
    return tokenizer.convert_ids_to_tokens(ids)


def stop_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every token that ends an answer: those of the chat template first, then the tokenizer's EOS."""
    stops = [*_template_stops(tokenizer), tokenizer.eos_token]
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _template_stops(tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        return []
    known = known_template(tokenizer)
    stops = [] if known is None else [tokenizer.eos_token if stop == EOS else stop for stop in known.template.stop_tokens]
    try:
        stops += template_parts(tokenizer).stop_tokens
    except ValueError:  # a template that does not show how a turn ends; the tokenizer's EOS still does
        pass
    vocabulary = tokenizer.get_vocab()
    return [stop for stop in stops if stop in vocabulary]


def known_template(tokenizer: Any) -> Known | None:
    """The named template that renders as the tokenizer's own, found by rendering a few conversations with each."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    vocabulary = tokenizer.get_vocab()
    lacking = frozenset(template.eos_token for template in TABLE if template.eos_token not in vocabulary)
    return _known_template(tokenizer.chat_template, json.dumps(tokenizer.special_tokens_map), tokenizer.eos_token, lacking)


@functools.lru_cache(maxsize=8)  # an export asks several times, and a hundred renderings take a second
def _known_template(jinja: str, special_tokens: str, eos: str | None, lacking: frozenset[str]) -> Known | None:
    """``special_tokens``: by name, as JSON. ``lacking``: stop tokens of named templates that are not in the vocabulary."""
    special = json.loads(special_tokens)
    own = _renderings(special, jinja)
    variants = [(template, jinja, stop) for template in TABLE for jinja, stop in _variants(template, eos, lacking)]
    renderings = [_renderings(special, jinja) for _, jinja, _ in variants]
    for (template, _, stop), named in zip(variants, renderings, strict=True):
        if named == own:
            return Known(template, stop)
    for (template, jinja, stop), named in zip(variants, renderings, strict=True):
        if own[2] is not None and named[2:] == own[2:]:  # the same wherever there is a system message
            system = _default_system(special, jinja, own)
            if system:
                return Known(template, stop, system)
    return None


def _variants(template: ChatTemplate, eos: str | None, lacking: frozenset[str]) -> Iterator[tuple[str, str | None]]:
    """A template's Jinja, and the one with the tokenizer's EOS where its stop token is not in the vocabulary."""
    yield template.jinja, None
    stop = template.eos_token
    if eos and stop != EOS and stop in lacking:
        yield template.jinja.replace(stop, eos), eos


def _renderings(special: dict, jinja: str) -> list[str | None]:
    return [_rendered(special, jinja, messages) for messages in PROBES]


def _rendered(special: dict, jinja: str, messages: list[dict]) -> str | None:
    """The prompt for a conversation; None where the template refuses it. The date is that of today in all of them."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=jinja, add_generation_prompt=True, **special
        )
    except (TemplateError, TypeError):
        return None
    return rendered[0]


def _default_system(special: dict, jinja: str, own: list[str | None]) -> str | None:
    """The system message that the tokenizer's template adds where there is none, if that is all that differs."""
    probe = "\x00"
    shown = _rendered(special, jinja, [{"role": "system", "content": probe}, *PROBES[0]])
    if shown is None or own[0] is None or shown.count(probe) != 1:
        return None
    before, after = shown.split(probe)
    if not own[0].startswith(before) or not own[0].endswith(after) or len(own[0]) <= len(before) + len(after):
        return None
    system = own[0][len(before) : len(own[0]) - len(after)]
    with_system = [{"role": "system", "content": system}]
    same = all(_rendered(special, jinja, with_system + PROBES[i]) == own[i] for i in (0, 1))
    return system if same else None
