"""The tokenizer of a GGUF file against the trained model's: what texts become, and every entry of the vocabulary."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.gguf.reader import GGUFFile
from luthier.proof.gguf_tokenizer import (
    BYTE,
    CONTROL,
    CUTS,
    NORMAL,
    PUBLISHED,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFTokenizer,
)
from luthier.proof.reference import TEXTS, conversations

SPACES = "llama.cpp puts a space behind special tokens where the tokenizer puts none"
CAPITALS = "llama.cpp cuts words with capitals or accents beyond ASCII otherwise than the tokenizer does: their tokens differ"
COMPOSED = "llama.cpp does not compose letters and accents written apart (NFC) as the tokenizer does: their tokens differ"
BYTES = re.compile(r"<0x[0-9A-F]{2}>")
MARKED = re.compile(r"<[|｜].*[|｜]>|<unused\d+>")  # what other converters take for control tokens, whatever the tokenizer says
NAMES = {NORMAL: "text", UNKNOWN: "unknown", CONTROL: "control", USER_DEFINED: "user-defined", UNUSED: "unused", BYTE: "byte"}


@dataclass
class TokenComparison:
    """``equal``: texts whose tokens are the same."""

    equal: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def compare_tokens(file: GGUFFile, tokenizer: Any, texts: Sequence[str] = ()) -> TokenComparison:
    """Compare the file's tokenizer with ``tokenizer``, on difficult texts, chats and ``texts`` as well."""
    result = TokenComparison()
    try:
        rebuilt = GGUFTokenizer(file)
        _compare_texts(rebuilt, tokenizer, texts, result)
    except ValueError as error:
        result.failures.append(str(error))
        return result
    result.failures += [wrong for wrong in (_first_other_token(rebuilt, tokenizer), _other_bos(file, tokenizer)) if wrong]
    if hasattr(tokenizer, "backend_tokenizer") and len(rebuilt.tokens) >= len(tokenizer):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        others = (
            _first_other_type(rebuilt, state), _first_other_merge(file, rebuilt, state), _first_other_cut(rebuilt, tokenizer)
        )  # fmt: skip
        result.failures += [wrong for wrong in others if wrong]
    return result


def _compare_texts(rebuilt: GGUFTokenizer, tokenizer: Any, texts: Sequence[str], result: TokenComparison) -> None:
    plain = [(text, True, tokenizer(text)["input_ids"]) for text in (*TEXTS, *texts)]
    # what prints its own BOS gets no second one from the programs that read GGUF
    chats = [(text, False, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in conversations(tokenizer)]
    for text, special, wanted in plain + chats:
        found = rebuilt.encode(text, special)
        if wanted == found:
            result.equal += 1
        elif rebuilt.may_be_given_a_space(text) and rebuilt.same_but_for_spaces(wanted, found):
            result.notes.append(SPACES)
        elif GGUFTokenizer(rebuilt.file, CUTS | PUBLISHED).encode(text, special) == wanted:
            result.notes.append(CAPITALS)
        elif rebuilt.encode(unicodedata.normalize("NFC", text), special) == wanted:
            result.notes.append(COMPOSED)
        else:
            place = next(
                (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found))
            )
            names = [rebuilt.name(ids[place]) if place < len(ids) else "nothing" for ids in (found, wanted)]
            result.failures.append(f"token {place} of {text[:24]!r} is {names[0]} instead of {names[1]}")
    result.notes = list(dict.fromkeys(result.notes))


def _first_other_token(rebuilt: GGUFTokenizer, tokenizer: Any) -> str | None:
    if len(rebuilt.tokens) < len(tokenizer):
        return f"it has {len(rebuilt.tokens)} tokens, the tokenizer {len(tokenizer)}"
    known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for i, (wanted, found) in enumerate(zip(known, rebuilt.tokens, strict=False)):
        if wanted is not None and wanted.replace("▁", " ") != found.replace("▁", " "):
            return f"token {i} is {found!r} in the file and {wanted!r} in the tokenizer"
    return None


def _other_bos(file: GGUFFile, tokenizer: Any) -> str | None:
    found = file.metadata.get("tokenizer.ggml.bos_token_id")
    if None in (found, tokenizer.bos_token_id) or found == tokenizer.bos_token_id:
        return None
    return f"its BOS is token {found}, the tokenizer's {tokenizer.bos_token_id}"


def _first_other_type(rebuilt: GGUFTokenizer, state: dict) -> str | None:
    """Whether control tokens end generation and stay hidden, and which tokens are looked for in a text, hangs on their types.

    ``state``: the tokenizer, as its JSON.
    """
    added, unknown = {token["id"]: token for token in state["added_tokens"]}, state["model"].get("unk_token")
    vocabulary = {*state["model"]["vocab"].values(), *added}
    for i, (token, found) in enumerate(zip(rebuilt.tokens, rebuilt.types, strict=True)):
        if token == unknown:
            allowed = (UNKNOWN, CONTROL, NORMAL)
        elif i in added:
            allowed = (CONTROL,) if added[i]["special"] else (USER_DEFINED, CONTROL)[: 1 + bool(MARKED.fullmatch(token))]
            if rebuilt.kind == "llama" and "▁" in token and not added[i]["special"]:
                allowed += (NORMAL,)  # made of spaces by merges, as Gemma's runs of them
        elif i not in vocabulary:
            allowed = (UNUSED,)
        else:
            allowed = (BYTE,) if rebuilt.kind == "llama" and BYTES.fullmatch(token) else (NORMAL,)
        if found not in allowed:
            return f"token {i}, {token!r}, is of the type {NAMES.get(found, found)} instead of {NAMES[allowed[0]]}"
    return None


def _first_other_merge(file: GGUFFile, rebuilt: GGUFTokenizer, state: dict) -> str | None:
    """Merges that are not the tokenizer's; or, where the file has scores for them, a score that turns their order round."""
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
    if rebuilt.kind == "gpt2":
        wanted = [" ".join(half.replace(" ", "Ġ") for half in pair) for pair in merges]
        found = file.metadata["tokenizer.ggml.merges"]
        place = _first_difference(wanted, found)
        if place < min(len(wanted), len(found)):
            return f"merge {place} is {found[place]!r} in the file and {wanted[place]!r} in the tokenizer"
        return None if len(wanted) == len(found) else f"it has {len(found)} merges, the tokenizer {len(wanted)}"
    made = dict.fromkeys(left + right for left, right in merges)  # by the first merge that makes them
    ids = [i for i in map(rebuilt.ids.get, made) if i is not None and rebuilt.types[i] == NORMAL]
    scores = file.metadata["tokenizer.ggml.scores"][ids]
    wrong = np.flatnonzero(scores[1:] > scores[:-1])
    if len(wrong):
        one, other = (rebuilt.tokens[ids[wrong[0] + i]] for i in (0, 1))
        return f"by its scores {other!r} is made before {one!r}, which the tokenizer merges first"
    return None


def _first_other_cut(rebuilt: GGUFTokenizer, tokenizer: Any) -> str | None:
    """Where a text is cut before BPE, whether or not the vocabulary shows it."""
    cutter = tokenizer.backend_tokenizer.pre_tokenizer
    if rebuilt.kind != "gpt2" or cutter is None:
        return None
    published = GGUFTokenizer(rebuilt.file, CUTS | PUBLISHED)
    for text in TEXTS:
        wanted, found = [part for part, _ in cutter.pre_tokenize_str(text)], published.cut(text)
        if wanted != found:
            place = _first_difference(wanted, found)
            return f"it cuts text otherwise than the tokenizer: {found[place]!r} instead of {wanted[place]!r}"
    return None


def _first_difference(one: Sequence, other: Sequence) -> int:
    """Where two lists differ first; the length of the shorter one, where that is how the longer one begins."""
    places = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(places, min(len(one), len(other)))
