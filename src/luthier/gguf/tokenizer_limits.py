"""Where llama.cpp's tokenizers differ from those of the ``tokenizers`` library: refused by name, or said."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator

from tokenizers import Tokenizer, models, pre_tokenizers

from luthier.errors import UnsupportedError
from luthier.gguf.vocabulary import Vocabulary, parts, read_vocabulary

SPACE = "▁"  # how SentencePiece writes a space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UTF8 = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # bytes that a text can have
BYTE_LETTERS = set(pre_tokenizers.ByteLevel.alphabet()) - set("ÀÁõö÷øùúûüýþÿ")  # how byte-level BPE writes them
RARE_LETTERS = {chr(i) for i in (*range(0x100, 0x120), 0x121)} - set("ĉĊč") | set("ñòóô")  # control, far planes of Unicode

# found whole wherever they stand, and never shown, whatever a file says of them
CONTROL_LOOKING = frozenset(
    "</s> <EOT> <MID> <PAD> <PRE> <REPO> <SUF> <end_of_turn> <end_of_utterance> <eos> <fim-middle> <fim-pad> <fim-prefix> "
    "<fim-repo> <fim-suffix> <fim_middle> <fim_pad> <fim_prefix> <fim_suffix> <reponame> <turn|> <|calls|> <|call|> "
    "<|code_middle|> <|code_prefix|> <|code_suffix|> <|end_of_text|> <|endoftext|> <|end|> <|eom_id|> <|eot_id|> <|file_sep|> "
    "<|fim_middle|> <|fim_pad|> <|fim_prefix|> <|fim_repo|> <|fim_suffix|> <|flush|> <|im_end|> <|middle|> <|prefix|> "
    "<|repo_name|> <|return|> <|suffix|> <|tool_response> [EOS] [EOT] [PAD] [e~[ _<EOT>".split()
)


def warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=4)


def such_as(tokens: Collection[str]) -> str:
    tokens = list(dict.fromkeys(tokens))
    return f"{', '.join(tokens[:3])}{' and more' if len(tokens) > 3 else ''}"


def check_model(state: dict) -> None:
    """Kinds of BPE that llama.cpp does not have."""
    model = state["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedError(f"GGUF export does not cover tokenizers of the kind {kind}, only BPE.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                f"GGUF export does not cover this tokenizer: its BPE has {key} {model[key]!r}, which llama.cpp does not know."
            )


def check_tokens(vocabulary: Vocabulary, swallows_white_space: bool) -> None:
    """Say which tokens llama.cpp finds elsewhere, or does not find."""
    added = [token for token in vocabulary.added.values() if token["content"]]
    for flag in ("lstrip", "single_word") if swallows_white_space else ("lstrip", "rstrip", "single_word"):
        tokens = [token["content"] for token in added if token.get(flag)]
        if tokens:
            warn(
                f"The tokenizer has {flag}=True for {such_as(tokens)}; llama.cpp does not know it: text with white space or "
                "letters beside them is cut into other tokens there."
            )
    if vocabulary.lacking:
        warn(
            f"tokenizer_config.json names {such_as(vocabulary.lacking)}, which tokenizer.json does not have: transformers adds "
            "what is lacking when it reads the directory, the file has no such token. Save the tokenizer there again."
        )
    looking = [token for i, token in vocabulary.tokens.items() if i not in vocabulary.added and token in CONTROL_LOOKING]
    if looking:
        warn(f"llama.cpp takes {such_as(looking)} for control tokens; in this tokenizer they are made of their letters.")
    overlaps = list(_overlaps(added))
    if overlaps:
        warn(
            f"Added tokens overlap: of {such_as(overlaps)} llama.cpp takes the longest first, and the tokenizer the first one: "
            "such text is cut into other tokens there."
        )


def _overlaps(added: Collection[dict]) -> Iterator[str]:
    """Short texts in which llama.cpp finds other added tokens than the tokenizer does."""
    early = [token["content"] for token in added if not token.get("normalized")]
    late = [token["content"] for token in added if token.get("normalized")]  # looked for in what is left, once it is normalised
    beginnings: dict[str, list[str]] = defaultdict(list)
    for token in (*early, *late):
        for i in range(1, len(token)):
            beginnings[token[:i]].append(token)
    texts = {first[:i] + second for first in (*early, *late) for i in range(1, len(first))
             for second in beginnings.get(first[i:], ()) if second != first}  # fmt: skip
    passes = [_any_of(tokens) for tokens in (early, late) if tokens]
    if early and late:
        texts |= {token for token in late if passes[0].search(token)}
    longest_first = sorted((*early, *late), key=lambda token: -len(token.encode()))
    for text in sorted(texts):
        if _cut(text, passes) != _cut(text, [_any_of([token]) for token in longest_first if token in text]):
            yield text


def _any_of(tokens: Collection[str]) -> re.Pattern:
    """Of tokens that begin in the same place, the longest."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")


def _cut(text: str, passes: Collection[re.Pattern]) -> list[str]:
    """The text cut at tokens, every pass in what the earlier ones left."""
    pieces = [(text, False)]
    for pattern in passes:
        pieces = [
            (part, is_token or i % 2 == 1)
            for piece, is_token in pieces
            for i, part in enumerate([piece] if is_token else pattern.split(piece))
        ]
    return [piece for piece, _ in pieces if piece]


def check_bytes(state: dict) -> None:
    """Of byte-level BPE: a byte without a token is dropped, by llama.cpp after merging, by the tokenizer before."""
    lacking = BYTE_LETTERS - state["model"]["vocab"].keys()
    if lacking - RARE_LETTERS:
        raise UnsupportedError(
            f"GGUF export does not cover this tokenizer: it has no token for {len(lacking)} of 256 bytes "
            f"({such_as(sorted(lacking - RARE_LETTERS))} as byte-level BPE writes them), so that it loses letters."
        )
    if lacking:
        warn(f"The tokenizer has no token for {len(lacking)} bytes of rare letters: llama.cpp cuts text beside them otherwise.")


def check_byte_tokens(vocabulary: Vocabulary) -> None:
    """Of SentencePiece's BPE: llama.cpp ends the process at a byte without a token."""
    known = set(vocabulary.tokens.values())
    lacking = [f"<0x{byte:02X}>" for byte in UTF8 if f"<0x{byte:02X}>" not in known]
    if lacking:
        raise UnsupportedError(f"GGUF export does not cover this tokenizer: it has no token {such_as(lacking)}.")


def unmade(state: dict) -> list[str]:
    """Tokens that merging their text does not give."""
    vocabulary = read_vocabulary(state)
    added = {token["content"] for token in vocabulary.added.values()}
    tokens = [token for token in state["model"]["vocab"] if token not in added and not BYTE_TOKEN.fullmatch(token)]
    merging = Tokenizer(models.BPE(state["model"]["vocab"], vocabulary.merges))
    made = merging.encode_batch(tokens, add_special_tokens=False)
    return [token for token, encoded in zip(tokens, made, strict=True) if encoded.tokens != [token]]


def adds_space(state: dict) -> bool:
    """Whether a text begins with a space that nobody typed. Of SentencePiece's BPE.

    ``UnsupportedError`` for whatever does more than to write spaces as SentencePiece does.
    """
    adds = marks = False
    for step in (*parts(state.get("normalizer")), *parts(state.get("pre_tokenizer"))):
        match step:
            case {"type": "Prepend", "prepend": prefix} if not adds and prefix in (SPACE, SPACE if marks else " "):
                adds = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                marks = True
            case {"type": "Metaspace", "replacement": "▁"}:
                adds = adds or (step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
                marks = True
            case {"type": "Split", "pattern": {"String": " "}} if marks:
                pass  # there are no spaces any more
            case _:
                raise UnsupportedError(f"GGUF export does not cover this step of the tokenizer: {step}.")
    if not marks:
        raise UnsupportedError(f"GGUF export does not cover this tokenizer: it does not write a space as {SPACE!r}.")
    return adds


def check_spaces(state: dict, vocabulary: Vocabulary) -> None:
    """Say where llama.cpp puts spaces that the tokenizer does not."""
    steps = [*parts(state.get("normalizer")), *parts(state.get("pre_tokenizer"))]
    prepended = any(step["type"] == "Prepend" for step in steps)
    behind_spaces = [token["content"] for token in vocabulary.added.values() if token.get("normalized")]
    if prepended and behind_spaces:
        warn(
            f"The tokenizer looks for {such_as(behind_spaces)} behind spaces only (normalized=True), and llama.cpp everywhere: "
            "some text is cut into other tokens there. Save it with normalized=False for them."
        )
    if adds_space(state) and not prepended:
        warn(
            "The tokenizer puts a space before the first word of a text only (Metaspace). llama.cpp puts one behind every "
            "special token, too, and before text that begins with a space: such text is cut into other tokens there."
        )


def check_merges(state: dict, tokens: Collection[str], merges: Collection[tuple[str, str]]) -> None:
    """llama.cpp joins any neighbours that make a token, the best token first; SentencePiece's tokenizers have a merge for each
    such pair, and those of a token in a row.

    ``tokens``: those that merges may make.
    """
    if any(step["type"] == "Metaspace" and step.get("split", True) for step in parts(state.get("pre_tokenizer"))):
        joined = [token for token in tokens if SPACE in token[1:]]
        if joined:
            raise UnsupportedError(
                f"GGUF export does not cover this tokenizer: it cuts its text at every space, and has {joined[0]!r} in its "
                "vocabulary, which llama.cpp would make all the same."
            )
    known, pairs = set(tokens), set(merges)
    lacking = [
        token for token in tokens for i in range(1, len(token))
        if token[:i] in known and token[i:] in known and (token[:i], token[i:]) not in pairs
    ]  # fmt: skip
    if lacking:
        warn(
            f"{len(set(lacking))} tokens such as {lacking[0]!r} can be made in llama.cpp of halves that this tokenizer does "
            "not merge: some text may be cut into other tokens there."
        )
    made = [left + right for left, right in merges]
    begun: set[str] = set()
    torn = [token for i, token in enumerate(made) if token in begun and token != made[i - 1] or begun.add(token)]
    if torn:
        warn(
            f"The merges of {len(set(torn))} tokens such as {torn[0]!r} are not in a row, and llama.cpp knows one rank of a "
            "token: some text may be cut into other tokens there."
        )
    odd = unmade(state) if state["model"].get("ignore_merges") else []
    if odd:
        warn(
            f"{len(odd)} tokens such as {odd[0]!r} are not what the tokenizer's merges make of their text (ignore_merges), and "
            "llama.cpp merges: such words are cut into other tokens there."
        )
