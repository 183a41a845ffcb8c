"""What ``tokenizer.json`` and its neighbours say, before it is written down for GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from luthier.errors import Damaged

CONFIG = "tokenizer_config.json"
CONDITIONS = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)  # of an added token


@dataclass
class Vocabulary:
    """Tokens and added tokens by id, merges in their order, and the names of special tokens that have no id."""

    tokens: dict[int, str]
    added: dict[int, dict]
    merges: list[tuple[str, str]]
    lacking: list[str] = field(default_factory=list)


def read_vocabulary(state: dict, directory: Path | None = None) -> Vocabulary:
    """``state``: tokenizer.json. In ``directory`` tokenizer_config.json may have more added tokens, or other conditions for
    them, which transformers obeys.

    ``ValueError`` where one id stands for two tokens.
    """
    added = {token["id"]: CONDITIONS | token for token in state.get("added_tokens") or []}
    tokens = {i: token for token, i in state["model"]["vocab"].items()}
    for i, token in added.items():
        if tokens.setdefault(i, token["content"]) != token["content"]:
            raise ValueError(f"tokenizer.json is damaged: the id {i} stands for {tokens[i]!r} and {token['content']!r}.")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in state["model"]["merges"]]
    if directory is None:
        return Vocabulary(tokens, added, merges)
    ids = {token: i for i, token in tokens.items()}
    for key, token in (read_json(directory / CONFIG).get("added_tokens_decoder") or {}).items():
        i = int(key)
        if tokens.get(i, token["content"]) == token["content"] and ids.get(token["content"], i) == i:
            added[i], tokens[i] = CONDITIONS | token | {"id": i}, token["content"]
    known = set(tokens.values())
    return Vocabulary(tokens, added, merges, [token for token in _named(directory) if token not in known])


def special_tokens(directory: str | Path) -> dict[str, str]:
    """The named special tokens (``bos_token``, ``eos_token``...) of the tokenizer in ``directory``."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", CONFIG):
        for key, token in read_json(Path(directory) / file).items():
            if key.endswith("_token") and isinstance(_content(token), str):
                named[key] = _content(token)
    return named


def _named(directory: Path) -> list[str]:
    """Every special token that the directory names."""
    config = read_json(directory / CONFIG)
    more = [config.get(key) or [] for key in ("extra_special_tokens", "additional_special_tokens")]
    lists = [list(part.values()) if isinstance(part, dict) else part for part in more]
    named = [*special_tokens(directory).values(), *(_content(token) for part in lists for token in part)]
    return list(dict.fromkeys(token for token in named if isinstance(token, str)))


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def read_json(path: Path) -> dict:
    """What a JSON file says; nothing, where there is none."""
    with Damaged(path):
        return dict(json.loads(path.read_text("utf8")).items()) if path.is_file() else {}


def parts(component: dict | None) -> Iterator[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for key in ("pretokenizers", "normalizers", "decoders", "processors"):
        for part in component.get(key) or []:
            yield from parts(part)
