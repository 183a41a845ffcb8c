"""A tokenizer as GGUF metadata, from ``tokenizer.json`` alone.

Two kinds exist in llama.cpp: "gpt2", a byte-level BPE whose text is cut by a regex that llama.cpp knows by name, and
"llama", SentencePiece's BPE, which merges the pair with the best score. Both are read from the merges of
tokenizer.json; ``tokenizer.model`` is not needed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from luthier.errors import Damaged, UnsupportedError
from luthier.gguf.tokenizer_limits import (
    BYTE_TOKEN,
    SPACE,
    adds_space,
    check_byte_tokens,
    check_bytes,
    check_merges,
    check_model,
    check_spaces,
    check_tokens,
    unmade,
)
from luthier.gguf.vocabulary import Vocabulary, parts, read_vocabulary, special_tokens
from luthier.gguf.writer import Value
from luthier.terminal import say

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PHI_3 = re.compile("phi-?3", re.IGNORECASE)
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{0}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{0}|"
)
_GPT4O_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# how the text is cut before BPE -> llama.cpp's name of it
PRE_TOKENIZERS = {
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
    (_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,): "qwen2",
    (_GPT4O_WORDS.replace("{0}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _GPT4O_REST,): "gpt-4o",
    (_GPT4O_WORDS.replace("{0}", "") + r"\p{N}" + _GPT4O_REST,): "tekken",
    (_CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}" + _REST.replace(r"\p{L}", r"\p{L}\p{M}"),): "qwen35",
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
    (BLOOM,): "bloom",
    (BLOOM, r"\p{N}"): "viking",
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is in the vocabulary is taken whole there, whatever the merges say
CONTRACTIONS = re.compile(r"\(\?:'\[sS\]\|'\[tT\]\|'\[rR\]\[eE\]\|'\[vV\]\[eE\]\|'\[mM\]\|'\[lL\]\[lL\]\|'\[dD\]\)")
# other spellings of the same: one number with a count; tiktoken's of GPT-4; a class within a class
SPELLINGS = {
    r"\p{N}{1}|": r"\p{N}|",
    "'(?i:[sdmt]|ll|ve|re)|": _CONTRACTIONS,
    r"[^\r\n\p{L}\p{N}]?+\p{L}+|": r"[^\r\n\p{L}\p{N}]?\p{L}+|",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)": r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    "[.,!?…。，、।۔،]": ".,!?…。，、।۔،",
}


def tokenizer_metadata(directory: str | Path, vocab_size: int) -> dict[str, Value]:
    """The ``tokenizer.*`` entries for the tokenizer in ``directory`` and a model with ``vocab_size`` embeddings.

    Raises ``FileNotFoundError`` without a tokenizer.json, ``UnsupportedError`` for a kind that is not covered,
    ``ValueError`` where the tokenizer has more tokens than the model.
    """
    directory = Path(directory)
    path = _tokenizer_file(directory)
    with Damaged(path):
        state = json.loads(path.read_text("utf8"))
        check_model(state)
        vocabulary = read_vocabulary(state, directory)
        top = max(vocabulary.tokens)
        if top >= vocab_size:
            raise ValueError(
                f"The tokenizer has a token {vocabulary.tokens[top]!r} with the id {top}, but the model has {vocab_size} rows."
                " Resize the model (resize_model_vocab) or save the tokenizer that belongs to it."
            )
        check_tokens(vocabulary, _swallows_white_space(vocabulary.added.values()))
        write = _byte_level if _is_byte_level(state) else _sentencepiece
        return write(state, vocabulary, vocab_size) | _special_tokens(directory, path, vocabulary)


def _tokenizer_file(directory: Path) -> Path:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Save the fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return path


def _is_byte_level(state: dict) -> bool:
    return any(part["type"] == "ByteLevel" for part in parts(state.get("pre_tokenizer")))


def _token_type(i: int, vocabulary: Vocabulary) -> int:
    if i not in vocabulary.tokens:
        return UNUSED
    if i in vocabulary.added:
        return CONTROL if vocabulary.added[i]["special"] else USER_DEFINED
    return NORMAL


def _byte_level(state: dict, vocabulary: Vocabulary, vocab_size: int) -> dict[str, Value]:
    check_bytes(state)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(state),
        "tokenizer.ggml.tokens": [vocabulary.tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": np.array([_token_type(i, vocabulary) for i in range(vocab_size)], np.int32),
        # in a merge the space stands between the two halves, so a space in a half is written as byte-level BPE does
        "tokenizer.ggml.merges": [" ".join(half.replace(" ", "Ġ") for half in pair) for pair in vocabulary.merges],
    }


def _pre_tokenizer(state: dict) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts its text."""
    if any(part["type"] not in ("NFC",) for part in parts(state.get("normalizer"))):
        raise UnsupportedError(f"GGUF export does not cover the normalizer of this tokenizer: {state['normalizer']}.")
    cuts = []
    *_, last = steps = list(parts(state["pre_tokenizer"]))
    for part in steps:
        if part["type"] == "ByteLevel" and part is not last:
            raise UnsupportedError("GGUF export does not cover a tokenizer that cuts its text once more after ByteLevel.")
        kept = (part.get("behavior"), bool(part.get("invert"))) in (("Isolated", False), ("Removed", True))
        if part["type"] == "Split" and "Regex" in part["pattern"] and kept:
            cuts.append(_plainly(part["pattern"]["Regex"]))
        elif part["type"] == "Digits" and part["individual_digits"]:
            cuts.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            cuts += [GPT2] if part.get("use_regex", True) else []
        else:
            raise UnsupportedError(f"GGUF export does not cover this step of the tokenizer: {part}.")
    name = PRE_TOKENIZERS.get(tuple(cuts))
    if name is None:
        raise UnsupportedError(f"llama.cpp has no name for the way this tokenizer cuts its text: {cuts}.")
    return _whole_words(name, state)


def _plainly(regex: str) -> str:
    """A regex as `PRE_TOKENIZERS` spells it."""
    regex = CONTRACTIONS.sub("(?i:'s|'t|'re|'ve|'m|'ll|'d)", regex).replace("\r", r"\r").replace("\n", r"\n")
    for spelled, plain in SPELLINGS.items():
        regex = regex.replace(spelled, plain)
    return regex


def _whole_words(name: str, state: dict) -> str:
    """Of two pre-tokenizers with one regex, the one that takes a word in the vocabulary whole, or the one that merges."""
    whole = bool(state["model"].get("ignore_merges"))
    name = "dbrx" if name == "llama-bpe" and not whole else name
    odd = unmade(state) if whole != (name in WHOLE_WORDS) else []
    if odd:
        warnings.warn(
            f"{len(odd)} tokens such as {odd[0]!r} are not what the tokenizer's merges make of their text, and llama.cpp "
            f"{'merges' if whole else 'takes them whole'} with {name!r}: such words are cut into other tokens there.",
            UserWarning,
            stacklevel=2,
        )
    return name


def _sentencepiece(state: dict, vocabulary: Vocabulary, vocab_size: int) -> dict[str, Value]:
    if not state["model"].get("byte_fallback"):
        raise UnsupportedError("GGUF export does not cover SentencePiece-style tokenizers without byte_fallback.")
    check_byte_tokens(vocabulary)
    check_spaces(state, vocabulary)
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(vocabulary.merges):
        rank.setdefault(left + right, i)
    tokens, types, scores = [], [], []
    for i in range(vocab_size):
        token, kind, score = vocabulary.tokens.get(i, f"[PAD{i}]"), _token_type(i, vocabulary), 0.0
        if kind == USER_DEFINED and not vocabulary.added[i]["normalized"] and SPACE in token and token in rank:
            kind = NORMAL  # added as it stands, and merges make it where spaces are: Gemma's runs of spaces
        if BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        elif token == state["model"].get("unk_token"):
            kind = UNKNOWN
        elif kind == USER_DEFINED:  # looked for in the text as it is, before spaces are replaced
            token = token.replace(SPACE, " ") if vocabulary.added[i]["normalized"] else token
            score = -1000.0
        elif kind == NORMAL:  # the earlier a merge, the better its score; what no merge makes is never preferred
            score = -float(rank.get(token, len(rank) + i))
        tokens.append(token)
        types.append(kind)
        scores.append(score)
    made = [
        token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL or kind == USER_DEFINED and SPACE in token
    ]
    check_merges(state, made, vocabulary.merges)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": adds_space(state),
    }


def _special_tokens(directory: Path, path: Path, vocabulary: Vocabulary) -> dict[str, Value]:
    """Ids of the special tokens, and whether BOS and EOS are added: asked of the tokenizer itself."""
    ids = {token: i for i, token in vocabulary.tokens.items()}
    result: dict[str, Value] = {}
    named = special_tokens(directory)
    for key, name in SPECIAL_TOKENS.items():
        if named.get(key) in ids:
            result[f"tokenizer.ggml.{name}_token_id"] = ids[named[key]]
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()  # a file may say how its last batch was padded
    encoded, plain = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    bos, eos = ids.get(named.get("bos_token")), ids.get(named.get("eos_token"))
    adds_bos, adds_eos = encoded[:1] == [bos], encoded[-1:] == [eos]
    if encoded != [bos] * adds_bos + plain + [eos] * adds_eos:
        raise UnsupportedError(
            f"The tokenizer makes {tokenizer.encode('a').tokens} of 'a', and llama.cpp puts nothing around a text but one BOS "
            "and one EOS: change its post_processor."
        )
    return result | {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}


def model_name(directory: str | Path, name: str) -> str:
    """``general.name`` for the model ``name``.

    llama.cpp takes "phi-3" in it for the promise that special tokens swallow the white space behind them, and breaks
    without an <|endoftext|>; so it stands there where the tokenizer keeps that promise, and nowhere else.
    """
    path = _tokenizer_file(Path(directory))
    with Damaged(path):
        swallows = _swallows_white_space(read_vocabulary(json.loads(path.read_text("utf8"))).added.values())
    if swallows:
        return name if PHI_3.search(name) else f"{name} (phi-3 tokenizer)"
    return PHI_3.sub("phi 3", name)


def _swallows_white_space(added: Collection[dict]) -> bool:
    """Whether a tokenizer's special tokens do what llama.cpp takes them for where the name says phi-3."""
    swallowing = sum(token["special"] and token["rstrip"] for token in added)
    return swallowing > len(added) / 2 and any(token["content"] == "<|endoftext|>" for token in added)


def fix_sentencepiece_gguf(directory: str | Path) -> None:
    """Nothing has to be fixed: GGUF files are made from tokenizer.json, added tokens included. For scripts that call it.

    Raises, like an export, where the tokenizer in ``directory`` is missing or of a kind that is not covered.
    """
    state = json.loads(_tokenizer_file(Path(directory)).read_text("utf8"))
    tokenizer_metadata(directory, max(read_vocabulary(state).tokens) + 1)
    say(f"{directory}: tokenizer.json holds all that GGUF needs; tokenizer.model is not read.")
