"""The tokenizer in a GGUF file, rebuilt from the file alone, as llama.cpp reads it."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Mapping

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from luthier.errors import UnsupportedError
from luthier.gguf.reader import GGUFFile

NEEDED = ("model", "tokens", "token_type")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WHOLE = (UNKNOWN, CONTROL, USER_DEFINED)  # found wherever their letters stand
SPACE = "▁"
ASCII_SPACE = " \t\n\v\f\r"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
NOT_LOWER, NOT_UPPER = (
    r"(?:(?=\p{L})[^a-z])",
    r"(?:(?=\p{L})[^A-Z])",
)  # llama.cpp has no classes of case, and marks are no letters
SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(upper: str, lower: str, numbers: str, contractions: str = "") -> tuple[str]:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (f"{start}{upper}*{lower}+{contractions}|{start}{upper}+{lower}*{contractions}|{numbers}{SLASHED}",)


_GPT4O = r"\p{N}{1,3}", r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# what tokenizer.ggml.pre stands for in llama.cpp
CUTS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (CL100K,),
    "dbrx": (CL100K,),
    "qwen2": (CL100K.replace("{1,3}", ""),),
    "gpt-4o": _words(NOT_LOWER, NOT_UPPER, *_GPT4O),
    "tekken": _words(NOT_LOWER, NOT_UPPER, r"\p{N}"),
    "qwen35": (CL100K.replace("{1,3}", "").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!-/:-~&&[^A-Za-z]][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "bloom": (BLOOM,),
    "viking": (BLOOM, r"\p{N}"),
}
# where the tokenizers of that name cut otherwise
PUBLISHED = {
    "gpt-4o": _words(UPPER, LOWER, r"\p{N}{1,3}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),
    "tekken": _words(UPPER, LOWER, r"\p{N}"),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is in the vocabulary is taken whole


class GGUFTokenizer:
    """``GGUFTokenizer(file).encode(text)``: control tokens in the text are parsed, BOS and EOS added if the file says so.

    ``cuts``: of the text before BPE; as llama.cpp does it, or ``CUTS | PUBLISHED`` as the tokenizers do.
    """

    def __init__(self, file: GGUFFile, cuts: Mapping[str, tuple[str, ...]] = CUTS) -> None:
        self.file, self._cuts = file, cuts
        missing = [key for key in NEEDED if f"tokenizer.ggml.{key}" not in file.metadata]
        if missing:
            raise ValueError(f"it has no tokenizer.ggml.{missing[0]}")
        self.tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
        self.types = file.metadata["tokenizer.ggml.token_type"].tolist()
        self.ids = {token: i for i, token in reversed(list(enumerate(self.tokens)))}
        whole = [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in WHOLE and token]
        self._whole = sorted(whole, key=lambda token: -len(token.encode()))
        for name in ("bos", "eos"):
            if file.metadata.get(f"tokenizer.ggml.add_{name}_token") and f"tokenizer.ggml.{name}_token_id" not in file.metadata:
                raise ValueError(f"it adds {name.upper()} to a text and has no tokenizer.ggml.{name}_token_id")
        self.kind = file.metadata["tokenizer.ggml.model"]
        if self.kind not in ("gpt2", "llama"):
            raise UnsupportedError(f"The proof cannot read a tokenizer of the kind {self.kind!r}.")
        self._pieces = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special``: with BOS and EOS where the file says so."""
        result: list[int] = []
        after_special = True
        for part, is_token in self._split(text):
            result += [self.ids[part]] if is_token else self._pieces(part, after_special)
            after_special = is_token
        metadata = self.file.metadata
        if special and metadata.get("tokenizer.ggml.add_bos_token"):
            result = [metadata["tokenizer.ggml.bos_token_id"], *result]
        if special and metadata.get("tokenizer.ggml.add_eos_token"):
            result = [*result, metadata["tokenizer.ggml.eos_token_id"]]
        return result

    def cut(self, text: str) -> list[str]:
        """``text`` cut as before BPE, without regard to tokens that are taken whole; whole, where nothing is cut."""
        return [part for part, _ in self._cutter.pre_tokenize_str(text)] if self.kind == "gpt2" else [text]

    def _swallows(self, token: str) -> bool:
        """Whether white space behind ``token`` disappears: what llama.cpp makes of "phi-3" in a model's name."""
        name = str(self.file.metadata.get("general.name", "")).lower()
        return ("phi-3" in name or "phi3" in name) and token not in ("<s>", "<unk>", "<|endoftext|>")

    def name(self, i: int) -> str:
        """A token for a message."""
        return repr(self.tokens[i]) if i < len(self.tokens) else f"the unknown token {i}"

    def may_be_given_a_space(self, text: str) -> bool:
        """Whether llama.cpp puts a space into ``text`` where tokenizers put none: behind special tokens, and before a space."""
        return self.kind == "llama" and (text[:1].isspace() or any(whole for _, whole in self._split(text)))

    def same_but_for_spaces(self, ids: list[int], others: list[int]) -> bool:
        """Whether ``ids`` are what this tokenizer makes of their own text, which is that of ``others`` but for its spaces."""
        if max(ids, default=0) >= len(self.tokens):
            return False
        texts = ["".join(self.tokens[i] for i in some).replace(SPACE, "").replace(" ", "") for some in (ids, others)]
        return texts[0] == texts[1] and self._cut_again(ids) == ids

    def _cut_again(self, ids: list[int]) -> list[int]:
        """Tokens of the text of ``ids``, those that are always taken whole aside."""
        result: list[int] = []
        for whole, group in itertools.groupby(ids, lambda i: self.types[i] in WHOLE):
            run = list(group)
            result += run if whole else self._cut(self._text(run))
        return result

    def _text(self, ids: list[int]) -> str:
        """Spaces as SentencePiece writes them, bytes as what they stand for."""
        parts = [bytes([int(self.tokens[i][3:5], 16)]) if self.types[i] == BYTE else self.tokens[i].encode() for i in ids]
        return b"".join(parts).decode(errors="replace")

    def _split(self, text: str) -> list[tuple[str, bool]]:
        """Text cut at the tokens that are always taken whole, the longest first: (part, whether it is such a token)."""
        parts = [(text, False)]
        for token in self._whole:
            if token not in text:
                continue
            cut = re.compile(f"({re.escape(token)}){f'[{ASCII_SPACE}]*' if self._swallows(token) else ''}")
            parts = [
                (piece, is_token or i % 2 == 1)
                for part, is_token in parts
                for i, piece in enumerate([part] if is_token else cut.split(part))
            ]
        return [part for part in parts if part[0]]

    def _byte_level(self) -> Callable[[str, bool], list[int]]:
        name = self.file.metadata.get("tokenizer.ggml.pre", "default")
        if name not in self._cuts:
            raise UnsupportedError(f"The proof does not know the pre-tokenizer {name!r}.")
        if "tokenizer.ggml.merges" not in self.file.metadata:
            raise ValueError("it has no tokenizer.ggml.merges")
        merges = [tuple(merge.split(" ")) for merge in self.file.metadata["tokenizer.ggml.merges"]]
        for merge in merges:
            if len(merge) != 2 or not {*merge, "".join(merge)} <= self.ids.keys():
                raise ValueError(f"its merge {' '.join(merge)!r} is of tokens that it does not have")
        tokenizer = Tokenizer(models.BPE(self.ids, merges, ignore_merges=name in WHOLE_WORDS))
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in self._cuts[name]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = self._cutter = pre_tokenizers.Sequence([*cuts, byte_level])
        return lambda text, after_special: tokenizer.encode(text, add_special_tokens=False).ids

    def _sentencepiece(self) -> Callable[[str, bool], list[int]]:
        if "tokenizer.ggml.scores" not in self.file.metadata:
            raise ValueError("it has no tokenizer.ggml.scores")
        self._scores = self.file.metadata["tokenizer.ggml.scores"].tolist()
        if len(self._scores) != len(self.tokens):
            raise ValueError(f"it has {len(self.tokens)} tokens and {len(self._scores)} scores")
        prefix = self.file.metadata.get("tokenizer.ggml.add_space_prefix", True)

        def encode(text: str, after_special: bool) -> list[int]:
            return self._cut(((" " if prefix and after_special else "") + text).replace(" ", SPACE))

        return encode

    def _cut(self, text: str) -> list[int]:
        return [i for piece in self._merge(list(text)) for i in self._with_bytes(piece)]

    def _merge(self, pieces: list[str]) -> list[str]:
        """Join the neighbours that make the token of best score, the leftmost of equal ones, until none is left."""
        after = list(range(1, len(pieces) + 1))
        before = list(range(-1, len(pieces) - 1))
        heap: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if 0 <= left and after[left] < len(pieces):
                joined = pieces[left] + pieces[after[left]]
                if joined in self.ids:
                    heapq.heappush(heap, (-self._scores[self.ids[joined]], left, joined))

        for i in range(len(pieces)):
            offer(i)
        while heap:
            _, left, joined = heapq.heappop(heap)
            right = after[left]
            if not pieces[left] or right >= len(pieces) or pieces[left] + pieces[right] != joined:
                continue  # one of the two has been joined with another since
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(pieces):
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return [piece for piece in pieces if piece]

    def _with_bytes(self, piece: str) -> list[int]:
        names = [piece] if piece in self.ids else [f"<0x{byte:02X}>" for byte in piece.encode()]
        lacking = [name for name in names if name not in self.ids]
        if lacking:
            raise ValueError(f"it has no token {lacking[0]}")
        return [self.ids[name] for name in names]
